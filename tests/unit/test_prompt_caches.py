"""A prompt enters a generation once: with a cache the text is the same as without, or there is an error."""

import functools

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import (
    BertConfig,
    BertLMHeadModel,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    JambaConfig,
    JambaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
    XLNetConfig,
    XLNetLMHeadModel,
)

import peftlab as pl
from peftlab.core.checkpointing import switch_checkpointing
from peftlab.methods import caches

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}
HEADS = {"intermediate_size": 64, "num_attention_heads": 4}
GROUPED = HEADS | {"num_key_value_heads": 2}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, **GROUPED)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4)),
    "bloom": lambda: BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)),
    "bert": lambda: BertLMHeadModel(BertConfig(**SIZES, **HEADS, is_decoder=True)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, **GROUPED, sliding_window=6)),
    "mamba": lambda: MambaForCausalLM(MambaConfig(**SIZES, state_size=4)),
    "jamba": lambda: JambaForCausalLM(
        JambaConfig(
            **SIZES, **GROUPED, num_experts=2, attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False
        )
    ),
    "recurrent gemma": lambda: RecurrentGemmaForCausalLM(
        RecurrentGemmaConfig(**SIZES | {"num_hidden_layers": 3}, **HEADS, lru_width=32)
    ),
}
NO_PREFIX = ("mamba", "jamba", "recurrent gemma")
PROMPT, DEEP = {"num_virtual_tokens": 4}, {"num_virtual_tokens": 4, "deep": True}
CONFIGS = {
    "prompt": lambda: pl.PromptTuningConfig(**PROMPT),
    "deep": lambda: pl.PromptTuningConfig(**DEEP),
    "p-tuning": lambda: pl.PTuningConfig(**PROMPT),
    "prefix": lambda: pl.PrefixTuningConfig(**PROMPT),
}


def prompted(name: str, config: str, seed: int = 0):
    """A model whose text depends strongly on its prompt, and two texts, the first padded on the left."""
    torch.manual_seed(seed)
    model = MODELS[name]().eval()
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6 if parameter.dim() > 1 else 1)
        pl.attach(model, CONFIGS[config]())
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 3)
    ids = torch.randint(3, 60, (2, 7))
    mask = torch.ones_like(ids)
    if name != "bloom":  # its padding moves attention's biases, and two equal scores may change places
        mask[0, :2] = 0
    return model, ids, mask


PAIRS = [(m, c) for m in MODELS for c in CONFIGS if not (c == "prefix" and m in NO_PREFIX)]


@pytest.mark.parametrize(("name", "config"), PAIRS)
def test_with_a_cache_the_text_is_the_same(name, config):
    model, ids, mask = prompted(name, config)
    greedy = {"attention_mask": mask, "max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    whole = model.generate(ids, use_cache=False, **greedy)
    assert torch.equal(model.generate(ids, use_cache=True, **greedy), whole)
    with pl.disabled(model):
        base = model(ids, attention_mask=mask).logits[:, -1]
    assert (model(ids, attention_mask=mask).logits[:, -1] - base).abs().max() > 0.1  # the prompt matters


def test_a_checkpointed_deep_prompt_has_its_gradients_after_other_calls():
    gradients = []
    for between in (False, True):
        model, ids, mask = prompted("llama", "deep")
        switch_checkpointing(model.train(), "enable", {"use_reentrant": False})
        loss = model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False).loss
        if between:
            model.eval().generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
            model.train()
        loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


KEEPS = Version(transformers.__version__) >= Version("5.24")


@pytest.mark.skipif(not KEEPS, reason="before 5.24 transformers itself drops the cache of a checkpointed layer")
def test_a_prefix_generates_the_same_in_training_mode_under_checkpointing():
    model, ids, mask = prompted("llama", "prefix")
    greedy = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    expected = model.generate(ids, **greedy)
    switch_checkpointing(model, "enable", {"use_reentrant": False})
    assert torch.equal(model.train().generate(ids, **greedy), expected)


@pytest.mark.parametrize("config", ["prompt", "deep", "p-tuning"])
@pytest.mark.parametrize(
    "model",
    [
        lambda: RwkvForCausalLM(RwkvConfig(**SIZES)),
        lambda: XLNetLMHeadModel(XLNetConfig(vocab_size=64, d_model=32, n_layer=2, n_head=4, d_inner=64)),
    ],
)
def test_a_generator_whose_cache_has_an_unknown_name_is_refused(model, config):
    model = model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(pl.PeftLabError, match="takes no cache under a name that peftlab knows"):
        pl.attach(model, CONFIGS[config]())
    assert not pl.attached(model)
    assert before.keys() == model.state_dict().keys()


@pytest.mark.parametrize("name", NO_PREFIX)
def test_a_prefix_is_refused_where_a_layer_keeps_no_keys(name):
    with pytest.raises(pl.PeftLabError, match="layers without keys and values"):
        pl.attach(MODELS[name](), CONFIGS["prefix"]())


def renamed(kind: type, old: str, new: str) -> type:
    """A model class as a later release might have it: another name for the cache, in the signature and in calls."""

    class Renamed(kind):
        @functools.wraps(kind.forward)
        def forward(self, *args, **kwargs):
            if new in kwargs:
                kwargs[old] = kwargs.pop(new)
            return super().forward(*args, **kwargs)

        def prepare_inputs_for_generation(self, *args, **kwargs):
            inputs = super().prepare_inputs_for_generation(*args, **kwargs)
            return {new if name == old else name: value for name, value in inputs.items()}

    return Renamed


OLD = caches.cache_argument(LlamaForCausalLM(LlamaConfig(**SIZES, **GROUPED)))


@pytest.mark.parametrize("config", ["prompt", "deep", "p-tuning"])
def test_a_cache_under_a_new_name_is_found_by_what_it_can_do(config):
    model, ids, mask = prompted("llama", config)
    greedy = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    expected = model.generate(ids, **greedy)
    model.__class__ = renamed(LlamaForCausalLM, OLD, "memory")
    assert torch.equal(model.generate(ids, **greedy), expected)


class Boxed:
    """A cache of a kind that we cannot recognise."""

    def __init__(self, cache):
        self.cache = cache


@pytest.mark.parametrize("config", ["prompt", "deep", "p-tuning", "prefix"])
def test_a_step_whose_cache_cannot_be_found_is_an_error(config):
    model, ids, mask = prompted("llama", config)

    class Hidden(LlamaForCausalLM):
        """Hands its cache to its forward in a box."""

        @functools.wraps(LlamaForCausalLM.forward)
        def forward(self, *args, box=None, **kwargs):
            return super().forward(*args, **kwargs | ({} if box is None else {OLD: box.cache}))

        def prepare_inputs_for_generation(self, *args, **kwargs):
            inputs = super().prepare_inputs_for_generation(*args, **kwargs)
            return inputs | {"box": Boxed(inputs.pop(OLD))}

    model.__class__ = Hidden
    with pytest.raises(pl.PeftLabError, match="its attention mask covers 8 tokens"):
        model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)


@pytest.mark.parametrize("config", ["prompt", "prefix"])
def test_a_cache_filled_without_the_prompt_is_an_error(config):
    model, ids, mask = prompted("llama", config)
    with pl.disabled(model):
        cache = transformers.DynamicCache()
        model(ids[:, :5], attention_mask=mask[:, :5], use_cache=True, **{OLD: cache})
    with pytest.raises(pl.PeftLabError, match="a cache of 5 positions"):
        model(ids[:, 5:], attention_mask=mask, use_cache=True, **{OLD: cache})


def test_step_by_step_with_a_cache_equals_one_call():
    model, ids, mask = prompted("llama", "prompt")
    mask = torch.ones_like(mask)  # a call without position ids counts padding
    whole = model(ids, attention_mask=mask).logits[:, -1]
    cache = transformers.DynamicCache()
    for end in (5, 6, 7):
        start = 0 if end == 5 else end - 1
        logits = model(ids[:, start:end], attention_mask=mask[:, :end], use_cache=True, **{OLD: cache}).logits
    torch.testing.assert_close(logits[:, -1], whole, rtol=1e-4, atol=1e-4)
