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
from peftlab.training.generation import generate_text


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


def test_a_text_gets_one_end_token_whether_or_not_the_tokenizer_writes_one():
    writes, writes_none = TargetTokenizer(), tiny.tokenizer()
    for end in (True, False):
        assert encode_text(writes, "the cat", end=end) == encode_text(writes_none, "the cat", end=end)
    assert encode_text(writes, "the cat")["input_ids"].count(0) == 1
    assert encode_text(writes_none, "")["input_ids"] == encode_text(writes, "")["input_ids"] == [0]
    assert encode_text(writes_none, "", end=False)["input_ids"] == encode_text(writes, "", end=False)["input_ids"] == []


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


class TargetTokenizer:
    """A tokenizer that closes a text with its end token, and marks a target with its language behind that."""

    def __init__(self, mark=True):
        self.inner, self.mark = tiny.tokenizer(), mark
        self.chat_template, self.eos_token_id, self.pad_token_id = None, 0, 0
        self.all_special_ids = [0, 2]

    def __call__(self, text=None, text_target=None, add_special_tokens=True):
        ids = self.inner(text_target if text is None else text)["input_ids"]
        after = [0, 2] if text is None and self.mark else [0]
        return {"input_ids": ids + after if add_special_tokens else ids}

    def decode(self, ids, skip_special_tokens):
        return self.inner.decode(ids, skip_special_tokens=skip_special_tokens)


def encoder_decoder(**settings):
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    sizes = {
        "vocab_size": 32,
        "d_model": 16,
        "d_kv": 4,
        "d_ff": 32,
        "num_layers": 1,
        "num_heads": 4,
        "dropout_rate": 0.0,
    }
    return T5ForConditionalGeneration(T5Config(**{**sizes, "decoder_start_token_id": 0, **settings}))


@pytest.mark.parametrize("mark", [False, True])
def test_for_an_encoder_decoder_the_prompt_and_the_answer_stand_apart(mark):
    tokenizer, model = TargetTokenizer(mark), encoder_decoder()
    words = tokenizer.inner.convert_tokens_to_ids
    example = encode_completion(tokenizer, "the cat ?", "yes .", model=model)
    assert example["input_ids"] == [*words(["the", "cat", "?"]), 0]
    assert example["labels"] == [*words(["yes", "."]), 0, *([2] if mark else [])]
    plain = encode_completion(tiny.tokenizer(), "the cat ?", "yes .", model=model)
    assert plain["labels"] == [*words(["yes", "."]), 0], "an end is put where the tokenizer writes none"
    for most in (4, 5, 9):
        assert encode_completion(tokenizer, "the cat ?", "yes .", most, model=model) == example, "what fits is whole"
    cut = encode_completion(tokenizer, "red green the cat ?", "yes .", 4, model=model)
    assert cut == {**example, "input_ids": example["input_ids"]}, "cut from its beginning, with its end token"
    with pytest.raises(PeftLabError, match="Raise max_length to"):
        encode_completion(tokenizer, "the cat ?", "yes . no .", 4, model=model)
    decoder = encode_completion(tiny.tokenizer(), "the cat ?", "yes .", model=tiny.llama())
    assert decoder == encode_completion(tiny.tokenizer(), "the cat ?", "yes .")


def test_an_encoder_decoder_answers_as_it_was_taught():
    import peftlab as pl

    tokenizer, model = tiny.tokenizer(), encoder_decoder()
    pairs = [("the cat ?", "yes ."), ("a dog ?", "no no ."), ("red ?", "green")]
    examples = [encode_completion(tokenizer, *pair, model=model) for pair in pairs]
    pl.train(model, examples, tokenizer=tokenizer, steps=150, batch_size=3, learning_rate=1e-2, progress=False)
    assert generate_text(model, tokenizer, [prompt for prompt, _ in pairs], 8, progress=False) == [
        "yes.",
        "nono.",
        "green",
    ]
    assert pl.mean_loss(model, examples, Collator(tokenizer)) < 0.1


def test_an_encoder_reads_the_same_in_training_and_in_generation():
    tokenizer, model, seen = TargetTokenizer(), encoder_decoder(), []
    model.encoder.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    generate_text(model, tokenizer, "the cat ?", 2, progress=False)
    assert seen[0].tolist() == [encode_completion(tokenizer, "the cat ?", "yes", model=model)["input_ids"]]


def test_completions_as_messages():
    """As TRL has them."""
    tokenizer = tiny.tokenizer(chat=True)
    prompt, text = [{"role": "user", "content": "red ?"}], encode_completion(tokenizer, "red ?", "yes .")
    answer = [{"role": "assistant", "content": "yes ."}]
    assert encode_completion(tokenizer, prompt, answer) == text
    assert encode_completion(tokenizer, "red ?", answer) == text
    parts = [{"role": "assistant", "content": [{"type": "text", "text": "yes ."}]}]
    assert encode_completion(tokenizer, prompt, parts) == text
    plain = tiny.tokenizer()
    assert encode_completion(plain, "red ?", answer) == encode_completion(plain, "red ?", "yes .")
    for wrong, message in (
        ([*answer, {"role": "user", "content": "?"}, *answer], "roles assistant, user, assistant"),
        ([{"role": "user", "content": "?"}], "one message of the assistant; found the roles user"),
        ([{"role": "assistant"}], "a list of {'role'"),
        ([{"role": "assistant", "content": None}], "a list of {'role'"),
        ([{"role": "assistant", "content": 5}], "A completion's content is a text, found 5"),
        ([], "holds no message"),
        ({"role": "assistant", "content": "a"}, "A completion is a text, found"),
    ):
        with pytest.raises(PeftLabError, match=message):
            encode_completion(tokenizer, prompt, wrong)


@pytest.mark.parametrize("value", [None, float("nan"), 5, 2.5, True, b"a", ["a"], {"a": 1}])
@pytest.mark.parametrize("chat", [False, True])
def test_what_is_no_text_is_told(value, chat):
    tokenizer = tiny.tokenizer(chat)
    calls = [
        lambda: encode_text(tokenizer, value),
        lambda: encode_completion(tokenizer, "red", value),
        lambda: encode_completion(tokenizer, value, "red"),
        lambda: encode_classification(tokenizer, value, 1),
        lambda: encode_classification(tokenizer, "red", 1, pair=value),
        lambda: generate_text(tiny.llama(), tokenizer, [value], progress=False),
    ]
    if value is None:
        calls.pop(4)  # no second text
    for call in calls:
        with pytest.raises(PeftLabError) as raised:
            call()
        if value is None or value != value:
            assert "keep_default_na=False" in str(raised.value)


@pytest.mark.parametrize(
    ("template", "messages", "reason"),
    [
        (
            "{{ raise_exception('System role not supported') }}",
            ["system", "user"],
            "System role not supported.*of the user's",
        ),
        ("{{ raise_exception('roles must alternate') }}", ["user", "user"], "roles user, user.*must alternate"),
        ("{% for m in messages %}{{ m.content | nosuch }}{% endfor %}", ["user"], "nosuch"),
        ("{% for", ["user"], "TemplateSyntaxError"),
        ("{{ messages[7].content.x }}", ["user"], "UndefinedError"),
    ],
)
def test_a_template_that_refuses_a_conversation(template, messages, reason):
    tokenizer = tiny.tokenizer(chat=True)
    tokenizer.chat_template = template
    prompt = [{"role": role, "content": "red"} for role in messages]
    for call in (
        lambda: prompt_ids(tokenizer, prompt),
        lambda: encode_completion(tokenizer, prompt, "yes"),
        lambda: generate_text(tiny.llama(), tokenizer, [prompt], progress=False),
    ):
        with pytest.raises(PeftLabError, match=reason.replace("of the user's", "beginning of the user's")):
            call()


def test_several_templates():
    tokenizer = tiny.tokenizer(chat=True)
    one = tokenizer.chat_template
    right = prompt_ids(tokenizer, "red")
    tokenizer.chat_template = {"rag": one, "tool_use": one}
    for call in (lambda: prompt_ids(tokenizer, "red"), lambda: end_ids(tokenizer)):
        with pytest.raises(PeftLabError, match=r"'rag', 'tool_use' and none called 'default'.*chat_template\['rag'\]"):
            call()
    tokenizer.chat_template = {"default": one, "rag": "x"}
    assert prompt_ids(tokenizer, "red") == right


def test_labels_of_every_kind_are_encoded_as_they_are():
    tokenizer = tiny.tokenizer()
    for label, encoded in (
        (1.0, 1),
        (0.5, 0.5),
        (True, 1),
        (torch.tensor(2), 2),
        ([1.0, 0], [1, 0]),
        ((0.25, 1), [0.25, 1]),
    ):
        found = encode_classification(tokenizer, "red", label)["labels"]
        assert found == encoded and type(found) is type(encoded)
    for label in ("good", None, float("nan"), float("inf"), ["a", "b"]):
        with pytest.raises(PeftLabError, match="A label is a number, found"):
            encode_classification(tokenizer, "red", label)


def test_collator_widens_numbers_and_refuses_what_is_none():
    rows = [{"input_ids": [5], "labels": 1}, {"input_ids": [6], "labels": 0.5}]
    assert Collator()(rows)["labels"].tolist() == [1.0, 0.5]
    rows = [{"input_ids": [5], "labels": [1, 0]}, {"input_ids": [6], "labels": [0.5, 1.0]}]
    assert Collator()(rows)["labels"].tolist() == [[1.0, 0.0], [0.5, 1.0]]
    assert Collator()([{"input_ids": []}, {"input_ids": [6]}])["input_ids"].dtype == torch.int64
    for row, message in (
        ({"input_ids": "the cat"}, "input_ids of an example cannot become a tensor: found 'the cat'"),
        ({"input_ids": None}, "found None"),
        ({"input_ids": [[1, 2], [3]]}, "cannot become a tensor"),
        ({"input_ids": [{"a": 1}]}, "cannot become a tensor"),
        ("the cat", "An example is a dict of numbers by name, not a str"),
    ):
        with pytest.raises(PeftLabError, match=message):
            Collator()([row])
    with pytest.raises(PeftLabError, match=r"labels has another shape in each example of a batch: \(\), \(2,\)"):
        Collator()([{"labels": 1}, {"labels": [1, 0]}])
