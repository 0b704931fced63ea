"""Some blocks computed again in the backward pass, and how many: `checkpointing=k` and `checkpointing="fit"`."""

import copy

import pytest
import tiny
import torch
from torch import nn

import peftlab as pl
from peftlab.core.checkpointing import blocks_of, memory_settings
from peftlab.errors import PeftLabError
from peftlab.memory import estimate
from peftlab.settings import Settings
from peftlab.training import fitting

GB = 10**9
RUN = dict(steps=2, batch_size=2, learning_rate=0.01, progress=False)


def adapted(layers=3, **settings):
    model = tiny.llama(layers=layers)
    torch.manual_seed(7)
    return pl.attach(model, pl.LoRAConfig(r=4, target_modules="all-linear"), **settings)


def recomputed(model):
    return [block.gradient_checkpointing for block in blocks_of(model)]


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_the_first_blocks_are_computed_again(count):
    model = adapted()
    calls = []
    for index, block in enumerate(model.model.layers):
        block.input_layernorm.register_forward_hook(lambda *_, index=index: calls.append(index))
    with memory_settings(model, count):
        assert recomputed(model) == [index < count for index in range(3)]
        model.train()
        model(torch.tensor([[1, 2, 3]])).logits.sum().backward()
    assert sorted(calls) == sorted([0, 1, 2, *range(count)])
    assert not any(recomputed(model))


@pytest.mark.parametrize("fast", [False, True])
def test_the_result_does_not_depend_on_how_many(fast):
    results = []
    for wish in (False, 1, 2, 3, True):
        model = adapted()
        pl.train(model, tiny.examples(), checkpointing=wish, fast=fast, **RUN)
        results.append([p.detach().clone() for p in model.parameters() if p.requires_grad])
    for result in results[1:]:
        for one, other in zip(results[0], result, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_one_is_not_true():
    assert Settings(checkpointing=1).checkpointing is not True and Settings(checkpointing=True).checkpointing is True
    for wrong in (-1, 1.5, "all", None):
        with pytest.raises(PeftLabError, match="checkpointing"):
            Settings(checkpointing=wrong)


def test_more_blocks_than_there_are_is_an_error():
    with pytest.raises(PeftLabError, match="checkpointing=4, and LlamaForCausalLM has 3 blocks"):
        pl.train(adapted(), tiny.examples(), checkpointing=4, fast=False, **RUN)


def test_on_a_cpu_every_block_is_and_the_run_says_so():
    history = pl.train(adapted(), tiny.examples(), checkpointing="fit", **RUN)
    assert history.checkpointing == "every block is computed again: the model is on cpu"
    assert history.steps == pl.train(adapted(), tiny.examples(), checkpointing=True, **RUN).steps


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Let `choose_blocks` think that a model is on a GPU with so much memory."""

    def choose(model, memory, lengths=(512,), chunked=True, triton=True, **settings):
        monkeypatch.setattr(fitting, "memory_of", lambda device: memory)
        monkeypatch.setattr(fitting, "kernel_on", lambda device: print if triton else None)
        wish = Settings(checkpointing="fit", precision="bf16", batch_size=4, **settings)
        return fitting.choose_blocks(model, wish, torch.device("cuda"), lengths, chunked)

    return choose


def meta(kind=pl.LoRAConfig, dtype=torch.bfloat16, **config):
    with torch.device("meta"):
        model = tiny.llama(layers=8, dtype=dtype, hidden_size=1024, intermediate_size=2816, num_attention_heads=8)
    return model if kind is None else pl.attach(model, kind(**config))


def test_as_many_as_the_memory_needs(on_a_gpu):
    model = meta(target_modules="all-linear")
    found = [on_a_gpu(model, memory)[0] for memory in (4 * GB, int(1.6 * GB), int(1.3 * GB), GB)]
    assert found[0] is False and found[-1] is True
    assert isinstance(found[1], int) and 0 < found[1] < found[2] <= 8
    told = on_a_gpu(model, int(1.6 * GB))[1]
    assert told == f"{found[1]} of 8 blocks are computed again, for an estimate within 873.79 MB"
    assert "even so the estimate is more" in on_a_gpu(model, GB)[1]
    # what the run is told to be decides
    assert on_a_gpu(model, int(1.6 * GB), lengths=(512, 1024))[0] > found[1]
    assert on_a_gpu(model, int(1.6 * GB), lengths=(64,))[0] is False
    # without Triton a chunk of logits has a float32 copy
    copied = 2**28
    assert on_a_gpu(model, int(1.6 * GB) + copied, triton=False) == on_a_gpu(model, int(1.6 * GB))
    assert on_a_gpu(model, int(1.6 * GB), triton=False, chunked=False) == on_a_gpu(model, int(1.6 * GB), chunked=False)


class Wrapper(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.inner, self.config = model, None


def partly():
    model = meta()
    next(model.model.norm.parameters()).requires_grad_(True)
    return model


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Wrapper(meta(None)), "Wrapper has no config"),
        (partly, "parameters train, and"),
        (lambda: pl.attach(meta(), pl.LoRAConfig(r=2), name="second"), "several adapters are attached"),
        (lambda: meta(None).requires_grad_(False), "no adapter is attached, and not everything trains"),
    ],
)
def test_a_model_that_is_not_known_says_why(make, told, on_a_gpu):
    wish, reason = on_a_gpu(make(), 4 * GB)
    assert wish is True and reason.startswith("every block is computed again: ") and told in reason
    assert on_a_gpu(meta(), 4 * GB, lengths=())[1].endswith("how long the examples are is not known")


@pytest.mark.parametrize(
    ("config", "method", "options"),
    [
        (pl.LoRAConfig(r=4, target_modules=["q_proj", "v_proj"]), "lora", {"r": 4}),
        (pl.IA3Config(), "ia3", {}),
        (pl.PromptTuningConfig(num_virtual_tokens=5), "prompt", {"virtual_tokens": 5}),
        (pl.BitFitConfig(), "bitfit", {}),
        (pl.VeRAConfig(r=6, bias="vera_only"), "vera", {"r": 6, "bias": "lora_only"}),
    ],
)
def test_methods_are_told_from_their_configs(config, method, options):
    model = tiny.llama(attention_bias=True)
    pl.attach(model, copy.deepcopy(config))
    run = fitting.described(model, Settings(precision="fp32"), 64, True)
    assert run["method"] == method and options.items() <= run.items()
    assert run["precision"] == "fp32" and run["adapter_precision"] == "fp32" and run["chunked_loss"]


def test_full_training_and_four_bits():
    assert fitting.described(tiny.llama(), Settings(precision="bf16"), 64, False)["precision"] == "mixed"
    model = pl.quantize_model(tiny.llama(hidden_size=64, intermediate_size=128))
    pl.attach(model, pl.LoRAConfig(r=4, target_modules="all-linear"))
    assert fitting.described(model, Settings(precision="bf16"), 64, True)["method"] == "qlora"
    pl.attach(pl.detach(model), pl.VeRAConfig(r=4))  # which has no row of its own for four bits
    run = fitting.described(model, Settings(precision="bf16"), 64, True)
    assert (run["method"], run["four_bit"]) == ("vera", True)
    assert estimate(**run).weights < estimate(**{**run, "four_bit": False}).weights
