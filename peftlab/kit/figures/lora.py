"""Pictures for the LoRA chapter: the two paths of a LoRA layer, drawn step by step."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, Polygon, Rectangle

from peftlab.checks import checked, whole
from peftlab.kit.figures.style import BLACK, ROLES, SMALLEST, WIDTH, Point, drawn, new

FROZEN, TRAINED, PASSING = ROLES["weights"], ROLES["adapter"], ROLES["activations"]
STEPS = (
    "The input x goes both ways",
    "Frozen path: W₀x",
    "A takes x down to r numbers",
    "B takes them up again",
    "Scale by α/r",
    "Add the two paths",
)


@checked()
@drawn()
def lora_dataflow(step: int | None = None, *, d_in: int = 576, d_out: int = 576, r: int = 8) -> Figure:
    """Draw the data flow of a LoRA layer, y = W₀x + (α/r) B A x: the sum of a frozen path and a low-rank path.

    Args:
        step: 1 to 6 draws the layer up to that step, and the later ones in outline. None draws all six steps as small
            pictures, for a page without a kernel.
        d_in, d_out, r: the sizes written beside the vectors of a single step.

    Returns:
        Figure.

    Raises:
        PeftLabError: step is not a number from 1 to 6.

    >>> pl.figures.lora_dataflow(step=3, d_in=576, d_out=192, r=8)
    <Figure size 896x560 with 1 Axes>
    """
    d_in, d_out, r = (whole("a size", size, least=1) for size in (d_in, d_out, r))
    if step is None:
        figure, grid = new(height=7.2, rows=3, columns=2)
        for number, axes in enumerate(grid.flat, 1):
            _draw(axes, number, None)
            axes.set_title(f"{number}. {STEPS[number - 1]}", fontsize=SMALLEST)
        return figure
    step = whole("step", step, least=1, most=len(STEPS))
    figure, axes = new(width=WIDTH, height=4.0)
    _draw(axes, step, (d_in, d_out, r))
    axes.set_title(f"{step}. {STEPS[step - 1]}")
    return figure


def _draw(axes: Axes, step: int, sizes: tuple[int, int, int] | None) -> None:
    """Draw one picture, 12 wide and 7 high: the frozen path above, the low-rank path below."""
    axes.set(xlim=(-0.2, 12.4), ylim=(0, 7), aspect="equal")
    axes.axis("off")
    up, down = 5.2, 1.8

    _vector(axes, 0.6, 3.5, 2.6, "x", True)
    _arrow(axes, (1.0, 3.9), (2.6, up), step >= 1)
    _arrow(axes, (1.0, 3.1), (2.6, down), step >= 1)
    _block(axes, [(2.6, up - 1.3), (2.6, up + 1.3), (6.6, up + 1.3), (6.6, up - 1.3)], "$W_0$", FROZEN, step >= 2)
    _block(axes, [(2.6, down - 1.3), (2.6, down + 1.3), (4.4, down + 0.4), (4.4, down - 0.4)], "$A$", TRAINED,
           step >= 3)
    _block(axes, [(4.8, down - 0.4), (4.8, down + 0.4), (6.6, down + 1.3), (6.6, down - 1.3)], "$B$", TRAINED,
           step >= 4)
    _arrow(axes, (4.4, down), (4.8, down), step >= 3)
    _arrow(axes, (6.6, down), (7.5, down), step >= 4)
    _round(axes, (8.2, down), r"$\frac{\alpha}{r}$", step >= 5)
    _arrow(axes, (6.6, up), (9.6, 3.9), step >= 6)
    _arrow(axes, (8.8, down + 0.3), (9.6, 3.1), step >= 6)
    _round(axes, (10.1, 3.5), "+", step >= 6)
    _arrow(axes, (10.75, 3.5), (11.4, 3.5), step >= 6)
    _vector(axes, 11.8, 3.5, 2.6, "y", step >= 6)
    if sizes is not None:
        d_in, d_out, r = sizes
        axes.text(0.6, 1.95, f"{d_in}", ha="center", va="top", fontsize=SMALLEST)
        axes.text(11.8, 1.95, f"{d_out}", ha="center", va="top", fontsize=SMALLEST, color=_ink(step >= 6))
        axes.text(4.6, 0.35, f"r = {r}", ha="center", va="center", fontsize=SMALLEST, color=_ink(step >= 3))
        axes.text(4.6, 6.75, "frozen", ha="center", va="center", fontsize=SMALLEST, color=_ink(step >= 2))
        axes.text(4.6, 3.3, "trained", ha="center", va="center", fontsize=SMALLEST, color=_ink(step >= 3))


def _ink(on: bool) -> str:
    return BLACK if on else "#8a8a8a"


def _block(axes: Axes, corners: list[Point], name: str, fill: str, on: bool) -> None:
    axes.add_patch(Polygon(corners, facecolor=fill if on else "white", edgecolor=_ink(on), linewidth=1.5,
                           linestyle="-" if on else ":"))
    across = sum(x for x, _ in corners) / len(corners)
    height = sum(y for _, y in corners) / len(corners)
    ink = "white" if on and fill == TRAINED else _ink(on)
    axes.text(across, height, name, ha="center", va="center", fontsize=14, color=ink)


def _vector(axes: Axes, x: float, y: float, height: float, name: str, on: bool) -> None:
    axes.add_patch(Rectangle((x - 0.4, y - height / 2), 0.8, height, facecolor=PASSING if on else "white",
                             edgecolor=_ink(on), linewidth=1.5, linestyle="-" if on else ":"))
    axes.text(x, y, name, ha="center", va="center", fontsize=14, color="white" if on else _ink(on))


def _round(axes: Axes, centre: Point, name: str, on: bool) -> None:
    axes.add_patch(Circle(centre, 0.65, facecolor="white", edgecolor=_ink(on), linewidth=1.5,
                          linestyle="-" if on else ":"))
    axes.text(*centre, name, ha="center", va="center", fontsize=15, color=_ink(on))


def _arrow(axes: Axes, start: Point, end: Point, on: bool) -> None:
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=14, linewidth=1.8 if on else 1.0,
                                   linestyle="-" if on else ":", color=_ink(on), shrinkA=1, shrinkB=1))
