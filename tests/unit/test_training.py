"""The loop against a loop written out by hand, and everything it promises to leave alone."""

import copy
import gc
import random
import warnings
import weakref
from unittest import mock

import numpy
import pytest
import tiny
import torch
from torch import nn
from torch.nn import functional as F

import peftlab as pl
from peftlab.errors import PeftLabError
from peftlab.training import TrainingError, train
from peftlab.training.encoding import IGNORE, Collator
from peftlab.training.losses import causal_lm_loss
from peftlab.training.optimizers import decay_groups
from peftlab.training.schedule import DataOrder


class WordModel(nn.Module):
    """Predicts the next token from the last one; float64 all through, unlike models with a float32 norm."""

    def __init__(self, dropout=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(32, 8, dtype=torch.float64)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(8, 32, dtype=torch.float64)

    def forward(self, input_ids, attention_mask):
        return self.head(self.dropout(torch.tanh(self.embedding(input_ids))))


def values(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_a_run_is_the_textbook_loop():
    """Three AdamW steps with warm-up, decay and clipping, set beside the loop written out with torch alone."""
    rows = tiny.examples(24)
    settings = {
        "steps": 6,
        "batch_size": 4,
        "learning_rate": 0.05,
        "warmup": 2,
        "weight_decay": 0.1,
        "max_grad_norm": 0.3,
        "seed": 5,
    }
    model = WordModel()
    history = train(model, rows, **settings)

    other = WordModel()
    matrices, vectors = [other.embedding.weight, other.head.weight], [other.head.bias]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0}])
    from transformers import get_linear_schedule_with_warmup

    for group in optimizer.param_groups:
        group["lr"] = 0.05
    scheduler = get_linear_schedule_with_warmup(optimizer, 2, 6)
    order = DataOrder(examples=24, batch=4, total=24, seed=5)
    for step in range(6):
        batch = Collator()([rows[index] for index in order.at(step)])
        logits = other(batch["input_ids"], batch["attention_mask"])
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=IGNORE)
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(other.parameters(), 0.3)
        row = history.steps[step]
        assert row["loss"] == pytest.approx(loss.item(), rel=1e-12)
        assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-12) and norm > 0.3
        assert row["lr"] == pytest.approx(scheduler.get_last_lr()[0], rel=1e-12, abs=0)
        optimizer.step()
        scheduler.step()
    assert torch.allclose(values(model), values(other), rtol=1e-12, atol=0)
    assert [row["step"] for row in history.steps] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("split", [(4, 2), (2, 4), (1, 8), (3, 3)])
def test_accumulation_is_exact(split):
    """Batches of unequal label counts: the sum over all labels divided by their number, not a mean of means."""
    batch_size, accumulation = split
    whole, parts = WordModel(), WordModel()
    common = {"steps": 5, "learning_rate": 0.05, "optimizer": "sgd", "max_grad_norm": None}
    one = train(whole, tiny.examples(), batch_size=batch_size * accumulation, **common)
    many = train(parts, tiny.examples(), batch_size=batch_size, accumulation=accumulation, **common)
    assert torch.allclose(values(whole), values(parts), rtol=1e-13, atol=1e-15)
    assert [r["loss"] for r in many.steps] == pytest.approx([r["loss"] for r in one.steps], rel=1e-13)
    assert [r["tokens"] for r in many.steps] == [r["tokens"] for r in one.steps]


def test_only_what_requires_gradients_moves_and_everything_else_is_put_back():
    model = tiny.llama().requires_grad_(False)
    model.model.layers[1].self_attn.q_proj.weight.requires_grad_(True)
    model.eval()
    model.lm_head.train()
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    generators = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state()
    train(model, tiny.examples(), steps=3, learning_rate=0.01)
    moved = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert moved == ["model.layers.1.self_attn.q_proj.weight"]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [module.training for module in model.modules()] == modes
    assert model.config.use_cache is True
    assert random.getstate() == generators[0] and numpy.random.get_state()[1].tolist() == generators[1]
    assert torch.equal(torch.get_rng_state(), generators[2])


def test_dropout_is_on_and_follows_the_seed_alone():
    results = []
    for seed, outside in [(0, 1), (0, 2), (1, 1)]:
        model = WordModel(dropout=0.5).eval()
        torch.manual_seed(outside)
        train(model, tiny.examples(), steps=3, learning_rate=0.01, seed=seed)
        results.append(values(model))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    without = WordModel().eval()
    train(without, tiny.examples(), steps=3, learning_rate=0.01)
    assert not torch.equal(results[0], values(without))


def test_nothing_to_train_says_what_to_do():
    model = tiny.llama().requires_grad_(False)
    with pytest.raises(PeftLabError, match=r"nothing to train.*Attach an adapter.*trainable=True") as raised:
        train(model, tiny.examples(), steps=1)
    tensors = len(list(model.parameters()))
    assert f"none of the model's {tensors} parameter tensors requires gradients" in str(raised.value)


def test_parameters_that_get_no_gradient_are_named():
    model = WordModel()
    model.forgotten = nn.Linear(2, 2)
    with pytest.warns(UserWarning, match="2 of 5 trainable parameters got no gradient.*forgotten.weight") as said:
        train(model, tiny.examples(), steps=3)
    assert len(said) == 1, "once, and not in each step"
    model.requires_grad_(False)
    model.forgotten.requires_grad_(True)
    with pytest.raises(TrainingError, match="does not depend on any parameter"):
        train(model, tiny.examples(), steps=1)


def test_matrices_decay_and_vectors_do_not():
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    groups = decay_groups(dict(model.named_parameters()), 0.1)
    assert [(len(group["params"]), group["weight_decay"]) for group in groups] == [(1, 0.1), (3, 0.0)]
    assert groups[0]["params"][0] is model[0].weight


def test_classification_learns_a_rule():
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, num_labels=2
    )
    model = BertForSequenceClassification(config)
    rows = [{"input_ids": row["input_ids"], "labels": int(7 in row["input_ids"])} for row in tiny.examples(200)]
    history = train(model, rows[:160], epochs=8, batch_size=16, learning_rate=0.01, evaluation_data=rows[160:])
    assert history.steps[-1]["step"] == len(history.steps) == 80
    assert history.steps[0]["tokens"] == 16, "one label an example"
    assert history.evaluations[-1]["loss"] < 0.45 < history.steps[0]["loss"]


def test_a_gradient_left_from_before_does_not_count():
    fresh, used = tiny.llama(), tiny.llama()
    for parameter in used.parameters():
        parameter.grad = torch.ones_like(parameter)
    for model in (fresh, used):
        train(model, tiny.examples(), steps=1, batch_size=4, learning_rate=0.1, optimizer="sgd")
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), used.parameters(), strict=True))


def test_a_custom_loss_and_callback():
    model, seen = nn.Linear(2, 1), []
    data = [{"x": [float(i), 1.0], "y": float(3 * i - 1)} for i in range(8)]

    def squared_error(model, batch):
        return (model(batch["x"]).squeeze(1) - batch["y"]).square().sum(), len(batch["y"])

    def callback(model, row):
        assert model.weight.grad is not None
        seen.append(row["step"])

    history = train(
        model, data, steps=300, batch_size=4, accumulation=2, learning_rate=0.05, loss=squared_error, callback=callback
    )
    assert seen == list(range(1, 301))
    assert history.steps[-1]["loss"] < 1e-3 and history.steps[0]["tokens"] == 8
    assert model.weight.flatten().tolist() + model.bias.tolist() == pytest.approx([3, 0, 0], abs=1.0)


def test_steps_without_labels_are_refused_and_empty_parts_are_not():
    empty = [{"input_ids": [1, 2, 3], "labels": [IGNORE] * 3}] * 4
    with pytest.raises(TrainingError, match="Step 1 of 1: nothing is labelled, with examples"):
        train(WordModel(), empty, steps=1, batch_size=4)
    mixed = train(WordModel(), empty[:3] + tiny.examples(1), steps=1, batch_size=1, accumulation=4)
    assert mixed.steps[0]["tokens"] == sum(label != IGNORE for label in tiny.examples(1)[0]["labels"])


@pytest.mark.parametrize("checkpointing", [True, "reentrant"])
@pytest.mark.parametrize("frozen", [True, False])
def test_gradient_checkpointing_changes_nothing_but_memory(checkpointing, frozen, capfd):
    """Both kinds give the gradients of plain training, also to layers behind a frozen embedding, and leave no trace."""

    def model():
        model = tiny.llama(layers=3)
        if frozen:
            model.requires_grad_(False)
            for layer in model.model.layers:
                layer.self_attn.q_proj.weight.requires_grad_(True)
        return model

    plain, saving = model(), model()
    settings = {"steps": 3, "learning_rate": 0.01, "evaluation_data": tiny.examples(3), "evaluate_every": 2}
    expected = train(plain, tiny.examples(), **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = train(saving, tiny.examples(), checkpointing=checkpointing, **settings)
    assert torch.allclose(values(plain), values(saving), rtol=1e-5, atol=1e-7)
    assert [r["grad_norm"] for r in found.steps] == pytest.approx([r["grad_norm"] for r in expected.steps], rel=1e-5)
    assert not any(getattr(module, "gradient_checkpointing", False) for module in saving.modules())
    assert saving.config.use_cache is True and not saving.model.embed_tokens._forward_hooks
    assert capfd.readouterr() == ("", "")


def test_checkpointing_stops_the_backward_pass_at_the_first_trained_layer():
    model, seen = tiny.llama(layers=3).requires_grad_(False), []
    model.model.layers[2].self_attn.q_proj.weight.requires_grad_(True)
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, args, output: seen.append(output.requires_grad))
    train(model, tiny.examples(), steps=1, checkpointing=True)
    assert seen == [False, False, True]


def test_checkpointing_really_recomputes():
    model, calls = tiny.llama(layers=1), []
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    train(model, tiny.examples(), steps=1, checkpointing=True)
    assert len(calls) == 2
    with pytest.raises(PeftLabError, match="WordModel offers no gradient checkpointing"):
        train(WordModel(), tiny.examples(), steps=1, checkpointing=True)


def test_compiled_models_train_under_their_own_names(tmp_path):
    model, plain = tiny.llama(), tiny.llama()
    train(torch.compile(model, backend="eager"), tiny.examples(), steps=2, learning_rate=0.01, folder=tmp_path)
    # the loss of a model that is compiled as a whole is not computed in chunks
    expected = train(plain, tiny.examples(), steps=2, learning_rate=0.01, chunked_loss=False)
    assert torch.allclose(values(model), values(plain), atol=1e-6)
    fresh = tiny.llama()
    assert (
        train(fresh, tiny.examples(), steps=2, learning_rate=0.01, folder=tmp_path).steps[1]["lr"]
        == (expected.steps[1]["lr"])
    )
    assert torch.equal(values(model), values(fresh)), "an uncompiled model takes the state up"


def test_token_loss_of_a_step_is_what_the_model_says():
    model = tiny.llama().double()
    rows = tiny.examples(4)
    total, count = causal_lm_loss(model, Collator()(rows))
    history = train(model, rows, steps=1, batch_size=4, learning_rate=1e-9)
    assert history.steps[0]["loss"] == pytest.approx((total / count).item(), rel=1e-6)
    assert history.steps[0]["tokens"] == count.item()


@pytest.mark.parametrize("virtual", [0, 3])
def test_logits_that_nobody_reads_are_not_computed(virtual):
    """The loss and its gradients are those of all logits, with virtual tokens in front or without."""
    model = tiny.llama().double()
    batch = Collator()([row for row in tiny.examples(12) if row["labels"][1] == -100])
    embedded = model.model.embed_tokens(batch.pop("input_ids"))
    inputs = {**batch, "inputs_embeds": embedded}
    if virtual:
        front = torch.randn(len(inputs["labels"]), virtual, 16, dtype=torch.float64)
        inputs["inputs_embeds"] = torch.cat([front, inputs["inputs_embeds"]], dim=1)
        ones = torch.ones(len(front), virtual, dtype=inputs["attention_mask"].dtype)
        inputs["attention_mask"] = torch.cat([ones, inputs["attention_mask"]], dim=1)
    labels = inputs["labels"]
    total, count = causal_lm_loss(model, inputs)
    (gradient,) = torch.autograd.grad(total, model.lm_head.weight)

    logits = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits[:, virtual:-1]
    every = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="sum")
    (expected,) = torch.autograd.grad(every, model.lm_head.weight)
    torch.testing.assert_close(total, every)
    torch.testing.assert_close(gradient, expected)
    assert count == (labels[:, 1:] != -100).sum()
    with mock.patch.object(model.lm_head, "forward", wraps=model.lm_head.forward) as head:
        causal_lm_loss(model, inputs)
    assert head.call_args.args[0].shape[1] < labels.shape[1] + virtual


@pytest.mark.parametrize("fast", [False, True])
def test_a_trained_model_does_not_stay_in_memory(fast):
    model = pl.attach(tiny.llama(), pl.LoRAConfig(r=2, target_modules=["q_proj"]))
    pl.train(model, tiny.examples(), steps=2, fast=fast, progress=False)
    there = weakref.ref(model)
    del model
    gc.collect()
    assert there() is None
