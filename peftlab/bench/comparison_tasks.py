"""The three tasks of `bench comparison`: what their runs start from, learn, and are tested on.

reviews  minilm says of a film review whether it is good or bad. How well its embeddings separate the topics of news
         articles says what it forgets.
desk     smollm2-135m answers messages with tickets in JSON, as in `bench lora`. The perplexity on news says what it
         forgets.
news     smollm2-135m goes on with news articles, which it does well before training. The perplexity on sentences about
         films says what it forgets.

Each test keeps what it found of each item, so that two methods can be compared on the same items: `answers` is a text
with a 1 for each right answer and a 0 for each wrong one, and `nats` the loss of each article, summed over its tokens.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peftlab as pl
from peftlab.bench import lora
from peftlab.core.modes import device_of, mode

Row = dict[str, Any]

AT_ONCE = 16  # examples of a batch that is only read; twelve processes may share a GPU
MOST = 1600  # examples of a split that are encoded
REVIEW, ARTICLE = 64, 192  # tokens of a review and of an article
SIZES = {"reviews": {"validation": 640}, "desk": {"validation": 256}, "news": {"validation": 128}}
SAMPLE = {"reviews": 640, "desk": 160, "news": 128}  # training examples whose loss is read again at the end
CENTROIDS = 400  # training articles from which the topics' centroids are computed
SENTENCES = 300  # sentences about films


class Task(NamedTuple):
    """A task: what makes its model, encodes a split, tests a model, and says what the model has forgotten."""

    base: Callable[[int], tuple[nn.Module, Any]]
    encoded: Callable[[str], list[Any]]
    tested: Callable[[nn.Module], Row]
    kept: Callable[[nn.Module], Row]


def examples(task: str, split: str, many: int | None = None) -> list[Any]:
    """Return the encoded examples of a split of a task, at most so many."""
    return OF[task].encoded(split)[: many or SIZES[task].get(split)]


def loss_on(model: nn.Module, tokenizer: Any, rows: list[Any]) -> float | None:
    """Return the mean loss in evaluation mode: per review, or per token that is learned."""
    return lora.finite(pl.mean_loss(model, rows, pl.Collator(tokenizer), batch_size=AT_ONCE))


def batches(model: nn.Module, tokenizer: Any, rows: list[Any]) -> Any:
    """Yield batches of rows, in their order, on the model's device."""
    collate = pl.Collator(tokenizer)
    for start in range(0, len(rows), AT_ONCE):
        batch = collate(rows[start : start + AT_ONCE])
        yield {name: tensor.to(device_of(model)) for name, tensor in batch.items()}


# -------------------------------------------------------------------------------------------------- reviews, minilm


def encoder(seed: int) -> tuple[nn.Module, Any]:
    """Return minilm with a new head, drawn with this seed, and its tokenizer."""
    torch.manual_seed(seed)
    return pl.load_model("minilm", num_labels=2, device="cuda" if torch.cuda.is_available() else None)


@cache
def encoder_tokenizer() -> Any:
    """Return minilm's tokenizer. Each process loads it once."""
    return encoder(0)[1]


@cache
def reviews(split: str) -> list[Any]:
    """Return the reviews of a split as examples."""
    return classified("reviews", split)


def classified(name: str, split: str) -> list[Any]:
    """Return the texts of a split, with their labels, as examples of the encoder."""
    rows = pl.load_data(name)[split]
    rows = rows.select(range(min(len(rows), MOST)))
    return [pl.encode_classification(encoder_tokenizer(), row["text"], row["label"], REVIEW) for row in rows]


def judged_reviews(model: nn.Module) -> Row:
    """Return the loss on the test reviews, and which ones the model judges rightly."""
    rows = examples("reviews", "test")
    found = pl.predict_labels(model, rows, encoder_tokenizer(), batch_size=128)
    right = [label == row["labels"] for label, row in zip(found, rows, strict=True)]
    return {"test_loss": loss_on(model, encoder_tokenizer(), rows), **told(right)}


def told(right: list[bool]) -> Row:
    """Return how many answers were tested, how many are right, and which."""
    return {"tested": len(right), "right": sum(right), "answers": "".join("01"[one] for one in right)}


@cache
def articles(split: str) -> list[Any]:
    """Return the news articles of a split, with their topics, as examples of the encoder."""
    return classified("news", split)


def separated(model: nn.Module) -> Row:
    """Return how many news articles lie nearest to the centroid of their topic: the validation and the test ones."""
    train, test = articles("train")[:CENTROIDS], articles("validation") + articles("test")
    known, asked = embeddings(model, train), embeddings(model, test)
    labels = torch.tensor([row["labels"] for row in train])
    # the centroid of a topic is the mean of its embeddings, all of length one
    centroids = torch.stack([known[labels == topic].mean(0) for topic in range(int(labels.max()) + 1)])
    nearest = (asked @ F.normalize(centroids, dim=-1).T).argmax(-1)
    right = sum(int(topic) == row["labels"] for topic, row in zip(nearest, test, strict=True))
    return {"news_topics_tested": len(test), "news_topics_right": right}


@torch.no_grad()
def embeddings(model: nn.Module, rows: list[Any]) -> Tensor:
    """Return the embeddings (n, d) of texts: the mean of their last hidden states, at length one, on the CPU."""
    found = []
    with mode(model, False):
        for batch in batches(model, encoder_tokenizer(), rows):
            batch.pop("labels")
            states: Tensor = model(**batch, output_hidden_states=True).hidden_states[-1]
            mask = batch["attention_mask"].unsqueeze(-1)
            states = states[:, -mask.shape[1] :]  # a prompt's states stand in front
            found.append(F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1).cpu())
    return torch.cat(found)


# ------------------------------------------------------------------------------------------ desk and news, smollm2-135m


def decoder(seed: int) -> tuple[nn.Module, Any]:
    """Return a copy of smollm2-135m, and its tokenizer; the seed is for what is drawn afterwards."""
    model, tokenizer = lora.base()
    torch.manual_seed(seed)
    return copy.deepcopy(model), tokenizer


def answered(model: nn.Module) -> Row:
    """Return the loss on the tickets of the test messages, and which messages get exactly the right one."""
    rows, tokenizer = lora.messages("test"), lora.base()[1]
    prompts = [row["prompt"] for row in rows]
    answers = pl.generate_text(model, tokenizer, prompts, max_new_tokens=24, batch_size=250, progress=False)
    right = [pl.support_desk.score([answer], [row["ticket"]])["exact"] == 1
             for answer, row in zip(answers, rows, strict=True)]  # fmt: skip
    return {"test_loss": loss_on(model, tokenizer, examples("desk", "test")), **told(right)}


@cache
def continued(split: str) -> list[Any]:
    """Return the first tokens of each news article of a split as an example."""
    return [text_example(text) for text in texts("news", split)]


def text_example(text: str) -> Any:
    """Return the first tokens of a text as an example: every token but the first is learned.

    Behind a prompt the first token has something in front of it, too. It must not count, or losses with and without a
    prompt would be of different tokens.
    """
    example = pl.encode_text(lora.base()[1], text, ARTICLE, end=False)
    return {**example, "labels": [-100, *example["labels"][1:]]}


def texts(name: str, split: str) -> list[str]:
    """Return the texts of a split."""
    return list(pl.load_data(name)[split]["text"])[:MOST]


@torch.no_grad()
def read(model: nn.Module) -> Row:
    """Return the loss per token on the test articles, and each article's loss and number of tokens."""
    nats: list[float] = []
    tokens: list[int] = []
    with mode(model, False):
        for batch in batches(model, lora.base()[1], examples("news", "test")):
            wanted = batch.pop("labels")[:, 1:]
            logits = model(**batch).logits[:, -wanted.shape[1] - 1 : -1].float()
            lost = F.cross_entropy(logits.transpose(1, 2), wanted, reduction="none")  # 0 where a label is -100
            nats += lost.sum(1).tolist()
            tokens += (wanted >= 0).sum(1).tolist()
    return {
        "test_loss": lora.finite(sum(nats) / sum(tokens)), "tested": len(nats), "test_tokens": sum(tokens),
        "nats": " ".join(f"{one:.2f}" for one in nats), "tokens": " ".join(map(str, tokens)),
    }  # fmt: skip


def perplexity_on(name: str, model: nn.Module) -> Row:
    """Return the perplexity on news or on sentences about films."""
    found = map(text_example, lora.news() if name == "news" else texts("reviews", "test")[:SENTENCES])
    loss = loss_on(model, lora.base()[1], [one for one in found if len(one["labels"]) > 1])
    return {f"{name}_perplexity": None if loss is None else lora.finite(math.exp(min(loss, 700)))}


OF = {
    "reviews": Task(encoder, reviews, judged_reviews, separated),
    "desk": Task(decoder, lora.encoded, answered, partial(perplexity_on, "news")),
    "news": Task(decoder, continued, read, partial(perplexity_on, "reviews")),
}
