"""Adapter folders both ways: what Hugging Face peft saves we load, what we save it loads, and the files are alike."""

import json
import warnings

import peft
import pytest
import torch
from pairs import WRAPPER, base, batch, our_state, pair, peft_model, relative
from releases import skip_lost_biases
from safetensors.torch import load_file, save_file
from test_lora_parity import CASES
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

import peftlab as pl
from peftlab.adapters.trainer_callback import restore_adapter


def output(model, kind):
    inputs = batch(kind)
    del inputs["labels"]
    with torch.no_grad():
        return model.eval()(**inputs).logits


def peft_save(theirs, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(folder)


def peft_open(model, folder):
    """peft's model and what it warned of on the way."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        opened = peft.PeftModel.from_pretrained(model, folder)
    return opened, {str(warning.message) for warning in caught}


def shapes(folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    return {key: tuple(value.shape) for key, value in tensors.items() if not WRAPPER.search(key)}


@pytest.mark.parametrize("case", CASES)
def test_both_ways(case, tmp_path):
    kind, settings = CASES[case]
    skip_lost_biases(settings)
    settings = {"r": 5, "alpha": 12, "dropout": 0.1, **settings}
    ours, theirs = pair(kind, **settings)
    expected = output(theirs, kind)
    assert relative(output(base(kind), kind), expected) > 1e-3

    peft_save(theirs, tmp_path / "theirs")
    loaded = pl.load_adapter(base(kind), tmp_path / "theirs")
    assert relative(output(loaded, kind), expected) < 1e-12

    assert pl.save_adapter(ours, tmp_path / "ours") == tmp_path / "ours"
    assert shapes(tmp_path / "ours") == shapes(tmp_path / "theirs")
    opened, said = peft_open(base(kind), tmp_path / "ours")
    assert relative(output(opened, kind), expected) < 1e-12
    assert said <= peft_open(base(kind), tmp_path / "theirs")[1]  # no complaint that its own folder does not earn

    # and once more through our own hands
    pl.save_adapter(loaded, tmp_path / "again")
    again = pl.load_adapter(base(kind), tmp_path / "again")
    assert torch.equal(output(again, kind), output(loaded, kind))


def test_config_says_the_same(tmp_path):
    settings = dict(
        r=5, alpha=12, dropout=0.25, target_modules=["q_proj", "up_proj"], use_rslora=True, rank_pattern={"q_proj": 3},
        alpha_pattern={"up_proj": 4}, layers_to_transform=[0, 2], layers_pattern="layers", modules_to_save=["lm_head"],
        task_type="CAUSAL_LM", exclude_modules=["layers.0.mlp.up_proj"],
    )  # fmt: skip
    ours, theirs = pair("llama", **settings)
    pl.save_adapter(ours, tmp_path / "ours")
    peft_save(theirs, tmp_path / "theirs")
    mine = json.loads((tmp_path / "ours/adapter_config.json").read_text())
    other = json.loads((tmp_path / "theirs/adapter_config.json").read_text())
    assert list(mine) == sorted(mine)
    for name, value in mine.items():
        expected = other[name]
        if name in ("target_modules", "modules_to_save", "exclude_modules", "layers_pattern"):
            value, expected = set(value), {expected} if isinstance(expected, str) else set(expected)
        if name not in ("init_lora_weights", "base_model_name_or_path"):
            assert value == expected, name
    assert mine["inference_mode"] is True


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_a_named_adapter_lies_in_a_subfolder(kind, tmp_path):
    ours, theirs = pair(kind, r=3, alpha=5)
    expected = output(theirs, kind)
    model = base(kind)
    pl.attach(model, pl.LoRAConfig(r=3, alpha=5), name="french")
    with torch.no_grad():
        for key, parameter in our_state(model, "french").items():
            parameter.copy_(our_state(ours)[key])
    assert pl.save_adapter(model, tmp_path, name="french") == tmp_path / "french"
    assert relative(output(pl.load_adapter(base(kind), tmp_path, name="french"), kind), expected) < 1e-12
    assert relative(output(pl.load_adapter(base(kind), tmp_path / "french", name="other"), kind), expected) < 1e-12
    opened = peft.PeftModel.from_pretrained(base(kind), tmp_path / "french")
    assert relative(output(opened, kind), expected) < 1e-12
    opened.save_pretrained(tmp_path / "two")
    theirs = peft.PeftModel.from_pretrained(base(kind), tmp_path / "french", adapter_name="french")
    theirs.save_pretrained(tmp_path / "theirs")
    assert relative(output(pl.load_adapter(base(kind), tmp_path / "theirs", name="french"), kind), expected) < 1e-12
    with pytest.raises(pl.PeftLabError, match="'french'"):
        pl.load_adapter(base(kind), tmp_path)


def test_half_precision_base_and_another_dtype(tmp_path):
    ours, theirs = pair("llama", dtype=torch.bfloat16, r=4, alpha=9, target_modules=["embed_tokens", "v_proj"])
    peft_save(theirs, tmp_path / "theirs")
    pl.save_adapter(ours, tmp_path / "ours")
    tensors = load_file(tmp_path / "ours/adapter_model.safetensors")
    assert {value.dtype for key, value in tensors.items() if "lora" in key} == {torch.float32}
    for folder in ("ours", "theirs"):
        same = pl.load_adapter(base("llama", torch.bfloat16), tmp_path / folder)
        assert torch.equal(output(same, "llama"), output(theirs, "llama"))
        # the same base, loaded in float32 from the same 16-bit numbers or before they were rounded
        wide = pl.load_adapter(base("llama", torch.float32), tmp_path / folder)
        assert relative(output(wide, "llama"), output(theirs, "llama")) < 0.1


def test_a_resized_vocabulary_is_refused_with_a_reason(tmp_path):
    model = base("llama")
    model.resize_token_embeddings(60)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(model, peft.LoraConfig(target_modules=["embed_tokens"]))
        theirs.save_pretrained(tmp_path)
    with pytest.raises(pl.PeftLabError, match="embed_tokens"):
        pl.load_adapter(base("llama"), tmp_path)


@pytest.mark.parametrize("settings", [{"target_modules": ["embed_tokens"]},
                                      {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}])  # fmt: skip
def test_an_adapter_that_ties_the_head_is_refused_with_a_reason(settings, tmp_path):
    config = peft.LoraConfig(r=3, ensure_weight_tying=True, **settings)
    theirs = peft.get_peft_model(base("llama-tied"), config)
    for parameter in theirs.parameters():
        parameter.data += 0.1 * parameter.requires_grad  # as after training
    peft_save(theirs, tmp_path)
    with pytest.raises(pl.PeftLabError, match="ensure_weight_tying=True.*Load it with Hugging Face peft"):
        pl.load_adapter(base("llama-tied"), tmp_path)


def test_scaled_embeddings(tmp_path):
    """Gemma multiplies what it looks up; forward, peft and merging must agree on where the update stands."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=53, hidden_size=20, intermediate_size=37, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=6, max_position_embeddings=32, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    model = Gemma3ForCausalLM(config).double().eval()
    plain = model.state_dict()
    pl.attach(model, pl.LoRAConfig(r=3, alpha=5, target_modules=["embed_tokens"], init="random"))
    expected = output(model, "llama")
    pl.save_adapter(model, tmp_path)
    twin = Gemma3ForCausalLM(config).double().eval()
    twin.load_state_dict({key: value for key, value in plain.items() if "peftlab" not in key})
    assert relative(output(peft.PeftModel.from_pretrained(twin, tmp_path), "llama"), expected) < 1e-9
    pl.merge(model)
    assert relative(output(model, "llama"), expected) < 1e-9


def test_patterns_that_overlap_keep_their_order(tmp_path):
    """The first match counts, but the file's keys are sorted: the order must not be lost on the way."""
    model = base("llama")
    patterns = dict(
        rank_pattern={r"layers\.1\..*": 2, "down_proj": 7}, alpha_pattern={"v_proj": 3, r"layers\.0.*": 1.5}
    )
    config = pl.LoRAConfig(r=5, alpha=12, target_modules=["down_proj", "v_proj"], init="random", **patterns)
    pl.attach(model, config)
    expected = output(model, "llama")
    pl.save_adapter(model, tmp_path)
    assert relative(output(pl.load_adapter(base("llama"), tmp_path), "llama"), expected) < 1e-12
    assert relative(output(peft_open(base("llama"), tmp_path)[0], "llama"), expected) < 1e-12


@pytest.mark.parametrize("field, value", [
    ("use_dora", True), ("layer_replication", [[0, 2]]), ("trainable_token_indices", [1]),
    ("alora_invocation_tokens", [1]), ("target_parameters", ["weight"]), ("use_qalora", True),
])  # fmt: skip
def test_what_we_do_not_have_is_named(field, value, tmp_path):
    ours, _ = pair("llama", r=3, alpha=5)
    pl.save_adapter(ours, tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    with pytest.raises(pl.PeftLabError):
        pl.load_adapter(base("llama"), tmp_path)


@pytest.mark.parametrize("init", ["pissa_niter_4", "corda", "lora_ga"])
def test_a_start_that_changes_the_base_is_refused(init, tmp_path):
    theirs = peft_model(base("llama"), r=3, alpha=5, target_modules=["q_proj"])
    peft_save(theirs, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "init_lora_weights": init}))
    with pytest.raises(pl.PeftLabError, match=f"init_lora_weights='{init}'.*path_initial_model_for_weight_conversion"):
        pl.load_adapter(base("llama"), tmp_path)


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal"])
def test_a_start_that_only_draws_the_factors_loads(init, tmp_path):
    theirs = peft_model(base("llama"), r=4, alpha=5, target_modules=["q_proj"], init_lora_weights=init)
    peft_save(theirs, tmp_path)
    loaded = pl.load_adapter(base("llama"), tmp_path)
    assert relative(output(loaded, "llama"), output(theirs, "llama")) < 1e-12


def test_a_folder_of_peft_is_put_back_only_into_the_same_adapter(tmp_path):
    settings = dict(r=3, alpha=16, target_modules=["q_proj", "v_proj"], alpha_pattern={"v_proj": 4})
    ours, theirs = pair("llama", **settings)
    peft_save(theirs, tmp_path)
    with torch.no_grad():
        for parameter in our_state(ours).values():
            parameter.zero_()
    restore_adapter(ours, tmp_path, "default")
    assert relative(output(ours, "llama"), output(theirs, "llama")) < 1e-12
    other = pl.attach(base("llama"), pl.LoRAConfig(**{**settings, "alpha_pattern": {}}))
    with pytest.raises(pl.PeftLabError, match="alpha_pattern"):
        restore_adapter(other, tmp_path, "default")


@pytest.mark.parametrize("settings", [
    dict(target_modules=["lm_head"], layers_to_transform=1),
    dict(target_modules=["lm_head"], layers_to_transform=[0, 7], layers_pattern=["layers", "h"]),
    dict(target_modules=["lm_head", "q_proj"], layers_to_transform=[7, 1]),
    dict(target_modules=["v_proj"], layers_to_transform=[2, 9], layers_pattern="layers"),
    dict(target_modules=["lm_head", "q_proj"], layers_to_transform=[8]),
], ids=str)  # fmt: skip
def test_blocks_that_hold_no_target_are_passed_over_as_in_peft(settings, tmp_path):
    """In `attach` they are an error, but in a folder the keys say what was trained."""
    theirs = peft_model(base("llama"), r=3, **settings)
    peft_save(theirs, tmp_path)
    loaded = pl.load_adapter(base("llama"), tmp_path)
    assert relative(output(loaded, "llama"), output(theirs, "llama")) < 1e-12
    pl.save_adapter(loaded, tmp_path / "ours")
    opened, _ = peft_open(base("llama"), tmp_path / "ours")
    assert relative(output(opened, "llama"), output(theirs, "llama")) < 1e-12
    with pytest.raises(pl.PeftLabError, match="layers_to_transform names block"):
        pl.attach(base("llama"), pl.LoRAConfig(**settings))


@pytest.mark.parametrize("settings, config", [
    (dict(bias="lora_only", init_lora_weights=False), peft.LoraConfig),
    (dict(bias="vera_only", r=3, init_weights=False), peft.VeraConfig),
    (dict(bias="all", r=0, oft_block_size=6, init_weights=False), peft.OFTConfig),
])  # fmt: skip
def test_a_folder_whose_biases_were_lost_is_refused_and_says_what_to_do(settings, config, tmp_path):
    """peft 0.20 writes such folders. A newer one gives the biases, which are taken out here."""
    theirs = peft.get_peft_model(base("bert"), config(target_modules=["query", "value"], **settings))
    peft_save(theirs, tmp_path)
    weights, fields = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    whole = load_file(weights)
    save_file({key: value for key, value in whole.items() if not key.endswith("bias")}, weights)
    with pytest.raises(pl.PeftLabError, match='all of its trained biases.* before 0.21 .* "bias" to "none"'):
        pl.load_adapter(base("bert"), tmp_path)
    fields.write_text(json.dumps(json.loads(fields.read_text()) | {"bias": "none"}))
    found, expected = output(pl.load_adapter(base("bert"), tmp_path), "bert"), output(theirs, "bert")
    assert relative(found, expected) < 1e-12 < relative(output(base("bert"), "bert"), expected)
    biases = [key for key in whole if key.endswith("bias")]
    if len(biases) > 1:  # one that is missing is another fault
        save_file({key: value for key, value in whole.items() if key != biases[0]}, weights)
        fields.write_text(json.dumps(json.loads(fields.read_text()) | {"bias": settings["bias"]}))
        with pytest.raises(pl.PeftLabError, match="lacks 1 of .* this model is"):
            pl.load_adapter(base("bert"), tmp_path)
