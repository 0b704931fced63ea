"""The commands that only compute: `peftlab count` and `peftlab memory`."""

from __future__ import annotations

import argparse
from typing import Any

from peftlab.catalogue import METHODS
from peftlab.commands.method_options import add_method_options, counted, settle
from peftlab.commands.terminal import SwitchOrFit, parse_targets, print_json, print_table
from peftlab.errors import PeftLabError
from peftlab.memory import cards
from peftlab.memory.counting import totals as counting
from peftlab.memory.counting.builtin import BUILT_IN
from peftlab.memory.counting.methods import method_name
from peftlab.memory.estimate import (
    ADAPTER_PRECISIONS,
    ATTENTIONS,
    LIBRARIES,
    OPTIMIZERS,
    PARALLEL,
    PRECISIONS,
    estimate,
    uses_autocast,
)
from peftlab.memory.measured import measured_like
from peftlab.memory.replay.tape import KINDS
from peftlab.memory.units import format_both, format_bytes, format_count, format_percent

LABELS = {
    "weights": "weights", "adapter": "adapter", "gradients": "gradients", "optimizer": "optimiser states",
    "activations": "activations", "logits": "logits and loss", "workspace": "alive for a moment",
}  # fmt: skip
MARGIN = f"{cards.TOO_LOW:.0%} for the estimate, {format_bytes(cards.CONTEXT)} for the CUDA context"
NO_AUTOCAST = dict.fromkeys(PRECISIONS, "none") | {"bf16": "none; for Trainer(bf16=True) add --autocast"}
OF_A_RUN = (
    "batch", "sequence", "precision", "optimizer", "checkpointing", "chunked_loss", "autocast", "adapter_precision",
    "masters",
    "attention", "gpus", "parallel", "library", "four_bit",
)  # fmt: skip


def add_count_options(command: argparse.ArgumentParser) -> None:
    """Add SHAPE and the options that describe a method."""
    command.add_argument("shape", metavar="SHAPE", help=f"{', '.join(BUILT_IN)}; or the path of a config.json")
    add_method_options(command, counted())
    add = command.add_argument
    named = "for lora: parameters to adapt, comma-separated, such as mlp.experts.gate_up_proj,mlp.experts.down_proj"
    add("--target-parameters", metavar="P", help=named)
    add("--labels", type=int, metavar="N", help="classes of an encoder's head (default: 2)")


def add_memory_options(command: argparse.ArgumentParser) -> None:
    """Add the options of `count`, and those that describe a run."""
    add_count_options(command)
    add = command.add_argument
    add("--batch", type=int, default=1, metavar="N", help="examples at once (default: 1)")
    add("--sequence", type=int, default=512, metavar="N", help="tokens of an example (default: 512)")
    add("--precision", default="bf16", metavar="P", help=f"{', '.join(PRECISIONS)} (default: bf16)")
    named = ", ".join(OPTIMIZERS)
    add("--optimizer", default="adamw", metavar="O", help=f"{named} (default: adamw, which is torch's plain loop)")
    switch: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
    told = "recompute activations in the backward pass; fit: of as few blocks as --card allows (default: no)"
    add("--checkpointing", action=SwitchOrFit, default=False, help=told)
    add("--chunked-loss", **switch, default=False, help="no whole logits, as in peftlab train (default: no)")
    add("--autocast", **switch, help="compute in bf16, as Trainer(bf16=True) does (default: for mixed and qlora)")
    named = ", ".join(ADAPTER_PRECISIONS)
    add(
        "--adapter-precision", "--adapter-dtype", default="fp32", metavar="P",
        help=f"of what a method adds: {named} (default: fp32)",
    )  # fmt: skip
    add("--masters", **switch, default=False, help="float32 masters of a bf16 adapter, as train keeps (default: no)")
    add("--attention", default="sdpa", metavar="A", help=f"{', '.join(ATTENTIONS)} (default: sdpa)")
    add("--gpus", type=int, default=1, metavar="N", help="GPUs that train together, each on a batch (default: 1)")
    add("--parallel", default="ddp", metavar="P", help=f"how: {', '.join(PARALLEL)} (full shards) (default: ddp)")
    add("--library", default="peft", metavar="L", help=f"whose layers: {', '.join(LIBRARIES)} (default: peft)")
    add("--four-bit", **switch, help="the base in four bits, whatever the method (default: only for qlora)")
    add("--card", metavar="C", help=f"the largest batch and sequence on one of {', '.join(cards.CARDS)}")


def described(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the keyword arguments that `count` and `estimate` share."""
    method_name(arguments.method)  # an unknown one is told before its options
    settle(arguments, counted())
    names = ("shape", "method", "r", "bias", "virtual_tokens", "reduction_factor", "decompose_factor",
             "oft_block_size", "init", "labels")  # fmt: skip
    parameters = arguments.target_parameters
    return {name: getattr(arguments, name) for name in names} | {
        "targets": parse_targets(arguments.targets),
        "target_parameters": parameters if parameters is None else [one.strip() for one in parameters.split(",")],
    }


def count(arguments: argparse.Namespace) -> int:
    """Run `peftlab count`."""
    result = counting.count(**described(arguments))
    if arguments.json:
        return print_json(result.as_dict())
    row = METHODS[result.method]
    rank = f", r = {arguments.r or row.default('r')}" if row.takes("r") else ""
    names = list(dict.fromkeys(module.path.rsplit(".", 1)[-1] for module in result.adapted))
    rows = [
        ("shape", result.shape),
        ("method", result.method + rank),
        ("adapted modules", f"{len(result.adapted)} ({', '.join(names)})" if names else "none"),
        ("trainable", format_count(result.trainable)),
        ("  of these in a new head", format_count(result.head) if result.head else ""),
        ("total", format_count(result.total)),
        ("percent", format_percent(result.percent)),
        ("trainable in float32", format_both(4 * result.trainable)),
    ]
    print_table([row for row in rows if row[1]])
    return 0


def _recomputed(blocks: bool | int) -> str:
    return "all, and that is not enough" if blocks is True else f"the first {blocks:,}" if blocks else "none"


def _blocks(card: str | None, run: dict[str, Any]) -> bool | int:
    """Return how many blocks are computed again for a step to fit on a card; True if even all are too few."""
    if not card:
        raise PeftLabError("--checkpointing fit needs to know what to fit on: add --card, such as --card 'RTX 4090'.")
    rest = {name: value for name, value in run.items() if name != "checkpointing"}
    blocks = cards.blocks_to_recompute(cards.card_bytes(card), **rest)
    return True if blocks is None else blocks


def memory(arguments: argparse.Namespace) -> int:
    """Run `peftlab memory`."""
    run = described(arguments) | {name: getattr(arguments, name) for name in OF_A_RUN}
    if arguments.card:
        cards.card_bytes(arguments.card)  # refuse an unknown card before anything is computed
    if run["checkpointing"] == "fit":
        run["checkpointing"] = _blocks(arguments.card, run)
    result = estimate(**run)
    autocast = arguments.autocast
    if autocast is None:
        autocast = uses_autocast(result.method, arguments.precision, arguments.four_bit)
    like = measured_like(**run, peak_bytes=result.peak_bytes)
    on_codes = " on a base in four bits" if arguments.four_bit else ""
    more = {}
    if arguments.card:
        more = {f"largest_{what}": cards.largest(what, arguments.card, **run) for what in ("batch", "sequence")}
    if arguments.json:
        return print_json(result.as_dict() | more)
    rows = [
        ("shape", result.shape),
        ("method", f"{result.method}{on_codes}, {format_count(result.trainable)} trainable"),
        ("step", f"{arguments.batch:,} x {arguments.sequence:,} tokens, {arguments.precision}, {arguments.optimizer}"),
        *([("blocks recomputed", _recomputed(run["checkpointing"]))] if arguments.checkpointing == "fit" else []),
        ("autocast", "bf16" if autocast else NO_AUTOCAST[arguments.precision]),
        *([("GPUs", f"{arguments.gpus}, {arguments.parallel}; what follows is of each")] if arguments.gpus > 1 else []),
        ("peak", format_both(result.peak_bytes)),
        ("measured errors", f"{cards.LOWEST:+.1%} to {cards.HIGHEST:+.1%} of the peak, in {cards.RUNS} runs on GPUs"),
        ("  in runs like it", f"{like.lowest:+.2%} to {like.highest:+.2%}, in the {like.runs} that are most like it"),
        *([("  beyond them", "; ".join(like.beyond))] if like.beyond else []),
        *((f"  {LABELS[kind]}", format_both(result.parts[kind])) for kind in KINDS),
        ("with a margin", f"{format_both(cards.with_margin(result.peak_bytes))} ({MARGIN})"),
        ("peak reached in", result.moment),
        ("arithmetic", f"{result.flops / 1e12:.3g} TFLOP per step"),
        ("file", format_both(result.file_bytes)),
        ("fits on", ", ".join(cards.that_hold(result.peak_bytes)) or "none of the cards known"),
    ]
    if arguments.card:
        batch, sequence = more["largest_batch"], more["largest_sequence"]
        has = f"it has {format_both(cards.card_bytes(arguments.card))}. With the margin it holds "
        told = f"{f'batches up to {batch:,}' if batch else 'no batch'} of {arguments.sequence:,} tokens,"
        longest = f"sequences up to {sequence:,} tokens" if sequence else "no sequence at all"
        link = "or" if batch and sequence else "but" if batch or sequence else "and"
        rows.append((f"on {arguments.card}", has + told))
        rows.append(("", f"{link} {longest} in batches of {arguments.batch:,}"))
    print_table(rows)
    return 0
