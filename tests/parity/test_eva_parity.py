"""EVA held to Hugging Face peft: the directions, the ranks, the scalings, and the folder."""

import copy
import warnings

import peft
import pytest
import torch
from pairs import base, batch, peft_state, relative, three_steps
from test_lora_folders import output, peft_open, peft_save
from test_starts_parity import factors, live

import peftlab as pl

OPTIONS = {
    "as it is": {},
    "no ranks move": {"rho": 1.0},
    "more ranks move": {"rho": 3.0, "tau": 0.9},
    "whitened": {"whiten": True, "adjust_scaling_factors": False},
    "all tokens": {"use_label_mask": False},
    "another mask": {"label_mask_value": 7, "tau": 0.5},
}


def batches(kind, count=3):
    found = []
    for seed in range(count):
        one = batch(kind, seed=seed, rows=6, length=13)
        if kind not in ("bert",):
            one["labels"] = one["labels"].masked_fill(one["labels"] % 5 == 0, -100)
        found.append(one)
    return found


def both(kind, options=None, dtype=torch.float32, data=None, **settings):
    settings = {"r": 3, "alpha": 6, "target_modules": "all-linear", **settings}
    data = batches(kind) if data is None else data
    ours, theirs = base(kind, dtype), base(kind, dtype)
    if kind == "gpt2":
        settings |= {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}
    pl.attach(ours, pl.LoRAConfig(init="eva", init_options=options or {}, **settings), data=data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        alpha = settings.pop("alpha")
        names = {"alpha_pattern": settings.get("alpha_pattern", {}), **settings}
        config = peft.LoraConfig(
            lora_alpha=alpha, init_lora_weights="eva", eva_config=peft.EvaConfig(**(options or {})), **names
        )
        theirs = peft.get_peft_model(theirs, config)
        peft.initialize_lora_eva_weights(theirs, copy.deepcopy(data), show_progress_bar=False)
    return ours, theirs


def check(ours, theirs):
    mine, other = factors(ours), peft_state(theirs)
    assert mine.keys() == other.keys()  # layers without a rank have no adapter
    for key, value in other.items():
        assert mine[key].shape == value.shape, key
        assert relative(mine[key], value) < 1e-5 or not value.any(), key
    for path, layer in theirs.base_model.model.named_modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            part = ours.get_submodule(path).peftlab["default"]["lora"]
            assert part.scaling == pytest.approx(layer.scaling["default"])


@pytest.mark.parametrize("options", OPTIONS)
def test_same_directions_and_ranks(options):
    # peft whitens directions that layers share once for each of these layers, in place; we do it once
    apart = {"target_modules": ["q_proj", "o_proj", "gate_proj", "down_proj"]} if options == "whitened" else {}
    ours, theirs = both("llama", OPTIONS[options], **apart)
    check(ours, theirs)
    ranks = {len(value) for key, value in factors(ours).items() if "lora_A" in key}
    assert (ranks == {3}) == (options == "no ranks move")


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_other_models(kind):
    # peft takes a classifier's labels for those of tokens
    targets = {"target_modules": ["query", "key", "value", "intermediate.dense"]} if kind == "bert" else {}
    check(*both(kind, {"use_label_mask": kind != "bert"}, **targets))


@pytest.mark.parametrize("settings", [
    {"use_rslora": True}, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    {"target_modules": ["q_proj"]},
])  # fmt: skip
def test_with_other_settings(settings):
    check(*both("llama", **settings))


def test_steps_and_folders(tmp_path):
    ours, theirs = both("llama", {"rho": 2.0})
    for model in (ours, theirs):
        model.double()
    with torch.no_grad():
        for key, value in live(theirs).items():
            factors(ours)[key].copy_(value)
    three_steps(ours, theirs, batch("llama"), lambda: (factors(ours), live(theirs)))
    expected = output(theirs, "llama")
    peft_save(theirs, tmp_path / "theirs")
    loaded = pl.load_adapter(base("llama"), tmp_path / "theirs")
    assert relative(output(loaded, "llama"), expected) < 1e-6  # the bases differ by their rounding to float32
    pl.save_adapter(ours, tmp_path / "ours")
    opened, _ = peft_open(base("llama"), tmp_path / "ours")
    assert relative(output(opened, "llama"), expected) < 1e-6
