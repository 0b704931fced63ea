"""AdaLoRA held to Hugging Face peft in float64: steps through pruning with equal masks, and folders both ways."""

import json
import warnings
from types import SimpleNamespace

import peft
import pytest
import torch
from pairs import RENAMED, base, batch, give, gradients, live, optimiser, our_state, relative, same, twin_of
from releases import skip_lost_biases
from safetensors.torch import load_file
from test_lora_folders import output, peft_open, peft_save, shapes
from test_qlora_parity import bitsandbytes_layers
from torch import nn

import peftlab as pl
from peftlab.adapters.key_table import placed
from peftlab.methods.adalora_parts import AdaLoRALinear

SCHEDULE = dict(init_r=6, target_r=3, alpha=10, total_step=10, tinit=2, tfinal=2, beta1=0.8, beta2=0.7)
CASES = {
    "llama": ("llama", dict(target_modules=["q_proj", "v_proj", "down_proj"])),
    "gpt2": ("gpt2", dict(target_modules=["c_attn", "c_proj"], deltaT=3)),
    "bert": ("bert", dict(target_modules=["query", "value", "dense"], task_type="SEQ_CLS", bias="lora_only")),
}


def pair(kind, model=None, **settings):
    """(ours, theirs): equal bases and equal adapters."""
    settings = {"task_type": "CAUSAL_LM", **SCHEDULE, **settings}
    model = base(kind) if model is None else model
    theirs = {RENAMED.get(name, name): value for name, value in settings.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(
            twin_of(model), peft.AdaLoraConfig(init_lora_weights=False, **theirs), low_cpu_mem_usage=False
        )
    mine = {name: value for name, value in settings.items() if name not in IGNORED}
    pl.attach(model, pl.AdaLoRAConfig(init="random", **mine))
    with torch.no_grad():  # peft draws these of size 1, which saturates BERT's attention
        for name, parameter in theirs.named_parameters():
            parameter.mul_(0.4 if ".lora_" in name else 1)
    give(theirs, model)
    # Moving to float64 makes parameters of peft's rank numbers. They would train then, and no folder keeps them.
    for name, parameter in theirs.named_parameters():
        if "ranknum" in name:
            parameter.requires_grad_(False)
    return model, theirs


IGNORED = ("r", "use_rslora", "lora_bias", "alpha_pattern", "init_lora_weights")


def masks(ours):
    parts = [one for one in placed(ours, "default") if isinstance(one.part, AdaLoRALinear)]
    return {f"{path}.lora_E": part.kept.tolist() for path, _, part in parts}


def train(ours, theirs, inputs, steps, first=1):
    """Both make these steps: equal outputs, losses and gradients in each, and parameters and masks after it."""
    ours.train(), theirs.train()
    mine, other = optimiser(ours), optimiser(theirs)
    states = our_state(ours), live(theirs)
    for step in range(first, first + steps):
        found, expected = ours(**inputs), theirs(**inputs)
        assert relative(found.logits, expected.logits) < 1e-9
        loss = found.loss + pl.added_loss(ours)
        assert relative(loss, expected.loss) < 1e-6  # a language model's loss is float32
        loss.backward()
        expected.loss.backward()
        same(*map(gradients, states))
        mine.step(), other.step()
        pl.after_step(ours, step)
        theirs.base_model.update_and_allocate(step)
        mine.zero_grad(), other.zero_grad()
        same(*states)
        pattern = theirs.peft_config["default"].rank_pattern
        if pattern is not None:
            assert masks(ours) == {key.removesuffix(".default"): mask for key, mask in pattern.items()}, step


@pytest.mark.parametrize("case", CASES)
def test_twelve_steps_through_pruning(case):
    kind, settings = CASES[case]
    skip_lost_biases(settings)
    ours, theirs = pair(kind, **settings)
    assert pl.count_parameters(ours)[:2] == theirs.get_nb_trainable_parameters()
    train(ours, theirs, batch(kind), 12)
    ranks = pl.adalora_ranks(ours)
    assert sum(ranks.values()) == 3 * len(ranks) and len(set(ranks.values())) > 2


@pytest.mark.parametrize("steps", [0, 2, 5, 12])
def test_folders_both_ways_before_during_and_after_pruning(steps, tmp_path):
    ours, theirs = pair("llama", target_modules=["q_proj", "up_proj"])
    train(ours, theirs, batch("llama"), steps)
    expected = output(ours, "llama")
    peft_save(theirs, tmp_path / "theirs")
    pl.save_adapter(ours, tmp_path / "ours")
    assert shapes(tmp_path / "ours") == shapes(tmp_path / "theirs")
    mine, other = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("ours", "theirs"))
    for name in (
        "rank_pattern",
        "init_r",
        "target_r",
        "tinit",
        "tfinal",
        "total_step",
        "deltaT",
        "beta1",
        "lora_alpha",
    ):
        assert mine[name] == other[name], name

    loaded = pl.load_adapter(base("llama"), tmp_path / "theirs")
    assert relative(output(loaded, "llama"), expected) < 1e-12
    opened, said = peft_open(base("llama"), tmp_path / "ours")
    assert relative(output(opened, "llama"), expected) < 1e-12
    assert said <= peft_open(base("llama"), tmp_path / "theirs")[1]
    pl.save_adapter(loaded, tmp_path / "again")
    assert load_file(tmp_path / "again/adapter_model.safetensors").keys() == our_state(ours).keys()
    assert shapes(tmp_path / "again") == shapes(tmp_path / "ours")
    assert torch.equal(output(pl.load_adapter(base("llama"), tmp_path / "again"), "llama"), output(loaded, "llama"))


def test_a_folder_saved_between_two_allocations_computes_what_the_model_did(tmp_path):
    """There e is not zero any more where it was pruned. peft leaves it out of the folder all the same."""
    ours, theirs = pair("llama", target_modules=["q_proj", "up_proj"], deltaT=3)
    train(ours, theirs, batch("llama"), 4)
    expected = output(ours, "llama")
    assert relative(output(theirs, "llama"), expected) < 1e-9
    pl.save_adapter(ours, tmp_path / "ours")
    assert relative(output(pl.load_adapter(base("llama"), tmp_path / "ours"), "llama"), expected) < 1e-12
    assert relative(output(peft_open(base("llama"), tmp_path / "ours")[0], "llama"), expected) < 1e-12
    peft_save(theirs, tmp_path / "theirs")
    both = peft_open(base("llama"), tmp_path / "theirs")[0], pl.load_adapter(base("llama"), tmp_path / "theirs")
    assert relative(*(output(one, "llama") for one in both)) < 1e-12


def test_a_module_without_any_rank(tmp_path):
    ours, theirs = pair("gpt2", target_modules=["c_attn", "c_fc"], target_r=1)
    train(ours, theirs, batch("gpt2"), 10)
    assert 0 in pl.adalora_ranks(ours).values()
    pl.save_adapter(ours, tmp_path / "ours")
    opened = peft_open(base("gpt2"), tmp_path / "ours")[0]
    peft_save(opened, tmp_path / "theirs")
    loaded = pl.load_adapter(base("gpt2"), tmp_path / "theirs", trainable=True)
    for one in (opened, loaded):
        assert relative(output(one, "gpt2"), output(ours, "gpt2")) < 1e-12
    (loaded(**batch("gpt2")).loss + pl.added_loss(loaded)).backward()
    assert all(p.grad.isfinite().all() for p in loaded.parameters() if p.requires_grad)
    expected = output(loaded, "gpt2")
    pl.merge(loaded)
    assert relative(output(loaded, "gpt2"), expected) < 1e-9


@pytest.mark.parametrize(
    "more",
    [dict(use_rslora=True, lora_bias=True), dict(alpha_pattern={"q_proj": 3}), dict(r=64), dict(bias="all"),
     dict(modules_to_save=["lm_head"], dropout=0.2), dict(layers_to_transform=[1], layers_pattern="layers"),
     dict(exclude_modules=["layers.1.mlp.up_proj"]), dict(target_r=9), dict(trainable_tokens=[4, 7])],
)  # fmt: skip
def test_options_of_peft(more, tmp_path):
    """Some of LoRA's that AdaLoRA takes over and computes nothing by, and those that it knows."""
    ours, theirs = pair("llama", target_modules=["q_proj", "up_proj"], **more)
    train(ours, theirs.eval(), {**batch("llama")}, 0)
    peft_save(theirs, tmp_path / "theirs")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = pl.load_adapter(base("llama"), tmp_path / "theirs")
    assert relative(output(loaded, "llama"), output(theirs, "llama")) < 1e-12
    pl.save_adapter(ours, tmp_path / "ours")
    assert relative(output(peft_open(base("llama"), tmp_path / "ours")[0], "llama"), output(theirs, "llama")) < 1e-12


@pytest.mark.parametrize(
    ("name", "value"),
    [("layer_replication", [[0, 2], [1, 3]]), ("target_parameters", ["weight"]), ("use_dora", True),
     ("alora_invocation_tokens", [1, 2]), ("lora_alpha", 0), ("init_r", 7), ("init_r", 10**12),
     ("rank_pattern", {"model.layers.0.self_attn.q_proj.lora_E": [True, False]})],
)  # fmt: skip
def test_what_cannot_be_loaded_is_refused_in_one_line(name, value, tmp_path):
    _, theirs = pair("llama", target_modules=["q_proj"])
    peft_save(theirs, tmp_path)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**fields, name: value}))
    with pytest.raises(pl.PeftLabError) as told:
        pl.load_adapter(base("llama"), tmp_path)
    assert "\n" not in str(told.value) and len(str(told.value)) < 500
    if value == 10**12:  # before anything is built
        assert "no tensor beside it has a dimension above" in str(told.value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_and_autocast(dtype, autocast):
    ours, theirs = pair("llama", base("llama", dtype), target_modules=["q_proj", "down_proj"])
    assert {p.dtype for p in our_state(ours).values()} == {torch.float32}
    inputs = batch("llama")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found, expected = ours(**inputs).logits, theirs(**inputs).logits
    assert found.dtype == expected.dtype and torch.equal(found, expected)


class Net(nn.Module):
    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.out = nn.Conv2d(6, 8, (3, 5), **options), nn.Linear(8, 3)

    def forward(self, x):
        logits = self.out(torch.tanh(self.conv(x)).flatten(2).mean(-1))
        return SimpleNamespace(logits=logits, loss=logits.square().mean() - logits[..., 0].mean())


@pytest.mark.parametrize("options", [dict(stride=(2, 1), padding=(1, 2)), dict(padding="same", dilation=2, bias=False)])
def test_a_convolution(options, tmp_path):
    ours, theirs = pair("net", Net(**options).double(), target_modules=["conv", "out"], task_type=None)
    x = torch.randn(2, 6, 9, 12, dtype=torch.float64)
    found, expected = ours(x), theirs(x)
    assert relative(found.logits, expected.logits) < 1e-9
    found.loss.backward(), expected.loss.backward()
    same(gradients(our_state(ours)), gradients(live(theirs)))
    peft_save(theirs, tmp_path)
    loaded = pl.load_adapter(Net(**options).double(), tmp_path)
    pl.merge(loaded)
    assert relative(loaded(x).logits, expected.logits) < 1e-9


def test_on_layers_of_bitsandbytes():
    ours, theirs = pair(
        "llama", bitsandbytes_layers(base("llama", torch.float32)), target_modules=["q_proj", "down_proj"]
    )
    ours.train(), theirs.train()
    inputs = batch("llama")
    found, expected = ours(**inputs), theirs(**inputs)
    assert relative(found.logits, expected.logits) < 1e-6
    (found.loss + pl.added_loss(ours)).backward()
    expected.loss.backward()
    same(gradients(our_state(ours)), gradients(live(theirs)), 1e-4)


def test_mixtures_rows_and_merging_of_adapters_with_other_ranks():
    """One is pruned and one is not. peft runs several at weight one; the merge is held to peft's."""
    ours, theirs = pair("gpt2", target_modules=["c_attn", "c_fc"])
    train(ours, theirs, batch("gpt2"), 10)
    expected = output(theirs, "gpt2")
    theirs.merge_adapter()
    merged = theirs.base_model.model.transformer.h[1].mlp.c_fc.base_layer.weight
    pl.merge(ours)
    assert relative(ours.transformer.h[1].mlp.c_fc.weight, merged) < 1e-12
    assert relative(output(ours, "gpt2"), expected) < 1e-9
    pl.unmerge(ours)
    assert relative(output(ours, "gpt2"), expected) < 1e-12
    pl.attach(ours, pl.AdaLoRAConfig(init_r=2, init="random", target_modules=["c_attn"]), name="other")
    other = output(ours, "gpt2")
    pl.activate(ours, ["other", "default"])
    assert relative(output(ours, "gpt2"), torch.stack([other[0], expected[1]])) < 1e-12
    pl.activate(ours, {"default": 0.5, "other": 0.5})
    assert 1e-3 < relative(output(ours, "gpt2"), expected) < relative(other, expected)


def test_a_pruned_adapter_trains_on_as_in_peft(tmp_path):
    """peft's own allocation is left out there: it counts what was pruned before as still there, and prunes it twice."""
    ours, theirs = pair("llama", target_modules=["q_proj", "up_proj"])
    train(ours, theirs, batch("llama"), 10)
    pl.save_adapter(ours, tmp_path)
    loaded = pl.load_adapter(base("llama"), tmp_path, trainable=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opened = peft.PeftModel.from_pretrained(base("llama"), tmp_path, is_trainable=True)
    for name, parameter in opened.named_parameters():
        if "ranknum" in name:
            parameter.requires_grad_(False)
    mine, other = optimiser(loaded), optimiser(opened)
    theirs = {name.replace(".default", ""): p for name, p in opened.named_parameters() if ".lora_" in name}
    states = [{key: p for key, p in state.items() if p.numel()} for state in (our_state(loaded), theirs)]
    for _ in range(3):
        found, expected = loaded(**batch("llama")), opened(**batch("llama"))
        (found.loss + pl.added_loss(loaded)).backward()
        expected.loss.backward()
        same(*map(gradients, states))
        mine.step(), other.step()
        mine.zero_grad(), other.zero_grad()
        same(*states)
