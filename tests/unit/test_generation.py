"""Batched greedy generation equals one prompt at a time, and leaves everything as it was."""

import copy
import warnings

import pytest
import tiny
import torch

from peftlab.errors import PeftLabError
from peftlab.training.encoding import Collator, encode_completion
from peftlab.training.generation import generate_text
from peftlab.training.losses import causal_lm_loss

PROMPTS = ["the cat runs ?", "no", "red green blue the dog sleeps . the cat ?", "a dog ?", "yes yes yes"]


@pytest.mark.parametrize("chat", [False, True])
def test_batches_equal_one_at_a_time(chat):
    tokenizer, model = tiny.tokenizer(chat), tiny.llama(seed=1, vocab_size=18, initializer_range=1.0).double()
    alone = [generate_text(model, tokenizer, prompt, 12)[0] for prompt in PROMPTS]
    assert generate_text(model, tokenizer, PROMPTS, 12) == alone
    assert generate_text(model, tokenizer, PROMPTS, 12, batch_size=2) == alone, "sorted by length and put back"
    assert len(set(alone)) == len(alone), "prompts that all get one answer would prove nothing"


def test_nothing_is_left_changed_and_nothing_is_said(capfd):
    tokenizer, model = tiny.tokenizer(), tiny.llama(vocab_size=18)
    model.generation_config.update(do_sample=True, temperature=0.3, top_p=0.5, max_length=7)
    model.model.layers[0].eval()  # a mixed mode must come back mixed
    modes = [module.training for module in model.modules()]
    config, side = copy.deepcopy(model.generation_config), tokenizer.padding_side
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = generate_text(model, tokenizer, PROMPTS, 12)
    assert first == generate_text(model, tokenizer, PROMPTS, 12), "greedy, whatever the model's own settings"
    assert [module.training for module in model.modules()] == modes
    assert model.generation_config.to_dict() == config.to_dict()
    assert tokenizer.padding_side == side
    assert capfd.readouterr() == ("", "")


def test_a_trained_model_stops_at_the_end_token():
    tokenizer, model = tiny.tokenizer(), tiny.llama(vocab_size=18)
    pairs = [("the cat ?", "yes ."), ("a dog ?", "no no .")]
    batch = Collator(tokenizer)([encode_completion(tokenizer, *pair) for pair in pairs])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(60):
        total, count = causal_lm_loss(model, batch)
        optimizer.zero_grad()
        (total / count).backward()
        optimizer.step()
    assert generate_text(model, tokenizer, [prompt for prompt, _ in pairs], 30) == ["yes.", "nono."]
    assert generate_text(model, tokenizer, "a dog ?", 1) == ["no"]
    assert generate_text(model, tokenizer, []) == []


def test_refuses_what_cannot_generate():
    with pytest.raises(PeftLabError, match=r"Linear has no generate\(\)"):
        generate_text(torch.nn.Linear(2, 2), tiny.tokenizer(), ["no"])
    with pytest.raises(PeftLabError, match="max_new_tokens must be a positive whole number"):
        generate_text(tiny.llama(), tiny.tokenizer(), ["no"], max_new_tokens=0)


@pytest.mark.slow
def test_the_real_model_answers_in_batches_as_it_does_one_at_a_time():
    """float32, prompts of very different lengths: padding on the left changes no word."""
    import peftlab as pl

    model, tokenizer = pl.load_model("smollm2-135m")
    prompts = [
        "What is the capital of France?",
        "2 + 2 =",
        "Name three colours, separated by commas, and say why you like each of them.",
        "Write one sentence about the sea.",
    ]
    alone = [generate_text(model, tokenizer, prompt, 16)[0] for prompt in prompts]
    assert generate_text(model, tokenizer, prompts, 16) == alone
    assert generate_text(model, tokenizer, prompts, 16, batch_size=3) == alone
    assert alone[0] == "The capital of France is Paris.", "and it stops there"
