"""Pictures of memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from peftlab.checks import checked
from peftlab.kit.figures.charts import stacked_bars
from peftlab.kit.figures.style import BLACK, COLOURS, GREY, SMALLEST, drawn, look, new
from peftlab.memory import Estimate


@checked()
def memory_bars(estimates: Mapping[str, Estimate]) -> Figure:
    """Draw the parts of a step's peak in GB, one bar per estimate. Logits and workspace are one part."""
    rows = {}
    for name, found in estimates.items():
        parts = {part: size / 1e9 for part, size in found.parts.items()}
        passing = parts.pop("logits") + parts.pop("workspace")
        rows[name] = {**parts, "logits and passing": passing}
    return stacked_bars(rows, x_label="peak (GB)", fmt=".1f")


@checked()
@drawn()
def timelines(runs: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """Draw memory during a training step, one panel per run.

    Args:
        runs: {name of the run: {name of the line: bytes in the order of the step}}. All lines of a run share one axis:
            the share of the step's allocations.
    """
    figure, panels = new(height=0.6 + 1.7 * len(runs), rows=len(runs))
    for axes, (name, lines) in zip(panels, runs.items(), strict=True):
        for number, (line, values) in enumerate(lines.items()):
            places = [i / max(1, len(values) - 1) for i in range(len(values))]
            axes.plot(places, [value / 1e9 for value in values], label=line, **{**look(number), "marker": None})
        axes.set_ylim(bottom=0)
        axes.set(ylabel="GB", xlabel=f"{name} (share of the step's allocations)")
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), fontsize=SMALLEST)
    return figure


@checked()
@drawn()
def agreement(groups: Mapping[str, Sequence[tuple[float, float]]], *, band: float = 0.1) -> Figure:
    """Draw predicted against measured memory on logarithmic axes, with a band around equality.

    Args:
        groups: {name: [(measured, predicted), ...]} in bytes.
        band: the relative half-width of the band.
    """
    figure, axes = new()
    values = [value / 1e9 for pairs in groups.values() for pair in pairs for value in pair]
    ends = [min(values) / 1.5, max(values) * 1.5]
    axes.fill_between(ends, [(1 - band) * end for end in ends], [(1 + band) * end for end in ends], color=GREY,
                      alpha=0.25, linewidth=0, label=f"within {band:.0%}")
    axes.plot(ends, ends, color=BLACK, linewidth=1)
    for number, (name, pairs) in enumerate(groups.items()):
        axes.plot([m / 1e9 for m, _ in pairs], [p / 1e9 for _, p in pairs], linestyle="", marker="o^s"[number % 3],
                  color=COLOURS[number], label=name, fillstyle="none" if number else "full")
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends, xlabel="measured peak (GB)", ylabel="predicted (GB)")
    ticks = [tick for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if ends[0] <= tick <= ends[1]]
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])
        axis.set_ticks([], minor=True)
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), fontsize=SMALLEST)
    return figure
