"""Examples in batches by length, and with an adapter for each row."""

import math

import pytest
import tiny
import torch

import peftlab as pl
from peftlab.training import metrics
from peftlab.training.batching import batches
from peftlab.training.generation import generate_text

PROMPTS = ["no", "red green blue the dog sleeps . the cat ?", "a dog ?"]
ROWS = ["a", None, "b"]


def model_with_two():
    model = tiny.llama(seed=1, vocab_size=18, initializer_range=1.0).double()
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        pl.attach(model, pl.LoRAConfig(r=2, alpha=32, target_modules="all-linear", init="random"), name=name)
    return model


def one_at_a_time(model, call, items):
    found = []
    for name, item in zip(ROWS, items, strict=True):
        pl.activate(model, name or {})
        found.append(call(item))
    return found


def test_longest_first_but_one_batch_keeps_its_order():
    model = torch.nn.Linear(1, 1)
    assert batches(model, [1, 3, 2], 2) == [[1, 2], [0]]
    assert batches(model, [1, 3, 2], 3) == [[0, 1, 2]]
    assert batches(model, [], 3) == []


def test_answers_and_losses_are_those_of_each_rows_adapter():
    tokenizer, model = tiny.tokenizer(), model_with_two()
    answers = one_at_a_time(model, lambda prompt: generate_text(model, tokenizer, prompt, 8)[0], PROMPTS)
    rows = [{"input_ids": ids, "labels": ids} for ids in ([1, 2, 3], [4, 5, 6, 7, 8, 9], [2, 7])]
    losses = one_at_a_time(model, lambda row: math.log(metrics.perplexity(model, [row])), rows)
    counts = [len(row["labels"]) - 1 for row in rows]
    mean = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
    pl.activate(model, ROWS)
    assert generate_text(model, tokenizer, PROMPTS, 8) == answers
    assert math.log(metrics.perplexity(model, rows)) == pytest.approx(mean)
    with pytest.raises(pl.PeftLabError, match="pass batch_size=3 or more"):
        metrics.perplexity(model, rows, batch_size=2)
    with pytest.raises(pl.PeftLabError, match="3 names.*2 examples"):
        generate_text(model, tokenizer, PROMPTS[:2], 8)
    with pl.disabled(model):
        generate_text(model, tokenizer, PROMPTS, 2, batch_size=2)  # the base alone: no row has its own


def test_classes_are_those_of_each_rows_adapter():
    class Last(torch.nn.Module):
        """Logits of the class from the last token's embedding."""

        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.head = torch.nn.Embedding(9, 4), torch.nn.Linear(4, 6)

        def forward(self, input_ids, attention_mask):
            return self.head((self.embed(input_ids) * attention_mask[..., None]).sum(1))

    model = Last()
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        pl.attach(model, pl.LoRAConfig(r=2, alpha=32, target_modules=["head"], init="random"), name=name)
    rows = [{"input_ids": ids} for ids in ([1], [2, 5, 3, 4], [6, 7])]
    expected = one_at_a_time(model, lambda row: metrics.predict_labels(model, [row])[0], rows)
    pl.activate(model, ROWS)
    assert len(set(expected)) > 1
    assert metrics.predict_labels(model, rows) == expected
