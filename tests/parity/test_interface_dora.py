"""DoRA, written against the declared interface alone and held to Hugging Face peft: a test of the interface.

It asks for everything that LoRA does not: a value computed from the base's weights (so the part has to settle), the
host's own output, a `peft_type` that another method has too, and a weight that may lie in four bits.

    y = (m / c - 1) W x + (m / c) s B A x + b,    c = |W + s B A| row by row, without a gradient
"""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from pairs import base, batch, give, gradients, live, our_state, peft_model, relative, same, three_steps
from releases import skip_lost_biases
from test_lora_folders import output, peft_open, peft_save, shapes
from test_qlora_parity import bitsandbytes_layers
from torch import Tensor, nn

import peftlab as pl
from peftlab.adapters.key_table import placed
from peftlab.catalogue import METHODS
from peftlab.core.interface import Config, Part, Placement
from peftlab.core.targets import Targets, find, is_conv1d, linear_shape
from peftlab.methods.parts import cast, first_input, trained_biases, trained_copies, widened
from peftlab.quantization.weights import REPACKS, dense, is_quantized, is_repacked

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True, kw_only=True)
class DoRAConfig(Targets):
    r: int = 8
    alpha: float = 16
    dropout: float = 0.0
    bias: str = "none"

    method: ClassVar[str] = "dora"
    peft_type: ClassVar[str] = "LORA"
    requires: ClassVar[tuple[str, ...]] = ("use_dora",)
    unsupported: ClassVar[tuple[str, ...]] = (
        *(name for name in pl.LoRAConfig.unsupported if name != "use_dora"),
        *("use_rslora", "lora_bias", "rank_pattern", "alpha_pattern"),
    )

    def parts(self, model: nn.Module) -> Iterator[Placement]:
        targets = find(model, self)
        for path, host in targets.items():
            yield Placement(path, "dora", (Embedding if isinstance(host, nn.Embedding) else Linear)(host, self))
        copies = list(trained_copies(model, self))
        yield from trained_biases(model, self.bias, targets, copied=[copy.path for copy in copies])
        yield from copies

    def to_peft(self, model: nn.Module, hosts: Mapping[str, nn.Module]) -> dict[str, Any]:
        return {
            "r": self.r, "lora_alpha": self.alpha, "lora_dropout": self.dropout, "bias": self.bias, "use_dora": True,
            "fan_in_fan_out": any(is_conv1d(host) for host in hosts.values()),
        }  # fmt: skip

    @staticmethod
    def from_peft(fields: Mapping[str, Any]) -> dict[str, Any]:
        names = {"r": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "bias": "bias"}
        return {ours: fields[theirs] for ours, theirs in names.items()}


class Linear(Part):
    keys: ClassVar[dict[str, str]] = {
        "lora_A": "{path}.lora_A.weight",
        "lora_B": "{path}.lora_B.weight",
        "magnitude": "{path}.lora_magnitude_vector",
    }

    def __init__(self, host: nn.Module, config: DoRAConfig) -> None:
        super().__init__()
        inside, outside = linear_shape(host)
        self.scaling, self.dropout, self.transposed = config.alpha / config.r, config.dropout, is_conv1d(host)
        self.lora_A = nn.Parameter(torch.randn(config.r, inside) * inside**-0.5)
        self.lora_B = nn.Parameter(torch.zeros(outside, config.r))
        self.magnitude = nn.Parameter(torch.full((outside,), torch.nan))  # until the part settles

    def settle(self, host: nn.Module) -> None:
        self.magnitude.copy_(self.norms(host))

    def weight(self, host: nn.Module) -> Tensor:
        dtype = self.lora_A.dtype
        weight = dense(host.weight, dtype) if is_quantized(host.weight) else host.weight.detach().to(dtype)
        return weight.T if self.transposed else weight

    def norms(self, host: nn.Module) -> Tensor:
        return torch.linalg.norm(self.weight(host) + self.scaling * (self.lora_B @ self.lora_A), dim=1).detach()

    def after(self, host: nn.Module, args: tuple, kwargs: dict, output: Tensor, base: Tensor) -> Tensor:
        x = cast(first_input(args, kwargs), self.lora_A.dtype)
        if self.dropout and self.training:  # then W x is that of the dropped input, as in peft
            x = F.dropout(x, self.dropout)
            base = F.linear(x, self.weight(host))
        elif host.bias is not None:
            base = base - host.bias
        scale = self.magnitude / self.norms(host)
        update = F.linear(F.linear(x, self.lora_A), self.lora_B) * self.scaling
        return (output + (scale - 1) * base + scale * update).to(output.dtype)

    def merged(self, host: nn.Module) -> dict[str, Tensor]:
        weight = widened(host.weight)
        weight = weight.T if self.transposed else weight
        weight = weight + self.scaling * widened(self.lora_B) @ widened(self.lora_A)
        weight = weight * (widened(self.magnitude) / torch.linalg.norm(weight, dim=1))[:, None]
        return {"weight": weight.T if self.transposed else weight}


class Embedding(Linear):
    keys: ClassVar[dict[str, str]] = {
        "lora_A": "{path}.lora_embedding_A",
        "lora_B": "{path}.lora_embedding_B",
        "magnitude": "{path}.lora_magnitude_vector",
    }

    def __init__(self, host: nn.Embedding, config: DoRAConfig) -> None:
        super().__init__(host, config)
        self.transposed = True  # (vocabulary, width): the matrix of one-hot vectors

    def after(self, host: nn.Module, args: tuple, kwargs: dict, output: Tensor, base: Tensor) -> Tensor:
        scale = self.magnitude / self.norms(host)
        rows = F.embedding(first_input(args, kwargs), self.lora_A.T, host.padding_idx)
        update = F.linear(rows, self.lora_B) * self.scaling
        return (output + (scale - 1) * base + scale * update).to(output.dtype)


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
}  # fmt: skip


@pytest.fixture(autouse=True)
def known(monkeypatch):
    """The package knows DoRA for the time of a test."""
    monkeypatch.setitem(METHODS, "dora", replace(METHODS["dora"], config=f"{__name__}:DoRAConfig"))


def pair(kind, model=None, twin=None, adapter_dtype=None, **settings):
    """(ours, theirs): equal bases with equal adapters, moved off their start."""
    settings = {"r": 5, "alpha": 12, **settings}
    model = base(kind) if model is None else model
    twin = copy.deepcopy(model) if twin is None else twin
    ours = {name: value for name, value in settings.items() if name != "fan_in_fan_out"}
    pl.attach(model, DoRAConfig(**ours), adapter_dtype=adapter_dtype)
    theirs = peft_model(twin, use_dora=True, **settings)
    give(theirs, model)
    return model, theirs


def part_of(host, name="default"):
    return host.peftlab[name]["dora"]


def test_it_is_what_the_interface_says():
    assert isinstance(DoRAConfig(), Config)
    assert all(isinstance(config(), Config) for config in pl.METHODS.values())


@pytest.mark.parametrize("case", CASES)
def test_same_numbers(case):
    kind, settings = CASES[case]
    skip_lost_biases(settings)
    ours, theirs = pair(kind, **settings)
    lora = peft_model(base(kind), **{"r": 5, "alpha": 12, **settings})
    lora.load_state_dict(theirs.state_dict(), strict=False)
    assert relative(output(lora, kind), output(theirs, kind)) > 1e-3  # DoRA is another function than LoRA
    assert pl.count_parameters(ours)[:2] == theirs.get_nb_trainable_parameters()
    three_steps(ours, theirs, batch(kind), lambda: (our_state(ours), live(theirs)))


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
    pl.attach(model, DoRAConfig(target_modules=ALL), adapter_dtype=adapter_dtype)
    host = model.model.layers[0].self_attn.k_proj
    found = part_of(host).magnitude
    assert found.dtype == (adapter_dtype or torch.float64) and found.requires_grad and found.is_leaf
    exact = found.dtype == torch.float64
    assert relative(found, torch.linalg.norm(host.weight, dim=1)) < (1e-15 if exact else 1e-7)
    # computed before the part had its dtype, it would be that of a float32 norm: 1e-8 off
    assert relative(model(**inputs).logits, before) < (1e-14 if exact else 1e-6)


@pytest.mark.parametrize("case", CASES)
def test_a_part_settles_on_what_peft_starts_from(case):
    kind, settings = CASES[case]
    skip_lost_biases(settings)
    theirs = peft_model(base(kind), use_dora=True, **{"r": 5, "alpha": 12, **settings})  # with a random B
    settings = {name: value for name, value in settings.items() if name != "fan_in_fan_out"}
    ours = pl.attach(base(kind), DoRAConfig(**{"r": 5, "alpha": 12, **settings}))
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
    monkeypatch.setattr(Linear, "settle", lambda part, host: seen.append((part, host, torch.is_grad_enabled())))
    model = base("llama")
    pl.attach(model, DoRAConfig(target_modules=["q_proj"]))
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
        pl.attach(nn.Sequential(layer), DoRAConfig(target_modules=["0"]))
    assert relative(part_of(layer).magnitude, expected) < 0.004  # its scales were rounded to bf16


# ----------------------------------------------------------------------------------- two methods share one peft_type


@pytest.mark.parametrize("case", CASES)
def test_folders_both_ways(case, tmp_path):
    kind, settings = CASES[case]
    skip_lost_biases(settings)
    ours, theirs = pair(kind, dropout=0.1, **settings)
    expected = output(theirs, kind)
    peft_save(theirs, tmp_path / "theirs")
    loaded = pl.load_adapter(base(kind), tmp_path / "theirs")
    assert type(pl.attached(loaded)["default"]) is DoRAConfig
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
        "lora": pl.LoRAConfig, "dora": DoRAConfig,
    }  # fmt: skip
    for name in ("lora", "dora"):  # and once more through our own hands
        pl.save_adapter(model, tmp_path / "ours", name=name)
        again = pl.load_adapter(base("llama"), tmp_path / "ours", name=name)
        pl.activate(model, name)
        assert torch.equal(output(again, "llama"), output(model, "llama"))


def test_a_folder_that_no_method_or_more_than_one_fits_is_refused(tmp_path, monkeypatch):
    @dataclass(frozen=True, kw_only=True)
    class Other(DoRAConfig):
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


def test_what_both_methods_lack_is_named(tmp_path):
    theirs = peft_model(base("llama"), use_dora=True, use_rslora=True, r=4)
    peft_save(theirs, tmp_path)
    with pytest.raises(pl.PeftLabError, match="use_rslora=True, which"):
        pl.load_adapter(base("llama"), tmp_path)


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
