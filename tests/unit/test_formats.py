"""The forms that data comes in: each is told by its columns, read as it stands, and a broken row is named."""

import json
import re

import chat_templates as templates
import pytest
import tiny
from datasets import Dataset, DatasetDict

from peftlab.commands import tasks
from peftlab.commands.formats import form_of
from peftlab.commands.reading import read
from peftlab.errors import PeftLabError

ASK, ANSWER = {"role": "user", "content": "two and two?"}, {"role": "assistant", "content": "four."}
CHAT = [ASK, ANSWER]


def lines(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return str(path)


def found(path, *rows, **settings):
    """The task of a file with these rows, each several times, so that some can be held out."""
    name = lines(path, *rows)
    return tasks.task_of(read(name), name, **settings)


def example(task, template=templates.CHATML, **settings):
    tokenizer = templates.tokenizer(template)
    one = tasks.encode(task, tokenizer, task.train[:1], None, **settings)[0]
    return tokenizer.decode(one["input_ids"]), tokenizer.decode([label for label in one["labels"] if label != -100])


@pytest.mark.parametrize(
    "row, kind, told, learned",
    [
        ({"messages": CHAT, "id": 3}, "chat", "chat messages.*not used: id", "four.<|im_end|>"),
        ({"messages": [{"from": "human", "value": "two and two?"}, {"from": "gpt", "value": "four."}]}, "chat",
         "chat messages", "four.<|im_end|>"),
        ({"conversations": [{"from": "human", "value": "two and two?"}, {"from": "gpt", "value": "four."}]}, "chat",
         "ShareGPT", "four.<|im_end|>"),
        ({"conversations": [{"role": "user", "content": "two and two?"}, {"role": "Assistant", "content": "four."}],
          "text": "x"}, "chat", "ShareGPT.*not used: text", "four.<|im_end|>"),
        ({"prompt": "two and two?", "completion": "four."}, "completion", "prompt and completion", "four.<|im_end|>"),
        ({"prompt": [ASK], "completion": [ANSWER]}, "completion", "prompt and completion", "four.<|im_end|>"),
        ({"instruction": "two and two?", "input": "", "output": "four."}, "completion", "Alpaca", "four.<|im_end|>"),
        ({"instruction": "two and two?", "output": "four."}, "completion", "Alpaca", "four.<|im_end|>"),
    ],
    ids=str,
)  # fmt: skip
def test_each_form_is_told_by_its_columns_and_gives_the_same_example(tmp_path, row, kind, told, learned):
    task = found(tmp_path / "x.jsonl", *[row] * 4)
    assert task.kind == kind and len(task.train) == 3 and len(task.test) == 1

    assert re.search(told, task.told), task.told
    text, answer = example(task)
    assert answer == learned and text.startswith("<|im_start|>user\ntwo and two?<|im_end|>\n<|im_start|>assistant\n")


def test_what_stands_beside_a_form_is_read(tmp_path):
    task = found(tmp_path / "a.jsonl", *[{"instruction": "Hello", "input": "world", "output": "yes"}] * 2)
    assert task.train[0]["prompt"] == "Hello\n\nworld"
    told = []
    one = tasks.encode(task, templates.tokenizer(None), task.train, None, told.append)[0]
    assert templates.tokenizer(None).decode(one["input_ids"]) == (
        "### Instruction:\nHello\n\n### Input:\nworld\n\n### Response:\nyes</s>"
    )
    assert told == ["The tokenizer has no chat template: prompts are written with ### Instruction: and ### Response:"]
    row = {"instruction": "Hello", "output": "yes", "system": "be short", "history": [["red", "green"]]}
    text, answer = example(found(tmp_path / "b.jsonl", *[row] * 2))
    assert answer == "yes<|im_end|>" and [part.split("\n")[0] for part in text.split("<|im_start|>")[1:]] == [
        "system", "user", "assistant", "user", "assistant"
    ]  # fmt: skip
    task = found(tmp_path / "c.jsonl", *[{"conversations": CHAT, "system": "be short"}] * 2)
    assert example(task)[0].startswith("<|im_start|>system\nbe short")
    tool = {"type": "function", "function": {"name": "add", "description": "sums"}}
    for tools in ([tool], json.dumps([tool])):
        task = found(tmp_path / "d.jsonl", *[{"messages": CHAT, "tools": tools}] * 2)
        assert '"description": "sums"' in example(task, templates.THINKING)[0]
    many = [*CHAT, *CHAT]
    task = found(tmp_path / "e.jsonl", *[{"messages": many}] * 2, train_on="last")
    assert (
        example(task)[1] == "four.<|im_end|>"
        and example(found(tmp_path / "f.jsonl", *[{"messages": many}] * 2))[1] == "four.<|im_end|>four.<|im_end|>"
    )


def test_no_row_takes_on_the_keys_of_another(tmp_path):
    """Columns would give each message the keys of all others, and each call the arguments of all calls."""

    def call(**arguments):
        return {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}

    parts = {"role": "assistant", "content": [{"type": "text", "text": "four."}]}
    rows = [{"messages": [ASK, answer]} for answer in (call(a=1), call(b="x"), parts)]
    task = found(tmp_path / "x.jsonl", *rows, *rows)
    calls = [row["messages"][1].get("tool_calls") for row in task.train + task.test]
    assert all(set(one[0]["function"]["arguments"]) in ({"a"}, {"b"}) for one in calls if one)
    saved = DatasetDict(
        {"train": Dataset.from_list([{"messages": [ASK, {**ANSWER, "name": "x"}]}, {"messages": CHAT}])}
    )
    saved.save_to_disk(str(tmp_path / "saved"))
    task = tasks.task_of(read(str(tmp_path / "saved")), "saved")
    assert sorted(map(len, (row["messages"][1] for row in task.train + task.test))) == [2, 3]


def test_files_and_folders(tmp_path):
    rows = [{"messages": CHAT}] * 3
    (tmp_path / "list.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "inside.json").write_text(json.dumps({"data": rows}))
    (tmp_path / "lines.json").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    (tmp_path / "list.jsonl").write_text(json.dumps(rows, indent=1))
    (tmp_path / "windows.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(map(json.dumps, rows)).encode())
    for name in ("list.json", "inside.json", "lines.json", "list.jsonl", "windows.jsonl"):
        assert len(read(str(tmp_path / name))["train"]) == 3, name
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("train-00001.jsonl", "train-00002.jsonl", "valid.jsonl", "my_test.jsonl"):
        lines(folder / name, *rows)
    assert {split: len(part) for split, part in read(str(folder)).items()} == {"test": 3, "train": 6, "validation": 3}
    (tmp_path / "alpaca.csv").write_text("instruction,input,output\n7,,007\na,b,NA\n")
    task = tasks.task_of(read(str(tmp_path / "alpaca.csv")), "alpaca.csv")
    pairs = {(row["prompt"], row["completion"]) for row in task.train + task.test}
    assert pairs == {("7", "007"), ("a\n\nb", "NA")}
    table = "messages\n" + '"' + json.dumps(CHAT).replace('"', '""') + '"\n'
    (tmp_path / "chat.csv").write_text(table + table.split("\n", 1)[1] * 2)
    task = tasks.task_of(read(str(tmp_path / "chat.csv")), "chat.csv")
    assert task.kind == "chat" and task.train[0]["messages"] == CHAT


BROKEN = [
    ({"messages": CHAT}, '{"messages": [', "x.jsonl, line 2 is not JSON"),
    ({"messages": CHAT}, '["a"]', r"x.jsonl, line 2 is \['a'\] \(list\); a row is an object"),
    ({"messages": CHAT}, {"messages": []}, "x.jsonl, line 2: messages is a list of messages"),
    ({"messages": CHAT}, {"messages": "hello"}, "x.jsonl, line 2: messages is no list and no JSON"),
    ({"messages": CHAT}, {"messages": None}, r"a row without messages \(.*x.jsonl, line 2\)"),
    ({"messages": CHAT}, {"message": CHAT}, r"without messages \(.*line 2\).*Did you mean 'message'"),
    ({"messages": CHAT}, {"messages": [ASK]}, "line 2: no message is the assistant's.*found user"),
    ({"messages": CHAT}, {"messages": [ASK, {"role": "assitant", "content": "x"}]},
     "line 2: message 2 has the role 'assitant'.*Did you mean 'assistant'"),
    ({"messages": CHAT}, {"messages": [ASK, {"role": "assistant", "contents": "x"}]},
     "line 2: message 2 has the keys 'role', 'contents'.*Did you mean 'content'"),
    ({"messages": CHAT}, {"messages": [ASK, {"role": "assistant", "content": None}]},
     "line 2: message 2 .* has no content"),
    ({"messages": CHAT}, {"messages": [ASK, {"role": "assistant", "content": 4}]}, "line 2: message 2 .* found 4"),
    ({"messages": CHAT}, {"messages": [ASK, "four"]}, "line 2: message 2 is 'four', not an object"),
    ({"messages": CHAT}, {"messages": CHAT, "tools": 3}, "line 2: tools is a list of objects"),
    ({"prompt": "a", "completion": "b"}, {"prompt": "a", "completions": "b"},
     r"without completion \(.*line 2\).*Did you mean 'completions'"),
    ({"instruction": "a", "output": "b"}, {"instruction": "a", "output": None}, r"without output \(.*line 2\)"),
    ({"instruction": "a", "output": "b"}, {"instruction": "a", "input": [1], "output": "b"}, "line 2: input is a text"),
    ({"instruction": "a", "output": "b"}, {"instruction": "a", "history": ["x"], "output": "b"}, "line 2: history is"),
    ({"text": "a"}, {"text": 2.5}, r"text is a text, found 2.5.*line 2"),
]  # fmt: skip


@pytest.mark.parametrize("good, bad, message", BROKEN, ids=lambda value: str(value)[:60])
def test_a_broken_row_is_named_by_its_line(tmp_path, good, bad, message):
    with pytest.raises(PeftLabError, match=message):
        found(tmp_path / "x.jsonl", good, bad, good)


def test_lines_of_tables_whose_cells_run_over_several(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text('prompt,completion\n"a\nb",yes\n\nc,\nd,no\n')
    with pytest.raises(PeftLabError, match=r"without completion \(.*x.csv, line 5\)"):
        tasks.task_of(read(str(path)), "x.csv")


@pytest.mark.parametrize(
    "columns, near",
    [
        (("message", "id"), "Rename 'message' to 'messages'"),
        (("Prompt", "completion"), "Rename 'Prompt' to 'prompt'"),
        (("prompt", "response"), "Rename 'response' to 'completion'"),
        (("question", "answer"), "Rename 'question' to 'prompt'"),
        (("conversation",), "Rename 'conversation' to 'conversations'"),
        (("Text", "label"), "Rename 'Text' to 'text'"),
        (("instructions", "output"), "Rename 'instructions' to 'instruction'"),
        (("a", "b"), "instruction, input and output.$"),
    ],
)
def test_columns_of_no_form(columns, near):
    with pytest.raises(PeftLabError, match=f"x has the columns .*{near}"):
        form_of(columns, "x")


def test_what_is_cut_is_counted_and_answers_are_whole(tmp_path):
    rows = [{"messages": CHAT * 3}, {"messages": CHAT}, {"messages": CHAT}]
    task = found(tmp_path / "x.jsonl", *rows, *rows)
    tokenizer, told = templates.tokenizer(templates.CHATML), []
    short = len(
        tasks.encode(task, tokenizer, [r for r in task.train if len(r["messages"]) == 2][:1], None)[0]["labels"]
    )
    examples = tasks.encode(task, tokenizer, task.train + task.test, short, told.append)
    assert [len(one["labels"]) for one in examples] == [short] * 6
    assert told == [
        f"2 of 6 examples are longer than {short} tokens and were cut at the beginning of their context; 4 earlier "
        "answers fell out with it (--max-length)"
    ]
    for one in examples:
        assert tokenizer.decode([label for label in one["labels"] if label != -100]) == "four.<|im_end|>"
    with pytest.raises(PeftLabError, match=r"x.jsonl, line \d: The last answer has .* Raise max_length to"):
        tasks.encode(task, tokenizer, task.train, 3)
    told.clear()
    tasks.encode(task, tokenizer, task.train, 500, told.append)
    assert told == []


def test_chats_need_a_template_and_train_on_a_chat(tmp_path):
    task = found(tmp_path / "x.jsonl", *[{"messages": CHAT}] * 2)
    with pytest.raises(PeftLabError, match="no chat template.*-Instruct"):
        tasks.encode(task, tiny.tokenizer(), task.train, None)
    with pytest.raises(PeftLabError, match="--train-on is for chats, and .* holds text"):
        found(tmp_path / "y.jsonl", *[{"text": "a"}] * 2, train_on="last")
    (tmp_path / "e.jsonl").write_text("\n")
    with pytest.raises(PeftLabError, match="e.jsonl is empty"):
        read(str(tmp_path / "e.jsonl"))
    (tmp_path / "l.jsonl").write_bytes(b'{"text": "\xff"}')
    with pytest.raises(PeftLabError, match="Save it as UTF-8"):
        read(str(tmp_path / "l.jsonl"))


def test_rows_that_are_nested_without_end(tmp_path):
    deep = "[" * 100_000
    for row, told in ((f'{{"prompt": {deep}', "line 1 is not JSON"), ({"messages": deep}, "no list and no JSON")):
        with pytest.raises(PeftLabError, match=told) as error:
            found(tmp_path / "x.jsonl", row, {"messages": CHAT})
        assert len(str(error.value)) < 500


@pytest.mark.parametrize("row", [
    {"prompt": "a\ud800", "completion": "b"}, {"prompt": "a", "completion": "b\udc00"}, {"text": "\ud83d x"},
    {"text": "\ud83d x", "label": 1},
], ids=lambda row: " ".join(row))  # fmt: skip
@pytest.mark.parametrize("template", [templates.CHATML, None])
def test_half_a_character_is_told_with_its_line(tmp_path, row, template):
    """JSON can write half of an emoji; no tokenizer can read it."""
    task = found(tmp_path / "x.jsonl", *[row] * 3, *[{**row, "label": 2}] * 3 * ("label" in row))
    with pytest.raises(PeftLabError, match=r"x\.jsonl, line \d: A .* holds half a character"):
        tasks.encode(task, templates.tokenizer(template) if template else tiny.tokenizer(), task.train, None)


def test_blank_lines_between_texts_are_left_out_and_told(tmp_path):
    """A blank text has nothing to learn. One in the test would fail a run that has trained to its end."""
    (tmp_path / "x.txt").write_text("the cat runs\n\nthe dog sleeps\n   \n\n" * 5)
    task = tasks.task_of(read(str(tmp_path / "x.txt")), "x.txt")
    assert {row["text"] for row in [*task.train, *task.test]} == {"the cat runs", "the dog sleeps"}
    assert task.told.endswith("; 15 blank ones are left out")
    with pytest.raises(PeftLabError, match="each text is blank"):
        found(tmp_path / "x.jsonl", {"text": " "}, {"text": ""})


def test_a_row_with_a_cell_too_large_for_csv_is_still_named(tmp_path):
    (tmp_path / "x.csv").write_text(f"prompt,completion\nthe,{'cat ' * 50_000}\nthe,\n")
    with pytest.raises(PeftLabError, match=r"x\.csv, row 2"):
        tasks.task_of(read(str(tmp_path / "x.csv")), "x.csv")
