"""A whole model into four bits and back: layer by layer, stored, merged; and the same for bitsandbytes' layers."""

import copy
import json
import weakref

import pytest
import torch
from nets import Net, assert_same, snapshot, tokens
from tiny import llama
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
)

import peftlab as pl
from peftlab.optional import available, require
from peftlab.quantization import Linear4bit
from peftlab.quantization import model as quantised_model
from peftlab.quantization.model import weight_bytes
from peftlab.quantization.weights import REPACKS, is_repacked, quantized, unpack

SHAPE = dict(hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2, layers=2)
IDS = torch.tensor([[3, 4, 5, 6, 7], [8, 9, 10, 11, 12]])
LORA = dict(r=4, alpha=10, target_modules="all-linear", init="random")
needs_bitsandbytes = pytest.mark.skipif(available("bitsandbytes") is None, reason="needs bitsandbytes")


def whole(**settings):
    return llama(**SHAPE, **settings)


def four_bit(**settings):
    return pl.quantize_model(whole(), **settings)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    whole().save_pretrained(folder)
    return folder


def theirs(folder, **settings):
    """As a user gets it from transformers."""
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32, **settings
    )
    return LlamaForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu")


# ------------------------------------------------------------------------------------------------------ quantising


def test_every_linear_layer_but_the_head():
    model = four_bit()
    kinds = {path: type(module).__name__ for path, module in model.named_modules()}
    assert sum(kind == "Linear4bit" for kind in kinds.values()) == 14
    assert kinds["lm_head"] == "Linear" and type(model) is LlamaForCausalLM
    assert pl.count_parameters(model).total == pl.count_parameters(whole()).total
    assert weight_bytes(model) < 0.35 * weight_bytes(whole())
    for path, module in model.named_modules():
        if isinstance(module, Linear4bit):
            held = pl.quantize_nf4(whole().get_submodule(path).weight)
            assert torch.equal(module.weight, held.packed) and torch.equal(module.quant_state.absmax, held.absmax)


def test_the_peak_is_the_model_and_one_layer(monkeypatch):
    """Each old weight is gone before the next is quantised, without waiting for the garbage collector."""
    model = whole()
    old = [weakref.ref(module.weight) for module in model.modules() if type(module) is nn.Linear]
    alive, make = [], quantised_model.Linear4bit

    def counted(*arguments):
        alive.append(sum(ref() is not None for ref in old))
        return make(*arguments)

    monkeypatch.setattr(quantised_model, "Linear4bit", counted)
    pl.quantize_model(model)
    assert alive == list(range(15, 1, -1))  # fourteen layers and the head, one fewer each time


def test_skip_and_what_is_left_alone():
    model = four_bit(skip=["down_proj", "layers.0"])
    left = {path for path, module in model.named_modules() if type(module) is nn.Linear}
    assert left == {path for path, module in whole().named_modules() if type(module) is nn.Linear and (
        "down_proj" in path or "layers.0" in path or path == "lm_head")}  # fmt: skip
    tied = llama(tie_word_embeddings=True)
    assert type(pl.quantize_model(tied).lm_head) is nn.Linear

    class Own(nn.Linear):
        pass

    odd = nn.ModuleDict({"attention": nn.MultiheadAttention(64, 4), "own": Own(64, 64), "plain": nn.Linear(64, 64)})
    pl.quantize_model(odd)
    assert [path for path, module in odd.named_modules() if isinstance(module, Linear4bit)] == ["plain"]


def test_heads_of_tasks_stay_whole_and_train():
    config = BertConfig(
        vocab_size=41, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, num_labels=3
    )
    model = pl.quantize_model(BertForSequenceClassification(config))
    assert type(model.classifier) is nn.Linear
    pl.attach(model, pl.LoRAConfig(task_type="SEQ_CLS"))
    model(IDS, labels=torch.tensor([0, 1])).loss.backward()
    assert model.classifier.peftlab["default"]["copy"].module.weight.grad is not None


def test_conv1d_becomes_a_linear_layer():
    config = GPT2Config(vocab_size=51, n_embd=64, n_head=4, n_layer=2, n_positions=32)
    model = GPT2LMHeadModel(config).eval()
    expected = model(IDS).logits
    pl.quantize_model(model, block_size=32, double_quant=False)
    mlp = model.transformer.h[0].mlp.c_fc
    assert isinstance(mlp, Linear4bit) and (mlp.in_features, mlp.out_features) == (64, 256)
    found = model(IDS).logits
    assert 0 < (found - expected).norm() / expected.norm() < 0.2
    pl.attach(model, pl.LoRAConfig(**LORA))
    before = model(IDS).logits
    pl.merge(pl.dequantize_model(model), unload=True)
    torch.testing.assert_close(model(IDS).logits, before, rtol=1e-4, atol=1e-5)


def mistakes():
    def poisoned():
        model = whole()
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
        return model

    return {
        "NaN": (poisoned, {}, r"model.layers.1.mlp.up_proj.weight holds 1 values that are NaN"),
        "attached": (lambda: pl.attach(whole(), pl.LoRAConfig()), {}, "quantise it first, then attach"),
        "skip": (whole, dict(skip=["dwn_proj"]), "skip names 'dwn_proj', which matches no module"),
        "skip, a string": (whole, dict(skip="lm_head"), r"a list of module names, such as \['lm_head'\]"),
        "nothing": (lambda: nn.Sequential(nn.Embedding(3, 4)), {}, "no linear layer left"),
        "twice": (four_bit, {}, "no linear layer left"),
        "format": (whole, dict(format="nf5"), "Did you mean 'nf4'"),
        "block": (whole, dict(block_size=40), "power of two"),
        "backend": (whole, dict(backend="bitsnbytes"), "Did you mean 'bitsandbytes'"),
        "backend, format": (whole, dict(backend="bitsandbytes", format="int4"), "no format 'int4'|not installed"),
    }


@pytest.mark.parametrize("case", mistakes())
def test_mistakes_change_nothing(case):
    make, settings, said = mistakes()[case]
    model = make()
    before = snapshot(model)
    with pytest.raises(pl.PeftLabError, match=said):
        pl.quantize_model(model, **settings)
    after = snapshot(model)
    if case == "NaN":
        assert before["pointers"] == after["pointers"] and before["modules"] == after["modules"]
    else:
        assert_same(before, after)


# ------------------------------------------------------------------------------------------- adapters on a 4-bit base


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_adapters_train_on_it_as_on_the_dense_twin(backend):
    """Losses, gradients and three AdamW steps are those of LoRA on the dequantised model."""
    model = four_bit(backend=backend)
    twin = pl.dequantize_model(copy.deepcopy(model))
    for one in (model, twin):
        torch.manual_seed(3)
        pl.attach(one, pl.LoRAConfig(**LORA))
        optimizer = torch.optim.AdamW([p for p in one.parameters() if p.requires_grad], lr=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            one(IDS, labels=IDS).loss.backward()
            optimizer.step()
    others = dict(twin.named_parameters())
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 28
    for name, parameter in trained.items():
        torch.testing.assert_close(parameter.grad, others[name].grad, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(parameter, others[name], rtol=1e-4, atol=1e-6)


def test_detach_gives_the_base_back():
    model = four_bit()
    before = snapshot(model)
    pl.attach(model, pl.LoRAConfig(**LORA))
    assert pl.count_parameters(model).total - pl.count_parameters(model).trainable == pl.count_parameters(whole()).total
    pl.detach(model)
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("checkpointing", [False, True, "reentrant"])
def test_train_and_generate(checkpointing):
    from tiny import examples

    model = pl.attach(four_bit(), pl.LoRAConfig(**{**LORA, "init": "kaiming"}))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pl.train(model, examples(), steps=2, learning_rate=0.01, checkpointing=checkpointing, progress=False)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) != ("peftlab" in name), name
    assert model.generate(IDS, max_new_tokens=3, pad_token_id=0).shape[1] <= 8


def test_hugging_face_peft_takes_it():
    peft = pytest.importorskip("peft")
    ours, other = four_bit(), four_bit()
    pl.attach(ours, pl.LoRAConfig(r=4, alpha=10, target_modules=["q_proj"]))
    wrapped = peft.get_peft_model(other, peft.LoraConfig(r=4, lora_alpha=10, target_modules=["q_proj"]))
    with torch.no_grad():
        for layer in range(2):
            own = ours.model.layers[layer].self_attn.q_proj.peftlab["default"]["lora"]
            their = other.model.layers[layer].self_attn.q_proj
            own.lora_B.normal_()
            their.lora_A["default"].weight.copy_(own.lora_A), their.lora_B["default"].weight.copy_(own.lora_B)
    torch.testing.assert_close(ours(IDS).logits, wrapped(IDS).logits)


# ------------------------------------------------------------------------------------------- dequantising and merging


def test_dequantised_is_what_ran_and_adapters_stay():
    model = pl.attach(four_bit(), pl.LoRAConfig(**LORA))
    pl.attach(model, pl.LoRAConfig(**{**LORA, "r": 2}), name="b")
    pl.activate(model, {"default": 0.5, "b": 2.0})
    expected = model(IDS).logits
    assert pl.dequantize_model(model) is model
    torch.testing.assert_close(model(IDS).logits, expected)
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear and list(pl.attached(model)) == ["default", "b"]
    assert not hasattr(model.config, "quantization_config")
    report = pl.merge(model, unload=True)
    assert report.modules == 14 and report.relative_error < 1e-6
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(pl.PeftLabError, match="No layer of this LlamaForCausalLM is held in four bits"):
        pl.dequantize_model(model)


def test_merging_into_four_bits_is_refused_and_then_done_with_its_error():
    model = pl.attach(four_bit(), pl.LoRAConfig(**LORA))
    before, expected = snapshot(model), model(IDS).logits
    with pytest.raises(pl.PeftLabError, match="held in four bits.*dequantize_model.*requantize=True"):
        pl.merge(model)
    assert_same(before, snapshot(model))
    paths = ("model.layers.0.mlp.up_proj", "model.layers.1.self_attn.k_proj")
    parts = {path: model.get_submodule(path).peftlab["default"]["lora"] for path in paths}
    deltas = {path: (p.lora_B.double() @ p.lora_A.double()).detach() * p.scaling for path, p in parts.items()}
    bases = {path: model.get_submodule(path).dequantize(torch.float32).double() for path in deltas}
    report = pl.merge(model, requantize=True)
    for path, delta in deltas.items():
        stored = model.get_submodule(path).dequantize(torch.float32).double()
        exact = bases[path] + delta
        again = pl.quantize_nf4(exact.float()).dequantize().double()
        assert torch.equal(stored, again)
        assert report.by_module[path] == pytest.approx(((stored - exact).norm() / delta.norm()).item(), rel=1e-4)
    assert report.relative_error == max(report.by_module.values())
    with pytest.raises(pl.PeftLabError, match="call unmerge"):
        pl.dequantize_model(model)
    pl.unmerge(model)
    assert_same(before, snapshot(model))
    assert torch.equal(model(IDS).logits, expected)


@pytest.mark.parametrize("share, lost", [(0.005, 1.07), (0.025, 1.08), (0.1, 0.77), (0.5, 0.21)])
def test_a_small_update_vanishes_in_four_bits(share, lost):
    """As Hugging Face's merge loses it: the update's relative error, by its size over the weight's."""
    torch.manual_seed(0)
    weight = torch.randn(512, 512) * 0.02
    model = nn.Sequential(nn.Linear(512, 512, bias=False))
    model[0].weight.data.copy_(weight)
    pl.quantize_model(model)
    pl.attach(model, pl.LoRAConfig(r=16, alpha=16, target_modules=["0"], init="random"))
    part = model[0].peftlab["default"]["lora"]
    with torch.no_grad():
        part.lora_B.mul_(share * 0.02 / part.delta().std())
    assert pl.merge(model, requantize=True).relative_error == pytest.approx(lost, rel=0.1)


def test_a_plain_network_and_biases():
    model = Net(dtype=torch.float32)
    expected = model(tokens())
    pl.quantize_model(model, block_size=2, double_quant=False)
    assert {type(m).__name__ for m in model.modules()} >= {"Linear4bit"} and model.head.bias is not None
    assert (model(tokens()) - expected).norm() / expected.norm() < 0.05


# ---------------------------------------------------------------------------------------------------------- storing


@pytest.mark.parametrize(
    "settings", [{}, dict(format="fp4", double_quant=False), dict(format="int4", skip=["q_proj"])]
)
def test_saved_and_loaded_bit_for_bit_without_the_adapter(tmp_path, settings):
    model = pl.attach(four_bit(**settings).eval(), pl.LoRAConfig(**LORA))
    pl.save_adapter(model, tmp_path / "adapter")
    expected = model(IDS).logits
    assert pl.save_quantized(model, tmp_path / "base") == tmp_path / "base"
    again = pl.load_quantized(tmp_path / "base")
    assert type(again) is LlamaForCausalLM and not again.training
    with pl.disabled(model):
        assert torch.equal(again(IDS).logits, model(IDS).logits)
    pl.load_adapter(again, tmp_path / "adapter")
    assert torch.equal(again(IDS).logits, expected)
    assert sorted(path.name for path in (tmp_path / "base").iterdir()) == ["config.json", "model.safetensors"]
    size = (tmp_path / "base" / "model.safetensors").stat().st_size
    assert size < 1.6 * weight_bytes(again)  # each small layer carries two code books


@needs_bitsandbytes
@pytest.mark.parametrize("way", ["save_quantized", "save_pretrained"])
def test_transformers_opens_it_with_bitsandbytes(tmp_path, way):
    model = four_bit()
    pl.attach(model, pl.LoRAConfig(**LORA))
    model.save_pretrained(tmp_path) if way == "save_pretrained" else pl.save_quantized(model, tmp_path)
    opened, report = LlamaForCausalLM.from_pretrained(tmp_path, device_map="cpu", output_loading_info=True)
    assert not report["unexpected_keys"] and not report["missing_keys"]
    assert type(opened.model.layers[0].mlp.up_proj) is require("bitsandbytes").nn.Linear4bit
    assert type(opened.lm_head) is nn.Linear
    with pl.disabled(model):
        torch.testing.assert_close(opened.train()(IDS).logits, model(IDS).logits)
    assert torch.equal(opened.model.layers[1].mlp.up_proj.weight, model.model.layers[1].mlp.up_proj.weight)


@needs_bitsandbytes
@pytest.mark.parametrize("double_quant", [True, False])
def test_what_transformers_quantised_is_opened_here(folder, tmp_path, double_quant):
    model = theirs(folder, bnb_4bit_use_double_quant=double_quant).train()
    expected = model(IDS).logits
    model.save_pretrained(tmp_path / "theirs")
    pl.save_quantized(model, tmp_path / "ours")
    for saved in ("theirs", "ours"):
        again = pl.load_quantized(tmp_path / saved)
        torch.testing.assert_close(again(IDS).logits, expected)
        assert isinstance(again.model.layers[0].mlp.up_proj, Linear4bit)
    torch.testing.assert_close(four_bit(double_quant=double_quant)(IDS).logits, expected)


def test_mistakes_of_storing(tmp_path):
    with pytest.raises(pl.PeftLabError, match="is quantised; use its own save_pretrained"):
        pl.save_quantized(whole(), tmp_path / "a")
    with pytest.raises(pl.PeftLabError, match="no transformers config"):
        pl.save_quantized(pl.quantize_model(nn.Sequential(nn.Linear(64, 64))), tmp_path / "a")
    model = pl.attach(four_bit(), pl.LoRAConfig(**LORA))
    pl.merge(model, requantize=True)
    with pytest.raises(pl.PeftLabError, match="saved apart"):
        pl.save_quantized(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    with pytest.raises(pl.PeftLabError, match="lacks config.json or model.safetensors"):
        pl.load_quantized(tmp_path)
    whole().save_pretrained(tmp_path / "float")
    with pytest.raises(pl.PeftLabError, match="no 4-bit model"):
        pl.load_quantized(tmp_path / "float")
    pl.save_quantized(four_bit(), tmp_path / "cut")
    file = tmp_path / "cut" / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-100])
    with pytest.raises(pl.PeftLabError, match="damaged or cut short"):
        pl.load_quantized(tmp_path / "cut")
    file.write_bytes(content)
    fields = json.loads((tmp_path / "cut" / "config.json").read_text())
    (tmp_path / "cut" / "config.json").write_text(json.dumps(fields | {"num_hidden_layers": 1}))
    with pytest.raises((pl.PeftLabError, AttributeError)):
        pl.load_quantized(tmp_path / "cut")


# ------------------------------------------------------------------------------------------- bitsandbytes' layers


def repacking(folder, **settings):
    """A model repacked by one forward pass in eval mode; skips where the processor gives no reason to."""
    model = theirs(folder, **settings).eval()
    layer = model.model.layers[0].mlp.up_proj
    if not getattr(layer, REPACKS, False):
        pytest.skip("this processor has no AVX512-BF16, so bitsandbytes repacks nothing")
    with torch.no_grad():
        model(IDS)
    assert is_repacked(layer.weight)
    return model


@needs_bitsandbytes
@pytest.mark.parametrize("double_quant", [True, False])
def test_unpacking_gives_the_codes_back_and_the_scales_nearly(folder, double_quant):
    fresh = theirs(folder, bnb_4bit_use_double_quant=double_quant)
    model = repacking(folder, bnb_4bit_use_double_quant=double_quant)
    for path, module in model.named_modules():
        if unpack(module):
            found, expected = quantized(module.weight), quantized(fresh.get_submodule(path).weight)
            assert torch.equal(found.packed, expected.packed)
            assert found.state.dtype == expected.state.dtype
            # bf16 keeps eight bits; a second double quantisation adds its own rounding
            torch.testing.assert_close(found.state.scales(), expected.state.scales(), rtol=0.02, atol=1e-4)
    assert not any(unpack(module) for module in model.modules())
    model.train()
    torch.testing.assert_close(model(IDS).logits, fresh.train()(IDS).logits, rtol=0.1, atol=0.05)


@needs_bitsandbytes
def test_an_attached_model_is_not_repacked_and_merges_rightly(folder):
    model = theirs(folder)
    before = snapshot(model)
    pl.attach(model, pl.LoRAConfig(**LORA)).eval()
    expected = model(IDS).logits
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(model(IDS).logits, expected)  # in float32, not in bf16
    assert not any(is_repacked(p) for p in model.parameters())
    pl.detach(model)
    assert_same(before, snapshot(model.train() if before["modules"][0][2] else model.eval()))
    pl.attach(model, pl.LoRAConfig(**LORA)).eval()
    with torch.no_grad():
        expected = model(IDS).logits
        pl.merge(pl.dequantize_model(model), unload=True)
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-5)
    assert model.is_quantized is False if hasattr(model, "is_quantized") else True


@needs_bitsandbytes
def test_attaching_after_the_trap_repairs_and_warns(folder):
    model = repacking(folder)
    with pytest.raises(pl.PeftLabError, match="has repacked this 4-bit weight"):
        pl.dequantize_model(model)
    with pytest.warns(UserWarning, match="had repacked 14 4-bit weights"):
        pl.attach(model, pl.LoRAConfig(**LORA))
    model(IDS, labels=IDS).loss.backward()  # in eval mode still: through every layer
    lowest = model.model.layers[0].self_attn.q_proj.peftlab["default"]["lora"]
    assert lowest.lora_A.grad.abs().sum() > 0
    clean = pl.attach(theirs(folder), pl.LoRAConfig(**LORA), name="default")
    clean.load_state_dict({k: v for k, v in model.state_dict().items() if "peftlab" in k}, strict=False)
    clean(IDS, labels=IDS).loss.backward()
    expected = clean.model.layers[0].self_attn.q_proj.peftlab["default"]["lora"].lora_A.grad
    torch.testing.assert_close(lowest.lora_A.grad, expected, rtol=0.1, atol=1e-3)


@needs_bitsandbytes
@pytest.mark.parametrize("double_quant", [True, False])
def test_merging_into_bitsandbytes_layers(folder, double_quant):
    model = pl.attach(theirs(folder, bnb_4bit_use_double_quant=double_quant), pl.LoRAConfig(**LORA))
    before, expected = snapshot(model), model(IDS).logits
    with pytest.raises(pl.PeftLabError, match="held in four bits"):
        pl.merge(model)
    report = pl.merge(model, requantize=True)
    own = pl.attach(four_bit(double_quant=double_quant), pl.LoRAConfig(**LORA))
    own.load_state_dict({k: v for k, v in model.state_dict().items() if "peftlab" in k}, strict=False)
    assert pl.merge(own, requantize=True).relative_error == pytest.approx(report.relative_error, rel=1e-6)
    torch.testing.assert_close(model(IDS).logits, own(IDS).logits)
    pl.unmerge(model)
    assert_same(before, snapshot(model))
    assert torch.equal(model(IDS).logits, expected)
