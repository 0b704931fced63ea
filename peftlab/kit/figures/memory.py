"""Pictures of memory."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from peftlab.checks import checked
from peftlab.kit.figures.charts import add_legend, finish, stacked_bars
from peftlab.kit.figures.style import BLACK, COLOURS, GREY, MARKERS, SMALLEST, drawn, look, new
from peftlab.memory import Estimate


@checked()
@drawn()
def memory_bars(estimates: Mapping[str, Estimate], *, cards: Sequence[int] = (24, 48, 80)) -> Figure:
    """Draw the parts of a step's peak in GB, one bar per estimate. Logits and workspace are one part.

    Args:
        estimates: {name of the bar: what `pl.memory.estimate` returned}.
        cards: sizes of cards in GB, as vertical lines. Those beyond 1.5 times the longest bar are left out.

    >>> runs = {method: pl.memory.estimate("llama-2-7b", method) for method in ("lora", "qlora")}
    >>> pl.figures.memory_bars(runs)
    <Figure size 896x406 with 1 Axes>
    """
    rows = {}
    for name, found in estimates.items():
        parts = {part: size / 1e9 for part, size in found.parts.items()}
        passing = parts.pop("logits") + parts.pop("workspace")
        parts = {part.replace("optimizer", "optimiser"): size for part, size in parts.items()}
        rows[name] = {**parts, "logits and workspace": passing}
    room = 1.5 * max(sum(row.values()) for row in rows.values())
    largest = max((size for size in cards if size <= room), default=None)
    # only the last one names the unit, because the first ones stand close together
    marks: dict[str, float] = {f"{size} GB" if size == largest else f"{size}": size for size in cards}
    return stacked_bars(rows, x_label="peak (GB)", fmt=".1f", marks=marks)


@checked()
@drawn()
def timelines(runs: Mapping[str, Mapping[str, Sequence[float] | Sequence[tuple[str, float]]]]) -> Figure:
    """Draw memory during a training step, one panel per run, with its phases and its peak.

    Args:
        runs: {name of the run: {name of the line: bytes in the order of the step}}. All lines of a run share one axis:
            the share of the step's allocations. A line of pairs (moment, bytes), as in `Estimate.history`, tells the
            phases too: a moment begins with the name of its phase, as in "forward, layer 3".

    >>> found = pl.memory.estimate("smollm2-135m", "full")
    >>> pl.figures.timelines({"full": {"predicted": found.history}})
    <Figure size 896x389.2 with 1 Axes>
    """
    figure, grid = new(height=1.08 + 1.7 * len(runs), rows=len(runs), sharex=True, squeeze=False)
    panels = list(grid.flat)
    for axes, (name, lines) in zip(panels, runs.items(), strict=True):
        top = 0.0
        for number, (line, values) in enumerate(lines.items()):
            told = [value if isinstance(value, tuple | list) else ("", value) for value in values]
            sizes = [size / 1e9 for _, size in told]
            places = [i / max(1, len(values) - 1) for i in range(len(values))]
            axes.plot(places, sizes, label=line, **{**look(number), "marker": None})
            if not number:
                most = max(range(len(sizes)), key=sizes.__getitem__)
                axes.plot(places[most], sizes[most], "o", color=BLACK, zorder=4, clip_on=False)
                axes.annotate(f"peak {sizes[most]:.3g} GB", (places[most], sizes[most]), xytext=(0, 5),
                              textcoords="offset points", va="bottom", fontsize=SMALLEST,
                              ha="left" if places[most] < 0.25 else "right" if places[most] > 0.75 else "center")
            if told[0][0]:
                _phases(axes, [moment for moment, _ in told])
            top = max(top, *sizes)
        axes.set_ylim(0, 1.35 * top)
        axes.set_xlim(0, 1)
        axes.set_ylabel("GB")
        axes.set_title(name)
    panels[-1].set_xlabel("share of the step's allocations")
    if max(len(lines) for lines in runs.values()) > 1:
        add_legend(figure, panels[0])
    return figure


def _phases(axes: Axes, moments: list[str]) -> None:
    """Shade the backward pass, and name the phases that are wide enough, and the last one."""
    start = 0
    for phase, group in itertools.groupby(moment.split(",")[0] for moment in moments):
        width = len(list(group))
        left, right = start / len(moments), (start + width) / len(moments)
        if phase == "backward":
            axes.axvspan(left, right, color="#eef0f3", zorder=0)
        wide = right - left > 0.018 * len(phase)
        if wide or right == 1:
            axes.annotate(phase, ((left + right) / 2 if wide else 1, 0.03), xycoords="axes fraction", va="bottom",
                          ha="center" if wide else "right", fontsize=SMALLEST, color=GREY)
        start += width


@checked()
@drawn()
def agreement(groups: Mapping[str, Sequence[tuple[float, float]]], *, margin: float = 0.03) -> Figure:
    """Draw how far predictions of memory lie above or below what was measured, in percent of the measured peak.

    Args:
        groups: {name: [(measured, predicted), ...]} in bytes.
        margin: the share that a reader should add to a prediction, as a dashed line below zero.

    >>> pl.figures.agreement({"grid": [(1e9, 0.99e9), (5e10, 5e10)]})
    <Figure size 896x532 with 1 Axes>
    """
    figure, axes = new()
    axes.axhline(0, color=BLACK, linewidth=1)
    axes.axhline(-100 * margin, color=GREY, linestyle="--", linewidth=1.2)
    for number, (name, pairs) in enumerate(groups.items()):
        axes.plot([m / 1e9 for m, _ in pairs], [100 * (p / m - 1) for m, p in pairs], linestyle="",
                  marker=MARKERS[number % len(MARKERS)], color=COLOURS[number % len(COLOURS)], label=name,
                  fillstyle="none" if number else "full")
    axes.set(xscale="log", xlabel="measured peak (GB)", ylabel="error of the prediction (%)")
    for text, height in (("predicted too much", 4), ("predicted too little", -4)):
        axes.annotate(text, (0.01, 0), xycoords=("axes fraction", "data"), xytext=(0, height), fontsize=SMALLEST,
                      textcoords="offset points", va="bottom" if height > 0 else "top", color=GREY)
    axes.annotate(f"{margin:.0%} too little", (1, -100 * margin), xycoords=("axes fraction", "data"), ha="right",
                  va="bottom", xytext=(0, 1), textcoords="offset points", fontsize=SMALLEST)
    finish(figure, axes)
    if len(groups) > 1:
        add_legend(figure, axes)
    return figure
