"""Bottleneck adapters held to the library `adapters`: its three architectures under its own default settings.

A development-only test. The library pins an older transformers than this project runs on, so it is in no environment of
the project's; where both are at hand (a virtual environment of their own, peftlab's needs beside `adapters`), it runs:

    python -m pytest tests/parity/test_adapters_library.py
"""

import copy

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import peftlab as pl
from peftlab.adapters.key_table import placed

adapters = pytest.importorskip("adapters")

BERT = dict(
    vocab_size=41, hidden_size=18, intermediate_size=31, num_hidden_layers=3, num_attention_heads=3, num_labels=3,
    max_position_embeddings=40, pad_token_id=0, type_vocab_size=1,
)  # fmt: skip
KINDS = {
    "bert": lambda: BertForSequenceClassification(BertConfig(**BERT)),
    "roberta": lambda: RobertaForSequenceClassification(RobertaConfig(**BERT)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=41, n_embd=18, n_head=3, n_layer=3, n_positions=32)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(
        vocab_size=41, hidden_size=18, intermediate_size=31, num_hidden_layers=3, num_attention_heads=3,
        num_key_value_heads=1, max_position_embeddings=32,
    )),
}  # fmt: skip
# The library's config with its defaults, and ours; the activations are those defaults.
SETTINGS = {
    "houlsby": (lambda: adapters.DoubleSeqBnConfig(), dict(activation="silu", reduction_factor=16)),
    "pfeiffer": (lambda: adapters.SeqBnConfig(), dict(activation="relu", reduction_factor=16)),
    "parallel": (lambda: adapters.ParBnConfig(), dict(activation="relu", reduction_factor=2, scaling=4.0)),
}


def theirs_by_place(model):
    """{(block, after attention or not): their adapter}."""
    found = {}
    for path, module in model.named_modules():
        if type(module).__name__ in ("Adapter", "ParallelAdapter"):
            block = int(next(part for part in path.split(".") if part.isdigit()))
            found[block, "attention" in path] = module
    return found


def ours_by_place(model):
    found = {}
    for path, _, part in placed(model, "default"):
        block = int(next(name for name in path.split(".") if name.isdigit()))
        found[block, "att" in path] = part.bottleneck
    return found


@pytest.mark.parametrize("placement", SETTINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_same_outputs_and_gradients(kind, placement):
    torch.manual_seed(0)
    ours = KINDS[kind]().double().eval()
    theirs = copy.deepcopy(ours)
    config, settings = SETTINGS[placement]
    pl.attach(ours, pl.AdapterConfig(placement=placement, init="random", **settings))
    adapters.init(theirs)
    theirs.add_adapter("one", config=config())
    theirs.train_adapter("one")
    theirs.double().eval()
    mine, other = ours_by_place(ours), theirs_by_place(theirs)
    assert mine.keys() == other.keys() and len(mine) == (6 if placement == "houlsby" else 3)
    pairs = []
    for place, layer in other.items():
        pairs += [(layer.adapter_down[0], mine[place].down), (layer.adapter_up, mine[place].up)]
    with torch.no_grad():
        for they, we in pairs:
            assert they.weight.shape == we.weight.shape
            they.weight.copy_(we.weight)
            they.bias.copy_(we.bias)
    ids = torch.randint(3, 40, (2, 7))
    labels = torch.tensor([0, 2]) if kind in ("bert", "roberta") else ids
    found, expected = ours(input_ids=ids, labels=labels), theirs(input_ids=ids, labels=labels)
    error = ((found.logits - expected.logits).norm() / expected.logits.norm()).item()
    if (kind, placement) in (("llama", "parallel"), ("gpt2", "parallel")):
        # Where a norm stands in front of the feed-forward, the library's parallel adapter reads the residual stream;
        # ours reads what the feed-forward reads, as the paper's formula has it. In BERT the two are the same.
        assert error > 1e-3
        return
    assert error < 1e-12
    found.loss.backward()
    expected.loss.backward()
    for they, we in pairs:
        torch.testing.assert_close(they.weight.grad, we.weight.grad, rtol=1e-9, atol=1e-15)
        torch.testing.assert_close(they.bias.grad, we.bias.grad, rtol=1e-9, atol=1e-15)
