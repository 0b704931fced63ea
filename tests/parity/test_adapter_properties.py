"""Bottleneck adapters: where they stand, how they start, what they refuse, and all that an attached adapter can do."""

import dataclasses

import pytest
import torch
from nets import Net, assert_same, snapshot, tokens
from pairs import base, batch, relative
from test_transformers_trainer import trainer, weights
from tiny import examples, llama
from torch import nn

import peftlab as pl
from peftlab.adapters.key_table import placed
from peftlab.core.checkpointing import switch_checkpointing
from peftlab.methods.adapter import PLACEMENTS

CONFIG = pl.AdapterConfig(width=4, init="random")


def parts(model, name="default"):
    return {path: part for path, _, part in placed(model, name)}


def test_reduction_factor_16_is_a_bottleneck_of_48_at_768():
    assert pl.AdapterConfig().bottleneck(768) == 48
    assert pl.AdapterConfig(reduction_factor=1000).bottleneck(768) == 1
    assert pl.AdapterConfig(width=7).bottleneck(768) == 7


@pytest.mark.parametrize(
    ("kind", "placement", "where"),
    [
        ("llama", "houlsby", ["model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj"]),
        ("llama", "pfeiffer", ["model.layers.0"]),
        ("llama", "parallel", ["model.layers.0.mlp"]),
        ("gpt2", "houlsby", ["transformer.h.0.attn.c_proj", "transformer.h.0.mlp.c_proj"]),
        ("bert", "pfeiffer", ["bert.encoder.layer.0.output.LayerNorm"]),
        ("bert", "parallel", ["bert.encoder.layer.0.output"]),
    ],
)
def test_where_they_stand(kind, placement, where):
    model = base(kind)
    pl.attach(model, pl.AdapterConfig(placement=placement, layers_to_transform=0))
    assert list(parts(model)) == where


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_it_starts_where_the_base_is_bit_for_bit(kind, placement):
    for dtype in (torch.float32, torch.bfloat16):
        model = base(kind, dtype)
        inputs = batch(kind)
        before = model(**inputs).logits
        pl.attach(model, pl.AdapterConfig(placement=placement, reduction_factor=3))
        found = model(**inputs)
        assert torch.equal(found.logits, before)
        found.loss.backward()
        for layer in parts(model).values():
            assert layer.bottleneck.up.weight.grad.any() and not layer.bottleneck.down.weight.grad.any()


def test_the_papers_start_is_nearly_the_identity():
    torch.manual_seed(0)
    model = base("bert")
    inputs = batch("bert")
    before = model(**inputs).logits
    pl.attach(model, pl.AdapterConfig(placement="houlsby", width=9, init="houlsby"))
    weights = torch.cat([layer.bottleneck.down.weight.flatten() for layer in parts(model).values()])
    assert 0.006 < weights.std() < 0.012 and weights.abs().max() <= 0.02
    assert 0 < relative(model(**inputs).logits, before) < 0.01


def test_the_formula_on_one_layer():
    """y + s (W_up f(W_down y + b_down) + b_up), written out."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 3)).double()
    pl.attach(
        model, pl.AdapterConfig(target_modules=["0"], width=2, activation="tanh", scaling=1.5, init="random")
    )  # fmt: skip
    b = parts(model)["0"].bottleneck
    x = torch.randn(4, 5).double()
    y = x @ model[0].weight.T + model[0].bias
    expected = y + 1.5 * (torch.tanh(y @ b.down.weight.T + b.down.bias) @ b.up.weight.T + b.up.bias)
    torch.testing.assert_close(model(x), expected)
    pl.detach(model)
    # beside a layer that changes the width there is nothing to add
    with pytest.raises(pl.PeftLabError, match="0 reads 5 features and returns 3"):
        pl.attach(model, pl.AdapterConfig(placement="parallel", target_modules=["0"], width=2))


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_detached_it_is_the_model_it_was(kind, placement):
    model = base(kind)
    before = snapshot(model)
    pl.attach(model, pl.AdapterConfig(placement=placement, width=4))
    pl.attach(model, pl.AdapterConfig(placement="houlsby", width=2), name="second")
    pl.detach(model)
    pl.detach(model, "second")
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_switched_mixed_and_by_rows(kind, placement):
    model = base(kind)
    inputs = batch(kind, rows=3)
    del inputs["labels"]
    alone = {None: model(**inputs).logits}
    for name, width in (("a", 4), ("b", 3)):
        pl.attach(model, pl.AdapterConfig(placement=placement, width=width, init="random"), name=name)
        alone[name] = model(**inputs).logits
    assert relative(alone["a"], alone["b"]) > 1e-3
    pl.activate(model, "a")
    assert torch.equal(model(**inputs).logits, alone["a"])
    pl.activate(model, ["b", None, "a"])
    found = model(**inputs).logits
    for i, name in enumerate(["b", None, "a"]):
        assert relative(found[i], alone[name][i]) < 1e-12
    pl.activate(model, {"a": 1.0, "b": 0.0})
    assert relative(model(**inputs).logits, alone["a"]) < 1e-12
    pl.activate(model, {"a": 0.5, "b": 0.5})
    assert 1e-3 < relative(model(**inputs).logits, alone["a"])
    with pl.disabled(model):
        assert torch.equal(model(**inputs).logits, alone[None])


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_rows_generate_with_a_cache(placement):
    model = base("llama")
    ids = batch("llama", rows=2, length=5)["input_ids"]
    ids = torch.where(ids == 0, 7, ids)
    settings = dict(max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None)
    alone = {None: model.generate(ids, **settings)}
    pl.attach(model, pl.AdapterConfig(placement=placement, width=4, init="random"))
    alone["default"] = model.generate(ids, **settings)
    pl.activate(model, [None, "default"])
    rows = model.generate(ids, **settings)
    assert torch.equal(rows[0], alone[None][0]) and torch.equal(rows[1], alone["default"][1])
    assert not torch.equal(alone[None], alone["default"])


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "roberta"])
def test_saved_and_loaded_with_a_head(kind, placement, tmp_path):
    task = "SEQ_CLS" if kind in ("bert", "roberta") else None
    model = base(kind)
    config = pl.AdapterConfig(
        placement=placement, width=4, activation="gelu", scaling=2.0, init="random", task_type=task,
        layers_to_transform=[0, 2],
    )  # fmt: skip
    pl.attach(model, config, name="one")
    with torch.no_grad():
        for _, part_name, part in placed(model, "one"):
            if part_name == "copy":
                next(part.parameters()).add_(0.3)
    expected = model(**batch(kind)).logits
    folder = pl.save_adapter(model, tmp_path, name="one")
    assert folder == tmp_path / "one"
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    other = pl.load_adapter(base(kind), tmp_path, name="one")
    assert torch.equal(other(**batch(kind)).logits, expected)
    assert pl.attached(other)["one"].scaling == 2.0 and pl.attached(other)["one"].placement == placement
    wrong = base("gpt2" if kind != "gpt2" else "bert")
    with pytest.raises(pl.PeftLabError):
        pl.load_adapter(wrong, tmp_path, name="one")
    assert not pl.attached(wrong)


@pytest.mark.parametrize("kind", ["bert", "roberta", "llama-classifier"])
@pytest.mark.parametrize("config", [
    pl.AdapterConfig(width=4, task_type="SEQ_CLS"), pl.SelectiveConfig(task_type="SEQ_CLS"),
    pl.SelectiveConfig(last_layers=1, task_type="SEQ_CLS"), pl.PromptTuningConfig(task_type="SEQ_CLS"),
], ids=lambda config: config.method)  # fmt: skip
def test_a_base_is_known_again_whatever_head_it_was_given(kind, config, tmp_path):
    model, fresh = base(kind), base(kind)
    head = [p for name, p in fresh.named_parameters() if name.startswith(("classifier", "score"))]
    with torch.no_grad():
        for parameter in head:
            parameter.normal_()  # as loading the same base again would
    pl.attach(model, config)
    pl.save_adapter(model, tmp_path)
    pl.load_adapter(fresh, tmp_path)
    assert torch.equal(fresh(**batch(kind)).logits, model(**batch(kind)).logits)
    other = base(kind, seed=1)
    with pytest.raises(pl.PeftLabError, match="was trained on another base"):
        pl.load_adapter(other, tmp_path)


def test_a_name_that_is_taken_is_refused_and_nothing_changes():
    model = base("bert")
    pl.attach(model, CONFIG, name="reviews")
    before = model(**batch("bert")).logits
    with pytest.raises(pl.PeftLabError, match="'reviews' is attached already; detach it first, or use another name"):
        pl.attach(model, pl.AdapterConfig(width=2), name="reviews")
    assert torch.equal(model(**batch("bert")).logits, before)
    with pytest.raises(pl.PeftLabError, match="Did you mean 'reviews'"):
        pl.activate(model, "review")


def test_it_cannot_be_merged_and_says_so():
    model = base("llama")
    pl.attach(model, CONFIG)
    with pytest.raises(pl.PeftLabError, match=r"'default' \(pfeiffer\) changes more than weights"):
        pl.merge(model)
    model(**batch("llama")).loss.backward()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(placement="pfeifer"), "placement must be .* found 'pfeifer'.*Did you mean 'pfeiffer'"),
        (dict(activation="relo"), "activation must be .* found 'relo'.*Did you mean 'relu'"),
        (dict(init="zero"), "init must be .* found 'zero'"),
        (dict(reduction_factor=0), "reduction_factor must be a positive whole number, found 0"),
        (dict(reduction_factor=2.5), "reduction_factor must be .* found 2.5"),
        (dict(width=True), "width must be .* found True"),
        (dict(scaling=float("nan")), "scaling must be .* found nan"),
        (dict(dropout=1), "dropout must be .* found 1"),
    ],
)
def test_values_that_are_refused(settings, message):
    with pytest.raises(pl.PeftLabError, match=message):
        pl.AdapterConfig(**settings)


def test_models_and_places_that_are_refused():
    model = Net()
    before = snapshot(model)
    for settings, message in [
        ({}, "places of a pfeiffer adapter in Net are not known. Name the modules .* end in embed, up, down, head"),
        (dict(target_modules=["blocks"]), "blocks is a ModuleList"),
        (dict(target_modules=["upp"]), "Did you mean 'up'"),
        (dict(placement="parallel", target_modules=["up"]), "up reads 6 features and returns 11 .*equally wide"),
        (dict(placement="parallel", target_modules=["embed"]), "embed reads token ids and returns 6 features"),
    ]:
        with pytest.raises(pl.PeftLabError, match=message):
            pl.attach(model, pl.AdapterConfig(**settings))
    assert_same(before, snapshot(model))
    with pytest.raises(pl.PeftLabError, match="nn.MultiheadAttention"):
        pl.attach(nn.Sequential(nn.MultiheadAttention(4, 2)), pl.AdapterConfig(target_modules=["out_proj"]))
    bert = base("bert")
    with pytest.raises(pl.PeftLabError, match="modules_to_save trains a copy of .*LayerNorm, where a pfeiffer adapter"):
        pl.attach(bert, pl.AdapterConfig(modules_to_save=["LayerNorm"]))
    # Houlsby et al. trained the norms too
    pl.attach(bert, pl.AdapterConfig(placement="houlsby", modules_to_save=["LayerNorm"], task_type="SEQ_CLS"))
    assert torch.equal(bert(**batch("bert")).logits, base("bert")(**batch("bert")).logits)


def test_beside_a_module_that_returns_several_things():
    """Attention returns its output and its weights; only the output is changed."""
    model = base("llama")
    expected = model(**batch("llama")).logits
    config = pl.AdapterConfig(placement="parallel", target_modules=["self_attn"], width=2)
    pl.attach(model, config)
    assert torch.equal(model(**batch("llama")).logits, expected)
    pl.detach(model)
    pl.attach(model, dataclasses.replace(config, init="random"))
    assert relative(model(**batch("llama")).logits, expected) > 1e-3


def test_a_model_of_ones_own():
    model = Net()
    before = model(tokens())
    pl.attach(model, pl.AdapterConfig(placement="parallel", target_modules=[r"blocks.0", "blocks.1"], width=2))
    assert torch.equal(model(tokens()), before)
    pl.detach(model)
    pl.attach(model, pl.AdapterConfig(target_modules=["norm", "up", "embed"], width=2, init="random"))
    assert len(parts(model)) == 5 and relative(model(tokens()), before) > 1e-3
    assert {layer.bottleneck.up.out_features for layer in parts(model).values()} == {6, 11}


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_checkpointing_and_compile_give_the_same_gradients(placement):
    gradients = []
    for checkpointing in (False, True):
        model = base("llama").train()
        torch.manual_seed(1)
        pl.attach(model, pl.AdapterConfig(placement=placement, width=4, init="random"))
        if checkpointing:
            switch_checkpointing(model, "enable", {"use_reentrant": False})
        model(**batch("llama"), use_cache=False).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_and_half_precision(dtype):
    model = base("llama", dtype)
    pl.attach(model, CONFIG)
    assert {p.dtype for layer in parts(model).values() for p in layer.parameters()} == {torch.float32}
    assert model(**batch("llama")).logits.dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        model(**batch("llama")).loss.backward()
    assert all(layer.bottleneck.down.weight.grad.isfinite().all() for layer in parts(model).values())


def test_dropout_is_only_for_training():
    model = base("bert")
    pl.attach(model, pl.AdapterConfig(width=4, dropout=0.5, init="random"))
    inputs = batch("bert")
    assert torch.equal(model(**inputs).logits, model(**inputs).logits)
    model.train()
    assert not torch.equal(model(**inputs).logits, model(**inputs).logits)


EVERY = [
    *(pl.AdapterConfig(placement=placement, width=3, dropout=0.1) for placement in PLACEMENTS),
    pl.IA3Config(), pl.SelectiveConfig(last_layers=1),
]  # fmt: skip


@pytest.mark.parametrize("config", EVERY, ids=lambda config: config.method)
def test_a_training_that_goes_on_ends_as_one_that_was_not_stopped(config, tmp_path):
    class Stopped(Exception):
        pass

    def stop(model, row):
        if row["step"] == 7:
            raise Stopped

    def run(folder, callback=None):
        model = llama(attention_dropout=0.1)
        torch.manual_seed(3)
        pl.attach(model, config)
        pl.train(model, examples(24), steps=12, batch_size=3, learning_rate=0.01, folder=folder, save_every=2,
                 callback=callback, progress=False, seed=5)  # fmt: skip
        return {name: value.clone() for name, value in model.state_dict().items()}

    whole = run(tmp_path / "whole")
    with pytest.raises(Stopped):
        run(tmp_path / "parts", stop)
    again = run(tmp_path / "parts")
    assert all(torch.equal(value, again[name]) for name, value in whole.items())
    assert any("peftlab" in name and value.dim() > 1 and not torch.all(value == 1) for name, value in whole.items())


# one placement of an adapter: the Trainer sees parameters and a folder, and no places
@pytest.mark.parametrize("config", EVERY[len(PLACEMENTS) - 1 :], ids=lambda config: config.method)
def test_transformers_trainer_trains_the_adapter_alone_and_goes_on_to_the_bit(config, tmp_path):
    def model():
        made = llama()
        torch.manual_seed(1)
        pl.attach(made, config)
        return made

    one = model()
    before = weights(one)
    trainer(one, tmp_path / "whole").train()
    after = weights(one)
    for name, value in before.items():
        assert "peftlab" in name or torch.equal(value, after[name]), name
    assert any(not torch.equal(value, after[name]) for name, value in before.items() if "peftlab" in name)
    other = model()
    trainer(other, tmp_path / "whole").train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert all(torch.equal(value, after[name]) for name, value in weights(other).items())
