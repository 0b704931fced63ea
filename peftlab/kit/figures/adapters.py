"""Pictures for the chapters on adapters, IA3 and BitFit: where adapters sit, and scores against parameters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, Polygon, Rectangle
from matplotlib.ticker import PercentFormatter

from peftlab.checks import checked
from peftlab.kit.figures.charts import draw_repeats, finish
from peftlab.kit.figures.style import BLACK, COLOURS, ROLES, SMALLEST, Point, drawn, look, new

FROZEN, TRAINED = ROLES["weights"], ROLES["adapter"]
STREAM, BRANCH, BESIDE = 1.2, 4.6, 8.8  # where the three columns of a picture stand


@drawn()
def adapter_places() -> Figure:
    """Draw one block, from bottom to top, with its adapters in three placements: houlsby, pfeiffer, parallel.

    >>> pl.figures.adapter_places()
    <Figure size 896x602 with 3 Axes>
    """
    figure, grid = new(height=4.3, columns=3)
    for axes, name in zip(grid.flat, ("houlsby", "pfeiffer", "parallel"), strict=True):
        axes.set(xlim=(0.6, 10.4), ylim=(0, 17), aspect="equal")
        axes.axis("off")
        axes.set_title(name, fontsize=SMALLEST)
        _line(axes, (STREAM, 0), (STREAM, 16.6), arrow=True)
        _branch(axes, 0.8, "attention", adapter=name == "houlsby", beside=False)
        _branch(axes, 7.0, "feed-\nforward", adapter=name == "houlsby", beside=name == "parallel")
        if name == "pfeiffer":
            _line(axes, (STREAM, 13.2), (BRANCH, 13.2))
            _line(axes, (BRANCH, 13.2), (BRANCH, 15.6))
            _bottleneck(axes, BRANCH, 13.7)
            _join(axes, 15.6)
    return figure


def _branch(axes: Axes, bottom: float, name: str, adapter: bool, beside: bool) -> None:
    """Draw a sub-layer: from the stream through norm, layer and perhaps an adapter, and back into the stream."""
    top = bottom + (5.6 if adapter else 4.6)
    _line(axes, (STREAM, bottom), (BRANCH, bottom))
    _line(axes, (BRANCH, bottom), (BRANCH, top))
    _box(axes, BRANCH, bottom + 0.4, 0.9, "norm")
    _box(axes, BRANCH, bottom + 1.9, 1.7, name)
    if adapter:
        _bottleneck(axes, BRANCH, bottom + 3.9)
    if beside:
        middle = bottom + 1.6
        _line(axes, (BRANCH, middle), (BESIDE, middle))
        _line(axes, (BESIDE, middle), (BESIDE, top - 0.5))
        _line(axes, (BESIDE, top - 0.5), (BRANCH + 0.4, top - 0.5), arrow=True)
        _bottleneck(axes, BESIDE, bottom + 2.1)
        _sum(axes, BRANCH, top - 0.5)
    _join(axes, top)


def _join(axes: Axes, y: float) -> None:
    _line(axes, (BRANCH, y), (STREAM + 0.4, y), arrow=True)
    _sum(axes, STREAM, y)


def _line(axes: Axes, start: Point, end: Point, arrow: bool = False) -> None:
    style = "-|>" if arrow else "-"
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle=style, mutation_scale=11, linewidth=1.4, color=BLACK,
                                   shrinkA=0, shrinkB=0, zorder=1))


def _box(axes: Axes, x: float, y: float, height: float, name: str) -> None:
    axes.add_patch(Rectangle((x - 2.5, y), 5.0, height, facecolor=FROZEN, edgecolor=BLACK, linewidth=1.2, zorder=2))
    axes.text(x, y + height / 2, name, ha="center", va="center", fontsize=SMALLEST, zorder=3, linespacing=0.85)


def _bottleneck(axes: Axes, x: float, y: float) -> None:
    """Draw an adapter as two trapezoids, down and up, that meet at their narrow ends."""
    down = [(-1.4, 0), (1.4, 0), (0.5, 0.6), (-0.5, 0.6)]
    up = [(-0.5, 0.75), (0.5, 0.75), (1.4, 1.35), (-1.4, 1.35)]
    for corners in (down, up):
        moved = [(x + dx, y + dy) for dx, dy in corners]
        axes.add_patch(Polygon(moved, facecolor=TRAINED, edgecolor=TRAINED, linewidth=1.4, zorder=2))


def _sum(axes: Axes, x: float, y: float) -> None:
    axes.add_patch(Circle((x, y), 0.42, facecolor="white", edgecolor=BLACK, linewidth=1.2, zorder=3))
    axes.text(x, y, "+", ha="center", va="center", fontsize=SMALLEST, zorder=4)


@checked()
@drawn()
def budget(
    rows: Iterable[dict[str, Any]],
    x: str,
    y: str,
    by: str,
    *,
    x_label: str,
    y_label: str,
    reference: dict[str, float] | None = None,
) -> Figure:
    """Draw scores against the number of trained parameters: means over seeds, and each seed.

    Args:
        rows: dicts or `Results`. Rows with the same `by` and `x` are repeats, such as seeds.
        by: the column whose values make the lines. A value with only one `x` is a single point.
        reference: {name: value} horizontal lines.

    >>> rows = [{"own": 2304, "score": 0.75, "kind": "BitFit"}, {"own": 16128, "score": 0.79, "kind": "IA3"}]
    >>> pl.figures.budget(rows, "own", "score", "kind", x_label="parameters", y_label="accuracy")
    <Figure size 896x630 with 1 Axes>
    """
    rows = list(rows)
    figure, axes = new(height=4.5)
    lines = []
    for number, group in enumerate(dict.fromkeys(row[by] for row in rows)):
        chosen = [row for row in rows if row[by] == group]
        hollow = {"markerfacecolor": "white"} if number >= len(COLOURS) else {}  # there are more groups than colours
        lines.append(draw_repeats(axes, chosen, x, y, str(group), {**look(number), **hollow}))
    axes.set_xscale("log")
    axes.margins(x=0.12, y=0.1)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set(xlabel=x_label, ylabel=y_label)
    return finish(figure, axes, lines, reference)
