"""Bottleneck adapters held to transformers' blocks written out by hand with adapters in them: outputs, gradients, three
steps of AdamW; and both to the estimator's counts and to a step's real memory."""

import copy
import re

import adapters_by_hand
import memory_oracle
import pytest
import torch
from pairs import KINDS, base, batch, relative, three_steps
from test_memory_replay import CONFIGS, replayed
from transformers import T5Config, T5ForConditionalGeneration

import peftlab as pl
from peftlab.adapters.key_table import placed
from peftlab.memory import count, load_shape
from peftlab.methods.adapter import PLACEMENTS

T5 = dict(
    vocab_size=47, d_model=18, d_kv=5, d_ff=31, num_layers=2, num_heads=3, dropout_rate=0.0,
    decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
)  # fmt: skip
KINDS["t5"] = lambda: T5ForConditionalGeneration(T5Config(**T5))
FAMILIES = ("llama", "gpt2", "bert", "roberta", "t5")


def block_of(path):
    return re.match(r"(.*?\.\d+)(\.|$)", path)[1]


def pair(kind, placement, **settings):
    """(ours, by hand, {name: (our bottleneck, theirs)}): equal bases, equal adapters, everything at random."""
    ours = base(kind)
    theirs = copy.deepcopy(ours)
    pl.attach(ours, pl.AdapterConfig(placement=placement, width=5, init="random", **settings))
    by_hand = adapters_by_hand.put_in(theirs, placement, 5, **settings)
    mine = {path: part.bottleneck for path, _, part in placed(ours, "default")}
    if placement != "houlsby":  # one a block, on whichever module
        mine = {block_of(path): layer for path, layer in mine.items()}
        by_hand = {block_of(path): layer for path, layer in by_hand.items()}
    assert mine.keys() == by_hand.keys()
    for path, layer in by_hand.items():
        layer.load_state_dict(mine[path].state_dict())
    return ours, theirs, {path: (mine[path], layer) for path, layer in by_hand.items()}


def named(adapters, which):
    return {f"{path}.{name}": p for path, both in adapters.items() for name, p in both[which].named_parameters()}


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("kind", FAMILIES)
def test_same_numbers(kind, placement):
    ours, theirs, adapters = pair(kind, placement, activation="gelu", scaling=1.7)
    inputs = batch(kind)
    assert relative(base(kind)(**inputs).logits, theirs(**inputs).logits) > 1e-3
    three_steps(ours, theirs, inputs, lambda: (named(adapters, 0), named(adapters, 1)))


@pytest.mark.parametrize("activation", ["relu", "silu", "tanh"])
def test_activations(activation):
    ours, theirs, _ = pair("bert", "pfeiffer", activation=activation)
    assert relative(ours(**batch("bert")).logits, theirs(**batch("bert")).logits) < 1e-12


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_generation_with_a_cache(kind, placement):
    ours, theirs, _ = pair(kind, placement)
    ids = batch(kind, length=5)["input_ids"][1:]
    settings = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(ours.generate(ids, **settings), theirs.generate(ids, **settings))
    assert torch.equal(ours.generate(ids, use_cache=False, **settings), theirs.generate(ids, **settings))


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma", "gpt2", "bert", "roberta", "t5"])
def test_counts_are_the_estimators(family, placement):
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM
    from transformers import AutoModelForSequenceClassification as Classifier

    shape = load_shape(CONFIGS[family])
    auto = {"decoder": AutoModelForCausalLM, "encoder": Classifier, "encoder-decoder": AutoModelForSeq2SeqLM}
    with torch.device("meta"):
        model = auto[shape.kind].from_config(AutoConfig.for_model(**CONFIGS[family]))
        task = "SEQ_CLS" if shape.kind == "encoder" else None
        pl.attach(model, pl.AdapterConfig(placement=placement, reduction_factor=5, task_type=task))
    expected = count(shape, placement, reduction_factor=5)
    assert pl.count_parameters(model) == (expected.trainable, expected.total, expected.percent)


@pytest.mark.parametrize("bytes", [2, 4])
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_peak_of_a_step_is_the_estimators(family, placement, bytes, monkeypatch):
    size = {"batch": 3, "sequence": 160}
    found = replayed(load_shape(CONFIGS[family]), placement, bytes=bytes, **size)
    monkeypatch.setattr(memory_oracle.peft, "get_peft_model", lambda model, config: pl.attach(model, config))
    expected = memory_oracle.measure(
        CONFIGS[family], load_shape(CONFIGS[family]).kind, pl.AdapterConfig(placement=placement),
        dtype={2: torch.bfloat16, 4: torch.float32}[bytes], monkeypatch=monkeypatch, **size,
    )  # fmt: skip
    assert max(found) == pytest.approx(max(expected), rel=0.02)
