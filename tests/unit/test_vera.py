"""VeRA by hand on one layer, the one random pair of an adapter, its folders, and what is refused."""

import copy
import io
import json

import pytest
import torch
from nets import assert_same, snapshot
from safetensors.torch import load_file, save_file
from tiny import examples, llama, tokenizer
from torch import nn

import peftlab as pl
from peftlab.adapters.key_table import placed

IDS = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 3]])
TARGETS = ["q_proj", "k_proj", "down_proj"]


def base(dtype=torch.float64):
    torch.manual_seed(0)
    return llama().to(dtype).eval()


def adapted(model=None, name="default", targets=TARGETS, **settings):
    """A model whose vectors were moved off their start."""
    model = base() if model is None else model
    pl.attach(model, pl.VeRAConfig(r=6, target_modules=targets, init="random", **settings), name=name)
    return model


def pair_of(model, name="default"):
    """The one random pair that all parts of an adapter hold."""
    (shared,) = {id(p.part.shared): p.part.shared for p in placed(model, name) if p.name == "vera"}.values()
    return shared


def output(model):
    return model(IDS).logits.detach()


def files(folder):
    return folder / "adapter_model.safetensors", folder / "adapter_config.json"


def edit(folder, change):
    """Change the tensors of a folder, which then has no sums, as Hugging Face peft writes it."""
    weights, _ = files(folder)
    save_file(change(load_file(weights)), weights, {"format": "pt"})


def configure(folder, **fields):
    _, config = files(folder)
    config.write_text(json.dumps({**json.loads(config.read_text()), **fields}))
    edit(folder, lambda tensors: tensors)


def test_the_formula_by_hand():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 4, bias=False)).double()
    x, plain = torch.randn(7, 5, dtype=torch.float64), copy.deepcopy(model)
    pl.attach(model, pl.VeRAConfig(r=2, target_modules=["0", "1"], d_initial=0.5))
    assert torch.equal(model(x), plain(x))
    generator = torch.Generator().manual_seed(0)
    A = torch.empty(2, 5).uniform_(-((6 / 5) ** 0.5), (6 / 5) ** 0.5, generator=generator).double()
    B = torch.empty(4, 2).uniform_(-(3**0.5), 3**0.5, generator=generator).double()
    expected = x
    with torch.no_grad():
        for layer in model:
            part = layer.peftlab.default.vera
            assert torch.equal(part.vera_lambda_d, torch.full((2,), 0.5).double())
            part.vera_lambda_d.normal_(), part.vera_lambda_b.normal_()
            d, b = part.vera_lambda_d, part.vera_lambda_b
            low = d * (expected @ A[:, : layer.in_features].T)
            expected = nn.functional.linear(expected, layer.weight, layer.bias) + b * (low @ B[: layer.out_features].T)
    torch.testing.assert_close(model(x), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("change", ["deepcopy", "float", "state dict", "pickle", "a block copied"])
def test_one_copy_of_the_pair_whatever_happens_to_the_model(change):
    model = adapted()
    before = output(model)
    if change == "deepcopy":
        other = copy.deepcopy(model)
        assert pair_of(other) is not pair_of(model)
        assert torch.equal(output(other), before)
        model = other
    elif change == "float":
        model.float().double()
    elif change == "state dict":
        other = adapted(projection_prng_key=5)
        other.load_state_dict(model.state_dict())
        assert torch.equal(output(other), before)
        model = other
    elif change == "pickle":
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        model = torch.load(buffer, weights_only=False)
        assert torch.equal(output(model), before)
    else:
        block = copy.deepcopy(model.model.layers[0])
        assert block.self_attn.q_proj.peftlab.default.vera.shared is block.mlp.down_proj.peftlab.default.vera.shared
    shared = pair_of(model)
    assert {name for name, _ in shared.named_buffers()} == {"vera_A", "vera_B"}
    assert sum(buffer is shared.vera_A for buffer in model.buffers()) == 1


def test_the_pair_does_not_train_and_is_not_counted():
    model = adapted()
    widths = [sum(getattr(p.part, f"vera_lambda_{v}").numel() for v in "bd") for p in placed(model, "default")]
    assert pl.count_parameters(model).trainable == sum(widths)
    assert pl.count_parameters(model).total == pl.count_parameters(base()).total + sum(widths)


def test_each_adapter_has_a_pair_of_its_own():
    """Beside another one an adapter computes what it computes alone, also if it is smaller or has another key."""
    alone, model = adapted(targets=["k_proj"]), adapted(name="wide")
    adapted(model, name="narrow", targets=["k_proj"])
    adapted(model, name="other", projection_prng_key=9)
    assert pair_of(model, "narrow").vera_A.shape[1] < pair_of(model, "wide").vera_A.shape[1]
    assert not torch.equal(pair_of(model, "other").vera_A, pair_of(model, "wide").vera_A)
    with torch.no_grad():
        for mine, theirs in zip(placed(model, "narrow"), placed(alone, "default"), strict=True):
            mine.part.vera_lambda_d.copy_(theirs.part.vera_lambda_d)
    pl.activate(model, "narrow")
    assert torch.equal(output(model), output(alone))


@pytest.mark.parametrize("key", [-(2**63), 2**64 - 1])
def test_any_key_of_64_bits_is_kept(key, tmp_path):
    model = adapted(projection_prng_key=key, save_projection=False)
    pl.save_adapter(model, tmp_path)
    assert not [name for name in load_file(files(tmp_path)[0]) if "vera_A" in name]
    loaded = pl.load_adapter(base(), tmp_path)
    assert torch.equal(output(loaded), output(model))
    assert pl.attached(loaded)["default"].projection_prng_key == key


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_pair_in_the_file_is_read_whatever_its_numbers_and_dtype(dtype, tmp_path):
    pl.save_adapter(adapted(), tmp_path)

    def other(tensors):
        return {key: value.normal_().to(dtype) if "vera_" in key else value for key, value in tensors.items()}

    edit(tmp_path, other)
    stored, model = load_file(files(tmp_path)[0]), pl.load_adapter(base(), tmp_path)
    assert torch.equal(pair_of(model).vera_A, stored["base_model.vera_A"].double())
    pl.save_adapter(model, tmp_path / "again")
    assert torch.equal(output(pl.load_adapter(base(), tmp_path / "again")), output(model))


def repeated(tensors):
    """As in peft's model.state_dict(), where each layer holds the pair, and keys hold the adapter's name."""
    layers = {key.rpartition(".")[0] for key in tensors if key.endswith("vera_lambda_b")}
    pair = {f"{layer}.{name}": tensors[f"base_model.{name}"] for layer in layers for name in ("vera_A", "vera_B")}
    return {f"{key}.default": value for key, value in {**tensors, **pair}.items()}


def headless(tensors):
    return {key.replace("base_model.model.model.", "base_model.model."): value for key, value in tensors.items()}


@pytest.mark.parametrize("form", [repeated, headless])
def test_keys_in_another_form(form, tmp_path):
    model = adapted()
    pl.save_adapter(model, tmp_path)
    edit(tmp_path, lambda tensors: {key: value.clone() for key, value in form(tensors).items()})
    with pytest.warns(UserWarning, match="another form"):
        loaded = pl.load_adapter(base(), tmp_path)
    assert torch.equal(output(loaded), output(model))


def wider(tensors):
    return tensors | {"base_model.vera_A": torch.zeros(6, 99)}


def without(tensors):
    return {key: value for key, value in tensors.items() if "vera_B" not in key}


@pytest.mark.parametrize(
    ("change", "fields", "message"),
    [
        (wider, {}, r"vera_A.*has shape \(6, 99\)"),
        (without, {}, r"lacks 1 .*'base_model.vera_B'"),
        (None, {"projection_prng_key": 2**64}, "18446744073709551616, which is too large"),
        (None, {"projection_prng_key": 0.5}, "projection_prng_key must be"),
        (None, {"projection_prng_key": None}, "projection_prng_key"),
        (None, {"r": 5}, r"shape \(6,\)|shape \(6, "),
        (None, {"save_projection": False, "projection_prng_key": 3}, "vera_[AB].*save_projection"),
    ],
)  # fmt: skip
def test_a_folder_that_does_not_fit_is_refused_in_one_sentence(change, fields, message, tmp_path):
    pl.save_adapter(adapted(), tmp_path)
    configure(tmp_path, **fields)
    if change is not None:
        edit(tmp_path, change)
    model = base()
    before = snapshot(model)
    with pytest.raises(pl.PeftLabError, match=message) as raised:
        pl.load_adapter(model, tmp_path)
    assert "\n" not in str(raised.value)
    assert_same(before, snapshot(model))


def test_a_pair_that_the_key_draws_too_is_no_contradiction(tmp_path):
    """The config says that the file holds no pair; it holds the very one of the key."""
    model = adapted()
    pl.save_adapter(model, tmp_path)
    configure(tmp_path, save_projection=False)
    assert torch.equal(output(pl.load_adapter(base(), tmp_path)), output(model))


def test_on_a_base_in_four_bits_the_pair_is_the_keys():
    model = base(torch.float32)
    pl.quantize_model(model, backend="reference")
    adapted(model)
    plain = adapted(base(torch.float32))
    assert torch.equal(pair_of(model).vera_A, pair_of(plain).vera_A)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(r=0), "r must be"),
        (dict(projection_prng_key=2**64), "projection_prng_key must be"),
        (dict(projection_prng_key=1.5), "projection_prng_key must be"),
        (dict(bias="vera"), "'vera_only'"),
        (dict(dropout=1.0), "dropout must be"),
        (dict(target_modules=["embed_tokens"]), "embed_tokens is an embedding; VeRA adapts linear layers"),
    ],
)  # fmt: skip
def test_what_is_refused(settings, message):
    with pytest.raises(pl.PeftLabError, match=message):
        pl.attach(base(), pl.VeRAConfig(**settings))


def test_the_words_for_biases_of_the_adapted_modules():
    assert pl.VeRAConfig(bias="vera_only").bias == "lora_only"


def test_a_run_is_resumed_to_the_bit_with_the_pair_it_began_with(tmp_path, monkeypatch):
    monkeypatch.setattr("peftlab.training.buffers.SMALL_BUFFER", 0)

    def trained(folder, key=3, stop_at=None):
        def stop(model, row):
            if row["step"] == stop_at:
                raise KeyboardInterrupt

        model = pl.attach(base(torch.float32), pl.VeRAConfig(r=6, projection_prng_key=key, dropout=0.2))
        history = pl.train(
            model, examples(12), tokenizer=tokenizer(), steps=4, batch_size=2, learning_rate=0.1, folder=folder,
            save_every=2, progress=False, callback=stop, fast="auto",
        )  # fmt: skip
        return model, history

    model, history = trained(None)
    assert history.path.startswith("plain: 'default' has a VeRALinear on model.layers.0.self_attn.q_proj")
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, stop_at=3)
    other, again = trained(tmp_path, key=4)
    assert [row["loss"] for row in again.steps] == [row["loss"] for row in history.steps]
    assert torch.equal(output(other), output(model))
