"""A picture of the three families of methods: what stands beside a weight, behind it, or in it."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, Rectangle
from matplotlib.path import Path

from peftlab.checks import checked
from peftlab.kit.figures.style import BLACK, ROLES, SMALLEST, Point, drawn, new

TRAINED, FROZEN, INK = ROLES["adapter"], ROLES["weights"], "#454b54"
LEFT, RIGHT, MIDDLE = 2.6, 7.4, 5.0  # of the weight
LOW, HIGH = 2.6, 7.4
FLOOR, TOP = 0.6, 12.2  # where the data enters and leaves
JOIN = 9.4  # the height at which a second way comes back


@checked()
@drawn()
def families() -> Figure:
    """Draw one weight of a network in each family of methods. What trains is coloured; data goes upwards.

    >>> pl.figures.families()
    <Figure size 896x336 with 3 Axes>
    """
    figure, grid = new(height=2.4, columns=3)
    panels = {"reparameterised": _beside, "additive": _behind, "selective": _within}
    for axes, (name, draw) in zip(grid.flat, panels.items(), strict=True):
        axes.set(xlim=(-0.4, 13.4), ylim=(-0.2, 13.2), aspect="equal")
        axes.axis("off")
        axes.set_title(name, fontsize=SMALLEST)
        _way(axes, [(MIDDLE, FLOOR), (MIDDLE, TOP)])
        _weight(axes)
        draw(axes)
    return figure


def _weight(axes: Axes) -> None:
    _box(axes, (LEFT, LOW), RIGHT - LEFT, HIGH - LOW, trained=False)
    axes.text(MIDDLE, LOW + 1.7, "W", ha="center", va="center", fontsize=SMALLEST, color=BLACK, zorder=5)


def _beside(axes: Axes) -> None:
    """Draw a change of the weight, as two thin matrices on a way of their own."""
    x = 10.6
    _way(axes, [(MIDDLE, 1.6), (x, 1.6), (x, JOIN), (MIDDLE + 0.9, JOIN)])
    _box(axes, (x - 2, 2.9), 4.0, 1.3, trained=True, name="A")
    _box(axes, (x - 2, 5.6), 4.0, 1.3, trained=True, name="B")
    axes.add_patch(Circle((MIDDLE, JOIN), 0.9, facecolor="white", edgecolor=INK, linewidth=1.1, zorder=4))
    axes.text(MIDDLE, JOIN, "+", ha="center", va="center_baseline", fontsize=SMALLEST, color=BLACK, zorder=5)


def _behind(axes: Axes) -> None:
    """Draw a new part on the way of the data."""
    _box(axes, (LEFT, 8.6), RIGHT - LEFT, 1.7, trained=True, name="new")


def _within(axes: Axes) -> None:
    """Draw some of the old numbers as trained: the bias behind the weight."""
    _box(axes, (LEFT, HIGH - 1.5), RIGHT - LEFT, 1.5, trained=True, name="b")


def _box(axes: Axes, corner: Point, width: float, height: float, trained: bool, name: str = "") -> None:
    fill = TRAINED if trained else FROZEN
    axes.add_patch(Rectangle(corner, width, height, facecolor=fill, edgecolor=BLACK, linewidth=1, zorder=4))
    axes.text(corner[0] + width / 2, corner[1] + height / 2, name, ha="center", va="center", fontsize=SMALLEST,
              color="white", fontweight="bold", zorder=5)


def _way(axes: Axes, points: list[Point]) -> None:
    axes.add_patch(FancyArrowPatch(path=Path(points), arrowstyle="-|>", mutation_scale=9, linewidth=1.2, color=INK,
                                   zorder=2, joinstyle="round"))
