"""Folders of default configs open in Hugging Face's `AutoPeftModel...`: the task is told from the model's class."""

import json

import peft
import pytest
import torch
import transformers

import peftlab as pl

SMALL = dict(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
CONFIGS = {
    "llama": transformers.LlamaConfig(**SMALL, num_key_value_heads=1),
    "gpt2": transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32),
    "bert": transformers.BertConfig(**SMALL),
    "t5": transformers.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2),
}
KINDS = {
    "llama": ("llama", transformers.LlamaForCausalLM, peft.AutoPeftModelForCausalLM, "CAUSAL_LM"),
    "gpt2": ("gpt2", transformers.GPT2LMHeadModel, peft.AutoPeftModelForCausalLM, "CAUSAL_LM"),
    "t5": ("t5", transformers.T5ForConditionalGeneration, peft.AutoPeftModelForSeq2SeqLM, "SEQ_2_SEQ_LM"),
    "encoder": ("bert", transformers.BertModel, peft.AutoPeftModelForFeatureExtraction, "FEATURE_EXTRACTION"),
}


class OfAPerson(transformers.LlamaForCausalLM):
    """A class of one's own that stands on one of transformers'."""


def made(kind, folder):
    """A small model with a base that lies in a folder, as one that was loaded has."""
    config, model_class, *_ = KINDS[kind]
    torch.manual_seed(0)
    model_class(CONFIGS[config]).save_pretrained(folder)
    return model_class.from_pretrained(folder).eval()


def trained(model, config):
    pl.attach(model, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    return model.eval()


def output(model, kind):
    ids = torch.arange(12).view(2, 6)
    more = {"decoder_input_ids": ids} if kind == "t5" else {}
    with torch.no_grad():
        return model(input_ids=ids, **more)[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "config", [pl.LoRAConfig(r=2, alpha=5), pl.IA3Config(), pl.LoRAConfig(r=3, alpha=1, target_modules="all-linear")]
)
def test_a_default_folder_opens_in_the_class_for_its_task(kind, config, tmp_path):
    model = trained(made(kind, tmp_path / "base"), config)
    pl.save_adapter(model, tmp_path / "adapter")
    _, _, auto, task = KINDS[kind]
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["task_type"] == task
    opened = auto.from_pretrained(tmp_path / "adapter").eval()
    assert torch.allclose(output(opened, kind), output(model, kind), atol=1e-5)
    again = pl.load_adapter(made(kind, tmp_path / "base"), tmp_path / "adapter")
    assert torch.allclose(output(again, kind), output(model, kind), atol=1e-6)


def test_a_class_of_ones_own_counts_as_what_it_stands_on(tmp_path):
    model = OfAPerson(CONFIGS["llama"])
    pl.attach(model, pl.LoRAConfig(r=2))
    pl.save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"


@pytest.mark.parametrize(
    ("model_class", "settings", "task"),
    [
        (transformers.BertForSequenceClassification, {}, None),  # its head is not in the folder
        (transformers.BertForSequenceClassification, {"modules_to_save": ["classifier"]}, "SEQ_CLS"),
        (transformers.BertForSequenceClassification, {"modules_to_save": ["LayerNorm"]}, None),
        (transformers.BertForTokenClassification, {"modules_to_save": ["classifier"]}, "TOKEN_CLS"),
        (transformers.BertForMaskedLM, {}, None),  # peft has no class for it
    ],
)
def test_a_head_is_only_promised_when_it_is_saved(model_class, settings, task, tmp_path):
    torch.manual_seed(0)
    model_class(CONFIGS["bert"]).save_pretrained(tmp_path / "base")
    model = trained(model_class.from_pretrained(tmp_path / "base"), pl.LoRAConfig(r=2, **settings))
    pl.save_adapter(model, tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["task_type"] == task
    opened = peft.PeftModel.from_pretrained(model_class.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    assert torch.allclose(output(opened.eval(), "bert"), output(model, "bert"), atol=1e-5)
    pl.load_adapter(model_class.from_pretrained(tmp_path / "base"), tmp_path / "adapter")


def test_a_task_that_the_person_named_stays(tmp_path):
    model = transformers.LlamaForCausalLM(CONFIGS["llama"])
    pl.attach(model, pl.LoRAConfig(r=2, task_type="FEATURE_EXTRACTION"))
    pl.save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] == "FEATURE_EXTRACTION"
