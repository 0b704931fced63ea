"""Charts that several chapters draw. Data comes as rows or dicts; units stand in the labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from peftlab.checks import checked
from peftlab.kit.figures.style import BLACK, COLOURS, GREY, HATCHES, SMALLEST, drawn, look, new


def _finish(figure: Figure, axes: Axes, lines: int) -> Figure:
    """Add a legend if there are several lines. It stands below the axes, where it hides no data."""
    if lines > 1:
        handles, names = axes.get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=_columns(names), fontsize=SMALLEST)
    return figure


def _array(values: Any) -> numpy.ndarray:
    """Return a torch tensor of any device and dtype, or anything that NumPy takes, as a float array."""
    if hasattr(values, "detach"):
        values = values.detach().float().cpu()
    return numpy.asarray(values, dtype=float)


def _columns(names: Sequence[str]) -> int:
    """Return how many columns of a legend fit into a page's width of about 60 characters."""
    return max(1, min(len(names), 60 // (max(map(len, names)) + 6)))


def _fewer_ticks(axis: Axis, values: Sequence[float]) -> None:
    """Put ticks of a logarithmic axis at the measured values, written as plain numbers."""
    axis.set_ticks(values, labels=[f"{value:g}" for value in values])
    axis.set_ticks([], minor=True)


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
    """Draw lines of a measured quantity against a setting, with a band from the minimum to the maximum of repeats.

    Args:
        rows: dicts or `Results`. Rows with the same `x` (and `by`) are repeats, such as seeds.
        x, y: column names. `x_label` and `y_label` name the axes, with units in brackets.
        by: the column whose values make the lines. None draws one line.
        log_x: logarithmic axis with a tick at each value measured.
        reference: {name: value} horizontal lines, such as the score without any training.
        percent: write the y axis as percentages of 1.
    """
    rows = [row for row in rows if row.get(x) is not None and row.get(y) is not None]
    figure, axes = new()
    groups = list(dict.fromkeys(row.get(by) for row in rows)) if by else [None]
    for number, group in enumerate(groups):
        chosen = [row for row in rows if by is None or row.get(by) == group]
        places = sorted({row[x] for row in chosen})
        repeats = [[row[y] for row in chosen if row[x] == place] for place in places]
        middle = [math.fsum(values) / len(values) for values in repeats]
        axes.plot(places, middle, label=str(group), **look(number))
        if any(len(values) > 1 for values in repeats):
            axes.fill_between(places, [min(v) for v in repeats], [max(v) for v in repeats],
                              color=COLOURS[number % len(COLOURS)], alpha=0.2, linewidth=0)
    if log_x:
        axes.set_xscale("log", base=2)
        _fewer_ticks(axes.xaxis, sorted({row[x] for row in rows}))
    if log_y:
        axes.set_yscale("log")
    for name, value in (reference or {}).items():
        axes.axhline(value, color=GREY, linestyle=":")
        axes.annotate(name, (1, value), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=SMALLEST)
    axes.set(xlabel=x_label or x, ylabel=y_label or y)
    if percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    return _finish(figure, axes, len(groups))


@checked()
@drawn()
def curves(
    series: dict[str, Any], *, x_label: str = "step", y_label: str = "loss", log_x: bool = False, log_y: bool = False
) -> Figure:
    """Draw lines without markers, such as losses over training.

    Args:
        series: {name: list of y, or a pair (list of x, list of y)}.
    """
    figure, axes = new()
    for number, (name, values) in enumerate(series.items()):
        xs, ys = values if isinstance(values, tuple) else (range(1, len(values) + 1), values)
        axes.plot(xs, ys, label=name, **{**look(number), "marker": None})
    axes.set(xlabel=x_label, ylabel=y_label)
    if log_x:
        axes.set_xscale("log")
    if log_y:
        axes.set_yscale("log")
    return _finish(figure, axes, len(series))


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
        highlight: names of bars that get another colour and a hatch.
        percent: write the x axis as percentages of 1.
    """
    figure, axes = new(height=1.1 + 0.42 * len(values))
    names = list(values)
    for place, name in enumerate(names):
        chosen = name in highlight
        axes.barh(place, values[name], color=COLOURS[1] if chosen else COLOURS[0], edgecolor="white",
                  hatch=HATCHES[1] if chosen else "", height=0.7)
        told = fmt(values[name]) if callable(fmt) else format(values[name], fmt)
        axes.annotate(told, (values[name], place), xytext=(4, 0), textcoords="offset points", va="center",
                      fontsize=SMALLEST)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    if log_x:
        axes.set_xscale("log")
    if not log_x:
        axes.set_xlim(min(0, *values.values()) * 1.2, max(values.values()) * 1.2)  # room for the numbers
    if percent:
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlabel(x_label)
    return figure


@checked()
@drawn()
def stacked_bars(parts: dict[str, dict[str, float]], *, x_label: str, fmt: str = ".3g") -> Figure:
    """Draw horizontal bars made of parts, with the sum at the end.

    Args:
        parts: {name of the bar: {name of the part: number}}. A part that a bar lacks counts as 0.
    """
    kinds = list(dict.fromkeys(kind for row in parts.values() for kind in row))
    figure, axes = new(height=1.9 + 0.5 * len(parts))
    left = [0.0] * len(parts)
    for number, kind in enumerate(kinds):
        sizes = [row.get(kind, 0) for row in parts.values()]
        axes.barh(range(len(parts)), sizes, left=left, label=kind, color=COLOURS[number % len(COLOURS)],
                  hatch=HATCHES[number % len(HATCHES)], edgecolor="white", height=0.7)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    for place, total in enumerate(left):
        axes.annotate(format(total, fmt), (total, place), xytext=(4, 0), textcoords="offset points", va="center",
                      fontsize=SMALLEST)
    axes.set_yticks(range(len(parts)), list(parts))
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlim(0, max(left) * 1.15)
    axes.set_xlabel(x_label)
    return _finish(figure, axes, len(kinds))


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
    """
    figure, axes = new()
    for number, (name, given) in enumerate(values.items()):
        numbers = sorted(_array(given).ravel().tolist(), reverse=True)
        top = numbers[0] if relative else 1.0
        shown = [value / top for value in numbers if value > 0]
        axes.plot(range(1, len(shown) + 1), shown, label=name, markevery=max(1, len(shown) // 10), **look(number))
    if mark is not None:
        axes.axvline(mark, color=BLACK, linestyle=":")
        axes.annotate(f"r = {mark}", (mark, 0), xycoords=("data", "axes fraction"), xytext=(4, 4),
                      textcoords="offset points", fontsize=SMALLEST)
    axes.set_yscale("log")
    axes.set(xlabel=x_label, ylabel=y_label)
    return _finish(figure, axes, len(values))


@checked()
@drawn()
def histogram(
    samples: dict[str, Any], *, x_label: str, bins: int = 100, limits: tuple[float, float] | None = None
) -> Figure:
    """Draw the outlines of normalised histograms, given as {name: numbers}. `limits` is the range of the x axis."""
    figure, axes = new()
    for number, (name, given) in enumerate(samples.items()):
        axes.hist(_array(given).ravel(), bins=bins, range=limits, density=True, histtype="step", label=name,
                  linewidth=2, color=COLOURS[number % len(COLOURS)], linestyle=look(number)["linestyle"])
    axes.set(xlabel=x_label, ylabel="density")
    return _finish(figure, axes, len(samples))


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
