"""The variants that `bench family` compares, what their papers lead one to expect, and how a run is described."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

Row = dict[str, Any]

TUNING, SEEDS = 10, (0, 1, 2)  # the seed of the runs that choose a rate, and those of the runs that are scored
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)  # LoRA's; each variant has its own range of the same ladder
LOWER, LOWEST, HIGHER = (1e-4, *RATES[:5]), (3e-5, 1e-4, *RATES[:4]), (*RATES[1:], 3e-1)
TASKS: dict[str, Row] = {"desk": {"steps": 60, "batch_size": 8}, "reviews": {"steps": 60, "batch_size": 24}}
TARGETS = "q_proj,v_proj"


class Variant(NamedTuple):
    """One way to train: a method of the catalogue or "full", its settings, the two sizes, and the rates to try."""

    method: str
    settings: Row
    sizes: tuple[Row, ...]
    rates: tuple[float, ...]


RANKS: tuple[Row, ...] = ({"r": 8}, {"r": 32})
ALPHA: Row = {"alpha": 16}  # the same for every rank: each variant has its own best rate
VARIANTS = {
    "LoRA": Variant("lora", ALPHA, RANKS, RATES),
    "full": Variant("full", {}, ({},), (3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3)),
    "DoRA": Variant("dora", ALPHA, RANKS, RATES),
    "rsLoRA": Variant("lora", {**ALPHA, "use_rslora": True}, RANKS, LOWER),
    "LoRA+": Variant("lora", {**ALPHA, "loraplus_lr_ratio": 16.0}, RANKS, LOWEST),
    "AdaLoRA": Variant("adalora", ALPHA, tuple({**size, "init_r": size["r"] * 3 // 2, "target_r": size["r"]}
                                               for size in RANKS), HIGHER),
    "VeRA": Variant("vera", {}, ({"r": 64}, {"r": 256}), HIGHER),
    "PiSSA": Variant("lora", {**ALPHA, "init": "pissa"}, RANKS, LOWEST),
    "OLoRA": Variant("lora", {**ALPHA, "init": "olora"}, RANKS, LOWEST),
    "EVA": Variant("lora", {**ALPHA, "init": "eva"}, RANKS, RATES),
    "orthogonal": Variant("lora", {**ALPHA, "init": "orthogonal"}, RANKS, LOWER),
    "LoHa": Variant("loha", ALPHA, ({"r": 4}, {"r": 16}), RATES),
    "LoKr": Variant("lokr", ALPHA, ({"r": 8}, {"r": 32, "decompose_factor": 4}), RATES),
    "OFT": Variant("oft", {}, ({"oft_block_size": 16}, {"oft_block_size": 32}), RATES),
}  # fmt: skip

# {variant: (paper, what it leads one to expect here, in a form that a row can contradict)}
PREDICTIONS = {
    "full": ("Biderman et al. 2024, arXiv:2405.09673",
             "learns more than LoRA (a lower test loss) and forgets more (a higher perplexity on news)"),
    "LoRA": ("Hu et al. 2021, arXiv:2106.09685", "reaches full fine-tuning, and r = 32 is no better than r = 8"),
    "rsLoRA": ("Kalajdzievski 2023, arXiv:2312.03732",
               "equals LoRA at r = 8; at r = 32 it is better, because LoRA's scale alpha / r is then too small. With a "
               "rate of its own for each, the scale is only another rate, and the difference should vanish"),
    "LoRA+": ("Hayou et al. 2024, arXiv:2402.12354",
              "1 to 2% more right answers than LoRA and up to twice as fast, with B's rate 16 times A's"),
    "DoRA": ("Liu et al. 2024, arXiv:2402.09353",
             "better than LoRA at equal rank, and at half the rank at least as good; over layers and steps the changes "
             "of magnitude and direction are correlated negatively, as in full fine-tuning, and positively in LoRA"),
    "AdaLoRA": ("Zhang et al. 2023, arXiv:2303.10512",
                "better than LoRA with as many parameters, most of all with few; more ranks stay in the upper layers "
                "and in the MLP than in queries and keys"),
    "VeRA": ("Kopiczko et al. 2023, arXiv:2310.11454", "equals LoRA with a tenth of its parameters, or fewer"),
    "PiSSA": ("Meng et al. 2024, arXiv:2404.02948",
              "its loss falls faster than LoRA's and ends lower, because the first singular directions train"),
    "OLoRA": ("Büyükakyüz 2024, arXiv:2406.01775", "its loss falls faster than LoRA's"),
    "EVA": ("Paischer et al. 2024, arXiv:2410.07170", "its loss falls faster than LoRA's and it has the best mean"),
    "orthogonal": ("no paper; an option of Hugging Face peft", "its loss falls faster than LoRA's"),
    "LoHa": ("Hyeon-Woo et al. 2021, arXiv:2108.06098",
             "better than LoRA with as many parameters, because its update has rank r squared"),
    "LoKr": ("Yeh et al. 2023, arXiv:2309.14859", "equals LoRA with fewer parameters"),
    "OFT": ("Qiu et al. 2023, arXiv:2306.07280",
            "forgets less than LoRA at an equal loss on the task, because angles between weights are kept"),
}  # fmt: skip


def grids(task: str, size: int) -> Iterator[Row]:
    """Yield the runs that choose each variant's rate, in its first or in its second size."""
    for name, variant in VARIANTS.items():
        for given in variant.sizes[size : size + 1]:
            for rate in variant.rates:
                settings = {"size": "large" if size else "small", **variant.settings, **given}
                yield run(task, task, name, settings, rate, TUNING)


def run(section: str, task: str, name: str, settings: Row, rate: float, seed: int, **more: Any) -> Row:
    """Describe one run of training."""
    method = {"method": VARIANTS[name].method, **settings, "targets": TARGETS}
    return {"section": section, "task": task, "variant": name, **method, **TASKS.get(task, {}), **more,
            "learning_rate": rate, "seed": seed, "scored": False}  # fmt: skip
