"""Folders of prompts and prefixes both ways: what Hugging Face peft saves we load, what we save it loads."""

import json
import warnings

import peft
import pytest
import torch
from pairs import relative
from prompt_pairs import METHODS, as_peft_expects, configs, inputs_of, model_of, pair, trained
from safetensors.torch import load_file

import peftlab as pl

KINDS = ("llama", "gpt2", "bert", "t5")


def answer(model, kind):
    inputs = inputs_of(kind)
    if kind != "t5":
        del inputs["labels"]
    with torch.no_grad():
        return model.eval()(**inputs).logits


def peft_open(kind, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(as_peft_expects(model_of(kind)), folder).double()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_both_ways(kind, method, tmp_path):
    ours, theirs = pair(kind, method)
    expected = answer(theirs, kind)
    theirs.save_pretrained(tmp_path / "theirs")
    pl.save_adapter(ours, tmp_path / "ours")
    mine, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    assert {key: value.shape for key, value in mine.items()} == {key: value.shape for key, value in other.items()}
    assert "prompt_embeddings" in mine and all(relative(mine[key], other[key]) < 1e-12 for key in mine)

    loaded = pl.load_adapter(model_of(kind), tmp_path / "theirs")
    assert relative(answer(loaded, kind), expected) < 1e-12
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert relative(answer(peft_open(kind, tmp_path / "ours"), kind), expected) < 1e-6  # peft reads prompts in float32
    # and once more through our own hands
    pl.save_adapter(loaded, tmp_path / "again")
    again = pl.load_adapter(model_of(kind), tmp_path / "again")
    assert torch.equal(answer(again, kind), answer(loaded, kind))
    assert not (tmp_path / "again" / "adapter_encoder.safetensors").exists()


@pytest.mark.parametrize("method", METHODS)
def test_config_says_the_same(method, tmp_path):
    ours, theirs = pair("llama", method)
    theirs.save_pretrained(tmp_path / "theirs")
    pl.save_adapter(ours, tmp_path / "ours")
    mine, other = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("ours", "theirs"))
    assert list(mine) == sorted(mine) and mine["inference_mode"] is True
    for name, value in mine.items():
        if name not in ("base_model_name_or_path", "prompt_tuning_init"):
            assert value == other[name], name
    assert "target_modules" not in mine


@pytest.mark.parametrize("method", METHODS)
def test_training_goes_on_after_loading(method, tmp_path):
    """Hugging Face peft refuses; here the network that makes a prompt comes back too, if this package saved it."""
    ours, theirs = pair("llama", method)
    inputs = inputs_of("llama")
    pl.save_adapter(ours, tmp_path / "ours")
    back = pl.load_adapter(model_of("llama"), tmp_path / "ours", trainable=True)
    assert set(trained(back)) == set(trained(ours))
    assert all(torch.equal(value, trained(ours)[name]) for name, value in trained(back).items())
    for model in (ours, back):
        model(**inputs).loss.backward()
    assert all(torch.equal(value.grad, trained(ours)[name].grad) for name, value in trained(back).items())

    with pytest.raises(ValueError, match="trainable"):
        peft.PeftModel.from_pretrained(model_of("llama"), tmp_path / "ours", is_trainable=True)
    # from peft's own folder what it holds goes on: the prompt itself
    theirs.save_pretrained(tmp_path / "theirs")
    plain = pl.load_adapter(model_of("llama"), tmp_path / "theirs", trainable=True)
    assert set(trained(plain)) == {"embedding.weight"}
    assert relative(answer(plain, "llama"), answer(theirs, "llama")) < 1e-12


def test_an_encoder_that_does_not_belong_is_noticed(tmp_path):
    ours, _ = pair("llama", "p-tuning")
    pl.save_adapter(ours, tmp_path / "one")
    with torch.no_grad():
        trained(ours)["embedding.weight"].add_(1)
    pl.save_adapter(ours, tmp_path / "two")
    (tmp_path / "one" / "adapter_encoder.safetensors").write_bytes(
        (tmp_path / "two" / "adapter_encoder.safetensors").read_bytes()
    )
    with pytest.raises(pl.PeftLabError, match="not saved together"):
        pl.load_adapter(model_of("llama"), tmp_path / "one", trainable=True)
    # an adapter without an encoder takes away the file of the one before it
    mine, _ = configs("llama", "prompt")
    pl.save_adapter(pl.attach(model_of("llama"), mine), tmp_path / "two")
    assert not (tmp_path / "two" / "adapter_encoder.safetensors").exists()


def test_another_base_is_refused(tmp_path):
    ours, _ = pair("llama", "prompt")
    pl.save_adapter(ours, tmp_path)
    with pytest.raises(pl.PeftLabError, match="another base"):
        pl.load_adapter(model_of("llama", seed=1), tmp_path)
    with pytest.raises(pl.PeftLabError, match="lm_head"):
        pl.load_adapter(model_of("gpt2"), tmp_path)


def test_a_deep_prompt_does_not_load_as_a_shallow_one(tmp_path):
    model = pl.attach(model_of("llama"), pl.PromptTuningConfig(num_virtual_tokens=5, deep=True))
    pl.save_adapter(model, tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors")
    assert set(keys) == {
        "deep_prompt_embeddings",
        "base_model.model.model.layers.1.prompt_embeddings",
        "base_model.model.model.layers.2.prompt_embeddings",
    }
    back = pl.load_adapter(model_of("llama"), tmp_path)
    assert torch.equal(answer(back, "llama"), answer(model, "llama"))
    with pytest.raises(KeyError):
        peft_open("llama", tmp_path)


def test_a_named_prompt_lies_in_a_subfolder(tmp_path):
    mine, _ = configs("llama", "prefix")
    model = pl.attach(model_of("llama"), mine, name="french")
    assert pl.save_adapter(model, tmp_path, name="french") == tmp_path / "french"
    expected = answer(model, "llama")
    assert relative(answer(pl.load_adapter(model_of("llama"), tmp_path, name="french"), "llama"), expected) < 1e-12
    assert relative(answer(peft_open("llama", tmp_path / "french"), "llama"), expected) < 1e-6


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("config", [pl.PromptTuningConfig(num_virtual_tokens=5), pl.PrefixTuningConfig()])
def test_the_task_is_told_to_peft(kind, config, tmp_path):
    """Without a task_type peft opens a folder of prompts and ignores them."""
    model = pl.attach(model_of(kind), config)
    pl.save_adapter(model, tmp_path)
    assert relative(answer(peft_open(kind, tmp_path), kind), answer(model, kind)) < 1e-6
    back = pl.load_adapter(model_of(kind), tmp_path)
    assert torch.equal(answer(back, kind), answer(model, kind))
