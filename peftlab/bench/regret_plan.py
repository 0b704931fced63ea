"""What `bench regret` runs: its settings, the rates to try for each, and what was predicted before the first run.

All rates of a section lie on one ladder. `FINE` has four rates per factor of ten, for the sections that ask where the
best rate is. The others ask how good a setting is at its best rate, and take the ladder of `bench lora`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from peftlab.bench import lora
from peftlab.bench.family_variants import SEEDS, TASKS, TUNING, run
from peftlab.bench.models import ALL_LINEAR
from peftlab.bench.search import Search, setting_of

Row = dict[str, Any]

FINE = tuple(float(f"{10 ** (k / 4):.1e}") for k in range(-24, 3))  # 1e-6, 1.8e-6, 3.2e-6, 5.6e-6, 1e-5, ... 3.2
COARSE = lora.LADDER
TWO = (TUNING, TUNING + 1)  # seeds that choose a rate where the rate itself is the question
LORA: Row = {"alpha": 32, "r": 16}  # alpha of "LoRA without regret"
RANKS = (1, 4, 16, 64, 256)
ALL = ",".join(ALL_LINEAR)
# Each about 920,000 parameters: r (d_in + d_out) summed over the modules, times 30 layers
PLACES = ((lora.QKVO, 8), (lora.MLP, 5), (ALL, 3), ("q_proj,v_proj", 16), ("q_proj", 27), ("v_proj", 40))
PASS = 2048  # messages of the desk that the section "batch" shows once
BATCHES = (8, 32, 128, 512)
STEPS = (15, 60, 240)
STOP = 15  # steps of a run that "live" keeps
# Strings: "steps" is the most that a run may take, see `regret_strings.Plateau`
STRINGS: Row = {"length": 8, "steps": 12_000, "precision": "bf16"}
STORED = (  # (strings, projections, r, how many of the last blocks), from 0.5 to 8 bits of data per parameter
    (191, ALL, 1, 1), (383, ALL, 1, 1), (766, ALL, 1, 1), (318, "down_proj", 1, 1), (2544, "down_proj", 4, 1),
)  # fmt: skip
ARTICLES: Row = {"targets": ALL, "batch_size": 16, "tokens": 128, "precision": "bf16"}
AMOUNTS = ((1600, 100), (200, 25))  # (articles, steps): one pass, and two
SWAPPED: Row = {"targets": ALL, "batch_size": 16, "tokens": 128, "precision": "bf16"}
LENGTHS = (380, 95)  # steps: nearly all pieces of the news once, and a quarter of them

# {section: ((source, what it predicts, in a form that a row can contradict), ...)}
PREDICTIONS: dict[str, tuple[tuple[str, str], ...]] = {
    "first": (
        ("derived in `regret_first`",
         "for any loss, the RMS of an entry of dW after one step is s lr sqrt((r + 2 r (r - 1) / (pi d_in)) / "
         "(3 d_in)): from r = 1 to 256 it falls 14 times with alpha = 16, and grows 18 times with alpha = 2 r. The "
         "part of dW along the gradient, and with it the fall of the loss, does not depend on r with alpha = 16, and "
         "grows 256 times with alpha = 2 r"),
    ),
    "rank": (
        ("Schulman and Thinking Machines Lab 2025, doi:10.64434/tml.20250929",
         "with alpha / r and a constant alpha the best rate is the same at every rank, within one step of the ladder"),
        ("derived in `regret_first`, from the fall of the loss in the first step",
         "with alpha = 2 r the best rate falls as 1 / r: at r = 256 it is 256 times lower than at r = 1"),
        ("derived in `regret_first`, from later steps too",
         "with alpha = 2 r the best rate falls as a power of r between -1 and -1/2; with a constant alpha it stays"),
        ("Kalajdzievski 2023, arXiv:2312.03732, if the size of dW decided",
         "with alpha = 2 r the best rate falls as 1 / sqrt(r): 16 times from r = 1 to 256; with a constant alpha it "
         "grows 16 times"),
        ("a rule of thumb in many guides", "alpha = 2 r keeps the best rate the same at every rank"),
    ),
    "full": (
        ("Schulman and Thinking Machines Lab 2025, doi:10.64434/tml.20250929",
         "LoRA's best rate is 10 times that of full fine-tuning, and 15 times in runs of up to 100 steps"),
        ("derived in `regret_first`, from the fall of the loss in the first step",
         "the ratio is of the size sqrt(3) d_in / alpha, which is 31 here. Gradients with few large entries lower it: "
         "with those of the first step, on the queries and values, it is 14"),
    ),
    "where": (
        ("Schulman and Thinking Machines Lab 2025, doi:10.64434/tml.20250929",
         "with as many parameters the MLP alone equals all seven projections, and attention alone loses to both"),
        ("Hu et al. 2021, arXiv:2106.09685",
         "with as many parameters q and v together are better than q alone and than v alone"),
    ),
    "batch": (
        ("Schulman and Thinking Machines Lab 2025, doi:10.64434/tml.20250929",
         "as the batch grows, at equal data, LoRA's loss grows more than that of full fine-tuning"),
    ),
    "capacity": (
        ("Allen-Zhu and Li 2024, arXiv:2404.05405, whole models trained on facts",
         "2 bits are stored per trained parameter where each fact is shown 1,000 times, and 1 where it is shown 100"),
        ("Morris et al. 2025, arXiv:2505.24832, whole models trained on random tokens",
         "3.6 bits are stored per trained parameter, and not more where there are more strings"),
        ("derived: of a pair of rank 1 only A is read, and B is one direction. And runs on a CPU",
         "fewer than 2 bits. With r = 1 on one projection each digit gets one number only: a small set is not stored "
         "whole, and more strings add bits"),
        ("Thinking Machines Lab 2025, tinker-docs.thinkingmachines.ai/lora-primer",
         "no floor: data beyond the capacity slow the training down, and the loss goes on falling"),
    ),
    "alphabet": (
        ("Biderman et al. 2024, arXiv:2405.09673",
         "with much to learn LoRA ends above full fine-tuning, the more so the lower its rank and the more data there "
         "are; and it forgets less"),
        ("Schulman and Thinking Machines Lab 2025, doi:10.64434/tml.20250929",
         "with 200 articles every rank from 8 on equals full fine-tuning, because they fit into it"),
    ),
    "rewiring": (
        ("derived in `regret_hard`",
         "each rank ends below the one before it, and full fine-tuning below r = 256, at both lengths; in the section "
         "alphabet r = 8 was as good as 256"),
        ("Biderman et al. 2024, arXiv:2405.09673",
         "full fine-tuning changes weights with 10 to 100 times the rank of usual LoRA: r = 16 stays above it however "
         "long the run; and LoRA forgets less"),
        ("Schulman and Thinking Machines Lab 2025, doi:10.64434/tml.20250929",
         "a high rank follows full fine-tuning, a low one falls off its curve when it is full"),
    ),
}  # fmt: skip


class Setting(NamedTuple):
    """One setting: what its runs have in common, and how its rate is searched."""

    told: Row
    search: Search

    def points(self) -> Iterator[Row]:
        """Yield the runs to begin with."""
        for rate in self.search.rates:
            for seed in self.search.tuning:
                yield {**self.told, "learning_rate": rate, "seed": seed}


def setting(section: str, task: str, name: str, settings: Row, search: Search, **more: Any) -> Setting:
    """Describe one setting of a section."""
    return Setting(run(section, task, name, settings, search.rates[0], search.tuning[0], **more), search)


def fine(lowest: float, number: int = 6, tuning: tuple[int, ...] = TWO) -> Search:
    """Return a search that begins with so many rates of the fine ladder."""
    first = FINE.index(lowest)
    return Search(FINE[first : first + number], FINE, tuning)


def coarse(
    lowest: float, number: int = 4, tuning: tuple[int, ...] = (TUNING,), seeds: tuple[int, ...] = SEEDS
) -> Search:
    """Return a search that begins with so many rates of the coarse ladder."""
    first = COARSE.index(lowest)
    return Search(COARSE[first : first + number], tuning=tuning, seeds=seeds)


def rank() -> Iterator[Setting]:
    """Vary r under two rules for alpha."""
    for r, lowest in zip(RANKS, (5.6e-3, 3.2e-3, 1.8e-3, 5.6e-4, 1.8e-4), strict=True):
        yield setting("rank", "desk", "LoRA", {"alpha": 16, "r": r}, fine(1.8e-3), rule="alpha = 16")
        yield setting("rank", "desk", "LoRA", {"alpha": 2 * r, "r": r}, fine(lowest), rule="alpha = 2 r")


def full(steps: int) -> Iterator[Setting]:
    """Compare LoRA and full fine-tuning at one length. LoRA over 60 steps is r = 16, alpha = 2 r of `rank`."""
    low_rank, every = {15: (3.2e-3, 5.6e-5), 60: (1.8e-3, 3.2e-5), 240: (1e-3, 1e-4)}[steps]
    number = 5 if steps == max(STEPS) else 6  # a long run costs as much as four of the usual ones
    if steps != TASKS["desk"]["steps"]:
        yield setting("full", "desk", "LoRA", LORA, fine(low_rank, number), steps=steps)
    yield setting("full", "desk", "full", {}, fine(every, number), steps=steps)


def where(task: str) -> Iterator[Setting]:
    """Put the same number of parameters into different layers. On the desk q and v together are a setting of `rank`."""
    lowest = {lora.MLP: 1e-3, ALL: 1e-3, "q_proj": 3.2e-3}
    left_out = ("q_proj,v_proj",) if task == "desk" else ("q_proj", "v_proj")
    for targets, r in PLACES:
        if targets not in left_out:
            first = FINE.index(lowest.get(targets, 1.8e-3)) - (2 if task == "reviews" else 0)
            search = fine(FINE[first], 5, (TUNING,))
            yield setting("where", task, "LoRA", {**LORA, "r": r}, search, targets=targets)


def batch(size: int) -> Iterator[Setting]:
    """Show the same messages once, in batches of one size."""
    low_rank, every = {8: (1e-3, 3e-5), 32: (1e-3, 3e-5), 128: (3e-3, 3e-5), 512: (1e-2, 1e-4)}[size]
    for name, settings, lowest in (("LoRA", LORA, low_rank), ("full", {}, every)):
        yield setting("batch", "desk", name, settings, coarse(lowest), batch_size=size, steps=PASS // size)


def capacity() -> Iterator[Setting]:
    """Store more and more strings in as many parameters, and strings enough in more and more of them."""
    for strings, targets, r, last in STORED:
        told = {**STRINGS, "strings": strings, "targets": targets, "last": last}
        yield setting("capacity", "strings", "LoRA", {**LORA, "r": r}, coarse(3e-3, 2, seeds=SEEDS[:2]), **told)


def rewiring() -> Iterator[Setting]:
    """Learn to read news in which frequent words have changed places, for two lengths of training.

    Two seeds choose each rate, because a rate at which one seed learns best can let another diverge.
    """
    for steps in LENGTHS:
        yield setting("rewiring", "rewired", "full", {}, coarse(3e-4, 3, TWO), **SWAPPED, steps=steps)
        for r in (256, 64, 16, 4, 1):
            search = coarse(1e-3, 3, TWO)
            yield setting("rewiring", "rewired", "LoRA", {**LORA, "r": r}, search, **SWAPPED, steps=steps)


def alphabet(articles: int, steps: int) -> Iterator[Setting]:
    """Learn to read news in Greek letters."""
    more = {**ARTICLES, "articles": articles, "steps": steps}
    for r in (8, 256, 1, 64):
        yield setting("alphabet", "greek", "LoRA", {**LORA, "r": r}, coarse(1e-3), **more)
    yield setting("alphabet", "greek", "full", {}, coarse(3e-5), **more)


def live() -> Iterator[Row]:
    """Yield runs of other sections (`of`) whose first steps are kept, loss by loss. The rates are their best ones."""
    for of, name, settings, rate, more in (
        ("full", "LoRA", LORA, 1e-2, {"steps": 15}),
        ("full", "full", {}, 3.2e-4, {"steps": 15}),
        ("where", "LoRA", {**LORA, "r": 5}, 3.2e-3, {"targets": lora.MLP}),
        ("where", "LoRA", {**LORA, "r": 8}, 5.6e-3, {"targets": lora.QKVO}),
        ("batch", "LoRA", LORA, 1e-3, {"batch_size": 8, "steps": PASS // 8}),
        ("batch", "full", {}, 1e-4, {"batch_size": 8, "steps": PASS // 8}),
    ):
        yield run("live", "desk", name, settings, rate, SEEDS[0], **more, of=of, stop=STOP)


def long() -> list[Setting]:
    """Return the settings whose runs take longest. They begin first, because other seeds follow at their best rates."""
    return [*full(max(STEPS)), *batch(min(BATCHES)), *rewiring(), *capacity()]


def short() -> list[Setting]:
    """Return the other settings. What matters most comes first, because a run may be cut."""
    return [
        *rank(), *(one for steps in STEPS[:-1] for one in full(steps)), *where("desk"),
        *alphabet(*AMOUNTS[0]), *(one for size in BATCHES[:0:-1] for one in batch(size)), *alphabet(*AMOUNTS[1]),
        *where("reviews"),
    ]  # fmt: skip


SEARCHES = {setting_of(one.told): one.search for one in (*long(), *short())}
