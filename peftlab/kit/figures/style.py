"""One style for every figure: readable in grey, by colour-blind people, and on a telephone.

A figure is 6.4 inches wide. A telephone shows it 350 pixels wide, which is 55 pixels per inch. There 12 points, the
smallest type in use, are 9 pixels high. Colours differ in lightness as well as in hue, and nothing is marked by colour
alone: lines also have markers and dashes, bars also have hatches.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from peftlab.checks import checked, number, whole
from peftlab.errors import PeftLabError

WIDTH = 6.4  # inches
MOST_INCHES, MOST_PANELS = 600, 100
SMALLEST = 12  # points
BLACK = "#1a1a1a"
GREY = "#767676"  # 4.5:1 on white
# What a colour means, in every drawing and every chart of memory. All are 12 or more apart in lightness (CIE L*: 83,
# 50, 66, 15, 33, 95), so that they differ in grey too. Each shape has a dark outline, because the pale ones need it.
ROLES = {
    "weights": "#c9cfd7",
    "adapter": "#c4540f",
    "gradients": "#5aa7de",
    "optimiser": "#3b1152",
    "activations": "#0a5940",
    "workspace": "#f7f0d0",
}
DARK = ("optimiser", "activations")  # these get a light hatch and outline
# Lines and bars that have no role, such as methods that are compared. Orange is not among them: it is the adapters'.
# Neighbours are 20 or more apart in lightness (CIE L*: 29, 49, 27, 48, 18, 48). Each has 4.5:1 or more against white.
COLOURS = ("#004488", "#c24983", "#084a37", "#8c6f10", "#551133", "#737373")
MARKERS = ("o", "s", "^", "D", "v", "P")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)))
HATCHES = ("", "//", "..", "xx", "\\\\", "--")
# The words by which a part's role is known: the first that its name contains. "master copy" is one of the weights.
ROLE_WORDS = {
    "adapter": "adapter", "gradient": "gradients", "optimi": "optimiser", "state": "optimiser", "moment": "optimiser",
    "activation": "activations", "logits": "workspace", "workspace": "workspace", "buffer": "workspace",
    "weight": "weights", "copy": "weights",
}  # fmt: skip

Point = tuple[float, float]

RC: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib, so that every machine draws the same
    "font.size": 13,
    "axes.titlesize": 13,
    "axes.labelsize": 13,
    "xtick.labelsize": SMALLEST,
    "ytick.labelsize": SMALLEST,
    "legend.fontsize": SMALLEST,
    "figure.figsize": (WIDTH, 3.8),
    "figure.dpi": 140,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "savefig.dpi": 140,
    "text.color": BLACK,
    "axes.labelcolor": BLACK,
    "axes.edgecolor": BLACK,
    "xtick.color": BLACK,
    "ytick.color": BLACK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "axes.axisbelow": True,
    "lines.linewidth": 2.0,
    "lines.markersize": 7,
    "hatch.linewidth": 0.8,
    "legend.frameon": False,
    "axes.titlelocation": "left",
    "mathtext.fontset": "dejavusans",
}


def use_style() -> None:
    """Switch matplotlib to the book's style for this process and, in a notebook, to PNGs without metadata."""
    matplotlib.rcParams.update(RC)
    _use_png()


@contextlib.contextmanager
def styled() -> Iterator[None]:
    """Use the book's style inside a `with` block or a function decorated with `@styled()`, and only there."""
    with matplotlib.rc_context(RC):
        yield


@contextlib.contextmanager
def drawn() -> Iterator[None]:
    """Draw a figure in the book's style, and say in one line why data cannot be drawn. Decorates every figure."""
    with styled():
        try:
            yield
        except (TypeError, LookupError, OverflowError, ValueError) as error:
            if isinstance(error, PeftLabError):
                raise
            told = " ".join(str(error).split())[:200]
            raise PeftLabError(f"This cannot be drawn ({type(error).__name__}: {told}). Look at its data.") from error


def _use_png() -> None:
    """Show figures as PNGs in a notebook, without metadata.

    matplotlib would write its version into each of them, so every upgrade would change every figure of the book.
    """
    try:
        from IPython import get_ipython
        from matplotlib_inline.backend_inline import set_matplotlib_formats
    except ImportError:
        return
    if get_ipython() is not None:
        set_matplotlib_formats("png", metadata={"Software": None})


@checked()
def new(
    width: float = WIDTH, height: float = 3.8, rows: int = 1, columns: int = 1, **layout: Any
) -> tuple[Figure, Any]:
    """Make a new figure and its axes, in the book's style.

    Args:
        width, height: inches.
        rows, columns: the number of axes.
        layout: `sharex`, `sharey`, `width_ratios` or `height_ratios` of `Figure.subplots`.

    Returns:
        (Figure, Axes), or (Figure, array of Axes) if there are several. pyplot does not know the figure, so it is not
        drawn twice and does not stay in memory.
    """
    width, height = (number("width or height", size, above=0, ceiling=MOST_INCHES) for size in (width, height))
    rows, columns = (whole("rows or columns", panels, least=1, ceiling=MOST_PANELS) for panels in (rows, columns))
    _use_png()
    with styled():
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, figure.subplots(rows, columns, **layout)


@checked()
def label(
    axes: Axes,
    x: str | None = None,
    y: str | None = None,
    x_unit: str | None = None,
    y_unit: str | None = None,
    title: str | None = None,
) -> Axes:
    """Name the axes, with units in brackets: `label(axes, "batch size", "peak memory", y_unit="GB")`."""
    if x is not None:
        axes.set_xlabel(f"{x} ({x_unit})" if x_unit else x)
    if y is not None:
        axes.set_ylabel(f"{y} ({y_unit})" if y_unit else y)
    if title is not None:
        axes.set_title(title)
    return axes


def look(number: int) -> dict[str, Any]:
    """Return colour, marker and dashes of the line with this number, as arguments of `Axes.plot`.

    The seventh line has the first one's colour, and another marker and other dashes.
    """
    rounds, place = divmod(number, len(COLOURS))
    other = (place + rounds) % len(MARKERS)
    return {"color": COLOURS[place], "marker": MARKERS[other], "linestyle": LINES[other]}


@checked()
def role(name: str) -> str | None:
    """Return the role of a part by its name: "8-bit states" is of the optimiser. None if it has none.

    >>> pl.figures.role("8-bit states"), pl.figures.role("gradient"), pl.figures.role("attention")
    ('optimiser', 'gradients', None)
    """
    return next((found for word, found in ROLE_WORDS.items() if word in name.lower()), None)


def fills(names: Sequence[str]) -> list[dict[str, Any]]:
    """Return fill and hatch for each part of a bar, as arguments of `Axes.barh`.

    Parts whose names all tell a role get the colours of their roles. Two parts of one role differ in their hatch.
    """
    roles = [role(name) for name in names]
    if None in roles:
        return [{"color": COLOURS[i % len(COLOURS)], "hatch": HATCHES[i % len(HATCHES)], "edgecolor": "white"}
                for i in range(len(names))]
    places = [list(ROLES).index(str(found)) + 3 * roles[:i].count(found) for i, found in enumerate(roles)]
    return [{"color": ROLES[str(found)], "hatch": HATCHES[place % len(HATCHES)], "linewidth": 0.7,
             "edgecolor": (1, 1, 1, 0.45) if found in DARK else BLACK}
            for place, found in zip(places, roles, strict=True)]


def png(figure: Figure) -> bytes:
    """Return the figure as PNG bytes, without metadata."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=figure.dpi, metadata={"Software": None})
    return buffer.getvalue()
