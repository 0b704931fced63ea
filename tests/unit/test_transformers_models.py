"""transformers' own machinery on an attached model: generate, save_pretrained, gradient checkpointing."""

import copy

import pytest
import torch
from nets import assert_same, snapshot
from tiny import llama
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

import peftlab as pl
from peftlab.core.checkpointing import switch_checkpointing

PROMPTS = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10], [11, 12, 13, 14]])


def attach(model, name="default", seed=1, **settings):
    torch.manual_seed(seed)
    settings = {"r": 4, "alpha": 20, "target_modules": "all-linear", "init": "random", **settings}
    return pl.attach(model, pl.LoRAConfig(**settings), name=name)


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=32, n_embd=16, n_head=2, n_layer=2, n_positions=32, bos_token_id=1, eos_token_id=0)
    return GPT2LMHeadModel(config).eval()


def t5():
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=32,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
        dropout_rate=0.0,
    )
    return T5ForConditionalGeneration(config).eval()


def generate(model, prompts=PROMPTS, **settings):
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, **settings}
    return model.generate(prompts, attention_mask=torch.ones_like(prompts), **settings)


# ------------------------------------------------------------------------------------------------------------ generate


@pytest.mark.parametrize("build, targets", [(llama, "all-linear"), (gpt2, ["c_attn", "c_proj"]), (t5, ["q", "v"])])
@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"use_cache": False}])
def test_generate_gives_what_the_merged_model_gives(build, targets, settings):
    model = attach(build().double().eval(), target_modules=targets)
    found = generate(model, **settings)
    with pl.disabled(model):
        assert not torch.equal(found, generate(model, **settings))
    pl.merge(model, unload=True)
    assert torch.equal(found, generate(model, **settings))


@pytest.mark.parametrize("build, whole", [
    (llama, "layers.0"), (llama, "layers.1.self_attn"), (gpt2, "h.1"), (t5, "decoder.block.1"),
])  # fmt: skip
def test_a_block_trained_in_full_fills_the_cache_once(build, whole):
    """The base's block runs before its copy: each of them with the cache would write its keys into it."""
    model = build().double().eval()
    torch.manual_seed(0)
    pl.attach(model, pl.SelectiveConfig(modules_to_save=[whole]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    found = generate(model)
    with pl.disabled(model):
        assert not torch.equal(found, generate(model))
    assert torch.equal(found, generate(model, use_cache=False))


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_generate_with_an_adapter_for_each_row(settings):
    model = llama().double().eval()
    attach(model, "a", seed=1)
    attach(model, "b", seed=2, target_modules=["q_proj", "down_proj"])
    alone = {}
    for name in ("a", "b"):
        pl.activate(model, name)
        alone[name] = generate(model, **settings)
    with pl.disabled(model):
        alone[None] = generate(model, **settings)
    rows = ["b", None, "a"]
    pl.activate(model, rows)
    found = generate(model, **settings)
    each = len(found) // 3
    for i, name in enumerate(rows):
        assert torch.equal(found[i * each : (i + 1) * each], alone[name][i * each : (i + 1) * each]), name
    assert not torch.equal(alone["a"], alone["b"])


# ----------------------------------------------------------------------------------------------------- save_pretrained


@pytest.mark.parametrize("tied", [False, True])
def test_the_saved_base_is_the_base(tmp_path, tied):
    plain = llama(tie_word_embeddings=tied)
    model = attach(copy.deepcopy(plain), modules_to_save=["norm"], target_modules=["q_proj", "embed_tokens"])
    model.save_pretrained(tmp_path)
    again, report = LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["unexpected_keys"] and not report["missing_keys"]
    for name, value in plain.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    model.model.save_pretrained(tmp_path / "inner")  # a model inside the model
    from safetensors.torch import load_file

    assert not any("peftlab" in key for key in load_file(tmp_path / "inner" / "model.safetensors"))


def test_detach_after_transformers_was_told(tmp_path):
    model = llama()
    model._keys_to_ignore_on_save = {"mine"}
    before = snapshot(model)
    attach(model)
    assert "mine" in model._keys_to_ignore_on_save and len(model._keys_to_ignore_on_save) == 1 + 2 * 14
    pl.save_adapter(model, tmp_path)
    pl.detach(model)
    assert_same(before, snapshot(model))


def test_merged_and_unloaded_it_is_saved_as_any_model(tmp_path):
    model = attach(llama().eval())
    expected = model(PROMPTS).logits
    pl.merge(model, unload=True)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(LlamaForCausalLM.from_pretrained(tmp_path).eval()(PROMPTS).logits, expected)


# ---------------------------------------------------------------------------------------------- gradient checkpointing


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("build, targets", [
    (llama, "all-linear"), (llama, ["embed_tokens", "q_proj"]), (llama, ["lm_head", "q_proj"]), (gpt2, ["c_attn"]),
    (t5, ["q", "wo"]),
])  # fmt: skip
def test_no_layer_is_silently_untrained(build, targets, when, reentrant):
    """With the reentrant kind and a frozen embedding, blocks would get no gradient at all, and only the head train."""

    def enable(model):
        switch_checkpointing(model, "enable", {"use_reentrant": reentrant})

    plain = build().double().train()
    model = copy.deepcopy(plain)
    for one in (plain, model):
        if one is model and when == "before":
            enable(model)
        attach(one, target_modules=targets)
        if one is model and when == "after":
            enable(model)
        torch.manual_seed(4)
        one(input_ids=PROMPTS, labels=PROMPTS).loss.backward()
    expected = {name: p.grad for name, p in plain.named_parameters() if p.requires_grad}
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert expected.keys() == found.keys() and expected
    for name, gradient in expected.items():
        assert found[name] is not None and gradient.any(), name
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12)
