"""What a choice is made of: the facts of a case at the left, the decisions at the right, and which decides which."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from peftlab.checks import checked
from peftlab.kit.figures.style import BLACK, ROLES, SMALLEST, WIDTH, drawn, new

DECIDED, GIVEN, INK = ROLES["adapter"], ROLES["weights"], "#454b54"
ACROSS, HIGH = 461, 252  # points of the whole drawing
TALL = 42  # of a box
# (left edge, width) of the two columns
FACTS_AT, DECISIONS_AT = (2, 240), (318, 141)
# {fact: the question that one asks}, from top to bottom
FACTS = {
    "serving": "one model, or many adapters?",
    "card": "how much memory, how much time?",
    "model": "which layers, which precision?",
    "task": "a format, a skill, new facts?",
    "data": "how many examples, how long?",
}
# {decision: (what it says, the facts that decide it)}
DECISIONS = {
    "method": ("full, LoRA, QLoRA", ("serving", "card")),
    "targets": ("which layers train", ("model", "task")),
    "rank": ("room for what is new", ("task", "data")),
    "rate": ("searched, never set", ("data",)),
}


@checked()
@drawn()
def choice() -> Figure:
    """Draw what a choice of method is made of: five facts about a case, and the four decisions that follow from them.

    What is given is in the colour of frozen weights. What is decided is in that of adapters.

    >>> pl.figures.choice()
    <Figure size 896x490 with 1 Axes>
    """
    figure, axes = new(width=WIDTH, height=HIGH / 72)
    axes.set(xlim=(0, ACROSS), ylim=(0, HIGH), aspect="equal")
    axes.axis("off")
    facts, decisions = _heights(len(FACTS)), _heights(len(DECISIONS))
    at = dict(zip(FACTS, facts, strict=True))
    for (name, told), y in zip(FACTS.items(), facts, strict=True):
        _box(axes, name, told, FACTS_AT, y, GIVEN, BLACK)
    for (name, (told, sources)), y in zip(DECISIONS.items(), decisions, strict=True):
        _box(axes, name, told, DECISIONS_AT, y, DECIDED, "white")
        for place, source in enumerate(sources):
            end = y + 8 * ((len(sources) - 1) / 2 - place)
            axes.add_patch(FancyArrowPatch((sum(FACTS_AT) + 1, at[source]), (DECISIONS_AT[0] - 1, end),
                                           arrowstyle="-|>", mutation_scale=11, linewidth=1.3, color=INK,
                                           shrinkA=0, shrinkB=0, zorder=2))  # fmt: skip
    return figure


def _heights(boxes: int) -> list[float]:
    """Return the middles of boxes that share the height evenly, from top to bottom."""
    share = HIGH / boxes
    return [HIGH - share * (place + 0.5) for place in range(boxes)]


def _box(axes: Axes, name: str, told: str, at: tuple[float, float], y: float, fill: str, ink: str) -> None:
    left, width = at
    axes.add_patch(FancyBboxPatch((left + 3, y - TALL / 2 + 3), width - 6, TALL - 6, zorder=3, facecolor=fill,
                                  edgecolor=INK, linewidth=1.1, boxstyle="round,pad=3,rounding_size=5"))  # fmt: skip
    middle = left + width / 2
    axes.text(middle, y + 9, name, ha="center", va="center", fontsize=SMALLEST, fontweight="bold", color=ink, zorder=5)
    axes.text(middle, y - 9, told, ha="center", va="center", fontsize=SMALLEST, color=ink, zorder=5)
