"""VeRA held to Hugging Face peft: counts, outputs, gradients, three AdamW steps, folders both ways, merged weights."""

import copy
import json
import warnings

import peft
import pytest
import torch
from pairs import LLAMA, base, batch, give, gradients, our_state, peft_state, relative, same, three_steps, twin_of
from releases import skip_lost_biases
from test_lora_folders import output, peft_open, peft_save, shapes
from test_qlora_parity import bitsandbytes_layers, curve
from transformers import LlamaConfig, LlamaForCausalLM

import peftlab as pl

ODD = dict(r=5, projection_prng_key=123456789)
CASES = {
    "llama default targets": ("llama", {}),
    "llama all-linear": ("llama", dict(target_modules="all-linear", r=7)),
    "llama without projections": ("llama", dict(target_modules=["k_proj", "down_proj"], save_projection=False)),
    "llama regex, some layers": ("llama", dict(target_modules=r".*layers\.[02]\..*(k|down)_proj")),
    "llama one layer": ("llama", dict(layers_to_transform=[1], layers_pattern="layers", target_modules=["up_proj"])),
    "llama start of d": ("llama", dict(target_modules=["o_proj", "gate_proj"], d_initial=0.7)),
    "llama head in full": ("llama", dict(modules_to_save=["lm_head"], projection_prng_key=-3)),
    "llama on the head": ("llama", dict(target_modules=["lm_head", "q_proj"])),
    "llama classifier": ("llama-classifier", dict(task_type="SEQ_CLS")),
    "gpt2 default targets": ("gpt2", {}),
    "gpt2 all-linear, adapted biases": ("gpt2", dict(target_modules="all-linear", bias="vera_only")),
    "gpt2 all biases, without projections": ("gpt2", dict(target_modules=["c_fc"], bias="all", save_projection=False)),
    "bert default targets": ("bert", {}),
    "bert classifier and biases": ("bert", dict(task_type="SEQ_CLS", bias="all")),
    "bert wide and narrow": ("bert", dict(target_modules=["query", "intermediate.dense", "output.dense"],
                                          bias="vera_only", projection_prng_key=2**40 + 1)),
}  # fmt: skip


def theirs_of(model, **settings):
    settings = {"vera_dropout" if name == "dropout" else name: value for name, value in settings.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, peft.VeraConfig(**settings))


def pair(kind, dtype=torch.float64, **settings):
    """(ours, theirs): equal bases, and vectors moved off their start; the random matrices are each library's own."""
    settings = {**ODD, **settings}
    model = base(kind, dtype)
    twin = twin_of(model)
    pl.attach(model, pl.VeRAConfig(**settings))
    theirs = theirs_of(twin, **settings)
    same(our_pair(model), their_pair(theirs), 1e-15)
    # both start alike; beside 16 bits peft rounds the start of d too
    same(our_state(model), peft_state(theirs), 1e-15 if dtype == torch.float64 else 1e-3)
    with torch.no_grad():
        drawn = {name: matrix.clone() for name, matrix in our_pair(model).items()}
        give(theirs, model)
        for found in (our_pair(model), their_pair(theirs)):
            for name, matrix in found.items():
                matrix.copy_(drawn[name])
    return model, theirs


def our_pair(model, name="default"):
    shared = {part.shared for part in parts(model, name)}
    assert len(shared) == 1
    return dict(shared.pop().named_buffers())


def parts(model, name="default"):
    modules = dict(model.named_modules())
    return [module for path, module in modules.items() if path.endswith(f"peftlab.{name}.vera")]


def their_pair(model, name="default"):
    return {"vera_A": model.base_model.vera_A[name], "vera_B": model.base_model.vera_B[name]}


def trained(states):
    return {key: value for key, value in states.items() if not key.startswith("base_model.vera_")}


def states(ours, theirs):
    def both():
        by_storage = {parameter.data_ptr(): parameter for parameter in theirs.parameters()}
        there = {key: by_storage[value.data_ptr()] for key, value in trained(peft_state(theirs)).items()}
        return trained(our_state(ours)), there

    return both


@pytest.mark.parametrize("case", CASES)
def test_same_numbers(case):
    kind, settings = CASES[case]
    skip_lost_biases(settings, kept=())
    ours, theirs = pair(kind, **settings)
    assert pl.count_parameters(ours)[:2] == theirs.get_nb_trainable_parameters()
    inputs, drawn = batch(kind), {name: matrix.clone() for name, matrix in our_pair(ours).items()}
    first = ours.train()(**inputs).logits
    three_steps(ours, theirs, inputs, states(ours, theirs))
    assert relative(ours(**inputs).logits, first) > 1e-4
    same(our_pair(ours), drawn, 1e-15)


@pytest.mark.parametrize("case", CASES)
def test_folders_both_ways(case, tmp_path):
    kind, settings = CASES[case]
    skip_lost_biases(settings, kept=())
    ours, theirs = pair(kind, **settings)
    expected = output(theirs, kind)
    assert relative(output(base(kind), kind), expected) > 1e-3

    peft_save(theirs, tmp_path / "theirs")
    loaded = pl.load_adapter(base(kind), tmp_path / "theirs")
    assert relative(output(loaded, kind), expected) < 1e-12

    pl.save_adapter(ours, tmp_path / "ours")
    assert shapes(tmp_path / "ours") == shapes(tmp_path / "theirs")
    assert ("base_model.vera_A" in shapes(tmp_path / "ours")) == settings.get("save_projection", True)
    opened, _ = peft_open(base(kind), tmp_path / "ours")
    assert relative(output(opened, kind), expected) < 1e-12
    pl.save_adapter(loaded, tmp_path / "again")
    assert torch.equal(output(pl.load_adapter(base(kind), tmp_path / "again"), kind), output(loaded, kind))


# each kind of host, with and without biases, a head and a start of d; how hosts are chosen says nothing of the merge
@pytest.mark.parametrize("case", ["llama all-linear", "llama start of d", "llama head in full", "llama on the head",
                                  "gpt2 all-linear, adapted biases", "bert classifier and biases",
                                  "bert wide and narrow"])  # fmt: skip
def test_merged_weights(case):
    kind, settings = CASES[case]
    skip_lost_biases(settings, kept=())
    ours, theirs = pair(kind, **settings)
    before, expected = dict(copy.deepcopy(ours.state_dict())), ours(**batch(kind)).logits
    pl.merge(ours)
    pl.unmerge(ours)
    assert all(torch.equal(value, before[key]) for key, value in ours.state_dict().items())
    pl.merge(ours, unload=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = theirs.merge_and_unload()
    same(dict(ours.state_dict()), dict(merged.state_dict()))
    assert relative(ours(**batch(kind)).logits, expected) < 1e-9


def test_config_says_the_same(tmp_path):
    settings = dict(
        r=5, target_modules=["k_proj", "up_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM", dropout=0.25,
        layers_to_transform=[0, 2], layers_pattern="layers", d_initial=0.3,
        projection_prng_key=77, save_projection=False, bias="vera_only",
    )  # fmt: skip
    ours, theirs = pair("llama", **settings)
    pl.save_adapter(ours, tmp_path / "ours")
    peft_save(theirs, tmp_path / "theirs")
    mine, other = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("ours", "theirs"))
    for name, value in mine.items():
        expected = other[name]
        if isinstance(value, list):
            value, expected = set(value), {expected} if isinstance(expected, str) else set(expected)
        if name != "base_model_name_or_path":
            assert value == expected, name
    assert other.keys() - mine.keys() == {"auto_mapping", "peft_version", "revision"}


@pytest.mark.parametrize(
    ("kind", "targets"),
    [("llama", ["q_proj", "lm_head"]), ("bert", "all-linear"), ("llama", r".*mlp\.(up|down)_proj")],
)
def test_layers_to_transform_and_what_they_do_not_reach(kind, targets, tmp_path):
    """peft takes a module that is named by its whole path whatever the layers, and passes over them for a pattern."""
    theirs = theirs_of(base(kind), **ODD, target_modules=targets, layers_to_transform=[1], init_weights=False)
    expected = output(theirs, kind)
    peft_save(theirs, tmp_path / "theirs")
    loaded = pl.load_adapter(base(kind), tmp_path / "theirs")
    assert relative(output(loaded, kind), expected) < 1e-12
    pl.save_adapter(loaded, tmp_path / "ours")
    assert relative(output(peft_open(base(kind), tmp_path / "ours")[0], kind), expected) < 1e-12


def test_what_is_excluded_is_saved_as_paths_that_peft_finds(tmp_path):
    """peft's VeRA has no exclude_modules, and would adapt more."""
    model = base("llama")
    pl.attach(model, pl.VeRAConfig(**ODD, exclude_modules=["layers.1.self_attn.q_proj"], init="random"))
    pl.save_adapter(model, tmp_path)
    opened, said = peft_open(base("llama"), tmp_path)
    assert relative(output(opened, "llama"), output(model, "llama")) < 1e-12
    assert not [line for line in said if "exclude_modules" in line]
    assert torch.equal(output(pl.load_adapter(base("llama"), tmp_path), "llama"), output(model, "llama"))


@pytest.mark.parametrize("dropout", [0.3, 0.9])
def test_dropout(dropout):
    """Both drop the same entries of the input, before the first product."""
    ours, theirs = pair("llama", dropout=dropout, target_modules=["q_proj", "down_proj"])
    inputs = batch("llama")
    results = []
    for model in (ours, theirs):
        torch.manual_seed(3)
        results.append(model.train()(**inputs).logits)
    assert relative(*results) < 1e-12
    assert relative(results[0], ours.eval()(**inputs).logits) > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_half_precision_base(kind, dtype, tmp_path):
    """float32 vectors and matrices; those of the key are rounded to the base's dtype first, as in peft."""
    ours, theirs = pair(kind, dtype=dtype)
    assert {value.dtype for value in (*our_state(ours).values(), *their_pair(theirs).values())} == {torch.float32}
    assert all(torch.equal(matrix, matrix.to(dtype).float()) for matrix in our_pair(ours).values())
    inputs = batch(kind)
    found, expected = ours(**inputs), theirs(**inputs)
    assert found.logits.dtype == dtype
    assert torch.equal(found.logits, expected.logits)
    found.loss.backward()
    expected.loss.backward()
    same(*map(gradients, states(ours, theirs)()), 1e-6)
    peft_save(theirs, tmp_path)
    assert torch.equal(output(pl.load_adapter(base(kind, dtype), tmp_path), kind), output(ours, kind))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(dtype):
    ours, theirs = pair("llama", dtype=dtype)
    inputs = batch("llama")
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = ours(**inputs), theirs(**inputs)
    assert found.logits.dtype == expected.logits.dtype
    assert relative(found.logits, expected.logits) < 1e-6
    found.loss.backward()
    expected.loss.backward()
    # ours returns what the layer returns, bfloat16; peft widens it to float32 again, and so its gradients
    same(*map(gradients, states(ours, theirs)()), 5e-2)


def test_a_second_adapter_of_the_same_key():
    """Of the same size it has peft's numbers. peft lends a smaller one the matrices of the first; ours has its own."""
    ours, theirs = pair("llama", target_modules=["q_proj", "down_proj"])
    settings = dict(ODD, target_modules=["q_proj", "down_proj"])
    pl.attach(ours, pl.VeRAConfig(**settings), name="other")
    theirs.add_adapter("other", peft.VeraConfig(**settings))
    same(our_pair(ours, "other"), their_pair(theirs, "other"), 1e-15)
    theirs.set_adapter("other")
    with torch.no_grad():
        for key, value in trained(peft_state(theirs, "other")).items():
            value.normal_(generator=torch.Generator().manual_seed(len(key)))
            our_state(ours, "other")[key].copy_(value)
    inputs = batch("llama")
    for name in ("other", "default"):
        pl.activate(ours, name)
        theirs.set_adapter(name)
        assert relative(ours(**inputs).logits, theirs(**inputs).logits) < 1e-9
    pl.activate(ours, {"default": 1.0, "other": 1.0})
    theirs.base_model.set_adapter(["default", "other"])
    assert relative(ours(**inputs).logits, theirs(**inputs).logits) < 1e-9


def test_on_a_base_in_four_bits():
    """The same losses as peft on bitsandbytes' layers, step by step."""
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**LLAMA, "hidden_size": 64, "head_dim": 16, "intermediate_size": 128}))
    twin = copy.deepcopy(model)
    settings = dict(r=32, target_modules=["q_proj", "v_proj", "down_proj"], projection_prng_key=3)
    theirs = theirs_of(bitsandbytes_layers(twin), **settings)
    assert isinstance(twin.model.layers[0].self_attn.q_proj.base_layer, bnb.nn.Linear4bit)
    pl.attach(pl.quantize_model(model, backend="reference"), pl.VeRAConfig(**settings))
    assert pl.count_parameters(model)[:2] == theirs.get_nb_trainable_parameters()
    batches = [batch("llama", seed=seed)["input_ids"] for seed in range(4)]
    found, expected = curve(model.train(), batches), curve(theirs.train(), batches)
    assert found == pytest.approx(expected, abs=1e-5) and found[0] != found[1]
