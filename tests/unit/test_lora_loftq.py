"""LoftQ and QPiSSA: what the base in four bits and the start give together, and what is refused."""

import pytest
import tiny
import torch
from nets import assert_same, snapshot
from peft.utils.loftq_utils import _low_rank_decomposition
from transformers import GPT2Config, GPT2LMHeadModel

import peftlab as pl
from peftlab.methods.lora_starts import factors
from peftlab.quantization.weights import dense

Q_PROJ = "model.layers.0.self_attn.q_proj"


def whole(layer):
    """Q + s B A of a layer, or Q alone."""
    weight = dense(layer.weight, torch.float32) if hasattr(layer.weight, "quant_state") else layer.weight.detach()
    part = layer.peftlab["default"]["lora"] if "peftlab" in layer._modules else None
    return weight if part is None else weight + part.delta().detach()


def test_it_makes_good_what_four_bits_have_lost():
    model, base = tiny.llama(), pl.quantize_model(tiny.llama(), block_size=64)
    codes = base.get_submodule(Q_PROJ).weight.clone()
    for data in (model, model.state_dict()):
        pl.attach(base, pl.LoRAConfig(r=4, alpha=8, init="loftq", target_modules="all-linear"), data=data)
        layer, weight = base.get_submodule(Q_PROJ), model.get_submodule(Q_PROJ).weight.detach()
        lost = weight - dense(layer.weight, torch.float32)
        theirs = _low_rank_decomposition(lost, reduced_rank=4)  # of peft
        torch.testing.assert_close(layer.peftlab["default"]["lora"].delta(), theirs["L"] @ theirs["R"])
        assert (whole(layer) - weight).norm() < 0.75 * lost.norm()
        assert torch.equal(layer.weight, codes)
        pl.detach(base)


def test_conv1d_and_patterns():
    def model():
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=16))

    settings = {"target_modules": ["c_attn"], "use_rslora": True, "rank_pattern": {"c_attn": 2}}
    for found in (
        pl.attach(pl.quantize_model(model()), pl.LoRAConfig(init="loftq", **settings), data=model()),
        pl.quantize_and_attach(model(), pl.LoRAConfig(init="loftq", **settings)),
        pl.quantize_and_attach(model(), pl.LoRAConfig(init="pissa", **settings), rounds=2),
    ):
        layer, weight = found.transformer.h[0].attn.c_attn, model().transformer.h[0].attn.c_attn.weight.T
        plain = pl.quantize_nf4(weight.detach()).dequantize()
        assert len(layer.peftlab["default"]["lora"].lora_A) == 2
        assert (whole(layer) - weight).norm() < 0.97 * (plain - weight).norm()


def test_each_round_is_fitted_to_the_codes_that_it_made():
    weight = tiny.llama().get_submodule(Q_PROJ).weight.detach()
    a, b, plain = torch.zeros(6, 16), torch.zeros(16, 6), pl.quantize_nf4(weight, double_quant=False).dequantize()
    for rounds in (1, 2, 3):
        config = pl.LoRAConfig(r=6, init="loftq")
        model = pl.quantize_and_attach(tiny.llama(), config, rounds=rounds, double_quant=False)
        layer = model.get_submodule(Q_PROJ)
        q = pl.quantize_nf4(weight - 16 / 6 * b @ a, double_quant=False).dequantize()
        assert torch.equal(dense(layer.weight, torch.float32), q)
        a, b = factors(weight - q, 6, 16 / 6, "pissa")
        assert torch.equal(layer.peftlab["default"]["lora"].lora_A, a)
        assert (whole(layer) - weight).norm() < 0.6 * (plain - weight).norm()


def test_qpissa_quantises_what_pissa_leaves(tmp_path):
    config = pl.LoRAConfig(r=4, alpha=8, init="pissa")
    model = pl.quantize_and_attach(tiny.llama(), config)
    layer, weight = model.get_submodule(Q_PROJ), tiny.llama().get_submodule(Q_PROJ).weight.detach()
    a, b = factors(weight, 4, 2.0, "pissa")
    part = layer.peftlab["default"]["lora"]
    assert torch.equal(part.lora_A, a) and torch.equal(part.lora_B, b)
    assert torch.equal(dense(layer.weight, torch.float32), pl.quantize_nf4(weight - 2.0 * b @ a).dequantize())
    assert (whole(layer) - weight).norm() < (pl.quantize_nf4(weight).dequantize() - weight).norm()

    ids = torch.arange(6)[None]
    expected = model(ids).logits
    pl.save_adapter(model, tmp_path)  # a plain LoRA for this base
    pl.detach(model)
    assert torch.equal(pl.load_adapter(model, tmp_path)(ids).logits, expected)


@pytest.mark.parametrize(
    "settings, more, message",
    [
        ({"r": 99, "init": "olora"}, {}, "no more than"),
        ({"init": "kaiming"}, {}, r"give LoRAConfig\(init='loftq'\)"),
        ({"target_modules": ["lm_head"]}, {}, "lm_head stays in full precision"),
        ({"target_modules": ["q_proj"]}, {"skip": ["q_proj"]}, "q_proj stays in full precision"),
        ({"r": 9, "target_modules": ["v_proj"]}, {}, "no more than 8 directions"),
        ({}, {"rounds": -1}, "rounds must be"),
        ({}, {"format": "nf5"}, "Did you mean 'nf4'"),
        ({}, {"name": "a b"}, "cannot name an adapter"),
        ({"target_modules": ["no_such"]}, {}, "no_such"),
        ({"target_modules": ["embed_tokens"]}, {}, "embed_tokens stays in full precision"),
    ],
)
def test_refused_and_left_alone(settings, more, message):
    model = tiny.llama()
    was = snapshot(model)
    with pytest.raises(pl.PeftLabError, match=message):
        pl.quantize_and_attach(model, pl.LoRAConfig(**{"r": 4, "init": "loftq", **settings}), **more)
    assert_same(snapshot(model), was)


def test_a_failure_half_way_leaves_the_weights(monkeypatch):
    def fail(*args, **more):
        raise RuntimeError("half way")

    model = tiny.llama()
    was = snapshot(model)
    monkeypatch.setattr("peftlab.adapters.quantized_starts.quantize_model", fail)
    with pytest.raises(RuntimeError, match="half way"):
        pl.quantize_and_attach(model, pl.LoRAConfig(r=4, init="pissa"))
    assert_same(snapshot(model), was)


@pytest.mark.parametrize(
    "model, data, message",
    [
        (tiny.llama, tiny.llama, "q_proj is not in four bits"),
        (lambda: pl.quantize_model(tiny.llama()), lambda: None, r"pl.attach\(model, config, data=whole\)"),
        (lambda: pl.quantize_model(tiny.llama()), lambda: 3, r"pl.attach\(model, config, data=whole\)"),
        (lambda: pl.quantize_model(tiny.llama()), dict, "data does not hold .*q_proj.weight in full precision"),
        (lambda: pl.quantize_model(tiny.llama()), lambda: pl.quantize_model(tiny.llama()), "in full precision"),
        (lambda: pl.quantize_model(tiny.llama()), lambda: tiny.llama(hidden_size=32), "in data is .32, 32."),
    ],
)
def test_data_that_do_not_fit(model, data, message):
    with pytest.raises(pl.PeftLabError, match=message):
        pl.attach(model(), pl.LoRAConfig(r=4, init="loftq", target_modules=["q_proj"]), data=data())


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_adapter_that_was_made_with_its_base_is_not_loaded_onto_another(init, tmp_path):
    wide = dict(hidden_size=64, intermediate_size=128)
    model = pl.quantize_and_attach(tiny.llama(**wide), pl.LoRAConfig(r=2, init=init)).eval()
    ids = torch.tensor([[3, 4, 5]])
    expected = model(ids).logits
    pl.save_adapter(model, tmp_path / "one")
    for base in (tiny.llama(**wide), pl.quantize_model(tiny.llama(**wide))):
        with pytest.raises(pl.PeftLabError, match="were made together"):
            pl.load_adapter(base, tmp_path / "one")
        assert not pl.attached(base)
    base = pl.detach(model)
    for folder in ("one", "two"):  # the second was saved from a loaded one
        loaded = pl.load_adapter(base, tmp_path / folder)
        assert torch.equal(loaded.eval()(ids).logits, expected)
        pl.save_adapter(loaded, tmp_path / "two")
        pl.detach(loaded)
    with pytest.raises(pl.PeftLabError, match="were made together"):
        pl.load_adapter(tiny.llama(**wide), tmp_path / "two")
