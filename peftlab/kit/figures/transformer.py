"""One drawing of a transformer block, for every chapter, with the place of the chapter's method coloured."""

from __future__ import annotations

from dataclasses import dataclass

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnnotationBbox, HPacker, TextArea
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Patch, Polygon, Rectangle
from matplotlib.path import Path

from peftlab.checks import checked, one_of
from peftlab.kit.figures.style import BLACK, ROLES, SMALLEST, WIDTH, Point, drawn, new

# What the line below the drawing says about each method.
METHODS = {
    "full": ("Every weight is trained.", ""),
    "lora": ("A and B are trained.", "The grey weights are frozen."),
    "qlora": ("A and B are trained.", "Hatched weights: frozen, in 4 bits."),
    "adapter": ("The adapters are trained.", "The grey weights are frozen."),
    "parallel-adapter": ("The adapter is trained.", "The grey weights are frozen."),
    "ia3": ("The scales × are trained.", "The grey weights are frozen."),
    "bitfit": ("The biases b are trained.", "The grey weights are frozen."),
    "prefix": ("Extra keys and values are trained.", "The rest is frozen."),
    "prompt": ("Extra tokens are trained.", "The grey weights are frozen."),
}
NORMS = ("pre", "post")

TRAINED, FROZEN, INK, PANEL = ROLES["adapter"], ROLES["weights"], "#454b54", "#f3f4f6"
STREAM = 256  # the height of the residual stream; all lengths here are points at the full size
ROWS = {"q": 184, "k": 134, "v": 84}
BELOW = 24  # from a row to the free place below it
THROUGH = 122  # the height at which attention's output leaves
UP = 184  # the height of the weights on the way back up, o and down
SCALE = 157  # the height of IA3's scale, between the hidden numbers and the down projection


@dataclass(frozen=True)
class _Layout:
    """Where the legs stand: into attention and out of it, into the feed-forward part and out of it."""

    attention: int
    attention_out: int
    forward: int
    forward_out: int
    right: int


LAYOUTS = {"pre": _Layout(107, 235, 306, 416, 466), "post": _Layout(92, 220, 301, 389, 466)}


@checked()
@drawn()
def block(method: str, norm: str = "pre") -> Figure:
    """Draw one transformer block, with what the method trains in the colour of adapters.

    Tokens enter at the left. The thick line is the residual stream. Attention and the feed-forward part hang below it:
    each reads the stream, and adds its result to it.

    Args:
        method: "full", "lora", "qlora", "adapter" (in series, after both parts), "parallel-adapter", "ia3", "bitfit",
            "prefix" or "prompt".
        norm: "pre" draws a block like Llama's, with a norm in front of each part and a gated feed-forward part. "post"
            draws one like BERT's, with a norm behind each addition.

    Returns:
        Figure.

    Raises:
        PeftLabError: there is no such method or norm (with near matches).

    >>> pl.figures.block("lora")
    <Figure size 896x560 with 1 Axes>
    >>> pl.figures.block("adapters")
    Traceback (most recent call last):
    peftlab.errors.PeftLabError: method must be one of 'full', 'lora', ...; found 'adapters'. Did you mean 'adapter'...
    """
    method, norm = one_of("method", method, METHODS), one_of("norm", norm, NORMS)
    figure, axes = new(width=WIDTH, height=4.0)
    axes.set(xlim=(0, 467), ylim=(0, 286), aspect="equal")
    axes.axis("off")
    _Block(axes, method, LAYOUTS[norm], pre=norm == "pre").draw()
    return figure


class _Block:
    """The drawing of one block. It knows what the method trains, and each shape asks it for its looks."""

    def __init__(self, axes: Axes, method: str, at: _Layout, pre: bool) -> None:
        self.axes, self.method, self.at, self.pre = axes, method, at, pre

    def draw(self) -> None:
        at = self.at
        left = 27 if self.pre else 14
        self.panel(at.attention - left, at.attention_out + 40, "attention")
        self.panel(at.forward - left, at.forward_out + 47, "feed-forward")
        self.line((72, STREAM), (at.right, STREAM), thick=True)
        self.tokens()
        self.attention()
        self.feed_forward()
        self.axes.text((at.attention + at.attention_out) / 2, STREAM + 6, "residual stream", ha="center", va="bottom",
                       fontsize=SMALLEST, color=INK)
        self.sentence(*METHODS[self.method])

    # The parts of a block

    def tokens(self) -> None:
        """Draw each token as a column of numbers; virtual tokens stand in front of them."""
        places = [(33 + 10 * i, self.method == "full") for i in range(4)]
        if self.method == "prompt":
            places += [(2 + 10 * i, True) for i in range(3)]
        for x, trained in places:
            self.add(Rectangle((x, STREAM - 22), 7, 44), trained)
        self.axes.text(52, STREAM - 27, "tokens", ha="center", va="top", fontsize=SMALLEST, color=INK)
        if self.method == "prompt":
            self.axes.plot([15.5, 15.5], [STREAM - 27, STREAM - 40], color=TRAINED, linewidth=1.2)
            self.axes.text(24, STREAM - 42, "prompt", ha="center", va="top", fontsize=SMALLEST, color=TRAINED)

    def attention(self) -> None:
        into, out = self.at.attention, self.at.attention_out
        self.enter(into, bottom=ROWS["v"])
        left = out - 52  # of the softmax
        for name, y in ROWS.items():
            self.line((into, y), (left, y))
            lora = self.method == "qlora" or (self.method == "lora" and name in "qv")
            self.weight(name, (into + 29, y), width=34, lora=lora, start=into)
            if self.method == "ia3" and name in "kv":
                self.operation("×", (into + 58, y), trained=True)
            if self.method == "prefix" and name in "kv":
                self.line((into + 29, y - BELOW), (left, y - BELOW))
                self.extra((into + 29, y - BELOW))
        self.box("softmax", (left + 12, THROUGH), 24, None, height=150, rotation=90)
        self.path([(left + 24, THROUGH), (out, THROUGH), (out, STREAM)])
        self.weight_up("o", out, width=28, lora=self.method == "qlora")
        self.leave(out)

    def feed_forward(self) -> None:
        into, out = self.at.forward, self.at.forward_out
        rows = {"gate": 158, "up": 108} if self.pre else {"up": 104}
        self.enter(into, bottom=min(rows.values()))
        middle = sum(rows.values()) / len(rows)
        for name, y in rows.items():
            if self.pre:
                self.path([(into, y), (into + 78, y), (into + 78, middle)])
            else:
                self.line((into, y), (out, y), arrow=False)
            self.weight(name, (into + 33, y), width=40, lora=self.method == "qlora", start=into)
        if self.pre:
            self.path([(into + 78, middle), (out, middle), (out, STREAM)])
            self.operation("×", (into + 78, middle))
        else:
            self.path([(out, middle), (out, STREAM)])
            self.box("GELU", (out, 133), 44, None, height=18)
        if self.method == "ia3":
            self.operation("×", (out, SCALE), trained=True)
        self.weight_up("down", out, width=42, lora=self.method == "qlora")
        if self.method == "parallel-adapter":
            self.parallel(into, out)
        self.leave(out)

    def enter(self, x: float, bottom: float) -> None:
        """Draw the way from the stream down into a part, through the norm if it stands in front."""
        self.line((x, STREAM), (x, bottom), arrow=False)
        if self.pre:
            self.box("norm", (x, 216), 42, self.method == "full")

    def leave(self, x: float) -> None:
        """Draw the way back to the stream: a serial adapter, the addition, and the norm if it stands behind."""
        if self.method == "adapter":
            self.bottleneck((x, 218), long=34, thick=12, upright=True)
        self.operation("+", (x, STREAM))
        if not self.pre:
            self.box("norm", (x + 34, STREAM), 42, self.method == "full")
            if self.method == "bitfit":
                self.bias((x + 55, STREAM), 22)

    def parallel(self, into: float, out: float) -> None:
        y, right = 66, out + 32
        self.path([(into, 110), (into, y), (right, y), (right, 218), (out + 8, 218)])
        self.bottleneck((into + 55, y), long=34, thick=16, upright=False)
        self.operation("+", (out, 218))

    # Weights and what stands beside them

    def weight(self, name: str, centre: Point, width: float, lora: bool, start: float) -> None:
        """Draw a weight through which the data goes from left to right."""
        x, y = centre
        self.box(name, centre, width, self.method == "full", quantized=self.method == "qlora")
        if self.method == "bitfit":
            self.bias((x + width / 2, y), 22)
        if lora:
            join = x + width / 2 + 10
            self.path([(start, y), (start, y - BELOW), (join, y - BELOW), (join, y - 6)])
            self.bottleneck((x, y - BELOW), long=20, thick=18, upright=False, names="AB")
            self.operation("+", (join, y), radius=6)

    def weight_up(self, name: str, x: float, width: float, lora: bool) -> None:
        """Draw a weight on the way up."""
        self.box(name, (x, UP), width, self.method == "full", quantized=self.method == "qlora")
        if self.method == "bitfit":
            self.bias((x + width / 2, UP), 22)
        if lora:
            beside = x + width / 2 + 12
            self.path([(x, UP - 24), (beside, UP - 24), (beside, UP + 27), (x + 6, UP + 27)])
            self.bottleneck((beside, UP), long=20, thick=18, upright=True, names="AB")
            self.operation("+", (x, UP + 27), radius=6)

    def bottleneck(self, centre: Point, long: float, thick: float, upright: bool, names: str = "  ") -> None:
        """Draw two trapezoids, down and up, that meet at their narrow ends."""
        x, y = centre
        narrow = 0.28 * long
        for side, name in zip((-1, 1), names, strict=True):
            corners = [(side * (thick + 0.5), long / 2), (side * (thick + 0.5), -long / 2), (side, -narrow),
                       (side, narrow)]
            if upright:
                corners = [(b, a) for a, b in corners]
            self.add(Polygon([(x + a, y + b) for a, b in corners], closed=True, joinstyle="round"), True)
            off = side * (thick / 2 + 1.2)
            self.axes.text(*((x, y + off) if upright else (x + off, y)), name, ha="center", va="center_baseline",
                           fontsize=SMALLEST, color="white", fontweight="bold", zorder=5)

    def bias(self, middle_left: Point, height: float) -> None:
        x, y = middle_left
        self.add(Rectangle((x, y - height / 2), 12, height), True)
        self.axes.text(x + 6, y, "b", ha="center", va="center", fontsize=SMALLEST, color="white", fontweight="bold",
                       zorder=5)

    def extra(self, centre: Point) -> None:
        """Draw the extra keys or values of a prefix as columns of numbers, like tokens."""
        x, y = centre
        for i in range(3):
            self.add(Rectangle((x - 16 + 11 * i, y - 9), 8, 18), True)

    # Shapes

    def box(
        self, name: str, centre: Point, width: float, trained: bool | None, height: float = 22, quantized: bool = False,
        rotation: int = 0,
    ) -> None:
        x, y = centre
        corner = (x - width / 2 + 3, y - height / 2 + 3)
        self.add(FancyBboxPatch(corner, width - 6, height - 6, boxstyle="round,pad=3,rounding_size=4"), trained,
                 hatch="//////" if quantized else "")
        plate = {"facecolor": FROZEN, "edgecolor": "none", "pad": 0.6} if quantized else None
        self.axes.text(x, y - 0.5, name, ha="center", va="center", fontsize=SMALLEST, zorder=5, bbox=plate,
                       rotation=rotation, color="white" if trained else BLACK,
                       fontweight="bold" if trained else "normal")

    def operation(self, sign: str, centre: Point, trained: bool | None = None, radius: float = 9) -> None:
        self.add(Circle(centre, radius), trained)
        self.axes.text(*centre, sign, ha="center", va="center_baseline", fontsize=SMALLEST, zorder=5,
                       color="white" if trained else BLACK, fontweight="bold")

    def add(self, patch: Patch, trained: bool | None, hatch: str = "") -> None:
        """Add a shape: a trained or a frozen weight, or, for None, an operation without weights."""
        fill = "white" if trained is None else TRAINED if trained else FROZEN
        patch.set(facecolor=fill, edgecolor=TRAINED if trained else INK, linewidth=1.1, zorder=4)
        if hatch:
            patch.set(hatch=hatch, hatch_linewidth=0.7)
        self.axes.add_patch(patch)

    def sentence(self, trained: str, frozen: str) -> None:
        """Say below the drawing what the colours mean."""
        looks = [(trained, {"color": TRAINED, "fontweight": "bold"}), (frozen, {"color": INK})]
        parts: list[Artist] = [TextArea(text, textprops={"fontsize": SMALLEST, **look}) for text, look in looks if text]
        line = HPacker(children=parts, pad=0, sep=5)
        middle = (self.at.attention + self.at.forward_out) / 2 + 8
        self.axes.add_artist(AnnotationBbox(line, (middle, 11), frameon=False, pad=0))

    def panel(self, left: float, right: float, name: str) -> None:
        self.axes.add_patch(FancyBboxPatch((left + 6, 33), right - left - 12, 201, boxstyle="round,pad=6",
                                           facecolor=PANEL, edgecolor="none", zorder=0))
        self.axes.text((left + right) / 2, 32, name, ha="center", va="bottom", fontsize=SMALLEST, color=INK)

    def line(self, start: Point, end: Point, thick: bool = False, arrow: bool = True) -> None:
        self.path([start, end], thick, arrow)

    def path(self, points: list[Point], thick: bool = False, arrow: bool = True) -> None:
        """Draw a line with corners; shapes above it hide what it crosses."""
        style, head, width = "-|>" if arrow else "-", 16 if thick else 9, 2.6 if thick else 1.2
        self.axes.add_patch(FancyArrowPatch(path=Path(points), arrowstyle=style, mutation_scale=head, linewidth=width,
                                            color=INK, zorder=2, joinstyle="round"))
