"""A picture for the chapter on training recipes: which tokens of a row are learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from peftlab.checks import checked, one_of
from peftlab.kit.figures.style import BLACK, GREY, ROLES, SMALLEST, drawn, new

LETTER, GAP = 0.105, 0.24  # inches that a letter takes at the smallest type, and around a token's text
KINDS = ("read", "learned", "padding")


@checked()
@drawn()
def token_rows(rows: Mapping[str, Sequence[tuple[str, str]]]) -> Figure:
    """Draw rows of tokens. A learned one is orange with a thick edge, one that is only read grey, padding dashed.

    Args:
        rows: {what the row shows: its tokens}, each token a pair of its text and "read", "learned" or "padding".

    >>> pl.figures.token_rows({"right": [("a cat", "read"), ("runs", "learned"), ("pad", "padding")]})
    <Figure size 896x105 with 1 Axes>
    """
    figure, axes = new(height=0.75 * len(rows))
    axes.set(xlim=(0, 6.4), ylim=(-0.75 * len(rows), 0))
    axes.axis("off")
    for number, (name, tokens) in enumerate(rows.items()):
        y = -0.75 * (number + 1) + 0.06
        axes.text(0.02, y + 0.48, name, ha="left", va="center", fontsize=SMALLEST)
        x = 0.02
        for text, kind in tokens:
            width = len(text) * LETTER + GAP
            _token(axes, x, y, width, text, one_of("kind", kind, KINDS))
            x += width + 0.05
    return figure


def _token(axes: Axes, x: float, y: float, width: float, text: str, kind: str) -> None:
    learned, padding = kind == "learned", kind == "padding"
    fill = ROLES["adapter"] if learned else "white" if padding else ROLES["weights"]
    axes.add_patch(Rectangle((x, y), width, 0.32, facecolor=fill, edgecolor=GREY if padding else BLACK,
                             linewidth=2.0 if learned else 1.0, linestyle="--" if padding else "-"))
    axes.text(x + width / 2, y + 0.16, text, ha="center", va="center", fontsize=SMALLEST,
              color="white" if learned else GREY if padding else BLACK, fontweight="bold" if learned else "normal")
