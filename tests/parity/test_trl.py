"""What the chapter on training recipes says of TRL, and DPO's loss against TRL's. TRL is no package of the book: this
runs where it is installed."""

import re
from pathlib import Path

import nbformat
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import peftlab as pl
from peftlab.training.preferences import answer_log_probability, dpo_loss

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

CHAPTER = Path(__file__).resolve().parents[2] / "book" / "09_training_recipes.ipynb"
QUIET = {"report_to": "none", "use_cpu": True, "bf16": False, "save_strategy": "no", "logging_steps": 1}


@pytest.fixture(scope="module")
def tokenizer():
    return pl.load_model("smollm2-135m")[1]


def tiny_model(tokenizer):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    ))  # fmt: skip


def blocks() -> list[str]:
    """The chapter's code that is shown as text and names TRL."""
    prose = [cell.source for cell in nbformat.read(CHAPTER, 4).cells if cell.cell_type == "markdown"]
    return [code for text in prose for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "SFT" in code]


def rows():
    desk = pl.load_data("support-desk")["train"].select(range(6))
    return [{"prompt": row["prompt"], "completion": [{"role": "assistant", "content": row["ticket"]}]} for row in desk]


def test_the_call_of_the_chapter_trains_an_attached_model(tokenizer, tmp_path):
    (code,) = [block for block in blocks() if "SFTConfig" in block]
    model = tiny_model(tokenizer)
    config = pl.LoRAConfig(r=8, alpha=16, target_modules=["q_proj", "v_proj"])
    names = {"pl": pl, "model": model, "config": config, "tokenizer": tokenizer, "folder": str(tmp_path),
             "desk_rows": datasets.Dataset.from_list(rows())}  # fmt: skip
    exec(code.replace('report_to="none"', 'report_to="none", use_cpu=True, save_strategy="no"'), names)
    trained = [p for name, p in model.named_parameters() if "lora_B" in name]
    assert trained and all(p.abs().max() > 0 for p in trained)
    batch = next(iter(names["trainer"].get_train_dataloader()))
    learned = tokenizer.decode([label for label in batch["labels"][0].tolist() if label != -100])
    assert learned.startswith("{") and learned.endswith("<|im_end|>\n"), "the ticket, its end, and one line break"


@pytest.mark.parametrize("name, value", [("tokenizer", None), ("dataset_text_field", "text"), ("max_seq_length", 512)])
def test_the_call_in_circulation_fails_as_the_chapter_says(name, value, tokenizer):
    (code,) = [block for block in blocks() if "TypeError" in block]
    with pytest.raises(TypeError) as raised:
        trl.SFTTrainer(tiny_model(tokenizer), train_dataset=None, **{name: value})
    said = str(raised.value)
    assert said.removeprefix("SFTTrainer.__init__() ") in code and said.startswith("SFTTrainer.__init__()")


class Reference(torch.nn.Module):
    """The base as a reference for TRL, as the page on other tools has it."""

    def __init__(self, model):
        super().__init__()
        self.config = model.config
        self.__dict__["model"] = model

    def __call__(self, *args, **kwargs):
        with pl.disabled(self.model):
            return self.model(*args, **kwargs)


@pytest.mark.parametrize("beta", [0.1, 0.6])
def test_the_loss_and_the_margin_are_those_of_trl(beta, tokenizer, tmp_path):
    model = tiny_model(tokenizer)
    pl.attach(model, pl.LoRAConfig(r=4, init="random", target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():  # as after some training
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(0.5 * torch.randn_like(parameter))
    pairs = [
        {
            "prompt": row["prompt"],
            "chosen": row["completion"],
            "rejected": [{"role": "assistant", "content": "Of course, I am happy to help."}],
        }
        for row in rows()[:3]
    ]
    arguments = trl.DPOConfig(str(tmp_path), beta=beta, per_device_train_batch_size=3, max_steps=1, **QUIET)
    trainer = trl.DPOTrainer(
        model,
        ref_model=Reference(model),
        args=arguments,
        processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_list(pairs),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    theirs = trainer.compute_loss(model.eval(), dict(batch)).item()
    margin = trainer._metrics["eval"]["rewards/margins"] or trainer._metrics["train"]["rewards/margins"]

    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    ours = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}
    with torch.no_grad():
        policy = answer_log_probability(model, ours).chunk(2)
        with pl.disabled(model):
            reference = answer_log_probability(model, ours).chunk(2)
    losses, margins = dpo_loss(*policy, *reference, beta=beta)
    assert margins.abs().max() > 0.01, "otherwise the test sees nothing"
    assert losses.mean().item() == pytest.approx(theirs, rel=1e-4)
    assert margins.mean().item() == pytest.approx(margin[-1], rel=1e-3)
