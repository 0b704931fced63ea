"""Pictures for the chapters on adapters, IA3 and BitFit: where adapters sit, and scores against parameters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, Polygon, Rectangle
from matplotlib.ticker import PercentFormatter

from peftlab.checks import checked, one_of
from peftlab.kit.figures.charts import draw_repeats, finish
from peftlab.kit.figures.style import BLACK, COLOURS, ROLES, SMALLEST, Point, drawn, look, new
from peftlab.kit.figures.transformer import NORMS

FROZEN, TRAINED = ROLES["weights"], ROLES["adapter"]
STREAM, BRANCH, BESIDE = 1.2, 4.6, 8.8  # where the three columns of a picture stand


@checked()
@drawn()
def adapter_places(norm: str = "pre") -> Figure:
    """Draw one block, from bottom to top, with its adapters in three placements: houlsby, pfeiffer, parallel.

    Args:
        norm: "pre" draws a block that normalises what a part reads, such as Llama's. "post" draws one that normalises
            the residual stream after each addition, such as BERT's.

    >>> pl.figures.adapter_places()
    <Figure size 896x644 with 3 Axes>
    """
    pre = one_of("norm", norm, NORMS) == "pre"
    left = 0.6 if pre else -0.8
    rights = {"houlsby": 7.4, "pfeiffer": 7.4, "parallel": 10.4}  # only the last has something beside its branch
    figure, grid = new(height=4.6, columns=3, width_ratios=[right - left for right in rights.values()])
    for axes, (name, right) in zip(grid.flat, rights.items(), strict=True):
        axes.set(xlim=(left, right), ylim=(0, 17), aspect="equal")
        axes.axis("off")
        axes.set_title(name, fontsize=SMALLEST)
        _line(axes, (STREAM, 0), (STREAM, 16.6), arrow=True)
        _branch(axes, 0.8, "attention", pre, adapter=name == "houlsby", beside=False)
        _branch(axes, 7.0, "feed-\nforward", pre, adapter=name == "houlsby", beside=name == "parallel")
        if name == "pfeiffer":
            _after_block(axes, 13.2 if pre else 10.7, pre)
        elif not pre:
            _norm(axes, STREAM, 11.8)
    return figure


def _branch(axes: Axes, bottom: float, name: str, pre: bool, adapter: bool, beside: bool) -> None:
    """Draw a part: from the stream through the layer and perhaps an adapter, and back into the stream."""
    layer = bottom + (1.9 if pre else 0.5)
    top = layer + (3.7 if adapter else 2.7)
    _line(axes, (STREAM, bottom), (BRANCH, bottom))
    _line(axes, (BRANCH, bottom), (BRANCH, top))
    if pre:
        _norm(axes, BRANCH, bottom + 0.4)
    _box(axes, BRANCH, layer, 1.7, name)
    if adapter:
        _bottleneck(axes, BRANCH, layer + 2.0)
    if beside:
        middle = layer - 0.3
        _line(axes, (BRANCH, middle), (BESIDE, middle))
        _line(axes, (BESIDE, middle), (BESIDE, top - 0.5))
        _line(axes, (BESIDE, top - 0.5), (BRANCH + 0.4, top - 0.5), arrow=True)
        _bottleneck(axes, BESIDE, layer + 0.2)
        _sum(axes, BRANCH, top - 0.5)
    _join(axes, top)
    if not pre and name == "attention":
        _norm(axes, STREAM, 5.6)


def _after_block(axes: Axes, bottom: float, pre: bool) -> None:
    """Draw Pfeiffer's adapter, which reads the stream after the block. BERT's norm runs before it and again after."""
    adapter = bottom + (0.5 if pre else 1.8)
    _line(axes, (STREAM, bottom), (BRANCH, bottom))
    _line(axes, (BRANCH, bottom), (BRANCH, adapter + 1.9))
    _bottleneck(axes, BRANCH, adapter)
    _join(axes, adapter + 1.9)
    if not pre:
        _norm(axes, BRANCH, bottom + 0.4)
        _norm(axes, STREAM, adapter + 2.5)


def _norm(axes: Axes, x: float, y: float) -> None:
    _box(axes, x, y, 0.9, "norm", 2.5 if x == BRANCH else 1.8)


def _join(axes: Axes, y: float) -> None:
    _line(axes, (BRANCH, y), (STREAM + 0.4, y), arrow=True)
    _sum(axes, STREAM, y)


def _line(axes: Axes, start: Point, end: Point, arrow: bool = False) -> None:
    style = "-|>" if arrow else "-"
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle=style, mutation_scale=11, linewidth=1.4, color=BLACK,
                                   shrinkA=0, shrinkB=0, zorder=1))


def _box(axes: Axes, x: float, y: float, height: float, name: str, half: float = 2.5) -> None:
    shape = Rectangle((x - half, y), 2 * half, height, facecolor=FROZEN, edgecolor=BLACK, linewidth=1.2, zorder=2)
    axes.add_patch(shape)
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
