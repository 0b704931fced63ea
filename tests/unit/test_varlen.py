"""Packed rows by torch's varlen kernel: here with a stand-in for the kernel that computes in float64 on the CPU."""

import re

import pytest
import tiny
import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

import peftlab as pl
from peftlab.errors import PeftLabError
from peftlab.training import varlen
from peftlab.training.model_facts import facts_of

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
         "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
ROWS = [{"input_ids": (ids := [(7 * n + 3 * i) % 63 + 1 for i in range(n)]), "labels": ids}
        for n in (3, 9, 5, 12, 7, 4, 8, 1)]  # fmt: skip
GIVEN = {"steps": 3, "batch_size": 4, "learning_rate": 1e-2, "precision": "fp32", "fast": False, "progress": False}


def llama(**changes):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, **changes)).double()
    return pl.attach(model, pl.LoRAConfig(r=4, alpha=9, target_modules=["q_proj", "v_proj"]))


@pytest.fixture
def calls(monkeypatch):
    """Put a stand-in into the kernel's place, and list its calls."""
    made = []

    def slowly(query, key, value, starts, same, longest, most, *, scale, window_size, enable_gqa=False):
        assert window_size == (-1, 0) and starts is same and longest == most
        made.append((longest, starts.tolist()))
        parts = []
        for begin, end in zip(starts[:-1], starts[1:], strict=True):
            q, k, v = (each[begin:end].transpose(0, 1) for each in (query, key, value))
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=enable_gqa)
            parts.append(mixed.transpose(0, 1))
        return torch.cat(parts)

    monkeypatch.setattr(varlen, "kernel", lambda: slowly)
    monkeypatch.setattr(varlen, "HALF", (torch.float64,))
    monkeypatch.setattr(varlen, "can_run_on", lambda device: True)
    monkeypatch.setattr(varlen, "LONG", 5)
    return made


@pytest.mark.parametrize("given", [{}, {"checkpointing": True}, {"accumulation": 2}])
def test_the_kernel_trains_as_the_mask_and_as_padded_rows_do(calls, given):
    losses, adapters = [], []
    for packing, kernel in ((True, True), (True, False), (False, False)):
        model = llama()
        if not kernel:
            varlen.HALF = ()  # the fixture puts it back
        history = pl.train(model, ROWS, packing=packing, **GIVEN, **given)
        assert (history.packing == "by torch's varlen kernel in rows from 5 tokens on") == kernel and bool(
            history.packing
        ) == packing
        losses.append([row["loss"] for row in history.steps])
        adapters.append([p.detach().clone() for p in model.parameters() if p.requires_grad])
        assert model.config._attn_implementation == "sdpa"
    trial = 9  # calls: three times three blocks
    assert len(calls) > trial and all(longest <= 12 for longest, _ in calls[trial:])
    assert losses[0] == pytest.approx(losses[1], rel=1e-12) and losses[0] == pytest.approx(losses[2], rel=1e-12)
    for kernel, mask, padded in zip(*adapters, strict=True):
        torch.testing.assert_close(kernel, mask, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(kernel, padded, rtol=1e-9, atol=1e-12)


def test_the_borders_are_read_once_for_each_batch(calls, monkeypatch):
    read = []
    starts_of = varlen.starts_of
    monkeypatch.setattr(varlen, "starts_of", lambda places: read.append(1) or starts_of(places))
    model = llama()
    places = torch.tensor([[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]])  # five tokens a row
    with varlen.used(model):
        model(input_ids=torch.ones_like(places), position_ids=places, use_cache=False)
        assert len(read) == 1 and calls == [(3, [0, 3, 5, 7, 10])] * 3
        places[0, 2] = 0  # the same tensor with other values
        model(input_ids=torch.ones_like(places), position_ids=places, use_cache=False)
    assert len(read) == 2 and calls[-1] == (3, [0, 2, 3, 5, 7, 10])


def test_a_batch_of_another_thread_is_not_taken_for_this_one(monkeypatch):
    """Another thread asks while this one notes what it found."""
    last, mine, theirs = varlen.Last(), torch.tensor([[0, 1, 0]]), torch.tensor([[0, 1, 2]])
    refer = varlen.weakref.ref

    def interrupted(positions):
        monkeypatch.setattr(varlen.weakref, "ref", refer)
        last.of(theirs, 1)
        return refer(positions)

    monkeypatch.setattr(varlen.weakref, "ref", interrupted)
    for _ in range(2):
        assert last.of(mine, 1).starts.tolist() == [0, 2, 3]
    assert last.of(theirs, 1).starts.tolist() == [0, 3]


def test_padding_and_a_cache_are_left_to_sdpa(calls):
    model = llama().eval()
    ids, mask = torch.arange(1, 13).view(2, 6), torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).logits
        written = model.generate(ids[1:], max_new_tokens=4, do_sample=False, pad_token_id=0)
        with varlen.used(model):
            assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, expected) and not calls
            assert torch.equal(model.generate(ids[1:], max_new_tokens=4, do_sample=False, pad_token_id=0), written)
    seen = varlen.mask(batch_size=1, q_length=5, kv_length=7, q_offset=2, allow_is_causal_skip=False)
    assert torch.equal(seen[0, 0], torch.ones(5, 7).tril(2).bool())  # five tokens behind two that a cache holds


def test_short_rows_stay_with_the_mask(calls):
    model, places = llama(), torch.tensor([[0, 1, 0, 1]])
    given = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "position_ids": places, "use_cache": False}
    expected = model(**given).logits
    with varlen.used(model):
        assert torch.equal(model(**given).logits, expected) and not calls
        with varlen.in_rows_from(4):
            torch.testing.assert_close(model(**given).logits, expected, rtol=1e-9, atol=1e-12)
    assert len(calls) == 3 and varlen.LONG == 5
    alone = model(input_ids=given["input_ids"][:, 2:]).logits
    torch.testing.assert_close(expected[:, 2:], alone, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"device": torch.device("cpu")}, "cpu is no NVIDIA GPU"),
        ({"dtype": torch.float32}, "the products are in float32, not in bf16 or fp16"),
        ({"attention": "eager"}, "attention is eager, not sdpa"),
        ({"config": {"attention_dropout": 0.1}}, "dropout, 0.1"),
        ({"model": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4))}, "has windows"),
        ({"kernel": None}, "has no varlen_attn with windows"),
        (
            {"kernel": lambda query, *given, **more: query.mean(0, keepdim=True).expand_as(query)},
            "changes with the example before it|is not what it says",
        ),
        ({"kernel": lambda *given, **more: 1 / 0}, "division"),
    ],
)
def test_the_reasons_for_the_mask(calls, monkeypatch, change, reason):
    model = change["model"]().double() if "model" in change else llama(**change.get("config", {}))
    if "attention" in change:
        model.set_attn_implementation(change["attention"])
    if "kernel" in change:
        monkeypatch.setattr(varlen, "kernel", lambda: change["kernel"])
    if "device" in change:
        monkeypatch.undo()
        monkeypatch.setattr(varlen, "kernel", lambda: print)
    before = model.config._attn_implementation
    device, dtype = change.get("device", torch.device("cuda")), change.get("dtype", torch.float64)
    given = model, facts_of(model), device, dtype
    if reason == "division":
        with pytest.raises(ZeroDivisionError):  # a fault of the program's own is not hidden
            varlen.why_not(*given)
    else:
        assert re.search(reason, varlen.why_not(*given))
    assert model.config._attn_implementation == before


def test_the_history_says_why_a_mask_is_used():
    model = tiny.llama()
    pl.attach(model, pl.LoRAConfig(r=4, target_modules=["q_proj", "v_proj"]))
    history = pl.train(model, tiny.examples(8), packing=True, steps=1, fast=False, progress=False)
    assert history.packing.startswith("by a mask of blocks: ")
    assert pl.train(model, tiny.examples(8), steps=1, progress=False).packing == ""


def test_a_failing_run_gives_the_attention_back(calls):
    model = llama()

    def fails(model, batch):
        assert model.config._attn_implementation == varlen.NAME
        raise PeftLabError("stop")

    with pytest.raises(PeftLabError, match="stop"):
        pl.train(model, ROWS, packing=True, loss=fails, **{**GIVEN, "fast": "auto"})
    assert model.config._attn_implementation == "sdpa"
