"""What every method must do, asked of each row of the catalogue and of the template: a new row is tested here at once.

A method may refuse what it cannot do, in one clear line (a `PeftLabError`); it may not do it wrongly or die of it. What
a method computes is for its own tests.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import warnings

import pytest
import torch
from nets import assert_same, snapshot
from places import has_place
from safetensors.torch import load_file, save_file
from tiny import llama, twin_of
from toy_rows import TOY
from transformers import GPT2Config, GPT2LMHeadModel

import peftlab as pl
from peftlab.catalogue import METHODS
from peftlab.core.targets import Targets
from peftlab.memory import count

ROWS = {name: row for name, row in METHODS.items() if row.config and not row.four_bit} | {"toy": TOY}
# Fields that a method cannot do without, beside those that its row fixes
NEEDED = {"selective": {"last_layers": 1}, "p-tuning": {"encoder_hidden": 8}}
IDS = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 3]])
# Fields of a folder that no method reads by itself
BY_ALL = ("auto_mapping", "base_model_name_or_path", "inference_mode", "modules_to_save", "peft_type", "revision",
          "task_type")
ON_TARGETS = [name for name, row in ROWS.items() if issubclass(row.config_class(), Targets)]
METHOD = pytest.mark.parametrize("method", ROWS)
KIND = pytest.mark.parametrize("kind", ["llama", "gpt2"])


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setitem(METHODS, "toy", TOY)


def base(kind="llama", dtype=torch.float64, seed=0):
    """A model whose layers have biases that are not zero: Linear layers, or GPT-2's Conv1D."""
    model, drawn = built(kind, dtype, seed)
    torch.set_rng_state(drawn)
    return twin_of(model)


@functools.cache
def built(kind, dtype, seed):
    torch.manual_seed(seed)
    if kind == "llama":
        model = llama(attention_bias=True, mlp_bias=True)
    else:
        sizes = dict(n_embd=16, n_layer=2, n_head=2, vocab_size=32, n_positions=64)
        dropout = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        model = GPT2LMHeadModel(GPT2Config(**sizes, **dropout, bos_token_id=1, eos_token_id=2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.3) if "norm" not in name and "ln_" not in name else parameter.normal_(1, 0.1)
    return model.to(dtype).eval(), torch.get_rng_state()


def config(method, model, **settings):
    """The method's config with its defaults.

    Where the model has none of its default targets, it stands on all linear layers, or on the head if it has no form
    for Conv1D layers.
    """
    row = ROWS[method]
    made = row.config_class()(**{**row.fixed, **NEEDED.get(method, {}), **settings})
    if method in ON_TARGETS and made.target_modules is None and "last_layers" not in NEEDED.get(method, {}):
        for targets in (None, "all-linear", ["lm_head"]):
            made = dataclasses.replace(made, target_modules=targets)
            with contextlib.suppress(pl.PeftLabError):
                list(made.parts(model))
                break
    return made


def adapted(method, kind="llama", dtype=torch.float64, name="default", model=None, seed=1, **settings):
    """A model with the method's adapter, moved off its start."""
    model = base(kind, dtype) if model is None else model
    pl.attach(model, config(method, model, **settings), name=name)
    move(model, seed)
    return model


@torch.no_grad()
def move(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.2 * noise.to(parameter.dtype))


def output(model):
    return model(IDS).logits.detach()


def apart(one, other):
    return ((one - other).norm() / other.norm()).item()


@METHOD
@KIND
def test_it_trains_and_detaches_bit_for_bit(method, kind):
    model = base(kind)
    before, plain = snapshot(model), output(model)
    adapted(method, model=model)
    changed = output(model)
    assert changed.shape != plain.shape or apart(changed, plain) > 1e-6
    model(IDS).logits.square().sum().backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(p.grad is not None and p.grad.isfinite().all() for p in trained.values())
    assert all(p.grad is None for name, p in model.named_parameters() if name not in trained)
    with pl.disabled(model):
        assert torch.equal(output(model), plain)
    pl.detach(model)
    assert_same(before, snapshot(model))


@METHOD
@KIND
def test_it_is_merged_rightly_or_not_at_all(method, kind):
    """With biases, and on layers that store their weight as (in, out)."""
    model = adapted(method, kind)
    expected = output(model)
    try:
        pl.merge(model)
    except pl.PeftLabError as error:
        assert "\n" not in str(error)
        assert torch.equal(output(model), expected)
        return
    assert apart(output(model), expected) < 1e-9
    pl.unmerge(model)
    assert torch.equal(output(model), expected)


@METHOD
def test_on_a_base_in_four_bits(method):
    """The adapter sees what the codes stand for, and a merge takes these values, not the codes."""
    model = base(dtype=torch.float32)
    pl.quantize_model(model, backend="reference")
    try:
        adapted(method, model=model)
    except pl.PeftLabError as error:
        assert "quantised" in str(error)
        return
    expected = output(model)
    model(IDS).logits.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    with contextlib.suppress(pl.PeftLabError):
        pl.merge(model, requantize=True)
        assert torch.isfinite(output(model)).all()
        pl.unmerge(model)
        assert torch.equal(output(model), expected)
    pl.dequantize_model(model)
    assert apart(output(model), expected) < 1e-4


@METHOD
def test_two_at_once_and_one_per_row(method):
    model = adapted(method, name="a")
    adapted(method, name="b", model=model, seed=2)
    alone = {}
    for name in ("a", "b"):
        pl.activate(model, name)
        alone[name] = output(model)
    pl.activate(model, {"a": 1.0, "b": 0.0})
    assert apart(output(model), alone["a"]) < 1e-9
    pl.activate(model, {"a": 0.5, "b": 0.5})
    assert min(apart(output(model), one) for one in alone.values()) > 1e-6
    pl.activate(model, ["a", "b"])
    rows = output(model)
    assert apart(rows[0], alone["a"][0]) < 1e-9 and apart(rows[1], alone["b"][1]) < 1e-9


@METHOD
@KIND
def test_its_folder_loads(method, kind, tmp_path):
    model = adapted(method, kind)
    pl.save_adapter(model, tmp_path)
    loaded = pl.load_adapter(base(kind), tmp_path)
    assert torch.equal(output(loaded), output(model))
    assert pl.attached(loaded)["default"].method == method


@METHOD
@pytest.mark.slow
def test_a_folder_with_missing_and_strange_fields_is_one_clear_line(method, tmp_path):
    pl.save_adapter(adapted(method), tmp_path)
    weights, fields = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    save_file(load_file(weights), weights, {"format": "pt"})  # without the sums, as Hugging Face peft writes it
    content = json.loads(fields.read_text())
    model = base()
    before = snapshot(model)
    others = itertools.cycle((None, -1, True, [7]))  # each field gets one of these
    number = list(ROWS).index(method)
    for name, more in zip(content, others, strict=False):
        without = {other: value for other, value in content.items() if other != name}
        edits = (without, {**content, name: "odd"}, {**content, name: more})
        if name in BY_ALL:  # read by the same lines for each method, so that the methods share out the three edits
            edits = (edits[(number + BY_ALL.index(name)) % 3],)
        for changed in edits:
            fields.write_text(json.dumps(changed))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    pl.load_adapter(model, tmp_path)
                except pl.PeftLabError as error:
                    assert "\n" not in str(error) and len(str(error)) < 2000
                else:
                    pl.detach(model)
    assert_same(before, snapshot(model))


@METHOD
def test_a_head_trains_beside_it_and_is_saved(method, tmp_path):
    """`modules_to_save` and `task_type` belong to every config."""
    model = adapted(method, modules_to_save=["lm_head"])
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert any(name.startswith("lm_head.") for name in trained)
    pl.save_adapter(model, tmp_path)
    assert any("lm_head" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    assert torch.equal(output(pl.load_adapter(base(), tmp_path)), output(model))


@METHOD
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_beside_sixteen_bits_it_is_float32_and_the_output_is_not(method, dtype):
    model = adapted(method, dtype=dtype)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert output(model).dtype == dtype


@pytest.mark.parametrize("method", ON_TARGETS)
@pytest.mark.parametrize("target", ["embed_tokens", "input_layernorm", "self_attn", "mlp", "layers", "lm_head", "no"])
def test_a_target_of_any_kind_is_adapted_or_refused_in_one_line(method, target):
    model = base()
    row, before = ROWS[method], snapshot(model)
    try:
        pl.attach(model, row.config_class()(**row.fixed, target_modules=[target]))
    except pl.PeftLabError as error:
        assert target in str(error) and "\n" not in str(error)
        assert_same(before, snapshot(model))
    else:
        move(model)
        assert torch.isfinite(output(model)).all()


@METHOD
@KIND
def test_it_is_counted_exactly(method, kind):
    model = base(kind)
    shape = {**model.config.to_dict(), "tie_word_embeddings": model.config.tie_word_embeddings}
    if ROWS[method].tensors and has_place(method, shape):
        attached = pl.attach(model, ROWS[method].config_class()(**ROWS[method].fixed))
        told = count(shape, method)
        assert pl.count_parameters(attached)[:2] == (told.trainable, told.total)
