"""Charts that several chapters draw. Data comes as rows or dicts; units stand in the labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, PercentFormatter, StrMethodFormatter

from peftlab.checks import checked
from peftlab.kit.figures.labels import Line, log_ticks, measured_ticks, name_lines, name_reference
from peftlab.kit.figures.style import (
    BLACK,
    COLOURS,
    GREY,
    HATCHES,
    ROLES,
    SMALLEST,
    drawn,
    fills,
    look,
    new,
    role,
)

THIN = 0.008  # of the longest bar: a thinner part is drawn as a stroke
LINE = 20  # points that a line drawn by `curves` may have to show each of them


def finish(figure: Figure, axes: Axes, lines: Sequence[Line] = (), reference: dict[str, float] | None = None) -> Figure:
    """Name what is drawn: each line beside it, or, where names would cover something, in a legend below the axes.

    Args:
        lines: (name, xs, ys, colour) of each line.
        reference: {name: y} of horizontal lines, which are drawn here.
    """
    texts = []
    for name, value in (reference or {}).items():
        axes.axhline(value, color=GREY, linestyle=":")
        texts.append(name_reference(figure, axes, name, value, lines))
    for axis in (axes.xaxis, axes.yaxis):
        if isinstance(axis.get_major_locator(), LogLocator):  # nobody chose ticks yet
            log_ticks(axis)
    if len(lines) > 1 and not name_lines(figure, axes, lines, texts):
        add_legend(figure, axes)
    return figure


def add_legend(figure: Figure, axes: Axes) -> None:
    """Add a legend below the axes, where it hides no data."""
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=_columns(names), fontsize=SMALLEST)


def _array(values: Any) -> numpy.ndarray:
    """Return a torch tensor of any device and dtype, or anything that NumPy takes, as a float array."""
    if hasattr(values, "detach"):
        values = values.detach().float().cpu()
    return numpy.asarray(values, dtype=float)


def _columns(names: Sequence[str]) -> int:
    """Return how many columns of a legend fit into a page's width of about 60 characters."""
    return max(1, min(len(names), 60 // (max(map(len, names)) + 6)))


def draw_repeats(
    axes: Axes, rows: list[dict[str, Any]], x: str, y: str, name: str, looks: dict[str, Any]
) -> Line:
    """Draw the means of repeats as a line, each repeat as a dot, and a bar from the least to the greatest of them.

    A bar stands only where there are repeats. Returns (name, xs, means, colour).
    """
    places = sorted({row[x] for row in rows})
    repeats = [[row[y] for row in rows if row[x] == place] for place in places]
    middle = [math.fsum(values) / len(values) for values in repeats]
    axes.plot(places, middle, label=name, **looks)
    several = [(place, values) for place, values in zip(places, repeats, strict=True) if len(values) > 1]
    if several:
        colour = looks["color"]
        axes.vlines([place for place, _ in several], [min(values) for _, values in several],
                    [max(values) for _, values in several], color=colour, linewidth=1.4)
        dots = [(place, value) for place, values in several for value in values]
        axes.scatter([dot[0] for dot in dots], [dot[1] for dot in dots], s=14, marker="_", color=colour, linewidth=1.4)
    return name, places, middle, looks["color"]


@checked()
@drawn()
def sweep(
    rows: Iterable[dict[str, Any]],
    x: str,
    y: str,
    by: str | None = None,
    *,
    x_label: str | None = None,
    y_label: str | None = None,
    log_x: bool = True,
    log_y: bool = False,
    reference: dict[str, float] | None = None,
    percent: bool = False,
) -> Figure:
    """Draw lines of a measured quantity against a setting: means of repeats, and each repeat.

    Where there are repeats, a bar goes from the least to the greatest, with a stroke at each of them. Nothing is drawn
    between the values that were measured but the line.

    Args:
        rows: dicts or `Results`. Rows with the same `x` (and `by`) are repeats, such as seeds.
        x, y: column names. `x_label` and `y_label` name the axes, with units in brackets.
        by: the column whose values make the lines. None draws one line.
        log_x: logarithmic axis with a tick at each value measured, where they fit.
        reference: {name: value} horizontal lines, such as the score without any training.
        percent: write the y axis as percentages of 1.

    >>> pl.figures.sweep([{"r": 4, "loss": 0.8}, {"r": 8, "loss": 0.7}, {"r": 8, "loss": 0.6}], "r", "loss")
    <Figure size 896x532 with 1 Axes>
    """
    rows = [row for row in rows if row.get(x) is not None and row.get(y) is not None]
    figure, axes = new()
    groups = list(dict.fromkeys(row.get(by) for row in rows)) if by else [None]
    lines: list[Line] = []
    for number, group in enumerate(groups):
        chosen = [row for row in rows if by is None or row.get(by) == group]
        lines.append(draw_repeats(axes, chosen, x, y, str(group), look(number)))
    if log_x:
        axes.set_xscale("log")
        measured_ticks(axes.xaxis, [row[x] for row in rows])
    if log_y:
        axes.set_yscale("log")
    axes.set(xlabel=x_label or x, ylabel=y_label or y)
    if percent:
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.4g}%")
    return finish(figure, axes, lines, reference)


@checked()
@drawn()
def curves(
    series: dict[str, Any], *, x_label: str = "step", y_label: str = "loss", log_x: bool = False, log_y: bool = False
) -> Figure:
    """Draw lines, such as losses over training. A line of at most 20 points shows each of them by a marker.

    Args:
        series: {name: list of y, or a pair (list of x, list of y)}.

    >>> pl.figures.curves({"training loss": [3.1, 1.4, 0.8]}, log_y=True)
    <Figure size 896x532 with 1 Axes>
    """
    figure, axes = new()
    lines: list[Line] = []
    for number, (name, values) in enumerate(series.items()):
        xs, ys = values if isinstance(values, tuple) else (range(1, len(values) + 1), values)
        looks = look(number) if len(ys) <= LINE else {**look(number), "marker": None}
        axes.plot(xs, ys, label=name, **looks)
        lines.append((name, list(xs), list(ys), looks["color"]))
    axes.set(xlabel=x_label, ylabel=y_label)
    if log_x:
        axes.set_xscale("log")
    elif all(float(x).is_integer() for _, xs, _, _ in lines for x in xs):
        axes.locator_params(axis="x", integer=True)  # there is no step 2.5
    if log_y:
        axes.set_yscale("log")
    return finish(figure, axes, lines)


@checked()
@drawn()
def bars(
    values: dict[str, float],
    *,
    x_label: str,
    fmt: str | Callable[[float], str] = ".3g",
    log_x: bool = False,
    highlight: Sequence[str] = (),
    percent: bool = False,
) -> Figure:
    """Draw horizontal bars, each with its name at the left and its value at its end.

    Args:
        values: {name: number}, drawn from top to bottom.
        x_label: what is measured, with units in brackets.
        fmt: the format of the values, or a function of the value.
        highlight: names of bars that get another colour and a hatch. All others then have one colour, whatever their
            names mean elsewhere in the book.
        percent: write the x axis as percentages of 1.

    >>> pl.figures.bars({"LoRA": 14.4, "QLoRA": 5.1}, x_label="peak (GB)")
    <Figure size 896x271.6 with 1 Axes>
    """
    figure, axes = new(height=1.1 + 0.42 * len(values))
    names = list(values)
    for place, name in enumerate(names):
        chosen = name in highlight
        own = None if highlight else role(name)
        colour = COLOURS[1] if chosen else ROLES[own] if own else COLOURS[0]
        axes.barh(place, values[name], color=colour, edgecolor="white" if chosen or not own else BLACK,
                  hatch=HATCHES[1] if chosen else "", height=0.7)
        told = fmt(values[name]) if callable(fmt) else format(values[name], fmt)
        axes.annotate(told, (values[name], place), xytext=(4, 0), textcoords="offset points", va="center",
                      fontsize=SMALLEST)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    if log_x:
        axes.set_xscale("log")
        log_ticks(axes.xaxis)
    if not log_x:
        axes.set_xlim(min(0, *values.values()) * 1.2, max(values.values()) * 1.2)  # room for the numbers
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.6g}"))
    if percent:
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlabel(x_label)
    return figure


@checked()
@drawn()
def stacked_bars(
    parts: dict[str, dict[str, float]],
    *,
    x_label: str,
    fmt: str = ".3g",
    marks: dict[str, float] | None = None,
) -> Figure:
    """Draw horizontal bars made of parts, with the sum at the end. A part too thin to see is a stroke of its colour.

    Parts such as "weights", "gradients" or "8-bit states" have the colours that they have in the whole book (`ROLES`).

    Args:
        parts: {name of the bar: {name of the part: number}}. A part that a bar lacks counts as 0.
        fmt: the format of the sums.
        marks: {name: number} vertical lines, such as the memory of a card. Those beyond 1.5 times the longest bar are
            left out.

    >>> pl.figures.stacked_bars({"bf16": {"weights": 2, "gradients": 2, "states": 4}}, x_label="bytes per parameter")
    <Figure size 896x336 with 1 Axes>
    """
    kinds = list(dict.fromkeys(kind for row in parts.values() for kind in row))
    figure, axes = new(height=1.9 + 0.5 * len(parts))
    left = [0.0] * len(parts)
    longest = max(sum(row.values()) for row in parts.values())
    for kind, looks in zip(kinds, fills(kinds), strict=True):
        sizes = [row.get(kind, 0) for row in parts.values()]
        drawn = axes.barh(range(len(parts)), sizes, left=left, label=kind, height=0.7, **looks)
        for bar, size in zip(drawn, sizes, strict=True):
            if not size:
                bar.set_linewidth(0)
            elif size < THIN * longest:
                bar.set(edgecolor=looks["color"], linewidth=1.8, zorder=3)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    for place, total in enumerate(left):
        axes.annotate(format(total, fmt), (total, place), xytext=(4, 0), textcoords="offset points", va="center",
                      fontsize=SMALLEST, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8})
    axes.set_yticks(range(len(parts)), list(parts))
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    shown = {name: value for name, value in (marks or {}).items() if value <= max(left) * 1.5}
    axes.set_xlim(0, max([max(left) * 1.15, *(value * 1.05 for value in shown.values())]))
    for name, value in shown.items():
        axes.axvline(value, color=BLACK, linestyle="--", linewidth=1.2, zorder=0.9)
        axes.annotate(name, (value, 1), xycoords=("data", "axes fraction"), xytext=(0, 2), ha="center", va="bottom",
                      textcoords="offset points", fontsize=SMALLEST)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 4, 5, 10]))
    axes.set_xlabel(x_label)
    if len(kinds) > 1:
        add_legend(figure, axes)
    return figure


@checked()
@drawn()
def spectrum(
    values: dict[str, Any],
    *,
    x_label: str = "index of the singular value",
    y_label: str = "singular value (largest = 1)",
    relative: bool = True,
    mark: int | None = None,
) -> Figure:
    """Draw sorted singular values on a logarithmic axis.

    Args:
        values: {name: one-dimensional tensor, array or list of singular values, at least one of them above zero}.
        relative: divide each spectrum by its largest value.
        mark: a rank to mark by a vertical line.

    >>> pl.figures.spectrum({"update": torch.linalg.svdvals(torch.ones(8, 8) + torch.eye(8))}, mark=2)
    <Figure size 896x532 with 1 Axes>
    """
    figure, axes = new()
    lines: list[Line] = []
    for number, (name, given) in enumerate(values.items()):
        numbers = sorted(_array(given).ravel().tolist(), reverse=True)
        top = numbers[0] if relative else 1.0
        shown = [value / top for value in numbers if value > 0]
        axes.plot(range(1, len(shown) + 1), shown, label=name, markevery=max(1, len(shown) // 10), **look(number))
        lines.append((name, list(range(1, len(shown) + 1)), shown, look(number)["color"]))
    if mark is not None:
        axes.axvline(mark, color=BLACK, linestyle=":")
        axes.annotate(f"r = {mark}", (mark, 0), xycoords=("data", "axes fraction"), xytext=(4, 4),
                      textcoords="offset points", fontsize=SMALLEST)
    axes.set_yscale("log")
    axes.set(xlabel=x_label, ylabel=y_label)
    return finish(figure, axes, lines)


@checked()
@drawn()
def histogram(
    samples: dict[str, Any],
    *,
    x_label: str,
    bins: int = 100,
    limits: tuple[float, float] | None = None,
    log_y: bool = False,
) -> Figure:
    """Draw the outlines of normalised histograms.

    Args:
        samples: {name: numbers}.
        limits: the range of the x axis.
        log_y: a logarithmic axis, which shows the tails.

    >>> pl.figures.histogram({"weights": torch.linspace(-1, 1, 99)}, x_label="weight", bins=20)
    <Figure size 896x532 with 1 Axes>
    """
    figure, axes = new()
    for number, (name, given) in enumerate(samples.items()):
        axes.hist(_array(given).ravel(), bins=bins, range=limits, density=True, histtype="step", label=name,
                  linewidth=2, color=COLOURS[number % len(COLOURS)], linestyle=look(number)["linestyle"])
    axes.set(xlabel=x_label, ylabel="density")
    if log_y:
        axes.set_yscale("log")
    finish(figure, axes)
    if len(samples) > 1:
        add_legend(figure, axes)
    return figure


@checked()
@drawn()
def by_layer(samples: dict[str, Sequence[Any]], *, y_label: str, start: float | None = None) -> Figure:
    """Draw how numbers are spread in each layer of a model, one panel for each kind.

    A dot is the median of a layer, the thick bar holds the middle half of its numbers, the thin bar nine tenths.

    Args:
        samples: {name of the kind: one tensor, array or list of numbers for each layer}.
        start: the value before training, as a horizontal line.

    >>> pl.figures.by_layer({"keys": torch.ones(6, 384), "values": torch.ones(6, 384)}, y_label="scale", start=1)
    <Figure size 896x448 with 2 Axes>
    """
    figure, grid = new(height=3.2, columns=len(samples), sharey=True, squeeze=False)
    for axes, (number, (name, layers)) in zip(grid.flat, enumerate(samples.items()), strict=True):
        colour = COLOURS[number % len(COLOURS)]
        low, first, middle, third, high = numpy.array(
            [numpy.quantile(_array(layer), (0.05, 0.25, 0.5, 0.75, 0.95)) for layer in layers]
        ).T
        places = numpy.arange(1, len(layers) + 1)
        if start is not None:
            axes.axhline(start, color=GREY, linestyle=":")
        axes.vlines(places, low, high, color=colour, linewidth=1.5)
        axes.vlines(places, first, third, color=colour, linewidth=6)
        axes.plot(places, middle, linestyle="", marker="o", markersize=6, color="white", markeredgecolor=colour)
        axes.set_title(name)
        axes.set_xlabel("layer")
        axes.set_xlim(0.4, len(layers) + 0.6)
        axes.set_xticks(places[:: 1 + len(places) // 7])
    grid.flat[0].set_ylabel(y_label)
    return figure


@checked()
@drawn()
def heatmap(
    matrix: Any,
    *,
    x_label: str,
    y_label: str,
    x_ticks: Sequence[str] | None = None,
    y_ticks: Sequence[str] | None = None,
    fmt: str | None = None,
    scale_label: str | None = None,
) -> Figure:
    """Draw a matrix as shades; dark is large.

    Args:
        matrix: (rows, columns) numbers.
        x_ticks, y_ticks: names of the columns and of the rows.
        fmt: the format of the numbers in the squares of a small matrix.
        scale_label: what the shades measure, with units in brackets.

    >>> pl.figures.heatmap([[0.1, 0.9], [0.5, 0.4]], x_label="r", y_label="alpha", x_ticks=["8", "16"], fmt=".1f")
    <Figure size 896x616 with 2 Axes>
    """
    numbers = _array(matrix)
    figure, axes = new(height=4.4)
    picture = axes.imshow(numbers, cmap="cividis_r", aspect="auto")  # looks the same to colour-blind people
    bar = figure.colorbar(picture, ax=axes)
    if scale_label:
        bar.set_label(scale_label)
    if fmt:
        middle = (picture.norm.vmin + picture.norm.vmax) / 2
        for i, row in enumerate(numbers):
            for j, value in enumerate(row):
                axes.text(j, i, format(value, fmt), ha="center", va="center", fontsize=SMALLEST,
                          color="white" if value > middle else BLACK)
    axes.grid(visible=False)
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.set_xticks(range(len(x_ticks or ())), x_ticks or ())
    axes.set_yticks(range(len(y_ticks or ())), y_ticks or ())
    return figure
