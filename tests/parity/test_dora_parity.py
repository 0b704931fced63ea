"""DoRA held to Hugging Face peft: numbers, gradients, steps, dropout, four bits, folders both ways.

It also tests the interface of a part: DoRA has a value computed from the base's weights (so the part has to settle), it
reads the host's own output, its `peft_type` is LoRA's, too, and its weight may lie in four bits.
"""

import copy
import json
import warnings
from dataclasses import dataclass, replace

import pytest
import torch
from pairs import base, batch, give, gradients, live, our_state, peft_model, relative, same, three_steps, twin_of
from releases import skip_lost_biases
from test_lora_folders import output, peft_open, peft_save, shapes
from test_qlora_parity import bitsandbytes_layers
from torch import nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

import peftlab as pl
from peftlab.adapters.key_table import placed
from peftlab.catalogue import METHODS
from peftlab.core.interface import Config
from peftlab.methods.dora import DoRALinear
from peftlab.quantization.weights import REPACKS, dense, is_quantized, is_repacked

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES = {
    "llama default targets": ("llama", {}),
    "llama all layers": ("llama", dict(target_modules=ALL)),
    "llama some layers": ("llama", dict(target_modules=["k_proj", "up_proj"], layers_to_transform=[0, 2])),
    "llama embedding": ("llama", dict(target_modules=["embed_tokens", "q_proj"])),
    "llama tied, embedding adapted": ("llama-tied", dict(target_modules=["embed_tokens"])),
    "llama classifier": ("llama-classifier", dict(task_type="SEQ_CLS")),
    "gpt2 Conv1D": ("gpt2", dict(target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)),
    "gpt2 embeddings": ("gpt2", dict(target_modules=["wte", "wpe"])),
    "bert, biases outside": ("bert", dict(target_modules=["query", "key", "value", "dense"])),
    "bert, biases trained": ("bert", dict(bias="lora_only", target_modules=["query", "dense"])),
    "bert classifier": ("bert", dict(task_type="SEQ_CLS")),
    "llama rslora": ("llama", dict(target_modules=["k_proj", "down_proj"], use_rslora=True)),
    "llama embedding rslora": ("llama", dict(target_modules=["embed_tokens"], use_rslora=True)),
    "llama patterns": ("llama", dict(target_modules=ALL, rank_pattern={r"layers\.1\.self_attn.*": 2, "down_proj": 9},
                                     alpha_pattern={"q_proj": 7, r"layers\.2.*v_proj": 1.5})),
    "llama rslora and patterns": ("llama", dict(use_rslora=True, rank_pattern={"v_proj": 3},
                                                alpha_pattern={"v_proj": 4})),
    "llama exclude": ("llama", dict(target_modules="all-linear", exclude_modules=r".*layers\.1\..*")),
    "llama regex": ("llama", dict(target_modules=r".*layers\.[02]\..*(q|down)_proj")),
    "llama head in full": ("llama", dict(modules_to_save=["lm_head"])),
    "llama head": ("llama", dict(target_modules=["lm_head", "v_proj"])),
    "llama tied, head adapted": ("llama-tied", dict(target_modules=["lm_head"])),
    "llama tokens": ("llama", dict(target_modules=["q_proj"], trainable_tokens=[4, 9])),
    "llama tied tokens": ("llama-tied", dict(target_modules=["v_proj"], trainable_tokens=[4, 9])),
    "gpt2 bias all": ("gpt2", dict(target_modules=["c_attn"], bias="all", use_rslora=True)),
    "gpt2 Conv1D patterns": ("gpt2", dict(target_modules=["c_attn", "c_fc", "wte"], rank_pattern={"c_fc": 2, "wte": 3},
                                          alpha_pattern={"h.1.mlp.c_fc": 5}, use_rslora=True)),
    "bert bias all, classifier": ("bert", dict(bias="all", task_type="SEQ_CLS")),
}  # fmt: skip


# Each kind of host, with a rank and a scale of its own and without. How hosts are chosen says nothing of their norms.
HOSTS = [
    "llama all layers", "llama embedding", "llama tied, embedding adapted", "llama tied, head adapted", "llama head",
    "llama rslora and patterns", "llama classifier", "gpt2 Conv1D patterns", "gpt2 embeddings", "bert, biases trained",
]
# Without those whose fields stand, with others, in the folder of another case on a host of the same kind.
FOLDERS = [
    case for case in CASES if case not in (
        "llama all layers", "llama embedding", "gpt2 Conv1D", "bert, biases outside", "bert classifier",
        "llama rslora", "llama embedding rslora", "gpt2 bias all",
    )
]  # fmt: skip


def pair(kind, model=None, twin=None, adapter_dtype=None, **settings):
    """(ours, theirs): equal bases with equal adapters, moved off their start."""
    settings = {"r": 5, "alpha": 12, **settings}
    model = base(kind) if model is None else model
    twin = twin_of(model) if twin is None else twin
    pl.attach(model, pl.DoRAConfig(init="random", **settings), adapter_dtype=adapter_dtype)
    theirs = peft_model(twin, use_dora=True, **settings)
    give(theirs, model)
    return model, theirs


def part_of(host, name="default"):
    return host.peftlab[name]["dora"]


def test_it_is_what_the_interface_says():
    assert isinstance(pl.DoRAConfig(), Config)
    assert all(isinstance(config(), Config) for config in pl.METHODS.values())


@pytest.mark.parametrize("case", CASES)
def test_same_numbers(case):
    kind, settings = CASES[case]
    skip_lost_biases(settings)
    ours, theirs = pair(kind, **settings)
    assert pl.count_parameters(ours)[:2] == theirs.get_nb_trainable_parameters()
    three_steps(ours, theirs, batch(kind), lambda: (our_state(ours), live(theirs)))


@pytest.mark.parametrize("case", ["llama all layers", "llama embedding", "gpt2 Conv1D", "bert, biases trained"])
def test_it_is_another_function_than_lora(case):
    kind, settings = CASES[case]
    skip_lost_biases(settings)
    _, theirs = pair(kind, **settings)
    lora = peft_model(base(kind), **{"r": 5, "alpha": 12, **settings})
    lora.load_state_dict(theirs.state_dict(), strict=False)
    assert relative(output(lora, kind), output(theirs, kind)) > 1e-3


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_dropout_also_drops_what_the_base_reads(kind):
    ours, theirs = pair(kind, dropout=0.4, target_modules="all-linear")
    ours.train(), theirs.train()
    inputs = batch(kind)
    torch.manual_seed(3)
    found = ours(**inputs)
    torch.manual_seed(3)
    expected = theirs(**inputs)
    assert relative(found.logits, expected.logits) < 1e-9
    assert relative(ours(**inputs).logits, found.logits) > 1e-6
    found.loss.backward(), expected.loss.backward()
    same(gradients(our_state(ours)), gradients(live(theirs)))
    ours.eval(), theirs.eval()
    assert relative(ours(**inputs).logits, theirs(**inputs).logits) < 1e-9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_half_precision_base_has_float32_adapters(kind, dtype):
    ours, theirs = pair(kind, base(kind, dtype), target_modules="all-linear")
    assert {parameter.dtype for parameter in our_state(ours).values()} == {torch.float32}
    inputs = batch(kind)
    found, expected = ours(**inputs), theirs(**inputs)
    assert found.logits.dtype == dtype
    assert torch.equal(found.logits, expected.logits)
    found.loss.backward(), expected.loss.backward()
    same(gradients(our_state(ours)), gradients(live(theirs)), 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(dtype):
    ours, theirs = pair("llama", base("llama", dtype), target_modules="all-linear")
    inputs = batch("llama")
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = ours(**inputs), theirs(**inputs)
    assert relative(found.logits, expected.logits) < 1e-6
    found.loss.backward(), expected.loss.backward()
    same(gradients(our_state(ours)), gradients(live(theirs)), 1e-2)


def test_scaled_embeddings():
    """Gemma multiplies what it looks up, after the norms."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=53, hidden_size=20, intermediate_size=37, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=6, max_position_embeddings=32, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    ours, theirs = pair("llama", Gemma3ForCausalLM(config).double().eval(), target_modules=["embed_tokens"])
    expected = output(theirs, "llama")
    assert relative(output(ours, "llama"), expected) < 1e-9
    pl.merge(ours)
    assert relative(output(ours, "llama"), expected) < 1e-9


@pytest.mark.parametrize("kind", ["llama", "bert"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_a_base_in_four_bits_in_float64(kind, dropout):
    """Ours stands on codes, peft's on the dense weights that they stand for."""
    model = pl.quantize_model(base(kind), backend="reference")
    dense_twin = pl.dequantize_model(copy.deepcopy(model))
    settings = dict(target_modules="all-linear", dropout=dropout, adapter_dtype=torch.float64)
    ours, theirs = pair(kind, model, dense_twin, **settings)
    assert any(is_quantized(parameter) for parameter in ours.parameters())
    inputs = batch(kind)
    ours.train(), theirs.train()
    torch.manual_seed(3)
    found = ours(**inputs)
    torch.manual_seed(3)
    expected = theirs(**inputs)
    assert relative(found.logits, expected.logits) < 1e-9
    found.loss.backward(), expected.loss.backward()
    same(gradients(our_state(ours)), gradients(live(theirs)))
    if not dropout:
        ours.zero_grad(), theirs.zero_grad()
        three_steps(ours, theirs, inputs, lambda: (our_state(ours), live(theirs)))


def test_a_base_of_bitsandbytes():
    """Both stand on bitsandbytes' own layers, which compute in float32."""
    pytest.importorskip("bitsandbytes")
    model, twin = (bitsandbytes_layers(base("llama", torch.float32)) for _ in range(2))
    ours, theirs = pair("llama", model, twin, target_modules=ALL)
    assert type(theirs.base_model.model.model.layers[0].mlp.up_proj).__module__ == "peft.tuners.lora.bnb"
    ours.train(), theirs.train()
    inputs = batch("llama")
    found, expected = ours(**inputs), theirs(**inputs)
    assert relative(found.logits, expected.logits) < 1e-5
    found.loss.backward(), expected.loss.backward()
    same(gradients(our_state(ours)), gradients(live(theirs)), 1e-4)


# ---------------------------------------------------------------------------------------------------------- settling


@pytest.mark.parametrize("adapter_dtype", [None, torch.float32, torch.float64])
def test_a_part_settles_in_its_own_dtype_and_the_model_starts_as_it_was(adapter_dtype):
    model, inputs = base("llama"), batch("llama")
    before = model(**inputs).logits
    pl.attach(model, pl.DoRAConfig(target_modules=ALL), adapter_dtype=adapter_dtype)
    host = model.model.layers[0].self_attn.k_proj
    found = part_of(host).magnitude
    assert found.dtype == (adapter_dtype or torch.float64) and found.requires_grad and found.is_leaf
    exact = found.dtype == torch.float64
    assert relative(found, torch.linalg.norm(host.weight, dim=1)) < (1e-15 if exact else 1e-7)
    # computed before the part had its dtype, it would be that of a float32 norm: 1e-8 off
    assert relative(model(**inputs).logits, before) < (1e-14 if exact else 1e-6)


@pytest.mark.parametrize("case", HOSTS)
def test_a_part_settles_on_what_peft_starts_from(case):
    kind, settings = CASES[case]
    skip_lost_biases(settings)
    theirs = peft_model(base(kind), use_dora=True, **{"r": 5, "alpha": 12, **settings})  # with a random B
    ours = pl.attach(base(kind), pl.DoRAConfig(**{"r": 5, "alpha": 12, **settings}))
    expected = live(theirs)
    with torch.no_grad():
        for key, parameter in our_state(ours).items():
            if not key.endswith("magnitude_vector"):
                parameter.copy_(expected[key])
        for path, _, part in placed(ours, "default"):
            part.settle(ours.get_submodule(path))
    same(our_state(ours), expected, 1e-12)


def test_a_part_settles_once_without_gradients_and_with_its_host(monkeypatch):
    seen = []
    monkeypatch.setattr(DoRALinear, "settle", lambda part, host: seen.append((part, host, torch.is_grad_enabled())))
    model = base("llama")
    pl.attach(model, pl.DoRAConfig(target_modules=["q_proj"]))
    hosts = [block.self_attn.q_proj for block in model.model.layers]
    assert seen == [(part_of(host), host, False) for host in hosts]


def test_what_a_file_holds_replaces_what_a_part_settled_on(tmp_path):
    ours, _ = pair("llama")
    pl.save_adapter(ours, tmp_path)
    again = pl.load_adapter(base("llama"), tmp_path)
    host = again.model.layers[1].self_attn.v_proj
    saved = part_of(ours.model.layers[1].self_attn.v_proj).magnitude
    assert torch.equal(part_of(host).magnitude, saved)
    assert relative(saved, part_of(host).norms(host)) > 1e-3


def test_a_part_settles_on_weights_that_bitsandbytes_had_repacked():
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(64, 64, quant_type="nf4", compute_dtype=torch.float32, device="meta", bias=False)
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4").to("cpu")
    if not getattr(layer, REPACKS, False):
        pytest.skip("this processor has no AVX512-BF16, so bitsandbytes repacks nothing")
    expected = torch.linalg.norm(dense(layer.weight, torch.float32), dim=1)
    with torch.no_grad():
        layer.eval()(torch.ones(1, 64))
    assert is_repacked(layer.weight)
    with pytest.warns(UserWarning, match="repacked 1 4-bit"):
        pl.attach(nn.Sequential(layer), pl.DoRAConfig(target_modules=["0"]))
    assert relative(part_of(layer).magnitude, expected) < 0.004  # its scales were rounded to bf16


# ----------------------------------------------------------------------------------- two methods share one peft_type


@pytest.mark.parametrize("case", FOLDERS)
def test_folders_both_ways(case, tmp_path):
    kind, settings = CASES[case]
    skip_lost_biases(settings)
    ours, theirs = pair(kind, dropout=0.1, **settings)
    expected = output(theirs, kind)
    peft_save(theirs, tmp_path / "theirs")
    loaded = pl.load_adapter(base(kind), tmp_path / "theirs")
    assert type(pl.attached(loaded)["default"]) is pl.DoRAConfig
    assert relative(output(loaded, kind), expected) < 1e-12

    pl.save_adapter(ours, tmp_path / "ours")
    assert shapes(tmp_path / "ours") == shapes(tmp_path / "theirs")
    opened, said = peft_open(base(kind), tmp_path / "ours")
    assert relative(output(opened, kind), expected) < 1e-12
    assert said <= peft_open(base(kind), tmp_path / "theirs")[1]


def test_a_folder_of_lora_beside_one_of_dora(tmp_path):
    ours, _ = pair("llama")
    plain = peft_model(base("llama"), r=3, alpha=7, target_modules=["q_proj"])
    pl.save_adapter(ours, tmp_path / "dora")
    peft_save(plain, tmp_path / "lora")
    model = base("llama")
    pl.load_adapter(model, tmp_path / "lora", name="lora")
    assert relative(output(model, "llama"), output(plain, "llama")) < 1e-12
    pl.load_adapter(model, tmp_path / "dora", name="dora")
    assert relative(output(model, "llama"), output(ours, "llama")) < 1e-12
    assert {name: type(config) for name, config in pl.attached(model).items()} == {
        "lora": pl.LoRAConfig, "dora": pl.DoRAConfig,
    }  # fmt: skip
    for name in ("lora", "dora"):  # and once more through our own hands
        pl.save_adapter(model, tmp_path / "ours", name=name)
        again = pl.load_adapter(base("llama"), tmp_path / "ours", name=name)
        pl.activate(model, name)
        assert torch.equal(output(again, "llama"), output(model, "llama"))


def test_a_folder_that_no_method_or_more_than_one_fits_is_refused(tmp_path, monkeypatch):
    @dataclass(frozen=True, kw_only=True)
    class Other(pl.DoRAConfig):
        pass

    ours, _ = pair("llama")
    pl.save_adapter(ours, tmp_path)
    monkeypatch.setitem(globals(), "Other", Other)
    monkeypatch.setitem(METHODS, "other", replace(METHODS["dora"], config=f"{__name__}:Other"))
    with pytest.raises(pl.PeftLabError, match="fit DoRAConfig and Other.*`requires`"):
        pl.load_adapter(base("llama"), tmp_path)
    for name in ("other", "dora"):  # not taken out: put back, they would stand last, and others read the order
        monkeypatch.setitem(METHODS, name, replace(METHODS[name], config=None))
    with pytest.raises(pl.PeftLabError, match="use_dora=True, which this package does not have"):
        pl.load_adapter(base("llama"), tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [("use_qalora", True, "use_qalora=True, which this package does not have"), ("lora_bias", True, "lora_bias cannot"),
     ("target_parameters", ["experts.down_proj"], "DoRA adapts modules alone.*LoRAConfig"),
     ("init_lora_weights", "pissa", "init_lora_weights='pissa'")],
)  # fmt: skip
def test_what_dora_lacks_is_named(field, value, told, tmp_path):
    peft_save(pair("llama")[1], tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    with pytest.raises(pl.PeftLabError, match=told):
        pl.load_adapter(base("llama"), tmp_path)


PROJECTION = {"llama": "v_proj", "gpt2": "c_attn"}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_where_and_how_it_was_trained_changes_nothing(kind, tmp_path):
    """peft writes a few fields that are for training alone: where DoRA was initialised, and from what start."""
    _, theirs = pair(kind, use_rslora=True, rank_pattern={PROJECTION[kind]: 2})
    peft_save(theirs, tmp_path)
    file = tmp_path / "adapter_config.json"
    fields = json.loads(file.read_text()) | {"init_lora_weights": "gaussian", "megatron_core": "megatron.core"}
    fields |= {"runtime_config": {"ephemeral_gpu_offload": True}}
    fields["alpha_pattern"] = {"mlp": 3, "embed_tokens": 5, "wte": 7}  # patterns that mean no target count for nothing
    file.write_text(json.dumps(fields))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = pl.load_adapter(base(kind), tmp_path)
    assert pl.attached(loaded)["default"].alpha_pattern == {}
    assert relative(output(loaded, kind), output(theirs, kind)) < 1e-12


# ------------------------------------------------------------------------------------------- the rest comes of itself


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_merged_mixed_and_detached_like_any_other(kind):
    ours, theirs = pair(kind, target_modules="all-linear")
    plain, expected = output(base(kind), kind), output(theirs, kind)
    pl.merge(ours)
    assert relative(output(ours, kind), expected) < 1e-9
    pl.unmerge(ours)
    pl.attach(ours, pl.LoRAConfig(r=2, alpha=3, init="random"), name="lora")
    one = output(ours, kind)
    pl.activate(ours, ["default", "lora"])
    rows = output(ours, kind)
    assert relative(rows[:1], expected[:1]) < 1e-9 and relative(rows[1:], one[1:]) < 1e-9
    pl.activate(ours, {"default": 1.0, "lora": 0.0})
    assert relative(output(ours, kind), expected) < 1e-9
    pl.detach(ours, "lora")
    pl.detach(ours)
    assert torch.equal(output(ours, kind), plain)
