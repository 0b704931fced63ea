"""Pictures for the chapter on QLoRA and NF4: the values of a code book, and the way of a block into bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from peftlab.checks import checked
from peftlab.kit.figures.charts import _array
from peftlab.kit.figures.style import BLACK, COLOURS, GREY, ROLES, SMALLEST, WIDTH, drawn, new


@checked()
@drawn()
def code_books(books: dict[str, Any], *, deviation: float = 0.4, x_label: str = "weight / its block's scale") -> Figure:
    """Draw the values of each code book as strokes on a line, in front of the density of the weights.

    Args:
        books: {name: values from -1 to 1}.
        deviation: the standard deviation of the normal density behind, in units of the block's scale.

    >>> pl.figures.code_books({"NF4": pl.quantization.code_book("nf4")})
    <Figure size 896x231 with 1 Axes>
    """
    figure, grid = new(width=WIDTH, height=0.6 + 1.05 * len(books), rows=len(books), sharex=True)
    xs = [-1.02 + 0.01 * i for i in range(205)]
    bell = [math.exp(-(x * x) / (2 * deviation * deviation)) for x in xs]
    rows = zip(grid if len(books) > 1 else [grid], books.items(), strict=True)
    for number, (axes, (name, values)) in enumerate(rows):
        axes.fill_between(xs, bell, color="#e4e4e4", linewidth=0)
        axes.vlines(_array(values), 0, 0.85, color=COLOURS[number % len(COLOURS)], linewidth=2)
        axes.axvline(0, color=GREY, linewidth=0.8, linestyle=":")
        axes.set(ylim=(0, 1.05), xlim=(-1.03, 1.03), yticks=[])
        axes.grid(visible=False)
        axes.spines["left"].set_visible(False)
        axes.set_title(name, fontsize=SMALLEST)
    axes.set_xlabel(x_label)
    return figure


@checked()
@drawn()
def block_steps(weights: Sequence[float], book: Any) -> Figure:
    """Draw how a few weights become bytes: divided by the scale, rounded to the nearest value, coded, packed by twos.

    What is stored, the bytes and the scale, is hatched.

    Args:
        weights: an even number of weights of one block, at most six.
        book: the sixteen values, ascending.

    >>> pl.figures.block_steps([0.021, -0.044, 0.0, 0.009], pl.quantization.code_book("nf4"))
    <Figure size 896x504 with 1 Axes>
    """
    scale = max(abs(w) for w in weights)
    values = _array(book).tolist()
    codes = [min(range(len(values)), key=lambda i: abs(w / scale - values[i])) for w in weights]
    rows = {
        "weights": [f"{w:g}" for w in weights],
        "divided by the scale": [f"{w / scale:.2f}" for w in weights],
        "nearest value": [f"{values[code]:.2f}" for code in codes],
        "its code": [str(code) for code in codes],
    }
    figure, axes = new(width=WIDTH, height=3.6)
    axes.set(xlim=(0, 10), ylim=(-0.9, 5.1))
    axes.axis("off")
    wide = 6.4 / len(weights)
    for number, (name, texts) in enumerate(rows.items()):
        y = 4.2 - number
        axes.text(3.3, y + 0.35, name, ha="right", va="center", fontsize=SMALLEST)
        for i, text in enumerate(texts):
            fill = ROLES["weights"] if number == 0 else "white"
            _cell(axes, 3.5 + i * wide, y, wide - 0.15, text, fill)
            axes.annotate("", (3.5 + (i + 0.46) * wide, y - 0.28), (3.5 + (i + 0.46) * wide, y - 0.02),
                          arrowprops={"arrowstyle": "-|>", "color": BLACK, "linewidth": 1.2})
    axes.text(3.3, 0.55, "stored: bytes", ha="right", va="center", fontsize=SMALLEST)
    for i in range(0, len(codes), 2):
        byte = f"{16 * codes[i] + codes[i + 1]:02x}"
        _cell(axes, 3.5 + i * wide, 0.2, 2 * wide - 0.15, byte, ROLES["weights"], stored=True)
    axes.text(3.3, -0.45, "stored: the scale", ha="right", va="center", fontsize=SMALLEST)
    _cell(axes, 3.5, -0.8, wide - 0.15, f"{scale:g}", ROLES["weights"], stored=True)
    return figure


def _cell(axes: Axes, x: float, y: float, width: float, text: str, fill: str, stored: bool = False) -> None:
    axes.add_patch(Rectangle((x, y), width, 0.7, facecolor=fill, edgecolor="white", linewidth=0,
                             hatch="////" if stored else ""))
    axes.add_patch(Rectangle((x, y), width, 0.7, facecolor="none", edgecolor=BLACK, linewidth=1.2))
    axes.text(x + width / 2, y + 0.35, text.replace("-", "\N{MINUS SIGN}"), ha="center", va="center", fontsize=SMALLEST)
