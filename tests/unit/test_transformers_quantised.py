"""Adapters on a base that bitsandbytes holds in 4 bits: forward, gradients, counts, Trainer, saving."""

import copy

import pytest
import torch
from nets import assert_same, snapshot
from tiny import checkpointing_arguments, examples, llama
from transformers import BitsAndBytesConfig, LlamaForCausalLM, Trainer, TrainingArguments

import peftlab as pl

bnb = pytest.importorskip("bitsandbytes")
peft = pytest.importorskip("peft")

SHAPE = dict(hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2, layers=2)
IDS = torch.tensor([[3, 4, 5, 6, 7], [8, 9, 10, 11, 12]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    llama(**SHAPE).save_pretrained(folder)
    return folder


def four_bit(folder, **settings):
    """The base as a user gets it: from_pretrained with a BitsAndBytesConfig. (In train mode: see facts on CPUs.)"""
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_use_double_quant=True,
    )  # fmt: skip
    return LlamaForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu", **settings).train()


def config(**settings):
    return pl.LoRAConfig(**{"r": 4, "alpha": 10, "target_modules": "all-linear", "init": "random", **settings})


def test_forward_and_gradient_are_pefts(folder):
    model = four_bit(folder)
    assert isinstance(model.model.layers[0].mlp.up_proj, bnb.nn.Linear4bit)
    twin = four_bit(folder)
    pl.attach(model, config())
    theirs = peft.get_peft_model(
        twin, peft.LoraConfig(r=4, lora_alpha=10, target_modules="all-linear", init_lora_weights=False)
    )
    mine = dict(model.named_parameters())
    pairs = []
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad:
                path, _, rest = name.removeprefix("base_model.model.").partition(".lora_")
                pairs.append((mine[f"{path}.peftlab.default.lora.lora_{rest[0]}"], parameter))
                parameter.copy_(pairs[-1][0])
    assert len(pairs) == 28 and {parameter.dtype for parameter, _ in pairs} == {torch.float32}
    assert pl.count_parameters(model)[:2] == theirs.get_nb_trainable_parameters()

    found, expected = model(IDS, labels=IDS), theirs(IDS, labels=IDS)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-6)
    found.loss.backward(), expected.loss.backward()
    for ours, other in pairs:
        torch.testing.assert_close(ours.grad, other.grad, rtol=1e-4, atol=1e-7)


def test_count_is_logical(folder):
    full, model = llama(**SHAPE), four_bit(folder)
    assert pl.count_parameters(model).total == sum(parameter.numel() for parameter in full.parameters())


def test_detach_and_refusals(folder):
    model = four_bit(folder)
    before = snapshot(model)
    pl.attach(model, config())
    attached = snapshot(model)
    with pytest.raises(pl.PeftLabError, match="held in four bits.*dequantize_model.*requantize=True"):
        pl.merge(model)
    with pytest.raises(pl.PeftLabError, match="quantised and cannot train"):
        pl.attach(model, config(target_modules=["q_proj"], modules_to_save=["mlp"]), name="b")
    assert_same(attached, snapshot(model))
    assert model.is_quantized is False  # so that Trainer takes it
    pl.detach(model)
    assert model.is_quantized is True
    assert_same(before, snapshot(model))


def test_adapter_folders_from_and_to_a_4_bit_base(folder, tmp_path):
    model = four_bit(folder)
    pl.attach(model, config())
    expected = model(IDS).logits
    pl.save_adapter(model, tmp_path)
    torch.testing.assert_close(pl.load_adapter(four_bit(folder), tmp_path)(IDS).logits, expected)
    opened = peft.PeftModel.from_pretrained(four_bit(folder), tmp_path)
    torch.testing.assert_close(opened.train()(IDS).logits, expected, rtol=1e-5, atol=1e-6)
    whole = LlamaForCausalLM.from_pretrained(folder)
    pl.load_adapter(whole, tmp_path)  # the adapter does not mind how the base is stored


def test_the_base_is_saved_without_adapters_and_reloads_bit_for_bit(folder, tmp_path):
    model = four_bit(folder)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    pl.attach(model, config())
    model.save_pretrained(tmp_path)
    again, report = LlamaForCausalLM.from_pretrained(tmp_path, device_map="cpu", output_loading_info=True)
    assert not report["unexpected_keys"] and not report["missing_keys"]
    assert isinstance(again.model.layers[0].mlp.up_proj, bnb.nn.Linear4bit)
    found = again.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_trainer_trains_it(folder, tmp_path, checkpointing):
    model = four_bit(folder)
    data = [row for row in examples(8) if len(row["input_ids"]) > 4]
    data = [{name: value[:5] for name, value in row.items()} for row in data]
    settings = {}
    if checkpointing is not None:
        settings = checkpointing_arguments(checkpointing)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to=[], disable_tqdm=True,
        use_cpu=True, save_steps=2, learning_rate=0.01, logging_strategy="no", **settings,
    )  # fmt: skip
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(model=model, args=arguments, train_dataset=data)
    pl.attach(model, config(init="kaiming"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    Trainer(model=model, args=arguments, train_dataset=data).train()
    after = model.state_dict()
    for name, value in before.items():
        moved = not torch.equal(value, after[name])
        assert moved == ("peftlab" in name), name


def test_a_copy_is_independent_and_float_keeps_the_codes(folder):
    model = four_bit(folder)
    pl.attach(model, config())
    expected = model(IDS).logits
    twin = copy.deepcopy(model)
    pl.detach(twin)
    torch.testing.assert_close(model(IDS).logits, expected)
    model.float()  # transformers would refuse this on a quantised model; bitsandbytes keeps its codes
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8
    torch.testing.assert_close(model(IDS).logits, expected)


def test_eight_bit_layers_take_adapters():
    from torch import nn

    model = nn.Sequential(bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False)).to("cpu")
    pl.attach(model, pl.LoRAConfig(r=2, target_modules=["0"]))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
