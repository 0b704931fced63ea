"""A picture for the chapter on prompts and prefixes: where virtual tokens sit, layer by layer."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

from peftlab.checks import checked
from peftlab.kit.figures.style import BLACK, ROLES, SMALLEST, drawn, new

VIRTUAL, TEXT, LAYERS = 2, 3, 3  # how many positions and layers are drawn
STEP, FLOOR = 2.0, 0.8  # from position to position; the height of the input
RISE = 3.0  # from layer to layer
TRAINED, FROZEN, COMPUTED = ROLES["adapter"], ROLES["weights"], "#f3d3bf"  # the last is a pale orange


@checked()
@drawn()
def virtual_tokens() -> Figure:
    """Draw the positions that three layers read: behind a prompt, behind a deep prompt, and with a prefix.

    Text enters at the bottom. Orange vectors are trained. Pale orange vectors are computed from trained ones.

    >>> pl.figures.virtual_tokens()
    <Figure size 896x420 with 3 Axes>
    """
    figure, grid = new(height=3.0, columns=3)
    for axes, name in zip(grid.flat, ("prompt", "deep prompt", "prefix"), strict=True):
        axes.set(xlim=(-0.2, 10.6), ylim=(-1.0, FLOOR + LAYERS * RISE + 1.5), aspect="equal")
        axes.axis("off")
        axes.set_title(name, fontsize=SMALLEST)
        for layer in range(LAYERS + 1):
            _states(axes, name, layer)
        for layer in range(LAYERS):
            _layer(axes, layer, prefix=name == "prefix")
        axes.text(STEP * (VIRTUAL + TEXT / 2) + 0.2, -0.1, "text", ha="center", va="top", fontsize=SMALLEST)
    return figure


def _states(axes: Axes, name: str, layer: int) -> None:
    """Draw the vectors that enter a layer, or leave the last one."""
    y = FLOOR + layer * RISE
    for position in range(VIRTUAL + TEXT):
        virtual = position < VIRTUAL
        if virtual and name == "prefix":
            continue
        trained = virtual and (layer == 0 or (name == "deep prompt" and layer < LAYERS))
        fill = TRAINED if trained else COMPUTED if virtual else FROZEN
        axes.add_patch(Rectangle((0.7 + STEP * position, y), 0.9, 1.4, facecolor=fill, edgecolor=BLACK, linewidth=1))


def _layer(axes: Axes, layer: int, prefix: bool) -> None:
    """Draw the way through a layer; a prefix stands beside it, as keys and values."""
    low, high = FLOOR + layer * RISE + 1.4, FLOOR + (layer + 1) * RISE
    start = VIRTUAL if prefix else 0
    for position in range(start, VIRTUAL + TEXT):
        x = 1.15 + STEP * position
        axes.add_patch(FancyArrowPatch((x, low), (x, high), arrowstyle="-|>", mutation_scale=9, linewidth=1,
                                       color="#454b54", shrinkA=1, shrinkB=1))
    if prefix:
        for position in range(VIRTUAL):
            for place, letter in enumerate("kv"):
                x = 0.2 + STEP * position + 0.9 * place
                axes.add_patch(Rectangle((x, low - 0.1), 0.8, 1.8, facecolor=TRAINED, edgecolor=BLACK, linewidth=1))
                axes.text(x + 0.4, low + 0.8, letter, ha="center", va="center", fontsize=SMALLEST, color="white",
                          fontweight="bold")
