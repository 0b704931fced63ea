"""What is learned and what is not, token by token."""

import pytest
import tiny
import torch

from peftlab.errors import PeftLabError
from peftlab.training.encoding import (
    IGNORE,
    Collator,
    encode_classification,
    encode_completion,
    encode_text,
    end_ids,
    prompt_ids,
)


@pytest.mark.parametrize("chat", [False, True])
def test_only_the_answer_and_its_end_are_labelled(chat):
    tokenizer = tiny.tokenizer(chat)
    example = encode_completion(tokenizer, "the cat runs ?", "yes .")
    learned = [token for token in example["labels"] if token != IGNORE]
    assert tokenizer.convert_ids_to_tokens(learned) == ["yes", ".", "<|end|>"]
    assert example["input_ids"][: -len(learned)] == prompt_ids(tokenizer, "the cat runs ?")
    assert example["labels"][: -len(learned)] == [IGNORE] * (len(example["input_ids"]) - len(learned))


def test_chat_prompts_open_the_assistants_turn():
    tokenizer = tiny.tokenizer(chat=True)
    words = tokenizer.convert_ids_to_tokens(prompt_ids(tokenizer, "red ?"))
    assert words == ["<|start|>", "user", "red", "?", "<|end|>", "<|start|>", "assistant"]
    conversation = [{"role": "user", "content": "red"}, {"role": "assistant", "content": "no"}]
    assert len(prompt_ids(tokenizer, conversation)) == 10


def test_end_of_text_is_learned_and_padding_never_when_both_are_one_token():
    """Padding with the end token is harmless only if the mask is not made from its id."""
    tokenizer = tiny.tokenizer()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    rows = [encode_completion(tokenizer, "red ?", "yes"), encode_completion(tokenizer, "the red dog ?", "no no no")]
    batch = Collator(tokenizer)(rows)
    end = tokenizer.eos_token_id
    assert batch["input_ids"][0].tolist().count(end) == 5, "one real end and four paddings"
    assert batch["labels"][0].tolist().count(end) == 1, "the real end alone is learned"
    assert batch["labels"][0][batch["attention_mask"][0] == 0].eq(IGNORE).all()
    assert batch["attention_mask"].sum(1).tolist() == [4, 8]


def test_end_ids_of_a_chat_are_the_turns_and_the_texts():
    tokenizer = tiny.tokenizer(chat=True)
    tokenizer.eos_token = "<|unk|>"  # as in models whose turns end otherwise than their texts
    assert tokenizer.convert_ids_to_tokens(end_ids(tokenizer)) == ["<|end|>", "<|unk|>"]
    tokenizer.chat_template = None
    tokenizer.eos_token = None
    with pytest.raises(PeftLabError, match="no end token"):
        end_ids(tokenizer)


def test_max_length_cuts_the_prompt_from_its_beginning_and_never_the_answer():
    tokenizer = tiny.tokenizer()
    whole = encode_completion(tokenizer, "the cat the dog ?", "yes no")
    cut = encode_completion(tokenizer, "the cat the dog ?", "yes no", max_length=5)
    assert cut["input_ids"] == whole["input_ids"][-5:]
    assert cut["labels"] == whole["labels"][-5:]
    with pytest.raises(PeftLabError, match="Raise max_length to 4"):
        encode_completion(tokenizer, "the cat", "yes no", max_length=3)


def test_text_ends_unless_it_is_cut():
    tokenizer = tiny.tokenizer()
    whole = encode_text(tokenizer, "the cat sleeps")
    assert whole["input_ids"][-1] == tokenizer.eos_token_id and len(whole["input_ids"]) == 4
    assert whole["labels"] == whole["input_ids"]
    assert encode_text(tokenizer, "the cat sleeps", max_length=3)["input_ids"] == whole["input_ids"][:3]
    assert encode_text(tokenizer, "the cat sleeps", end=False)["input_ids"] == whole["input_ids"][:3]


def test_classification_has_one_label_an_example():
    tokenizer = tiny.tokenizer()
    rows = [encode_classification(tokenizer, text, label) for text, label in [("the cat runs", 1), ("no", 0)]]
    batch = Collator(tokenizer)(rows)
    assert batch["labels"].tolist() == [1, 0] and batch["labels"].dtype == torch.int64
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert len(encode_classification(tokenizer, "the cat runs", 1, max_length=2)["input_ids"]) == 2


def test_collator_pads_left_and_to_multiples():
    rows = [{"input_ids": [5, 6, 7]}, {"input_ids": [8]}]
    batch = Collator(tiny.tokenizer(), side="left", multiple_of=4)(rows)
    assert batch["input_ids"].tolist() == [[0, 5, 6, 7], [0, 0, 0, 8]]
    assert batch["attention_mask"].tolist() == [[0, 1, 1, 1], [0, 0, 0, 1]]


def test_collator_needs_no_padding_token():
    batch = Collator(tiny.tokenizer(pad=False))([{"input_ids": [5, 6]}, {"input_ids": [7]}])
    assert batch["input_ids"].tolist() == [[5, 6], [7, 0]]


@pytest.mark.parametrize(
    ("rows", "message"),
    [([], "at least one example"), ([{"input_ids": [1]}, {"input_ids": [1], "labels": [1]}], "differ in their fields")],
)
def test_collator_refuses(rows, message):
    with pytest.raises(PeftLabError, match=message):
        Collator()(rows)
    with pytest.raises(PeftLabError, match="'left', 'right'"):
        Collator(side="middle")
