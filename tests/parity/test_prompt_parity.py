"""Prompts and prefixes held to Hugging Face peft in float64: counts, outputs, gradients, three steps, generation."""

import warnings

import peft
import pytest
import torch
from pairs import relative, same
from prompt_pairs import METHODS, as_peft_expects, configs, inputs_of, live, model_of, pair, trained

import peftlab as pl

CASES = [(kind, method) for kind in ("llama", "gpt2", "bert", "roberta", "t5") for method in METHODS]


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_same_numbers(kind, method):
    ours, theirs = pair(kind, method)
    assert pl.count_parameters(ours)[:2] == theirs.get_nb_trainable_parameters()
    inputs = inputs_of(kind)
    ours.train(), theirs.train()
    mine, other = optimiser(trained(ours)), optimiser(live(theirs))
    first = ours(**inputs).logits
    for step in range(3):
        found, expected = ours(**inputs), theirs(**inputs)
        assert found.logits.shape == expected.logits.shape
        assert relative(found.logits, expected.logits) < 1e-9
        assert relative(found.loss, expected.loss) < 1e-9
        found.loss.backward()
        expected.loss.backward()
        if step == 0:
            same(gradients(trained(ours)), gradients(live(theirs)))
        for one in (mine, other):
            one.step()
            one.zero_grad()
        same(trained(ours), live(theirs))
    assert relative(ours(**inputs).logits, first) > 1e-4  # three steps changed something, or nothing was compared


def optimiser(parameters):
    return torch.optim.AdamW([parameters[name] for name in sorted(parameters)], lr=0.02, weight_decay=0.1, eps=1e-6)


def gradients(parameters):
    missing = [key for key, parameter in parameters.items() if parameter.grad is None]
    assert not missing, missing
    return {key: parameter.grad for key, parameter in parameters.items()}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["llama-classifier"])
def test_a_decoder_that_classifies(kind, method):
    """Without padding as peft. With padding behind the text, a prompt in peft reads the padding; here a batch must
    say what its rows say alone."""
    ours, theirs = pair(kind, method)
    inputs = inputs_of(kind)
    whole = {"input_ids": inputs["input_ids"].clamp(min=3)}
    assert relative(ours(**whole).logits, theirs(**whole).logits) < 1e-9
    del inputs["labels"]
    together = ours(**inputs).logits
    for row, (ids, mask) in enumerate(zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True)):
        assert relative(together[row], ours(input_ids=ids[mask][None]).logits[0]) < 1e-9
    if method == "prompt":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert relative(theirs(**inputs).logits[0], together[0]) > 0.01


@pytest.mark.parametrize(
    ("kind", "method", "pads", "attention"),
    [  # every method with every padding on every model; each of these three meets both kinds of attention
        (kind, method, pads, ("sdpa", "eager")[(one + two + three) % 2])
        for one, kind in enumerate(("llama", "gpt2"))
        for two, method in enumerate(METHODS)
        for three, pads in enumerate(("left", "right", "none"))
    ],
)
def test_padding_and_attention(kind, method, pads, attention):
    ours, theirs = pair(kind, method)
    ours.set_attn_implementation(attention), theirs.base_model.set_attn_implementation(attention)
    inputs = padded(kind, pads)
    assert relative(ours(**inputs).logits, theirs(**inputs).logits) < 1e-9
    without = {"input_ids": inputs["input_ids"]}
    assert relative(ours(**without).logits, theirs(**without).logits) < 1e-9


def padded(kind, pads):
    inputs = inputs_of(kind, rows=3)
    ids, mask = inputs["input_ids"].clamp(min=3), torch.ones_like(inputs["attention_mask"])
    if pads != "none":
        for row, count in ((0, 2), (2, 3)):
            place = slice(0, count) if pads == "left" else slice(-count, None)
            ids[row, place], mask[row, place] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


WAYS = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "temperature": 0.9, "top_k": 7},
    "no cache": {"use_cache": False},
}


@pytest.mark.parametrize(
    ("kind", "method", "way"),
    [  # every method in every way, on models in turn: each model meets each method and each way
        (("llama", "gpt2", "t5")[(one + two) % 3], method, way)
        for one, method in enumerate(METHODS)
        for two, way in enumerate(WAYS)
    ],
)
def test_generation(kind, method, way):
    ours, theirs = pair(kind, method)
    inputs = {**padded(kind, "left"), **WAYS[way], "max_new_tokens": 7, "pad_token_id": 0}
    torch.manual_seed(1)
    found = ours.generate(**inputs)
    torch.manual_seed(1)
    if way == "no cache" and method.startswith("prefix"):
        # peft hands its own cache to the loop, which then reads the text twice; ours must be what a cache gives
        expected = ours.generate(**{**inputs, "use_cache": True})
    else:
        expected = theirs.generate(**inputs)
    assert torch.equal(found, expected)
    with pl.disabled(ours):
        torch.manual_seed(1)
        assert not torch.equal(ours.generate(**inputs), found)  # the prompt matters


@pytest.mark.parametrize("method", METHODS)
def test_half_precision_base(method):
    ours, theirs = (model_of("llama", dtype=torch.bfloat16) for _ in range(2))
    mine, other = configs("llama", method)
    pl.attach(ours, mine)
    theirs = peft.get_peft_model(as_peft_expects(theirs), other).eval()
    state = live(theirs)
    with torch.no_grad():
        for name, parameter in trained(ours).items():
            assert parameter.dtype == torch.float32
            parameter.copy_(state[name])
    inputs = inputs_of("llama")
    found, expected = ours(**inputs), theirs(**inputs)
    assert found.logits.dtype == torch.bfloat16
    assert torch.equal(found.logits, expected.logits)
    found.loss.backward()
    expected.loss.backward()
    same(gradients(trained(ours)), gradients(live(theirs)), 1e-6)


def test_without_a_prompt_the_base_answers():
    ours, theirs = pair("llama", "prefix")
    inputs = inputs_of("llama")
    with pl.disabled(ours), theirs.disable_adapter():
        assert relative(ours(**inputs).logits, theirs(**inputs).logits) < 1e-12
    expected = model_of("llama")(**inputs).logits
    assert torch.equal(pl.detach(ours)(**inputs).logits, expected)
