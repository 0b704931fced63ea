"""Pictures for the chapter on QLoRA and NF4: the values of a code book."""

from __future__ import annotations

import math
from typing import Any

from matplotlib.figure import Figure

from peftlab.kit.figures.charts import _array
from peftlab.kit.figures.style import COLOURS, GREY, SMALLEST, WIDTH, new, styled


@styled()
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
