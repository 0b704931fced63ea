"""The real model: smollm2-135m in float32, forward and gradient within 1e-5 of Hugging Face peft."""

import copy

import pytest
import torch
from pairs import give, gradients, live, our_state, peft_model, relative
from transformers import AutoTokenizer

import peftlab as pl
from peftlab.assets.fetch import ensure

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.slow
@pytest.mark.parametrize("settings", [
    dict(r=8, alpha=20, target_modules=TARGETS),
    dict(r=4, alpha=10, use_rslora=True, target_modules=["q_proj", "v_proj", "embed_tokens"]),
])  # fmt: skip
def test_forward_and_gradient(settings):
    model, tokenizer = pl.load_model("smollm2-135m")
    inputs = tokenizer("The capital of France is Paris, and the capital of Italy is Rome.", return_tensors="pt")
    inputs["labels"] = inputs["input_ids"]
    theirs = peft_model(copy.deepcopy(model), **settings)
    pl.attach(model, pl.LoRAConfig(**settings))
    assert pl.count_parameters(model)[:2] == theirs.get_nb_trainable_parameters()
    give(theirs, model, scramble=False)
    mine, other = our_state(model), live(theirs)
    with torch.no_grad():  # updates of a size that training makes, so that errors would show
        for key, parameter in mine.items():
            parameter.copy_(torch.randn(parameter.shape) * 0.02)
            other[key].copy_(parameter)
    found, expected = model(**inputs), theirs(**inputs)
    assert relative(found.logits, expected.logits) < 1e-5
    found.loss.backward()
    expected.loss.backward()
    mine, other = gradients(mine), gradients(other)
    for key in mine:
        assert relative(mine[key], other[key]) < 1e-5, key


def test_a_conversation_is_what_the_real_template_writes_and_its_answers_are_learned():
    tokenizer = AutoTokenizer.from_pretrained(ensure("smollm2-135m"))
    chat = [
        {"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "It is 4.\n"},
        {"role": "user", "content": "Danke"}, {"role": "assistant", "content": "Bitte sch\u00f6n \U0001f642"},
    ]  # fmt: skip
    example = pl.encode_chat(tokenizer, chat)
    assert example["input_ids"] == tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True)["input_ids"]
    learned = [label for label in example["labels"] if label != -100]
    assert tokenizer.decode(learned) == "It is 4.\n<|im_end|>Bitte sch\u00f6n \U0001f642<|im_end|>"
    one, other = pl.encode_chat(tokenizer, chat[:2]), pl.encode_completion(tokenizer, "What is 2 + 2?", "It is 4.\n")
    assert one["input_ids"][:-1] == other["input_ids"] and one["labels"][:-1] == other["labels"]  # but for a last blank
    with pytest.raises(pl.PeftLabError, match="begins before it.*Take the blanks off"):
        pl.encode_chat(tokenizer, [chat[0], {"role": "assistant", "content": "\n\nIt is 4."}])
