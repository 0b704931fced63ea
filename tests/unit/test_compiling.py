"""train(compile="layers"): one compilation for each length, the same result, and nothing left on the model."""

import itertools
import os
import random
from unittest import mock

import pytest
import tiny
import torch
from children import Child, one_worker
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

import peftlab as pl
from peftlab.training import compiling
from peftlab.training.compiling import MOST_LENGTHS, lengths_for, repeated_blocks
from peftlab.training.losses import causal_lm_loss


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x):
        return x + torch.relu(self.inner(self.norm(x)))


class Net(nn.Module):
    """A language model of which a compiler sees little: three blocks of one layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(32, 8), nn.Linear(8, 32)
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, input_ids, attention_mask=None):
        x = self.embedding(input_ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.fixture
def compilations(monkeypatch):
    """The shapes of the inputs of each graph that was compiled. The compiled function is the graph itself."""
    seen = []

    def backend(graph, inputs):
        seen.append([tuple(one.shape) for one in inputs if isinstance(one, torch.Tensor)])
        return graph

    torch._dynamo.reset()
    monkeypatch.setattr(compiling, "BACKEND", backend)
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)  # which other tests set for the whole process
    with torch._dynamo.config.patch(disable=False):
        yield seen
    torch._dynamo.reset()


def net(dropout: float = 0.1) -> nn.Module:
    model = Net()
    torch.manual_seed(1)
    return pl.attach(model, pl.LoRAConfig(r=2, target_modules=["inner"], dropout=dropout))


def ragged(count: int = 40) -> list[dict]:
    draw = random.Random(0)
    rows = [[draw.randrange(32) for _ in range(draw.randint(3, 60))] for _ in range(count)]
    return [{"input_ids": row, "labels": list(row)} for row in rows]


def trained(model, data=None, **given):
    settings = {"steps": 12, "batch_size": 4, "learning_rate": 0.05, "progress": False, "loss": causal_lm_loss}
    history = pl.train(model, data or ragged(), **(settings | given))
    return history, {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def clean(model) -> bool:
    return not any("_compiled_call_impl" in vars(module) for module in model.modules())


# -- lengths -----------------------------------------------------------------------------------------------------------


def test_the_lengths_are_those_with_the_fewest_tokens():
    draw = random.Random(0)
    for _ in range(20):
        longest = [draw.randint(1, 70) for _ in range(12)]
        sizes = sorted({-(-one // 8) * 8 for one in longest})

        def tokens(lengths, longest=longest):
            return sum(min(length for length in lengths if length >= one) for one in longest)

        found = lengths_for(longest)
        every = [
            (*lower, sizes[-1]) for count in range(len(found)) for lower in itertools.combinations(sizes[:-1], count)
        ]
        assert tokens(found) == min(map(tokens, every))
        assert len(found) <= MOST_LENGTHS


def test_few_lengths_where_more_would_save_nothing_and_none_beyond_the_models():
    assert lengths_for([64] * 10) == (64,)
    assert lengths_for([61, 62, 63, 64]) == (64,)
    assert lengths_for([75, 77], limit=77) == (77,)
    assert lengths_for([]) == ()


# -- blocks ------------------------------------------------------------------------------------------------------------


def test_the_blocks_of_models_of_several_shapes():
    small = dict(vocab_size=32)
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=32, **small))
    assert repeated_blocks(gpt2) == list(gpt2.transformer.h)
    bert = BertForSequenceClassification(
        BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, **small)
    )
    assert repeated_blocks(bert) == list(bert.bert.encoder.layer)
    t5 = T5ForConditionalGeneration(T5Config(d_model=16, d_kv=8, num_layers=2, num_heads=2, d_ff=16, **small))
    assert repeated_blocks(t5) == [*t5.encoder.block, *t5.decoder.block]
    llama = pl.attach(tiny.llama(), pl.LoRAConfig(r=2, target_modules="all-linear"))
    assert repeated_blocks(llama) == list(llama.model.layers)
    assert repeated_blocks(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))) == []


# -- runs --------------------------------------------------------------------------------------------------------------


def test_ragged_data_compiles_each_length_once(compilations):
    history, _ = trained(model := net(), compile="layers")
    lengths = history.compiled.removeprefix("3 blocks (Block); batches of ").removesuffix(" tokens").split(", ")
    assert 2 <= len(lengths) <= MOST_LENGTHS
    # the first block's input requires no gradient, so each length may be compiled twice
    assert len(lengths) <= len(compilations) <= 2 * len(lengths)
    before = len(compilations)
    trained(net(), compile="layers", steps=24)
    assert len(compilations) - before <= 2 * MOST_LENGTHS
    assert clean(model) and list(model.state_dict()) == list(net().state_dict())


def test_the_result_is_that_of_the_uncompiled_run(compilations):
    data = [example for example in ragged(60) if len(example["input_ids"]) > 20][:16]
    data = [{key: value[:16] for key, value in example.items()} for example in data]  # of one length: no padding
    (plain, expected), (compiled, found) = trained(net(), data), trained(net(), data, compile="layers")
    assert compilations
    assert compiled == plain
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_evaluation_and_a_smaller_last_batch_are_not_compiled(compilations):
    data = [{"input_ids": list(range(8)), "labels": list(range(8))}] * 6
    short = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 3
    trained(net(), data, compile="layers", steps=None, epochs=1, evaluation_data=short, evaluate_every=1)
    assert {shape[0] for graph in compilations for shape in graph if len(shape) == 3} == {4}


def test_another_adapter_runs_after_a_switch(compilations):
    data = ragged(8)
    model, other = (
        pl.attach(net(dropout=0), pl.LoRAConfig(r=3, target_modules=["inner"]), name="second") for _ in range(2)
    )
    for name in ("second", "default"):
        for one, compile in ((model, "layers"), (other, None)):
            pl.activate(one, name, trainable=True)
            trained(one, data, compile=compile, steps=2, batch_size=8)
    for one, another in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, another)


def test_no_more_shapes_than_there_is_room_for(compilations, monkeypatch):
    monkeypatch.setattr(compiling, "MOST_SHAPES", 2)
    lengths = iter(range(4, 100))

    def collate(examples):
        length = next(lengths)
        ids = torch.ones(len(examples), length, dtype=torch.long)
        return {"input_ids": ids, "labels": ids}

    history, _ = trained(net(), collate=collate, compile="layers")
    assert history.compiled == "3 blocks (Block)"  # a collate of one's own is left as it is
    assert len(history.steps) == 12
    assert {shape[1] for graph in compilations for shape in graph if len(shape) == 3} == {4, 5}


def with_a_failing_compiler():
    """Train with a compiler that fails. Return what the history says, and whether the run is the uncompiled one."""

    def backend(graph, inputs):
        raise RuntimeError("no such kernel")

    os.environ.pop("TORCHDYNAMO_DISABLE", None)
    expected, values = trained(net())
    with (
        mock.patch.object(compiling, "BACKEND", backend),
        mock.patch.object(compiling, "lengths_for", lambda *_, **__: ()),  # padding changes what dropout draws
        torch._dynamo.config.patch(disable=False),
        pytest.warns(UserWarning, match="compile='layers' compiles nothing.*no such kernel"),
    ):
        history, found = trained(model := net(), compile="layers")
    equal = all(torch.equal(found[name], value) for name, value in values.items())
    return history.compiled, history == expected, equal, clean(model)


@one_worker
def test_a_compiler_that_fails_is_told_of_and_the_run_goes_on():
    """In a process of its own: after a failure torch goes on running each Python function of the process its own way.

    Arguments then live longer, by which the memory replay counts up to 0.8% more.
    """
    compiled, *same = Child(with_a_failing_compiler).result()
    assert "no such kernel" in compiled and compiled.startswith("nothing: BackendCompilerFailed")
    assert same == [True, True, True]


def test_a_model_without_blocks_is_told_of():
    model = nn.Sequential(nn.Embedding(32, 8), nn.Linear(8, 32))

    def loss(model, batch):
        return model(batch["input_ids"]).square().sum(), torch.tensor(1)

    with pytest.warns(UserWarning, match="Sequential has no list of repeated blocks"):
        history, _ = trained(model, loss=loss, compile="layers", steps=1)
    assert history.compiled == "nothing: Sequential has no list of repeated blocks"


def test_a_run_goes_on_with_and_without_it(compilations, tmp_path):
    def stop(model, row):
        if row["step"] == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(net(), folder=tmp_path, save_every=2, compile="layers", callback=stop)
    history, _ = trained(net(), folder=tmp_path, save_every=2)
    assert [row["step"] for row in history.steps] == list(range(1, 13))
