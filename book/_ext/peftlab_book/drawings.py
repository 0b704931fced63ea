"""The drawings of the front page: what training costs, one small drawing for each card, and the picture for links.

The docstring of a card's drawing is its description for readers who cannot see it. Grey is frozen and orange is
trained, as in all drawings of the book.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from peftlab.kit import measurements
from peftlab.kit.figures.style import COLOURS, ROLES, styled
from peftlab.memory import Estimate, estimate
from peftlab_book.facts import VERDICTS, load
from peftlab_book.sketch import INK, Box, Dot, Line, Shape, Words

TRAINED, FROZEN, GRADIENTS, STATES = (ROLES[name] for name in ("adapter", "weights", "gradients", "optimiser"))
ACTIVATIONS, WORKSPACE = ROLES["activations"], ROLES["workspace"]
CARD = (160, 84)  # the size of a card's drawing
GB = 1e9
FOLDER = Path(__file__).resolve().parents[2] / "facts"

# ----------------------------------------------------------------------------------------------- what training costs

RUN = {"batch": 1, "sequence": 512, "checkpointing": True}
LORA = {"r": 16, "targets": "all-linear"}
METHODS = {"full": "Full fine-tuning", "lora": "LoRA", "qlora": "QLoRA"}
COST = (560, 330)
LEFT, RIGHT, FIRST, STEP, BAR = 96, 548, 58, 90, 30  # the bars' left end, 60 GB, the first row, the next, their height
MOST = 60  # GB
HOLDS = 24  # GB, a card that many people have


@dataclass(frozen=True)
class Cost:
    """One step of Llama-2-7B by one method: estimated, and the peak in bytes that was measured for it."""

    name: str
    estimated: Estimate
    measured: float

    @property
    def parts(self) -> dict[str, float]:
        """The bytes of each role at the peak."""
        e = self.estimated
        return {
            "weights": e.weights,
            "adapter": e.adapter,
            "gradients": e.gradients,
            "optimiser": e.optimizer,
            "activations": e.activations,
            "workspace": e.logits + e.workspace,
        }


@functools.cache
def costs() -> dict[str, Cost]:
    """The steps that chapter 1 compares."""
    grid, found = measurements.results("memory"), {}
    for method, name in METHODS.items():
        run = RUN | (LORA if method != "full" else {})
        row = grid.one(section="grid", shape="llama-2-7b", method=method, optimizer="adamw", **run)
        found[method] = Cost(name, estimate("llama-2-7b", method, **run), row["peak_bytes"])
    return found


def place(gigabytes: float) -> float:
    return LEFT + (RIGHT - LEFT) * gigabytes / MOST


def cost(found: Mapping[str, Cost]) -> list[Shape]:
    """Draw what each method trains, and what one step of it takes."""
    shapes: list[Shape] = [
        Words(place(HOLDS), 16, f"a card of {HOLDS} GB", 16, anchor="middle", ink=INK),
        Line([(place(HOLDS), 24), (place(HOLDS), COST[1] - 30)], dashed=True),
    ]
    for number, (method, row) in enumerate(found.items()):
        y = FIRST + number * STEP
        shapes += model(method, y - 13)
        shapes.append(Words(LEFT, y - 8, row.name, 19, bold=True))
        at = LEFT
        for role, size in row.parts.items():
            width = (RIGHT - LEFT) * size / GB / MOST
            if width > 1.5:  # what is thinner than its outline would look larger than it is
                shapes.append(Box(at, y, width, BAR, ROLES[role], round=0))
            at += width
        real = place(row.measured / GB)
        shapes.append(Line([(real, y - 3), (real, y + BAR + 6)], "#1a1a1a", 3))
        shapes.append(Words(RIGHT, y - 8, f"{row.measured / GB:.1f} GB", 19, bold=True, anchor="end"))
    return (
        shapes
        + names(found["full"], FIRST + BAR + 18)
        + [Words(LEFT, COST[1] - 6, "bars: predicted; upright marks: measured on a GPU", 16, ink=INK)]
    )


def names(row: Cost, y: float) -> list[Shape]:
    """Name the three great parts of full fine-tuning, below its bar."""
    spoken, shapes, at = {"weights": "weights", "gradients": "gradients", "optimiser": "optimiser"}, [], LEFT
    for role, size in row.parts.items():
        width = (RIGHT - LEFT) * size / GB / MOST
        if role in spoken:
            shapes.append(Words(at + 1, y, spoken[role], 15, ink=INK))
        at += width
    return shapes


def model(method: str, y: float) -> list[Shape]:
    """Draw a model as a square, with what the method trains in orange."""
    if method == "full":
        return [Box(8, y, 52, 52, TRAINED)]
    corners = [(8, y), (60, y), (60, y + 52), (8, y + 52), (8, y)]
    whole: Shape = Box(8, y, 52, 52, FROZEN)
    # four bits take a quarter of the room
    frozen = [Line(corners, INK, 1, dashed=True), Box(8, y + 26, 26, 26, FROZEN)] if method == "qlora" else [whole]
    return [*frozen, Box(65, y, 7, 52, TRAINED, round=2), Box(75, y, 7, 52, TRAINED, round=2)]


def told(found: Mapping[str, Cost]) -> str:
    """Describe the picture for those who cannot see it."""
    peaks = ", ".join(f"{row.name} {row.measured / GB:.1f} GB" for row in found.values())
    parts = found["full"].parts
    share = parts["optimiser"] / sum(parts.values())
    return (
        f"Three bars of memory for one training step of Llama-2-7B, each with a mark at what a GPU took: {peaks}. "
        f"Of full fine-tuning {share:.0%} is the optimiser's. A dashed line at {HOLDS} GB shows a common card: "
        f"{' and '.join(row.name for row in found.values() if row.measured < HOLDS * GB)} fit it. "
        "Beside the bars stands the model, orange where it is trained and grey where it is frozen."
    )


# ------------------------------------------------------------------------------------------------ the cards' drawings


def full() -> list[Shape]:
    """Four blocks of memory in a row: weights, gradients and twice the optimiser. A dashed line cuts the last."""
    squares = [Box(11 + 35 * i, 26, 32, 32, fill) for i, fill in enumerate((FROZEN, GRADIENTS, STATES, STATES))]
    return [*squares, Line([(112, 10), (112, 74)], dashed=True)]


def lora() -> list[Shape]:
    """A large grey square, and beside it a thin tall and a thin wide orange bar."""
    return [
        Box(22, 14, 56, 56, FROZEN),
        Box(100, 14, 10, 56, TRAINED),
        Box(116, 14, 34, 10, TRAINED),
        Line([(85, 42), (93, 42)], width=2),
        Line([(89, 38), (89, 46)], width=2),
    ]


def qlora() -> list[Shape]:
    """A square of sixteen cells, each in one of a few greys, and beside it two thin orange bars."""
    greys = [f"#{v:02x}{v + 4:02x}{v + 9:02x}" for v in (238, 226, 214, 201, 188, 176, 164, 152)]
    order = (3, 0, 5, 2, 6, 1, 4, 7, 2, 4, 1, 6, 0, 3, 7, 5)
    cells = [Box(22 + 14 * (i % 4), 14 + 14 * (i // 4), 14, 14, greys[k], round=0) for i, k in enumerate(order)]
    return [
        *cells,
        Box(100, 14, 10, 56, TRAINED),
        Box(116, 14, 34, 10, TRAINED),
        Line([(85, 42), (93, 42)], width=2),
        Line([(89, 38), (89, 46)], width=2),
    ]


def prompts() -> list[Shape]:
    """Three rows of tokens. The first two of each row are orange, the others grey."""
    rows = [(14, 2), (34, 2), (54, 2)]
    return [Box(14 + 22 * i, y, 17, 15, TRAINED if i < n else FROZEN) for y, n in rows for i in range(6)]


def adapters() -> list[Shape]:
    """An orange funnel, narrow in its middle, between two grey layers."""
    funnel = [(58, 32), (102, 32), (87, 42), (102, 52), (58, 52), (73, 42), (58, 32)]
    return [
        Line([(80, 4), (80, 80)], width=2),
        Box(50, 10, 60, 16, FROZEN),
        Line(funnel, INK, 1.2, fill=TRAINED),
        Box(50, 58, 60, 16, FROZEN),
    ]


def scales() -> list[Shape]:
    """Seven grey bars of different heights, each with an orange knob at its top."""
    heights = (34, 20, 52, 28, 44, 14, 38)
    bars = [Box(14 + 20 * i, 74 - h, 12, h, FROZEN) for i, h in enumerate(heights)]
    return bars + [Dot(20 + 20 * i, 74 - h, 4.5, TRAINED) for i, h in enumerate(heights)]


def family() -> list[Shape]:
    """A small drawing of LoRA, and below it two variants: one with a vector more, one with parts taken away."""

    def member(x: float, y: float) -> list[Shape]:
        return [
            Box(x, y, 22, 22, FROZEN, round=2),
            Box(x + 26, y, 5, 22, TRAINED, round=1),
            Box(x + 34, y, 12, 5, TRAINED, round=1),
        ]

    vector = [Box(13, 52, 5, 22, TRAINED, round=1), *member(22, 52)]
    pruned = [
        Box(100, 52, 22, 22, FROZEN, round=2),
        Box(126, 52, 5, 22, TRAINED, round=1),
        Box(133, 52, 5, 22, "none", round=1),
        Box(143, 52, 12, 5, TRAINED, round=1),
        Box(143, 59, 12, 5, "none", round=1),
    ]
    forks = [Line([(80, 34), (80, 42), (44, 42), (44, 47)]), Line([(80, 42), (122, 42), (122, 47)])]
    return [*member(58, 8), *forks, *vector, *pruned]


def choosing() -> list[Shape]:
    """Three intervals around a dashed line. One has an orange point."""
    rows = [(20, 52, 96, 76, TRAINED), (42, 40, 104, 66, FROZEN), (64, 72, 138, 112, FROZEN)]
    shapes: list[Shape] = [Line([(80, 8), (80, 78)], dashed=True)]
    for y, low, high, middle, fill in rows:
        shapes += [
            Line([(low, y), (high, y)], width=2),
            Line([(low, y - 4), (low, y + 4)], width=2),
            Line([(high, y - 4), (high, y + 4)], width=2),
            Dot(middle, y, 5, fill),
        ]
    return shapes


def recipes() -> list[Shape]:
    """A curve of the loss that falls and ends in an orange point."""
    heights = (14, 26, 39, 45, 53, 55, 60, 61, 63)
    curve = [(28 + 14 * i, h) for i, h in enumerate(heights)]
    return [Line([(18, 8), (18, 74), (150, 74)]), Line(curve, INK, 2.2), Dot(*curve[-1], 5.5, TRAINED)]


def bars() -> list[Shape]:
    """Three bars of memory and a dashed line. The first bar crosses it, the others do not."""
    shapes: list[Shape] = []
    for y, parts in ((10, (34, 34, 66)), (34, (34, 16, 8)), (58, (12, 14, 6))):
        at = 10
        for width, fill in zip(parts, (FROZEN, GRADIENTS if y == 10 else ACTIVATIONS, STATES), strict=True):
            shapes.append(Box(at, y, width, 15, fill, round=0))
            at += width
    return [*shapes, Line([(86, 2), (86, 82)], dashed=True)]


def verdict_counts() -> list[int]:
    """The number of claims with each verdict: right, half right, wrong."""
    found = [claim["verdict"] for facts in load(FOLDER)[0] for claim in facts.claims]
    return [found.count(verdict) for verdict in VERDICTS]


def verdicts() -> list[Shape]:
    """Three bars with the number of claims that are right, half right and wrong."""
    counts = verdict_counts()
    shapes: list[Shape] = [
        Line([(9, 20), (14, 26), (24, 13)], COLOURS[2], 3), Line([(9, 44), (24, 44)], COLOURS[3], 3),
        Line([(10, 63), (22, 75)], COLOURS[4], 3), Line([(22, 63), (10, 75)], COLOURS[4], 3),
    ]  # fmt: skip
    for y, count in zip((12, 36, 61), counts, strict=True):
        wide = 86 * count / max(counts)
        shapes += [Box(36, y, wide, 15, FROZEN), Words(42 + wide, y + 13, str(count), 14, bold=True)]
    return shapes


def fork() -> list[Shape]:
    """A box from which three ways lead over a question each; one of them ends in an orange box."""
    ways = [Line([(44, 42), (66, 42), (66, y), (84, y)], width=2 if y == 42 else 1.4) for y in (16, 42, 68)]
    ends = [Box(112, y - 9, 36, 18, TRAINED if y == 42 else FROZEN) for y in (16, 42, 68)]
    more = [Line([(96, y), (112, y)], width=2 if y == 42 else 1.4) for y in (16, 42, 68)]
    questions = [Dot(90, y, 6, "#ffffff") for y in (16, 42, 68)]
    return [Box(12, 30, 32, 24, "#ffffff", INK, 5), *ways, *more, *questions, *ends]


CARDS: dict[str, Callable[[], list[Shape]]] = {
    "01_full_finetuning_memory": full, "02_lora": lora, "03_qlora_nf4": qlora, "04_prompts_and_prefixes": prompts,
    "05_adapters": adapters, "06_ia3_and_bitfit": scales, "07_lora_family": family, "08_choosing": choosing,
    "09_training_recipes": recipes, "appendix_calculator": bars, "appendix_claims": verdicts, "appendix_guide": fork,
}  # fmt: skip

# ------------------------------------------------------------------------------- the picture for links, and the cover

PREVIEW = (1200, 630)
COVER = (600, 900)
WIDE = 550  # what the drawing of the costs takes of both


def preview(title: str, lines: list[str]) -> bytes:
    """Return the picture that other sites show beside a link: a title, some lines, and what training costs."""
    return picture(PREVIEW, (620, 153), title, lines)


def cover(title: str, lines: list[str]) -> bytes:
    """Return the same upright, as the cover of a book, with twice the pixels."""
    return picture(COVER, (25, 545), title, lines, scale=2)


@styled()
def picture(size: tuple[int, int], at: tuple[int, int], title: str, lines: list[str], scale: int = 1) -> bytes:
    """Draw a title and some lines below it, and what training costs with its upper left corner at `at`."""
    dots = 100
    figure = Figure(figsize=(size[0] / dots, size[1] / dots), dpi=dots, facecolor="white")
    left = figure.add_axes((0, 0, 1, 1), xlim=(0, size[0]), ylim=(size[1], 0))
    left.axis("off")
    for shape in (
        Box(0, 0, 14, size[1], TRAINED, "none", 0),
        Box(70, 96, 74, 74, FROZEN),
        Box(152, 96, 14, 74, TRAINED),
        Box(174, 96, 14, 74, TRAINED),
        Words(70, 262, title, 84, bold=True),
    ):
        shape.draw(left)
    for number, line in enumerate(lines):
        Words(70, 330 + 46 * number, line, 32, ink=INK).draw(left)
    high = WIDE * COST[1] / COST[0]
    place = (at[0] / size[0], 1 - (at[1] + high) / size[1], WIDE / size[0], high / size[1])
    right = figure.add_axes(place, xlim=(0, COST[0]), ylim=(COST[1], 0))
    right.axis("off")
    for shape in cost(costs()):
        shape.draw(right)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dots * scale, metadata={"Software": None})
    return buffer.getvalue()
