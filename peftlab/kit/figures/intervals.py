"""Charts of measured values with their errors: one below the other, ranked, or against what each of them costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from peftlab.checks import checked
from peftlab.errors import PeftLabError
from peftlab.kit.figures.labels import log_ticks, name_points
from peftlab.kit.figures.style import COLOURS, GREY, MARKERS, SMALLEST, drawn, new


@checked()
@drawn()
def intervals(
    values: Mapping[str, tuple[float, float, float]],
    *,
    x_label: str,
    reference: str | None = None,
    repeats: Mapping[str, Sequence[float]] | None = None,
    percent: bool = False,
    log_x: bool = False,
) -> Figure:
    """Draw each value as a point with a bar from its lower to its upper end, one below the other.

    Args:
        values: {name: (value, lower end, upper end)}, drawn from top to bottom.
        x_label: what is measured and what a bar is, with units in brackets.
        reference: the name of the row to compare with. Dotted lines go through its two ends.
        repeats: {name: values} of single runs, drawn as strokes on the bar.
        percent: write the x axis as percentages of 1.
        log_x: a logarithmic axis.

    Raises:
        PeftLabError: the reference is not among the names.

    >>> pl.figures.intervals({"LoRA": (0.48, 0.46, 0.5), "DoRA": (0.47, 0.45, 0.49)}, x_label="right", percent=True)
    <Figure size 896x243.6 with 1 Axes>
    """
    figure, axes = new(height=1.1 + 0.32 * len(values))
    for place, (name, (middle, low, high)) in enumerate(values.items()):
        colour, marker = (COLOURS[1], "s") if name == reference else (COLOURS[0], "o")
        axes.plot([low, high], [place, place], color=colour, linewidth=1.8, zorder=3)
        axes.plot([middle], [place], color=colour, marker=marker, markersize=6, zorder=4)
        for value in (repeats or {}).get(name, ()):
            axes.plot([value], [place], color=colour, marker="|", markersize=11, zorder=4)
    if reference is not None:
        for end in values[reference][1:]:
            axes.axvline(end, color=GREY, linestyle=":", linewidth=1.2, zorder=1)
    axes.set_yticks(range(len(values)), list(values))
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    if log_x:
        axes.set_xscale("log")
        log_ticks(axes.xaxis)
    if percent:
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.set_xlabel(x_label)
    return figure


@checked()
@drawn()
def trade_off(
    panels: Mapping[str, Mapping[str, tuple[float, float, float, float]]],
    *,
    x_label: str,
    reference: str | None = None,
    log_x: bool = True,
    height: float = 3.4,
) -> Figure:
    """Draw what each of several things reaches against what it costs: one panel for each task, names on the points.

    Args:
        panels: {title: {name: (cost, value, lower end, upper end)}}. A title says what is reached, with its unit. The
            panels stand one below the other and share the axis of the cost.
        x_label: what the cost is, with its unit in brackets.
        reference: the name of the thing to compare with. A grey band goes from the lower to the upper end of its value.
        log_x: a logarithmic axis for the cost.
        height: of one panel, in inches.

    >>> tasks = {"reviews": {"LoRA": (460800, 0.82, 0.8, 0.84), "IA3": (16128, 0.79, 0.77, 0.81)}}
    >>> pl.figures.trade_off(tasks, x_label="trained parameters", reference="LoRA")
    <Figure size 896x476 with 1 Axes>
    """
    figure, found = new(height=height * len(panels), rows=len(panels), sharex=True)
    placed = []
    for axes, (title, points) in zip([found] if len(panels) == 1 else found, panels.items(), strict=True):
        if log_x:
            axes.set_xscale("log")
        named = []
        for name, (cost, value, low, high) in points.items():
            colour, marker = (COLOURS[1], "s") if name == reference else (COLOURS[0], "o")
            axes.vlines(cost, low, high, color=colour, linewidth=1.4, zorder=3)
            axes.plot([cost], [value], color=colour, marker=marker, markersize=5.5, linestyle="none", zorder=4)
            named.append((name, cost, value, colour))
        if reference is not None and reference in points:
            axes.axhspan(*points[reference][2:], color=GREY, alpha=0.18, linewidth=0, zorder=1)
        axes.margins(x=0.14, y=0.12)
        axes.set_title(title)
        if log_x:
            log_ticks(axes.xaxis)
        placed.append((axes, named))
    axes.set_xlabel(x_label)
    for axes, named in placed:  # once all axes have their place
        name_points(figure, axes, named)
    return figure


@checked()
@drawn()
def ranking(
    values: Mapping[str, tuple[float, float, float]],
    *,
    y_label: str,
    marked: Mapping[str, Sequence[str]] | None = None,
    names: Sequence[str] = (),
    percent: bool = False,
) -> Figure:
    """Draw many values with their intervals from the highest to the lowest, side by side.

    Args:
        values: {name: (value, lower end, upper end)}, in any order.
        y_label: what is measured and what a bar is, with units in brackets.
        marked: {label: names} of at most three groups, each in a colour and with a marker of its own.
        names: values to write a name at.
        percent: write the y axis as percentages of 1.

    Raises:
        PeftLabError: there is no value, a name in `marked` or `names` is not among the values, or there are more than
            three groups.

    >>> pl.figures.ranking({"a": (0.5, 0.4, 0.6), "b": (0.7, 0.6, 0.8)}, y_label="right", names=["b"])
    <Figure size 896x504 with 1 Axes>
    """
    groups = dict(marked or {})
    unknown = {*names, *(name for group in groups.values() for name in group)} - set(values)
    if not values or unknown or len(groups) > 3:
        found = f"it lacks {', '.join(sorted(unknown))}" if unknown else f"{len(values)} values, {len(groups)} groups"
        raise PeftLabError(f"values must hold all that is named, in at most three groups; found: {found}.")
    order = sorted(values, key=lambda name: -values[name][0])
    figure, axes = new(height=3.6)
    of_group = {name: number for number, group in enumerate(groups.values(), start=1) for name in group}
    for number, label in enumerate(("others", *groups)):
        chosen = [place for place, name in enumerate(order) if of_group.get(name, 0) == number]
        colour, marker = (GREY, "o") if not number else (COLOURS[number - 1], MARKERS[number])
        for place in chosen:
            axes.plot([place + 1] * 2, values[order[place]][1:], color=colour, linewidth=1.6, zorder=2 + bool(number))
        heights = [values[order[place]][0] for place in chosen]
        axes.plot([place + 1 for place in chosen], heights, linestyle="", color=colour, marker=marker, markersize=5,
                  label=label, zorder=4)  # fmt: skip
    for name in names:
        place = order.index(name)
        _, low, high = values[name]
        axes.annotate(name, (place + 1, high), (0, 8), textcoords="offset points", rotation=60, fontsize=SMALLEST)
    if groups:
        axes.legend(loc="lower left")
    if percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlabel("rank")
    axes.set_ylabel(y_label)
    return figure
