"""Which tokens of a conversation are learned: the assistant's alone, as the template itself writes them."""

import random
import warnings

import chat_templates as templates
import pytest
import tiny

import peftlab as pl
from peftlab.errors import PeftLabError
from peftlab.training.conversations import prompt_ids

SHORT = [{"role": "user", "content": "what is two and two?"}, {"role": "assistant", "content": "four."}]
LONG = [*SHORT, {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello world"}]
SYSTEM = [{"role": "system", "content": "be short"}]


def runs(tokenizer, example):
    """The texts that are learned, each run of labels one."""
    found, before = [], False
    for token, label in zip(example["input_ids"], example["labels"], strict=True):
        assert label in (token, -100)
        if label != -100:
            found = [*found[:-1], [*found[-1], token]] if before else [*found, [token]]
        before = label != -100
    return [tokenizer.decode(one) for one in found]


def learned(template, messages, *, tools=None, options=None, **settings):
    tokenizer = templates.tokenizer(template)
    example = pl.encode_chat(tokenizer, messages, tools=tools, template_options=options, **settings)
    if "max_length" not in settings:
        kwargs = {"tools": tools, **(options or {})}
        rendered = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **kwargs)
        assert example["input_ids"] == rendered["input_ids"]
    return runs(tokenizer, example)


FAMILIES = {
    "CHATML": ["four.<|im_end|>", "Hello world<|im_end|>"],
    "UNOPENED": ["four.<|im_end|>", "Hello world<|im_end|>"],
    "THINKING": ["four.<|im_end|>", "<think>\n\n</think>\n\nHello world<|im_end|>"],
    "OPENED_THOUGHT": ["four.</s>", "Hello world</s>"],
    "LLAMA": ["four.<|eot|>", "Hello world<|eot|>"],
    "MISTRAL": [" four.</s>", " Hello world</s>"],
    "GEMMA": ["four.</turn>", "Hello world</turn>"],
    "TWO_ENDS": ["four.<|end|>", "Hello world<|end|>"],
    "MARKED": ["four.<|im_end|>", "Hello world<|im_end|>"],
    "VICUNA": [" four.</s>", " Hello world</s>"],
}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_answers_and_their_ends_are_learned_and_nothing_else(name):
    template, expected = getattr(templates, name), FAMILIES[name]
    assert learned(template, LONG) == expected
    assert learned(template, LONG, train_on="last") == expected[1:]
    # a single answer is what stands last
    last = expected[1].replace("Hello world", "four.")
    assert learned(template, SHORT) == [last]
    # what follows the last answer is not learned either
    assert learned(template, LONG[:3]) == [expected[0]]
    if name != "GEMMA":
        assert learned(template, [*SYSTEM, *LONG]) == expected


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("UNOPENED", "OPENED_THOUGHT")])
def test_what_is_learned_follows_what_the_model_is_given(name):
    """At inference the model reads the opened prompt; in training the same tokens stand before the answer."""
    tokenizer = templates.tokenizer(getattr(templates, name))
    example = pl.encode_chat(tokenizer, LONG, train_on="last")
    given = prompt_ids(tokenizer, LONG[:3])
    assert example["input_ids"][: len(given)] == given
    assert example["labels"][: len(given)] == [-100] * len(given) and example["labels"][len(given)] != -100


def test_a_template_that_takes_no_system_turn_says_so():
    with pytest.raises(PeftLabError, match="System role not supported.*beginning of the user's"):
        learned(templates.GEMMA, [*SYSTEM, *LONG])
    with pytest.raises(PeftLabError, match="roles must alternate"):
        learned(templates.MISTRAL, [LONG[1], *LONG])


def test_thinking_that_is_taken_out_of_earlier_turns():
    thought = [dict(message) for message in LONG]
    thought[1]["content"] = "<think>\nI think it is so.\n</think>\n\nfour."
    thought[3]["content"] = "<think>\nyes\n</think>\n\nHello world"
    last = "<think>\nyes\n</think>\n\nHello world<|im_end|>"
    assert learned(templates.THINKING, thought) == ["four.<|im_end|>", last]
    assert learned(templates.THINKING, thought, train_on="last") == [last]
    assert learned(templates.OPENED_THOUGHT, thought) == ["\n\nfour.</s>", "\n\nHello world</s>"]
    # in a field of its own, and with a prompt that closes the thought before the answer
    field = [*LONG[:3], {**LONG[3], "reasoning_content": "yes"}]
    assert learned(templates.THINKING, field)[1] == last
    off = {"enable_thinking": False}
    assert learned(templates.THINKING, LONG, options=off) == ["four.<|im_end|>", "Hello world<|im_end|>"]


def test_calls_of_tools_are_learned_and_what_the_tools_say_is_not():
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
    chat = [
        SHORT[0],
        {"role": "assistant", "content": "<think>\nI think\n</think>\n\n", "tool_calls": [call]},
        {"role": "tool", "content": "four"},
        {"role": "assistant", "content": "it is four."},
    ]
    tools = [{"type": "function", "function": {"name": "add", "description": "sums", "parameters": {}}}]
    # both answers follow the last question: both keep their thoughts
    asked, told = learned(templates.THINKING, chat, tools=tools)
    assert asked.startswith("<think>\nI think\n</think>\n\n") and asked.endswith("</tool_call><|im_end|>")
    assert '"arguments": {"a": 2, "b": 2}' in asked
    assert told == "<think>\n\n</think>\n\nit is four.<|im_end|>"
    # with another question behind them, neither does, and what the model was given then is no longer the beginning
    asked, told, last = learned(templates.THINKING, [*chat, *LONG[2:]], tools=tools)
    assert asked.lstrip().startswith("<tool_call>") and asked.endswith("</tool_call><|im_end|>")
    assert told == "it is four.<|im_end|>" and last.endswith("Hello world<|im_end|>")
    silent = [chat[0], {"role": "assistant", "content": None, "tool_calls": [call]}, *chat[2:]]
    assert learned(templates.THINKING, silent, tools=tools)[0].count("<tool_call>") == 1
    assert learned(templates.THINKING, [*silent, *LONG[2:]], tools=tools)[0].count("<tool_call>") == 1


def test_answers_that_stand_in_the_questions_too_are_not_confused():
    chat = [{"role": "user", "content": "four."}, {"role": "assistant", "content": "four."}] * 2
    for name, expected in FAMILIES.items():
        found = learned(getattr(templates, name), chat)
        assert found == [expected[0], expected[1].replace("Hello world", "four.")], name
    for word in ("im_end", "end", "|", "assistant", "<|im_start|>"):  # parts of what the template writes
        assert (
            learned(templates.CHATML, [SHORT[0], {"role": "assistant", "content": word}] * 2)
            == [f"{word}<|im_end|>"] * 2
        )
    # an answer that looks like what opens an answer, and one that holds the template's own words
    chat = [
        SHORT[0],
        {"role": "assistant", "content": "assistant"},
        LONG[2],
        {"role": "assistant", "content": "<think> red"},
    ]
    assert learned(templates.CHATML, chat) == ["assistant<|im_end|>", "<think> red<|im_end|>"]
    assert learned(templates.OPENED_THOUGHT, chat)[1] == "<think> red</s>"


PIECES = ["four", "Hello world", " ", "\n", "🙂", "é", "<|im_end|>", "assistant", "<|im_start|>", "[/INST]", "</s>",
          "<think>", "</think>", "end", "|", "x", "\n\n", "<|eot|>", "user\n", "{{ m }}", "7"]  # fmt: skip


@pytest.mark.parametrize(
    "name, written",
    [("CHATML", "{}<|im_end|>"), ("UNOPENED", "{}<|im_end|>"), ("MARKED", "{}<|im_end|>"), ("TWO_ENDS", "{}<|end|>"),
     ("MISTRAL", " {}</s>"), ("LLAMA", "{}<|eot|>"), ("GEMMA", "{}</turn>")],
)  # fmt: skip
def test_any_words_even_the_templates_own(name, written):
    tokenizer, draw = templates.tokenizer(getattr(templates, name)), random.Random(1)
    for _ in range(40):
        chat = []
        for _ in range(draw.randint(1, 3)):
            chat.append({"role": "user", "content": "".join(draw.choices(PIECES, k=draw.randint(1, 4)))})
            chat.append({"role": "assistant", "content": "".join(draw.choices(PIECES, k=draw.randint(0, 4)))})
        answers = [message["content"] for message in chat[1::2]]
        expected = "".join(written.format(text.strip() if name in ("LLAMA", "GEMMA") else text) for text in answers)
        example = pl.encode_chat(tokenizer, chat)
        assert tokenizer.decode([label for label in example["labels"] if label != -100]) == expected, chat


def test_blanks_around_answers():
    blank = [SHORT[0], {"role": "assistant", "content": "  four. \n"}]
    assert learned(templates.LLAMA, blank) == ["four.<|eot|>"]
    assert learned(templates.GEMMA, blank * 2) == ["four.</turn>"] * 2
    assert learned(templates.CHATML, blank) == ["  four. \n<|im_end|>"]
    assert learned(templates.CHATML, [SHORT[0], {"role": "assistant", "content": ""}]) == ["<|im_end|>"]


def test_other_languages_and_characters_of_several_bytes():
    chat = [{"role": "user", "content": "Grüße 🙂"}, {"role": "assistant", "content": "🙂 žluťoučký"}]
    assert learned(templates.CHATML, chat) == ["🙂 žluťoučký<|im_end|>"]
    assert learned(templates.MISTRAL, chat) == [" 🙂 žluťoučký</s>"]


def test_contents_in_parts_greetings_and_weights():
    parts = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": [{"type": "text", "text": "four."}]},
    ]
    template = templates.CHATML.replace(
        "{{ m['content'] }}", "{{ m.content if m.content is string else m.content[0].text }}"
    )
    assert learned(template, parts) == ["four.<|im_end|>"]
    greeting = [{"role": "assistant", "content": "Hello"}, *SHORT]
    assert learned(templates.CHATML, greeting) == ["Hello<|im_end|>", "four.<|im_end|>"]
    weighed = [LONG[0], {**LONG[1], "weight": 0}, *LONG[2:]]
    assert learned(templates.CHATML, weighed) == ["Hello world<|im_end|>"]
    assert learned(templates.MARKED, weighed) == ["Hello world<|im_end|>"]
    with pytest.raises(PeftLabError, match="have the weight 0"):
        learned(templates.CHATML, weighed[:2])


def test_marks_are_believed_where_they_stand_and_questioned_where_they_cannot_be_right():
    wide = templates.MARKED.replace("{% generation %}", "").replace(
        "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}",
        "{% if m.role == 'assistant' %}{% generation %}<|im_start|>assistant\n",
    ).replace("{% else %}{{ m.content }}", "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}")  # fmt: skip
    assert learned(wide, SHORT) == ["<|im_start|>assistant\nfour.<|im_end|>"]
    endless = templates.MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")
    with pytest.warns(UserWarning, match="marks leave the end of an answer out"):
        assert learned(endless, SHORT) == ["four."]
    users = templates.MARKED.replace("m.role == 'assistant'", "m.role == 'user'", 1)
    with pytest.raises(PeftLabError, match="marks .* as generated, and that is not the assistant's"):
        learned(users, LONG)
    # marks that stand, though a user's words cannot be found
    loud = templates.MARKED.replace("{% else %}{{ m.content }}", "{% else %}{{ m.content | upper }}")
    assert learned(loud, LONG) == ["four.<|im_end|>", "Hello world<|im_end|>"]
    with pytest.raises(PeftLabError, match="cannot be found exactly"):
        learned(loud, LONG, train_on="last")
    none = templates.MARKED.replace("m.role == 'assistant'", "m.role == 'robot'", 1)
    with pytest.raises(PeftLabError, match="marks nothing in these answers"):
        learned(none, LONG)


def test_a_template_without_an_end_is_told_of():
    with pytest.warns(UserWarning, match="writes no special token at the end"):
        assert [run.strip() for run in learned(templates.NO_END, LONG)] == ["four.", "Hello world"]


@pytest.mark.parametrize(
    "template, messages, message",
    [
        ("COUNTING", LONG, "cannot be found exactly"),
        ("CHATML", SHORT[:1], "No message has the role 'assistant'.*found user"),
        ("CHATML", [], "holds no message"),
        ("CHATML", [{"role": "user"}], "is a list of .*found"),
        ("CHATML", "hello", "messages is a text"),
    ],
)
def test_what_cannot_be_encoded(template, messages, message):
    with pytest.raises(PeftLabError, match=message):
        pl.encode_chat(templates.tokenizer(getattr(templates, template)), messages)


def test_a_template_that_leaves_answers_out_or_opens_them_within_a_token():
    dropped = templates.CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role == 'user' %}")
    with pytest.raises(PeftLabError, match="cannot be found exactly"):
        learned(dropped, LONG)
    # the blank that opens an answer is part of its first token: the model would be given it alone
    blank = templates.VICUNA.replace("ASSISTANT:{% endif", "ASSISTANT: {% endif")
    with pytest.raises(PeftLabError, match="its first token, ' four', begins before it"):
        learned(blank, SHORT)
    with pytest.raises(PeftLabError, match="no chat template"):
        pl.encode_chat(tiny.tokenizer(), SHORT)


def test_too_long_is_cut_from_the_beginning_and_never_an_answer():
    tokenizer = templates.tokenizer(templates.CHATML)
    whole = pl.encode_chat(tokenizer, [*SYSTEM, *LONG, {"role": "user", "content": "yes"}])
    count = len(whole["input_ids"])
    first = next(place for place, label in enumerate(whole["labels"]) if label != -100)
    last = max(place for place, label in enumerate(whole["labels"]) if label != -100)
    expected = ["four.<|im_end|>", "Hello world<|im_end|>"]
    smallest = len(tokenizer("Hello world<|im_end|>")["input_ids"]) + 1
    for most in range(smallest, count + 2):
        example = pl.encode_chat(tokenizer, [*SYSTEM, *LONG, {"role": "user", "content": "yes"}], max_length=most)
        size = len(example["input_ids"])
        assert size == len(example["labels"]) == min(most, count)
        # what follows the last answer goes first; then the beginning
        stop = max(most, last + 1) if most < count else count
        assert example["input_ids"] == whole["input_ids"][stop - size : stop]
        begins = stop - size
        assert runs(tokenizer, example) == (expected if begins < first else expected[1:])
    with pytest.raises(PeftLabError, match=f"Raise max_length to {smallest}"):
        pl.encode_chat(tokenizer, LONG, max_length=smallest - 1)


def test_the_calls_own_arguments():
    tokenizer = templates.tokenizer(templates.CHATML)
    with pytest.raises(PeftLabError, match="train_on must be one of 'assistant', 'last'"):
        pl.encode_chat(tokenizer, SHORT, train_on="assistants")
    for name in ("tokenize", "add_generation_prompt", "max_length"):
        with pytest.raises(PeftLabError, match=f"template_options holds '{name}', which is set here"):
            pl.encode_chat(tokenizer, SHORT, template_options={name: True})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pl.encode_chat(tokenizer, SHORT, "last", 100)
