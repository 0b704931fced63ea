"""Prompts and prefixes on a CUDA device: 16-bit bases, autocast, checkpointing, fused attention, generation."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
import tiny  # noqa: E402

import peftlab as pl  # noqa: E402
from peftlab.core.checkpointing import switch_checkpointing  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CONFIGS = {
    "prompt": pl.PromptTuningConfig(num_virtual_tokens=5),
    "deep": pl.PromptTuningConfig(num_virtual_tokens=5, deep=True),
    "p-tuning": pl.PTuningConfig(num_virtual_tokens=5, encoder="lstm"),
    "prefix": pl.PrefixTuningConfig(num_virtual_tokens=5),
    "projected": pl.PrefixTuningConfig(num_virtual_tokens=5, projection=True),
}


def model(kind, dtype=torch.float32):
    base = tiny.llama(dtype=dtype, initializer_range=0.2).cuda()
    torch.manual_seed(7)
    return pl.attach(base, CONFIGS[kind])


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_they_learn(kind, base, precision):
    trained = model(kind, base)
    assert {p.dtype for p in trained.parameters() if p.requires_grad} == {torch.float32}
    history = pl.train(
        trained, tiny.examples(), tokenizer=tiny.tokenizer(), steps=60, learning_rate=0.05, precision=precision,
        progress=False,
    )  # fmt: skip
    losses = [row["loss"] for row in history.steps]
    assert sum(losses[-10:]) < sum(losses[:10])


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_checkpointing_gives_the_same_gradients(kind, attention):
    found = []
    for checkpointing in (False, True):
        one = model(kind).double()
        one.set_attn_implementation(attention)
        one.config.use_cache = False
        if checkpointing:
            switch_checkpointing(one, "enable", {"use_reentrant": False})
        one.train()
        ids = torch.arange(1, 19, device="cuda").reshape(3, 6)
        mask = torch.ones_like(ids)
        mask[0, -2:] = 0
        one(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
        found.append([p.grad for p in one.parameters() if p.requires_grad])
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() <= 1e-6 * b.norm()


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_cache_and_beams_change_nothing(kind):
    one = model(kind).double().eval()
    ids = torch.arange(1, 19, device="cuda").reshape(3, 6)
    settings = dict(max_new_tokens=6, pad_token_id=0, attention_mask=torch.ones_like(ids))
    for beams in (1, 2):
        cached = one.generate(ids, num_beams=beams, use_cache=True, **settings)
        assert torch.equal(cached, one.generate(ids, num_beams=beams, use_cache=False, **settings))
