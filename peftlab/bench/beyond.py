"""LoRA beyond text generation: `peftlab bench beyond`. Small enough for two CPU cores.

    images       a small ViT reads the digits 0 to 4, then learns 5 to 9 from a hundred images
    embeddings   minilm learns to put headlines of one topic close together

The head alone, LoRA and full fine-tuning train at several rates with one seed. The rate with the best validation score
is taken, and other seeds run at it. `right` has a 1 for each test item that is right, and a 0 for each other one, so
that runs can be compared item by item.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

import peftlab as pl
from peftlab.bench.models import Row

SEEDS = (0, 1, 2)  # the first one chooses the rate
IMAGES: Row = {"section": "images", "examples": 100, "steps": 100, "batch": 32, "r": 4}
EMBEDDINGS: Row = {"section": "embeddings", "examples": 1024, "steps": 48, "batch": 32, "r": 8, "tokens": 16}
RATES = {
    "images": {"head": (1e-2, 3e-2, 1e-1), "lora": (1e-3, 3e-3, 1e-2, 3e-2), "full": (3e-4, 1e-3, 3e-3, 1e-2)},
    "embeddings": {"head": (1e-4, 3e-4, 1e-3, 1e-2), "lora": (3e-4, 1e-3, 3e-3, 1e-2), "full": (3e-5, 1e-4, 3e-4)},
}
TEMPERATURE = 0.1
HELD = 500  # articles at the end of the training split that no run trains on; they are tested beside the test split


def points() -> Iterator[Row]:
    """Yield one point for each method in each section, and the base of the second."""
    yield {**EMBEDDINGS, "method": "base", "rates": (0.0,)}
    for common in (IMAGES, EMBEDDINGS):
        for method, rates in RATES[common["section"]].items():
            yield {**common, "method": method, "rates": rates}


def measure(point: Row) -> list[Row]:
    """Run a method at each of its rates with the first seed, and with the others at the best one."""
    point = dict(point)
    rates = point.pop("rates")
    run = {"images": run_images, "embeddings": run_embeddings}[point["section"]]
    if point["method"] == "base":
        return [{**run(point, 0.0, 0), "chosen": True}]
    rows = [run(point, rate, SEEDS[0]) for rate in rates]
    best = max(rows, key=lambda row: row["validation"])["learning_rate"]
    rows += [run(point, best, seed) for seed in SEEDS[1:]]
    return [{**row, "chosen": row["learning_rate"] == best} for row in rows]


def row_of(point: Row, rate: float, seed: int, model: nn.Module, validation: float, right: Tensor) -> Row:
    """Return a run's row; `right` is (items,) of True and False."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    told = "".join(str(int(one)) for one in right)
    score = float(right.double().mean())
    return {**point, "learning_rate": rate, "seed": seed, "trainable": trained, "validation": validation,
            "test": score, "right": told}  # fmt: skip


def fit(model: nn.Module, loss: Callable[[Tensor], Tensor], size: int, steps: int, batch: int, rate: float,
        seed: int) -> None:  # fmt: skip
    """Take AdamW steps on what requires gradients: the rate rises over a tenth of them and then falls as a cosine.

    Args:
        loss: from the places of a batch's examples, (batch,), to its mean loss.
        size: how many examples there are.
    """
    draw = torch.Generator().manual_seed(seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss(torch.randint(size, (batch,), generator=draw)).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


# -------------------------------------------------------------------------------------------------------------- images


@cache
def images(split: str, first: int) -> tuple[Tensor, Tensor]:
    """Return the images (n, 1, 28, 28) of five digits from `first` on, and their labels 0 to 4."""
    data = pl.load_data("digits")[split].with_format("numpy")
    pixels = torch.tensor(numpy.asarray(data["image"][:])).float()[:, None]
    labels = torch.tensor(numpy.asarray(data["label"][:])) - first
    kept = (labels >= 0) & (labels < 5)
    return (pixels[kept] / 255 - 0.13) / 0.31, labels[kept]  # the mean and the spread of MNIST's pixels


def vit(seed: int = 0) -> ViTForImageClassification:
    """Return a ViT of two blocks and width 64 with random weights, for five classes. A patch has 7 x 7 pixels."""
    torch.manual_seed(seed)
    return ViTForImageClassification(ViTConfig(
        image_size=28, patch_size=7, num_channels=1, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=128, num_labels=5, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    ))  # fmt: skip


def train_images(model: nn.Module, x: Tensor, y: Tensor, steps: int, rate: float, seed: int = 0) -> None:
    """Train a classifier on images x with labels y."""
    fit(model, lambda chosen: model(x[chosen], labels=y[chosen]).loss, len(x), steps, IMAGES["batch"], rate, seed)


@torch.no_grad()
def says(model: nn.Module, x: Tensor) -> Tensor:
    """Return the class of each image."""
    return model(x).logits.argmax(-1)


@cache
def reader() -> dict[str, Tensor]:
    """Return the weights of a ViT that has learned the digits 0 to 4, without its head."""
    model = vit()
    train_images(model, *images("train", 0), steps=600, rate=2e-3)
    return {name: value for name, value in model.state_dict().items() if not name.startswith("classifier")}


def prepared(method: str, seed: int, r: int = 4) -> ViTForImageClassification:
    """Return the reader with a new head, and with what the method trains requiring gradients."""
    model = vit(seed)
    model.load_state_dict(reader(), strict=False)
    if method == "head":
        model.requires_grad_(False).classifier.requires_grad_(True)
    elif method == "lora":
        pl.attach(model, pl.LoRAConfig(r=r, alpha=2 * r, target_modules="all-linear", modules_to_save=["classifier"]))
    return model


def run_images(point: Row, rate: float, seed: int) -> Row:
    """Learn five new digits."""
    model = prepared(point["method"], seed, point["r"])
    x, y = images("train", 5)
    train_images(model, x[: point["examples"]], y[: point["examples"]], point["steps"], rate, seed)
    (x, y), (test, wanted) = images("validation", 5), images("test", 5)
    return row_of(point, rate, seed, model, float((says(model, x) == y).double().mean()), says(model, test) == wanted)


# ---------------------------------------------------------------------------------------------------------- embeddings


class Embedder(nn.Module):
    """minilm: the mean of the last states over a text's tokens, a linear map or none, and length 1.

    Args:
        projected: with a trained linear map, which begins as the identity.
    """

    def __init__(self, projected: bool) -> None:
        super().__init__()
        self.encoder, self.tokenizer = pl.load_model("minilm")
        width = self.encoder.config.hidden_size
        self.head: nn.Module = nn.Identity()
        if projected:
            self.head = head = nn.Linear(width, width, bias=False)
            nn.init.eye_(head.weight)

    def forward(self, texts: list[str], tokens: int) -> Tensor:
        """Return (texts, width)."""
        batch = self.tokenizer(texts, padding=True, truncation=True, max_length=tokens, return_tensors="pt")
        states, kept = self.encoder(**batch).last_hidden_state, batch["attention_mask"][..., None]
        return F.normalize(self.head((states * kept).sum(1) / kept.sum(1)), dim=1)


def contrastive(z: Tensor, labels: Tensor) -> Tensor:
    """Return the supervised contrastive loss of a batch (Khosla et al. 2020).

    For each text, the mean over the others with its label of -log softmax of the cosines over all others.

    Args:
        z: (batch, width) of length 1.
        labels: (batch,).
    """
    own = torch.eye(len(z), dtype=torch.bool)
    scores = (z @ z.T / TEMPERATURE).masked_fill(own, -torch.inf).log_softmax(1).masked_fill(own, 0.0)
    alike = (labels[:, None] == labels) & ~own
    return -((scores * alike).sum(1) / alike.sum(1).clamp(min=1)).mean()


@cache
def headlines(part: str) -> tuple[list[str], Tensor]:
    """Return the first lines of news articles and their topics. `part` is "train", "validation" or "test"."""
    data = pl.load_data("news")
    train = data["train"]
    cut = len(train) - HELD
    rows = {"train": [*train.select(range(cut))], "validation": [*data["validation"]],
            "test": [*data["test"], *train.select(range(cut, len(train)))]}[part]  # fmt: skip
    return [row["text"].split("\n", 1)[0] for row in rows], torch.tensor([row["label"] for row in rows])


@torch.no_grad()
def neighbours(model: Embedder, part: str, tokens: int) -> Tensor:
    """For each headline, tell whether the nearest other one has its topic: (headlines,) of True and False."""
    texts, labels = headlines(part)
    z = torch.cat([model(texts[i : i + 100], tokens) for i in range(0, len(texts), 100)])
    return labels[(z @ z.T).fill_diagonal_(-2).argmax(1)] == labels


def run_embeddings(point: Row, rate: float, seed: int) -> Row:
    """Learn to embed headlines by topic."""
    method, tokens = point["method"], point["tokens"]
    torch.manual_seed(seed)
    model = Embedder(projected=method == "head")
    if method in ("head", "base"):
        model.encoder.requires_grad_(False)
    elif method == "lora":
        pl.attach(model.encoder, pl.LoRAConfig(r=point["r"], alpha=2 * point["r"], target_modules="all-linear"))
    texts, labels = headlines("train")
    texts, labels = texts[: point["examples"]], labels[: point["examples"]]

    def loss(chosen: Tensor) -> Any:
        return contrastive(model([texts[i] for i in chosen.tolist()], tokens), labels[chosen])

    if method != "base":
        fit(model, loss, len(texts), point["steps"], point["batch"], rate, seed)
    model.eval()
    validation = float(neighbours(model, "validation", tokens).double().mean())
    return row_of(point, rate, seed, model, validation, neighbours(model, "test", tokens))
