"""What `peftlab bench speed` measured, beside what the arithmetic predicts: rows for the chapter's tables."""

from __future__ import annotations

from typing import Any

from peftlab.kit.measurements import Results
from peftlab.memory.speed import Times, predict

Row = dict[str, Any]
# How each rung makes its step: the way, the adapters' precision, whose layers
HOW = {
    "peft": ("eager", "fp32", "peft"),
    "eager": ("eager", "fp32", "peftlab"),
    "bf16 adapters": ("eager", "bf16", "peftlab"),
    "train": ("eager", "fp32", "peftlab"),
    **dict.fromkeys(
        ("compiled layers", "chunked loss", "flat AdamW", "triton", "cuda graph", "train compiled"),
        ("compiled", "bf16", "peftlab"),
    ),
    **dict.fromkeys(("fast, no graph", "fast", "fast, pinned", "fast, 8-bit"), ("by hand", "bf16", "peftlab")),
}


def limits(results: Results, section: str) -> tuple[float, float]:
    """Return the operations per second of the products alone, and the bytes per second of a copy, in that section."""
    top, copied = (results.one(section=section, rung=rung) for rung in ("ceiling", "copy"))
    return top["flops"] / top["seconds"], copied["bytes"] / copied["seconds"]


def predicted(results: Results, row: Row) -> Times:
    """Predict how long a measured rung's kernels are busy, from its section's limits."""
    rate, bandwidth = limits(results, row["section"])
    way, adapters, library = HOW[row["rung"]]
    step = {name: row[name] for name in ("batch", "sequence", "checkpointing", "r")}
    return predict(
        row["shape"], row["method"], way=way, adapter_precision=adapters, library=library, rate=rate,
        bandwidth=bandwidth, **step,
    )  # fmt: skip


def ladder(results: Results, section: str) -> list[Row]:
    """Return a row for each rung of a section that could run, from Hugging Face peft to the fast path.

    Times are in milliseconds and memory in GB. `share` is the ceiling's time over the rung's.
    """
    top = results.one(section=section, rung="ceiling")
    found = []
    for rung in HOW:
        for row in results.where(section=section, rung=rung):
            if not row.get("seconds"):
                continue  # it could not run, and `skipped` says why
            found.append({
                "rung": rung, "told": 1000 * predicted(results, row).seconds,
                "busy": 1000 * row["busy_seconds"] if row["busy_seconds"] else None, "clock": 1000 * row["seconds"],
                "range": f"{1000 * row['seconds_least']:.0f} to {1000 * row['seconds_most']:.0f}",
                "tokens": row["tokens_per_second"], "share": top["seconds"] / row["seconds"],
                "working": row["working_bytes"] / 1e9,
            })  # fmt: skip
    return found


def beside_peft(results: Results) -> list[Row]:
    """Return a row for each section: Hugging Face peft and the fast path, and their ratios."""
    found = []
    for section in dict.fromkeys(results.column("section")):
        rows = {row["rung"]: row for row in results.where(section=section)}
        if "peft" not in rows:
            continue  # the comparison of loops
        theirs, ours = rows["peft"], rows["fast"]
        if not (theirs.get("seconds") and ours.get("seconds")):
            continue
        ratio = results.ratio(theirs, ours)
        smallest = rows.get("fast, 8-bit")
        found.append({
            "section": section, "shape": ours["shape"], "method": ours["method"],
            "step": f"{ours['batch']} x {ours['sequence']}", "again": "yes" if ours["checkpointing"] else "no",
            "peft": theirs["tokens_per_second"], "fast": ours["tokens_per_second"],
            "times": ratio.middle, "least": ratio.least,
            "range": f"{ratio.least:.1f} to {ratio.most:.1f}",
            "share": rows["ceiling"]["seconds"] / ours["seconds"],
            "memory": ours["working_bytes"] / theirs["working_bytes"],
            "least_memory": smallest and smallest["working_bytes"] / theirs["working_bytes"],
        })  # fmt: skip
    return found


def beside_unsloth(results: Results) -> list[Row]:
    """Return a row for each step that was measured beside Unsloth, with the columns of `ladder`.

    Times are those of one batch: a step of Unsloth's trainer has several.
    """
    found = []
    for row in results:
        if row["rung"] in ("ceiling", "copy") or not row.get("seconds"):
            continue
        top = results.one(section=row["section"], rung="ceiling")
        milliseconds = 1000 / row.get("batches", 1)
        least, most = (milliseconds * row[f"seconds_{end}"] for end in ("least", "most"))
        found.append({
            "method": row["method"], "rung": row["rung"], "busy": milliseconds * row["busy_seconds"],
            "clock": milliseconds * row["seconds"], "range": f"{least:.0f} to {most:.0f}",
            "tokens": row["tokens_per_second"], "share": row["tokens_per_second"] / top["tokens_per_second"],
            "working": row["working_bytes"] / 1e9,
        })  # fmt: skip
    return found
