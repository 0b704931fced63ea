"""PiSSA and OLoRA held to Hugging Face peft: starts, outputs, gradients, three steps of AdamW, folders both ways."""

import json
import warnings

import peft
import pytest
import torch
from pairs import base, batch, peft_model, peft_state, relative, same, three_steps
from releases import skip_lost_biases
from safetensors.torch import load_file
from test_lora_folders import output, peft_open, peft_save

import peftlab as pl
from peftlab.adapters.key_table import entries, placed
from peftlab.adapters.trainer_callback import restore_adapter
from peftlab.core.records import unwrap
from peftlab.methods.lora_conv import start

CASES = {
    "llama pissa": ("llama", "pissa", dict(target_modules="all-linear")),
    "llama olora": ("llama", "olora", dict(target_modules="all-linear")),
    "llama pissa rslora": ("llama", "pissa", dict(use_rslora=True)),
    "llama olora patterns": ("llama", "olora", dict(rank_pattern={r"layers\.1.*q_proj": 2},
                                                    alpha_pattern={"v_proj": 4})),
    "llama pissa rslora and patterns": ("llama", "pissa", dict(use_rslora=True, rank_pattern={"q_proj": 2, "v_proj": 5},
                                                               alpha_pattern={"v_proj": 1.5})),
    "llama pissa head": ("llama", "pissa", dict(target_modules=["lm_head", "q_proj"])),
    "gpt2 pissa": ("gpt2", "pissa", dict(target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)),
    "bert pissa": ("bert", "pissa", dict(bias="lora_only")),
    "bert olora": ("bert", "olora", dict(target_modules="all-linear", task_type="SEQ_CLS")),
}  # fmt: skip


def started(kind, init, dtype=torch.float64, **settings):
    """(ours, theirs) from one base. peft starts in float32 only, and what it leaves of W is then widened exactly."""
    settings = {"r": 4, "alpha": 9, **settings}
    ours = base(kind, torch.float32)
    whole = base(kind, torch.float32)
    theirs = peft_model(base(kind, torch.float32), init_lora_weights=init, **settings)
    pl.attach(ours, pl.LoRAConfig(init=init, **settings))
    ours, theirs, whole = (model.to(dtype) for model in (ours, theirs, whole))
    with torch.no_grad():
        for path, layer in theirs.base_model.model.named_modules():
            if isinstance(layer, peft.tuners.lora.LoraLayer):
                a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
                delta = b @ a * layer.scaling["default"]
                kept = layer.base_layer.weight
                rest = whole.get_submodule(path).weight - (delta.T if layer.fan_in_fan_out else delta)
                assert relative(kept, rest) < 1e-6  # what peft has, up to its rounding to float32
                kept.copy_(rest)
    return ours, theirs


def factors(model):
    """{key: our parameter}: A and B alone, where the file would hold them folded with their starts."""
    return {
        key: getattr(placement.part, own.replace("folded", "lora")) if own.startswith("folded") else parameter
        for key, placement, own, parameter in entries(placed(unwrap(model), "default"))
    }


def live(theirs):
    by_storage = {parameter.data_ptr(): parameter for parameter in theirs.parameters()}
    return {key: by_storage[value.data_ptr()] for key, value in peft_state(theirs).items()}


@pytest.mark.parametrize("case", CASES)
def test_same_numbers(case):
    kind, init, settings = CASES[case]
    skip_lost_biases(settings)
    ours, theirs = started(kind, init, **settings)
    same(factors(ours), live(theirs), 1e-12)  # the same start
    assert pl.count_parameters(ours)[:2] == theirs.get_nb_trainable_parameters()
    inputs = batch(kind)
    before = ours(**inputs).logits
    assert relative(before, base(kind, torch.float32).double()(**inputs).logits) < 1e-12
    three_steps(ours, theirs, inputs, lambda: (factors(ours), live(theirs)))
    assert relative(ours(**inputs).logits, before) > 1e-3
    merged = ours(**inputs).logits
    pl.merge(ours)
    assert relative(ours(**inputs).logits, merged) < 1e-12


def published(kind, dtype=torch.float64):
    return base(kind, torch.float32).to(dtype)


def scramble(ours, theirs):
    """Moves every factor off its start, in both alike."""
    generator = torch.Generator().manual_seed(5)
    mine, other = factors(ours), live(theirs)
    with torch.no_grad():
        for key in sorted(other):
            other[key].add_(torch.randn(other[key].shape, generator=generator).to(other[key]) * 0.1)
            mine[key].copy_(other[key])


@pytest.mark.parametrize("case", CASES)
def test_both_ways(case, tmp_path):
    kind, init, settings = CASES[case]
    skip_lost_biases(settings)
    ours, theirs = started(kind, init, **settings)
    scramble(ours, theirs)
    expected = output(theirs, kind)
    assert relative(output(published(kind), kind), expected) > 1e-3

    # peft's own folder says how it started, and not what it took from the base
    peft_save(theirs, tmp_path / "theirs")
    assert json.loads((tmp_path / "theirs/adapter_config.json").read_text())["init_lora_weights"] == init
    loaded = pl.load_adapter(published(kind), tmp_path / "theirs")
    assert relative(output(loaded, kind), expected) < 1e-12
    assert pl.attached(loaded)["default"].init == init

    # ours is a plain LoRA for the base as published
    for model, folder in ((ours, tmp_path / "ours"), (loaded, tmp_path / "again")):
        pl.save_adapter(model, folder)
        assert json.loads((folder / "adapter_config.json").read_text())["init_lora_weights"] is True
        opened, said = peft_open(published(kind), folder)
        assert relative(output(opened, kind), expected) < 1e-12
        assert not any("init" in line for line in said)
        again = pl.load_adapter(published(kind), folder)
        assert relative(output(again, kind), expected) < 1e-12
        assert pl.attached(again)["default"].r == 8


def test_a_head_that_peft_rounded_loads(tmp_path):
    settings = dict(r=3, target_modules=["lm_head"])
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.05)):
        theirs = peft_model(base("llama", dtype), init_lora_weights="olora", **settings)
        peft_save(theirs, tmp_path)
        assert any("base_layer" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
        loaded = pl.load_adapter(base("llama", dtype), tmp_path)
        assert relative(output(loaded, "llama"), output(theirs, "llama")) < tolerance
    with pytest.raises(pl.PeftLabError, match="base_layer.weight"):  # another base would start elsewhere
        pl.load_adapter(base("llama", dtype, seed=1), tmp_path)


def test_a_folder_without_its_start_trains_on(tmp_path):
    ours, theirs = started("llama", "pissa", use_rslora=True, rank_pattern={"q_proj": 2})
    scramble(ours, theirs)
    peft_save(theirs, tmp_path)
    loaded = pl.load_adapter(published("llama"), tmp_path, trainable=True)
    three_steps(loaded, theirs, batch("llama"), lambda: (factors(loaded), live(theirs)))


@pytest.mark.parametrize("case", ["llama pissa", "llama pissa rslora and patterns", "bert olora"])
def test_our_folder_trains_on_beside_its_start(case, tmp_path):
    kind, init, settings = CASES[case]
    ours, theirs = started(kind, init, **settings)
    scramble(ours, theirs)
    pl.save_adapter(ours, tmp_path)
    loaded = pl.load_adapter(published(kind), tmp_path, trainable=True)
    assert pl.attached(loaded)["default"].r == 4 and pl.attached(loaded)["default"].init == init
    same(factors(loaded), factors(ours), 1e-15)
    three_steps(loaded, theirs, batch(kind), lambda: (factors(loaded), live(theirs)))


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_3", "olora"])
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"alpha_pattern": {"v_proj": 3}}])
def test_what_peft_converts_loads(init, settings, tmp_path):
    settings = dict(r=3, alpha=5, target_modules=["q_proj", "v_proj"], **settings)
    theirs = peft_model(base("llama", torch.float32), init_lora_weights=init, **settings)
    theirs.peft_config["default"].init_lora_weights = True  # as peft's guide has it, so that the start loads as it is
    peft_save(theirs, tmp_path / "start")
    theirs.peft_config["default"].init_lora_weights = init
    with torch.no_grad():
        for parameter in live(theirs).values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    expected = output(theirs, "llama")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(tmp_path / "end", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    loaded = pl.load_adapter(base("llama", torch.float32), tmp_path / "end")
    assert relative(output(loaded, "llama"), expected) < 1e-5
    assert pl.attached(loaded)["default"].r == 6


def test_a_checkpoint_is_put_back_with_its_start(tmp_path):
    ours, theirs = started("llama", "pissa")
    scramble(ours, theirs)
    pl.save_adapter(ours, tmp_path / "ours")
    peft_save(theirs, tmp_path / "theirs")
    expected, kept = output(ours, "llama"), {key: value.clone() for key, value in factors(ours).items()}
    for folder in ("ours", "theirs"):
        with torch.no_grad():
            for parameter in factors(ours).values():
                parameter.zero_()
        restore_adapter(ours, tmp_path / folder, "default")
        same(factors(ours), kept, 1e-15)
        assert torch.equal(output(ours, "llama"), expected)


def rewritten(folder, **fields):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def test_a_start_that_cannot_be_found_again_is_refused(tmp_path):
    convert = "path_initial_model_for_weight_conversion"
    theirs = peft_model(base("llama", torch.float32), r=3, init_lora_weights="pissa", target_modules=["q_proj"])
    peft_save(theirs, tmp_path)
    with pytest.raises(pl.PeftLabError, match="q_proj is held in four bits"):
        pl.load_adapter(pl.quantize_model(base("llama", torch.float32), block_size=64), tmp_path)
    for init in ("pissa_niter_4", "corda", "lora_ga", "PISSA_new"):
        rewritten(tmp_path, init_lora_weights=init)
        with pytest.raises(pl.PeftLabError, match=f"'{init}'.*{convert}"):
            pl.load_adapter(base("llama", torch.float32), tmp_path)
    rewritten(tmp_path, init_lora_weights="loftq", loftq_config={"loftq_bits": 4, "loftq_iter": 5})
    with pytest.raises(pl.PeftLabError, match="'loftq'.*4 bits hold, 5 times.*quantize_model"):
        pl.load_adapter(base("llama", torch.float32), tmp_path)
    rewritten(tmp_path, init_lora_weights="pissa")
    with pytest.raises(pl.PeftLabError, match="its start.*is not in the folder"):
        pl.export_adapter(tmp_path, tmp_path / "out")

    theirs = peft_model(base("llama-tied", torch.float32), r=3, init_lora_weights="pissa", target_modules=["lm_head"])
    peft_save(theirs, tmp_path / "tied")
    with pytest.raises(pl.PeftLabError, match=f"tied weights.*{convert}"):
        pl.load_adapter(base("llama-tied", torch.float32), tmp_path / "tied")

    model = base("gpt2", torch.float32)
    theirs = peft_model(model, r=3, init_lora_weights="olora", target_modules=["attn.c_proj"], fan_in_fan_out=True)
    peft_save(theirs, tmp_path / "conv1d")
    with pytest.raises(pl.PeftLabError, match=f"Conv1D.*{convert}"):
        pl.load_adapter(base("gpt2", torch.float32), tmp_path / "conv1d")


def test_orthogonal_draws_what_peft_draws():
    theirs = peft_model(base("llama", torch.float32), r=4, target_modules=["q_proj"], init_lora_weights=True)
    layer = theirs.base_model.model.model.layers[0].self_attn.q_proj
    torch.manual_seed(3)
    layer.orthogonal_init("default")
    a, b = torch.empty(4, 20), torch.zeros(24, 4)
    torch.manual_seed(3)
    start(a, b, "orthogonal")
    assert torch.equal(a, layer.lora_A["default"].weight) and torch.equal(b, layer.lora_B["default"].weight)
