"""One weight and its change in each method of the LoRA family: what is trained, and what differs from LoRA."""

from __future__ import annotations

from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from peftlab.checks import checked
from peftlab.kit.figures.style import BLACK, ROLES, SMALLEST, WIDTH, drawn, new

TRAINED, FROZEN, INK = ROLES["adapter"], ROLES["weights"], "#454b54"
PANEL, HEIGHT = 153, 84  # points of one panel
MIDDLE = 50  # the height at which the shapes stand
GAP = 4  # between two shapes
COLUMNS = 3


@dataclass(frozen=True)
class Shape:
    """A matrix, or a sign between two of them.

    Attributes:
        name: what stands in it; a sign has no width.
        width, height: points.
        trained: in the adapters' colour; otherwise it is frozen.
        new: a thick outline (of a sign: bold type), because LoRA has it otherwise.
        part: "whole"; "diagonal", where all but the diagonal is zero; or "blocks", where all but three blocks are.
    """

    name: str
    width: float = 0
    height: float = 0
    trained: bool = False
    new: bool = False
    part: str = "whole"


def weight(name: str = "W", trained: bool = False, new: bool = False, size: float = 36) -> Shape:
    return Shape(name, size, size, trained, new)


def tall(name: str = "B", trained: bool = True, new: bool = False) -> Shape:
    return Shape(name, 15, 36, trained, new)


def wide(name: str = "A", trained: bool = True, new: bool = False) -> Shape:
    return Shape(name, 36, 15, trained, new)


def vector(name: str, new: bool = True) -> Shape:
    return Shape(name, 15, 15, True, new, "diagonal")


PLUS = Shape("+")
# What stands in each panel from left to right, and the formula below it.
PANELS: dict[str, tuple[tuple[Shape, ...], str]] = {
    "full": ((weight(), PLUS, weight("ΔW", trained=True, new=True)), r"$W + \Delta W$"),
    "LoRA": ((weight(), PLUS, Shape(r"$\frac{\alpha}{r}$"), tall(), wide()), r"$W + sBA$, $s = \alpha/r$"),
    "rsLoRA": ((weight(), PLUS, Shape(r"$\mathbf{\frac{\alpha}{\sqrt{r}}}$"), tall(), wide()),
               r"$W + sBA$, $s = \alpha/\sqrt{r}$"),
    "LoRA+": ((weight(), PLUS, tall(new=True), wide()), r"$W + sBA$, $\eta_B > \eta_A$"),
    "DoRA": ((vector("m"), Shape("("), weight(), PLUS, tall(), wide(), Shape(")")),
             r"$m\,(W + sBA)\,/\,\Vert\cdot\Vert$"),
    "AdaLoRA": ((weight(), PLUS, tall("P"), vector("Λ"), wide("Q")), r"$W + P\,\Lambda\,Q$"),
    "VeRA": ((weight(), PLUS, vector("b"), tall(trained=False, new=True), vector("d"),
              wide(trained=False, new=True)), r"$W + \Lambda_b\,B\,\Lambda_d\,A$"),
    "PiSSA": ((weight("W'", new=True), PLUS, tall(new=True), wide(new=True)), r"$(W - sB_0A_0) + sBA$"),
    "EVA": ((weight(), PLUS, tall(), wide(new=True)), r"$W + sBA$, $A$ from data"),
    "LoHa": ((Shape("W +"), tall(new=True), Shape("A", 30, 15, True, True), Shape("⊙", new=True), tall(new=True),
              Shape("A", 30, 15, True, True)), r"$W + s\,(B_1A_1)\odot(B_2A_2)$"),
    "LoKr": ((weight(), PLUS, Shape("C", 20, 20, True, True), Shape("⊗", new=True), Shape("D", 28, 28, True, True)),
             r"$W + s\,C\otimes D$"),
    "OFT": ((weight(), Shape("R", 36, 36, True, True, "blocks")), r"$W R$, $R^{T} R = I$"),
}  # fmt: skip


@checked()
@drawn()
def lora_family() -> Figure:
    """Draw one weight and its change in twelve methods: full fine-tuning, LoRA, and ten that differ from LoRA.

    What trains is in the colour of adapters, what is frozen in that of weights. A thick outline marks what LoRA has
    otherwise.

    >>> pl.figures.lora_family()
    <Figure size 896x840 with 12 Axes>
    """
    figure, grid = new(width=WIDTH, height=6.0, rows=4, columns=COLUMNS)
    for axes, (name, (shapes, formula)) in zip(grid.flat, PANELS.items(), strict=True):
        axes.set(xlim=(0, PANEL), ylim=(0, HEIGHT), aspect="equal")
        axes.axis("off")
        axes.set_title(name, fontsize=SMALLEST, fontweight="bold", loc="center", pad=0)
        _place(axes, shapes)
        axes.text(PANEL / 2, 13, formula, ha="center", va="center", fontsize=SMALLEST, color=BLACK)
    return figure


def _place(axes: Axes, shapes: tuple[Shape, ...]) -> None:
    """Put the shapes beside each other, in the middle of the panel."""
    widths = [shape.width or (22 if shape.name == "W +" else 9) for shape in shapes]
    x = (PANEL - sum(widths) - GAP * (len(shapes) - 1)) / 2
    for shape, width in zip(shapes, widths, strict=True):
        _draw(axes, shape, x) if shape.width else _sign(axes, shape, x + width / 2)
        x += width + GAP


def _draw(axes: Axes, shape: Shape, left: float) -> None:
    bottom = MIDDLE - shape.height / 2
    fill = TRAINED if shape.trained else FROZEN
    axes.add_patch(Rectangle((left, bottom), shape.width, shape.height, zorder=4, edgecolor=BLACK,
                             facecolor=fill if shape.part == "whole" else "white",
                             linewidth=2.6 if shape.new else 1.0))  # fmt: skip
    pieces = {"whole": 0, "diagonal": 5, "blocks": 3}[shape.part]
    for i in range(pieces):
        wide_, high = shape.width / pieces, shape.height / pieces
        axes.add_patch(Rectangle((left + i * wide_, bottom + shape.height - (i + 1) * high), wide_, high,
                                 facecolor=fill, edgecolor="none", zorder=5))  # fmt: skip
    if shape.part == "whole":
        axes.text(
            left + shape.width / 2,
            MIDDLE,
            shape.name,
            ha="center",
            va="center",
            fontsize=SMALLEST,
            zorder=6,
            color="white" if shape.trained else BLACK,
            fontweight="bold" if shape.trained else "normal",
        )
    else:
        at = (0.8, 0.76 * shape.height) if shape.part == "blocks" else (0.5, -8)
        axes.text(
            left + at[0] * shape.width,
            bottom + at[1],
            shape.name,
            ha="center",
            va="center",
            fontsize=SMALLEST,
            color=TRAINED,
            fontweight="bold",
            zorder=6,
        )


def _sign(axes: Axes, shape: Shape, x: float) -> None:
    axes.text(
        x,
        MIDDLE,
        shape.name,
        ha="center",
        va="center",
        fontsize=SMALLEST,
        color=INK,
        fontweight="bold" if shape.new else "normal",
    )
