"""Intruder dimensions: found by the definition, and reduced as Hugging Face peft does it."""

import copy
import warnings

import pytest
import torch
from pairs import base, give, our_state, peft_model, peft_state, relative
from peft.tuners.lora.intruders import reduce_intruder_dimension
from test_convolutions import Net
from test_lora_folders import output
from torch import nn

import peftlab as pl
from peftlab.core.hooks import adapters_on

STRONG = dict(r=3, alpha=40)
CASES = {
    "llama": ("llama", pl.LoRAConfig, dict(target_modules="all-linear")),
    "llama rslora, patterns": ("llama", pl.LoRAConfig, dict(
        target_modules=["q_proj", "down_proj"], use_rslora=True, rank_pattern={"q_proj": 5},
        alpha_pattern={"down_proj": 20})),
    "llama head in full": ("llama", pl.LoRAConfig, dict(target_modules=["v_proj"], modules_to_save=["lm_head"])),
    "llama DoRA": ("llama", pl.DoRAConfig, dict(target_modules=["o_proj", "up_proj"])),
    "bert": ("bert", pl.LoRAConfig, dict(target_modules=["query", "dense"])),
}  # fmt: skip


def pair(case, dtype=torch.float64):
    kind, config, settings = CASES[case]
    model = base(kind, dtype)
    twin = copy.deepcopy(model)
    pl.attach(model, config(init="random", **STRONG, **settings))
    theirs = peft_model(twin, use_dora=config is pl.DoRAConfig, **STRONG, **settings)
    give(theirs, model)
    return kind, model, theirs


def products(state):
    """{path: B A}, since the sign of a singular vector is free."""
    return {
        key.removesuffix(".lora_A.weight"): state[key.replace("lora_A", "lora_B")].double() @ state[key].double()
        for key in state
        if key.endswith("lora_A.weight")
    }


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("limits", [(10, 0.5, 0.75), (2, 0.7, 0.0), (30, 0.9, 0.4)])
def test_reduced_as_peft_does(case, limits):
    top_k, threshold, scale = limits
    kind, ours, theirs = pair(case)
    told = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reduce_intruder_dimension(
            theirs, top_k=top_k, threshold_epsilon=threshold, mitigation_lambda=scale, logging_sink=told.append
        )
    report = pl.reduce_intruders(ours, top_k=top_k, threshold=threshold, scale=scale)
    assert [len(one.intruders) for one in report.by_module.values()] == [
        int(line.rpartition(" ")[2]) if line[-1].isdigit() else 0 for line in told[:-1]
    ]
    assert report.count > 0
    found, expected = products(our_state(ours, "intruder_reduced")), products(peft_state(theirs, "intruder_reduced"))
    assert set(found) == set(expected)
    for key in expected:
        assert relative(found[key], expected[key]) < 1e-9, key
    before = products(our_state(ours))
    assert max(relative(found[key], before[key]) for key in before) > 1e-2
    if case in ("llama", "bert"):  # peft neither copies a head nor magnitudes
        assert relative(output(ours, kind), output(theirs, kind)) < 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(dtype):
    _, ours, theirs = pair("llama", dtype)
    reduce_intruder_dimension(theirs, logging_sink=None)
    pl.reduce_intruders(ours)
    state = our_state(ours, "intruder_reduced")
    assert {value.dtype for value in state.values()} == {torch.float32}
    expected = products(peft_state(theirs, "intruder_reduced"))
    for key, found in products(state).items():  # peft rounds the factors to the base's dtype
        assert relative(found, expected[key]) < (1e-4 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("case", ["llama head in full", "llama DoRA"])
def test_a_scale_of_one_changes_nothing_and_all_else_is_copied(case):
    kind, ours, _ = pair(case)
    before = output(ours, kind)
    pl.reduce_intruders(ours, new_name="same", scale=1)
    assert relative(output(ours, kind), before) < 1e-9
    pl.activate(ours, "default")
    assert torch.equal(output(ours, kind), before)


@pytest.mark.parametrize(("kind", "targets"), [
    ("llama", ["q_proj", "up_proj"]), ("gpt2", ["c_fc", "c_attn"]), ("gpt2", ["wpe"]), ("llama", ["embed_tokens"]),
])  # fmt: skip
@pytest.mark.parametrize("config", [pl.LoRAConfig, pl.DoRAConfig])
def test_found_by_the_definition(kind, targets, config):
    model = base(kind)
    pl.attach(model, config(**STRONG, init="random", target_modules=targets))
    turned = kind == "gpt2" or targets == ["embed_tokens"]
    before = {path: model.get_submodule(path).weight.clone() for path in pl.find_intruders(model).by_module}
    report = pl.find_intruders(model, top_k=4, threshold=0.6)
    pl.merge(model)
    for path, weight in before.items():
        pair = [one.T if turned else one for one in (weight, model.get_submodule(path).weight)]
        old, new = (torch.linalg.svd(one, full_matrices=False)[0] for one in pair)
        similarity = (new[:, :4].T @ old).abs().max(dim=1).values
        assert report.by_module[path].similarity == pytest.approx(similarity.tolist(), abs=1e-9)
        assert list(report.by_module[path].intruders) == [j for j in range(4) if similarity[j] < 0.6]
    assert report.count == sum(len(one.intruders) for one in report.by_module.values()) > 0


@pytest.mark.parametrize("config", [pl.LoRAConfig, pl.DoRAConfig])
@pytest.mark.parametrize("layer", [
    lambda: nn.Conv2d(6, 8, 3), lambda: nn.Embedding(9, 7), lambda: nn.Linear(5, 4), lambda: nn.Linear(4, 9),
])  # fmt: skip
def test_what_was_found_is_weaker_after_reducing(config, layer):
    """Of a LoRA whose new rank holds the whole change, an intruder's singular value is scaled exactly."""
    torch.manual_seed(0)
    made = layer().double()
    model = Net(made, 8) if isinstance(made, nn.Conv2d) else nn.Sequential(made)
    target = "conv" if isinstance(made, nn.Conv2d) else "0"
    pl.attach(model, config(r=4, alpha=60, init="random", target_modules=[target]))
    report = pl.reduce_intruders(model, top_k=1, threshold=1, scale=0.5)
    ((path, before),) = report.by_module.items()
    part = next(iter(adapters_on(model.get_submodule(path)).parts_of("intruder_reduced").values()))
    old = next(iter(adapters_on(model.get_submodule(path)).parts_of("default").values()))
    assert part.lora_A.shape == old.lora_A.shape and part.lora_B.shape == old.lora_B.shape
    update, start = ((p.lora_B.flatten(1) @ p.lora_A.flatten(1)) for p in (part, old))
    assert before.intruders == (0,) and update.norm() < 0.9 * start.norm()


def test_what_is_refused_and_the_model_stays():
    model = base("llama")
    with pytest.raises(pl.PeftLabError, match="No adapter is attached"):
        pl.find_intruders(model)
    pl.attach(model, pl.LoRAConfig(r=2, init="random"))
    for call in (pl.find_intruders, pl.reduce_intruders):
        with pytest.raises(pl.PeftLabError, match="There is no adapter 'other'"):
            call(model, "other")
        with pytest.raises(pl.PeftLabError, match="threshold must be"):
            call(model, threshold=2)
        with pytest.raises(pl.PeftLabError, match="top_k must be"):
            call(model, top_k=0)
    for wrong, told in {"default": "attached already", "a b": "cannot name an adapter"}.items():
        with pytest.raises(pl.PeftLabError, match=told):
            pl.reduce_intruders(model, new_name=wrong)
    with pytest.raises(pl.PeftLabError, match="scale must be"):
        pl.reduce_intruders(model, scale=1.5)
    pl.attach(model, pl.IA3Config(init="random"), name="ia3")
    assert len(pl.find_intruders(model, "ia3").by_module) == 9
    with pytest.raises(pl.PeftLabError, match="intruders are reduced of LoRA and DoRA on layers alone"):
        pl.reduce_intruders(model, "ia3")
    pl.attach(model, pl.AdapterConfig(), name="bottleneck")
    with pytest.raises(pl.PeftLabError, match="changes more than weights"):
        pl.find_intruders(model, "bottleneck")
    pl.activate(model, "default")
    pl.merge(model)
    with pytest.raises(pl.PeftLabError, match="unmerge"):
        pl.reduce_intruders(model)
    assert list(pl.attached(model)) == ["default", "ia3", "bottleneck"]
