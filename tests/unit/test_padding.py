"""Padding: a classifier that searches for it, ids that a model does not have, the left side, and prompts in front."""

import functools
import warnings

import pytest
import tiny
import torch
import transformers as tf

import peftlab as pl
from peftlab.errors import PeftLabError
from peftlab.training import metrics
from peftlab.training.encoding import Collator

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
SEARCHING = [
    ("LlamaForSequenceClassification", SMALL),
    ("GPT2ForSequenceClassification", GPT2),
    ("Qwen2ForSequenceClassification", {**SMALL, "num_key_value_heads": 2}),
    ("OPTForSequenceClassification", {**SMALL, "ffn_dim": 32, "word_embed_proj_dim": 32}),
    ("BloomForSequenceClassification", {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
]
CONFIGS = {
    "none": None,
    "lora": pl.LoRAConfig(task_type="SEQ_CLS", init="random", target_modules="all-linear"),
    "prompt": pl.PromptTuningConfig(num_virtual_tokens=4, task_type="SEQ_CLS"),
    "p-tuning": pl.PTuningConfig(num_virtual_tokens=4, task_type="SEQ_CLS"),
    "prefix": pl.PrefixTuningConfig(num_virtual_tokens=4, task_type="SEQ_CLS"),
}


class Tokenizer:
    """All of a tokenizer that a collator asks for."""

    def __init__(self, pad, end=2):
        self.pad_token_id, self.eos_token_id = pad, end


def model(name, config, method="none", **settings):
    torch.manual_seed(0)
    kind = getattr(tf, name)
    made = kind(kind.config_class(**{**config, **settings}))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    if CONFIGS[method] is not None:
        pl.attach(made, CONFIGS[method])
    return made.eval()


def rows(lengths=(3, 9, 5, 2), labels=3):
    draw = torch.Generator().manual_seed(0)
    return [
        {"input_ids": torch.randint(8, 60, (length,), generator=draw).tolist(), "labels": place % labels}
        for place, length in enumerate(lengths)
    ]


def alone(made, examples):
    """Each text's loss by itself, without any padding."""
    return sum(metrics.mean_loss(made, [row], Collator(Tokenizer(3))) for row in examples) / len(examples)


@pytest.mark.parametrize(("name", "config"), SEARCHING, ids=[name for name, _ in SEARCHING])
@pytest.mark.parametrize("side", ["right", "left"])
def test_a_classifier_reads_the_last_token_whatever_the_tokenizer_pads_with(name, config, side):
    """Its config looks for 3 and the tokenizer pads with 7: the last token would be a padding one."""
    made, examples = model(name, config, num_labels=3, pad_token_id=3), rows()
    with pytest.warns(UserWarning, match="padded with 7.*config.pad_token_id=3"):
        loss = metrics.mean_loss(made, examples, Collator(Tokenizer(7), side=side), batch_size=4)
    assert loss == pytest.approx(alone(made, examples), abs=1e-6)
    assert made.config.pad_token_id == 3, "nothing is set behind the user's back"
    with pytest.warns(UserWarning, match="padded with 7"):
        found = metrics.predict_labels(made, examples, Tokenizer(7))
    assert found == [metrics.predict_labels(made, [row])[0] for row in examples]


@pytest.mark.parametrize("method", ["lora", "prompt", "p-tuning", "prefix"])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(("name", "config"), SEARCHING[:2], ids=["llama", "gpt2"])
def test_the_same_under_an_adapter(name, config, method, side):
    made, examples = model(name, config, method, num_labels=3, pad_token_id=3), rows()
    with pytest.warns(UserWarning, match="padded with 7"):
        loss = metrics.mean_loss(made, examples, Collator(Tokenizer(7), side=side), batch_size=4)
    assert loss == pytest.approx(alone(made, examples), abs=1e-6)


@pytest.mark.parametrize("pad", [None, -1, 64])
@pytest.mark.parametrize(("name", "config"), SEARCHING[:2], ids=["llama", "gpt2"])
def test_a_classifier_without_a_padding_id_is_refused_with_the_id_to_set(name, config, pad):
    made = model(name, config, num_labels=3)
    made.config.pad_token_id = pad
    for call in (
        lambda: pl.train(made, rows(), tokenizer=Tokenizer(7), steps=1, batch_size=2, progress=False),
        lambda: metrics.predict_labels(made, rows(), Tokenizer(7)),
        lambda: metrics.mean_loss(made, rows()[:1], Collator(Tokenizer(7), multiple_of=8)),
    ):
        with pytest.raises(PeftLabError, match=f"{name} finds the end.* is {pad}, .*pad_token_id = 7, which the tok"):
            call()
    assert made.config.pad_token_id == pad
    pl.train(made, rows(), tokenizer=Tokenizer(7), steps=2, batch_size=1, progress=False)  # nothing to search for


def test_a_text_that_ends_in_the_configs_padding_id_is_told():
    made, examples = model("LlamaForSequenceClassification", SMALL, num_labels=3, pad_token_id=3), rows()
    examples[1]["input_ids"][-1] = 3
    with pytest.warns(UserWarning, match="ends in the token 3, which is config.pad_token_id"):
        metrics.mean_loss(made, examples[:2], Collator(Tokenizer(7)))
    with warnings.catch_warnings():  # texts that end in the end token, which is padded with too: as people do it
        warnings.simplefilter("error")
        metrics.mean_loss(made, examples[:2], Collator(Tokenizer(3)))


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "RobertaForSequenceClassification"])
def test_encoders_need_no_padding_id_and_say_nothing(name):
    made, examples = model(name, {**SMALL, "max_position_embeddings": 32}, num_labels=3), rows()
    made.config.pad_token_id = None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss = metrics.mean_loss(made, examples, Collator(Tokenizer(7)), batch_size=4)
    assert loss == pytest.approx(alone(made, examples), abs=1e-6)


@pytest.mark.parametrize("pad", [64, 100_000])
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "BertForSequenceClassification", "T5ForConditionalGeneration"])
def test_a_padding_token_that_was_added_to_the_tokenizer_alone(name, pad):
    """`add_special_tokens({"pad_token": "[PAD]"})` without resizing: an id without an embedding, hidden by the mask."""
    t5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 4, "pad_token_id": 0}
    made = model(name, {**t5, "decoder_start_token_id": 0} if name[0] == "T" else SMALL)
    examples = rows(labels=2)
    if name[0] != "B":
        examples = [{**row, "labels": row["input_ids"][:1] if name[0] == "T" else row["input_ids"]} for row in examples]
    loss = metrics.mean_loss(made, examples, Collator(Tokenizer(pad)), batch_size=4)
    assert loss == pytest.approx(metrics.mean_loss(made, examples, Collator(Tokenizer(0)), batch_size=4), abs=1e-6)
    pl.train(made, examples, tokenizer=Tokenizer(pad), steps=1, progress=False)


@pytest.mark.parametrize("method", ["none", "lora", "prompt", "p-tuning", "prefix"])
@pytest.mark.parametrize(
    ("name", "config"), [("LlamaForCausalLM", SMALL), ("GPT2LMHeadModel", GPT2)], ids=["rotary", "learned"]
)
def test_padding_on_the_left_changes_nothing(name, config, method):
    """Positions count padding, under a prompt too, so left padding would move each text away from its prompt."""
    made = model(name, config)
    if CONFIGS[method] is not None:
        settings = {field: value for field, value in vars(CONFIGS[method]).items() if field != "task_type"}
        pl.attach(made, type(CONFIGS[method])(**settings))
    made.double().eval()
    examples = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in rows()]
    right, left = (
        metrics.mean_loss(made, examples, Collator(Tokenizer(7), side=side), batch_size=4) for side in ("right", "left")
    )
    assert left == pytest.approx(right, rel=1e-9)


@pytest.mark.parametrize("own", [False, True])
def test_a_left_padded_collate_trains_as_a_right_padded_one(own):
    results = []
    for side in ("right", "left"):
        made = tiny.llama(vocab_size=64).double()
        pl.attach(made, pl.PromptTuningConfig(num_virtual_tokens=2))
        examples = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in rows()]
        ours = Collator(Tokenizer(7), side=side)
        collate = functools.partial(Collator.__call__, ours) if own else ours
        results.append(
            pl.train(made, examples, steps=4, batch_size=4, collate=collate, learning_rate=0.1, progress=False)
        )
    assert [row["loss"] for row in results[0].steps] == [row["loss"] for row in results[1].steps]


def test_answers_in_batches_whatever_the_two_padding_ids():
    tokenizer, made = (
        tiny.tokenizer(),
        tiny.llama(seed=1, vocab_size=18, initializer_range=1.0, pad_token_id=5).double(),
    )
    pl.attach(made, pl.PromptTuningConfig(num_virtual_tokens=3))
    prompts = ["the cat runs ?", "no", "red green blue the dog sleeps . the cat ?"]
    alone = [pl.generate_text(made, tokenizer, prompt, 8, progress=False)[0] for prompt in prompts]
    assert pl.generate_text(made, tokenizer, prompts, 8, progress=False) == alone and len(set(alone)) > 1
