"""What a data set asks of a model: the kind of task, its splits, and the numbers of its classes."""

import pytest
import tiny
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from peftlab.commands import tasks
from peftlab.errors import PeftLabError


def splits(**rows):
    return DatasetDict({name: Dataset.from_list(part) for name, part in rows.items()})


TEXTS = [{"text": f"the cat {number}"} for number in range(40)]


def test_the_columns_tell_the_kind():
    for columns, kind, answer in (
        (("prompt", "completion", "text"), "completion", "completion"),
        (("prompt", "ticket", "message"), "completion", "ticket"),
        (("text", "label"), "classification", "label"),
        (("text", "source"), "text", "text"),
    ):
        rows = [{column: f"{column} {number % 2}" for column in columns} for number in range(4)]
        task = tasks.task_of(splits(train=rows), "d")
        assert (task.kind, task.answer) == (kind, answer)


def test_the_splits_that_are_there_are_used_and_a_missing_one_is_made():
    parts = {"train": TEXTS[:20], "validation": TEXTS[20:30], "test": TEXTS[30:]}
    task = tasks.task_of(splits(**parts), "d", limit=7)
    assert (task.train, task.validation, task.test) == (TEXTS[:7], TEXTS[20:30], TEXTS[30:])
    task = tasks.task_of(splits(train=TEXTS[:20], dev=TEXTS[20:30]), "d")
    assert task.test == task.validation == TEXTS[20:30]
    task, again, other = (tasks.task_of(splits(train=TEXTS), "d", seed) for seed in (0, 0, 1))
    assert len(task.test) == 4 and sorted(task.train + task.test, key=str) == sorted(TEXTS, key=str)
    assert task == again != other and task.validation == []
    with pytest.raises(PeftLabError, match="no split called 'train'; it has 'test'"):
        tasks.task_of(splits(test=TEXTS), "d")


def test_class_labels_keep_their_numbers():
    features = Features({"text": Value("string"), "label": ClassLabel(names=["rotten", "fresh", "odd"])})
    rows = [{"text": "a", "label": 1}, {"text": "a cat", "label": 0}] * 5
    data = DatasetDict({"train": Dataset.from_list(rows, features=features)})
    task = tasks.task_of(data, "d")
    assert task.classes == ("rotten", "fresh", "odd") and task.train[0]["label"] in ("rotten", "fresh")
    examples = tasks.encode(task, tiny.tokenizer(), task.train, None)
    assert [example["labels"] for example in examples] == [1 if row["text"] == "a" else 0 for row in task.train]


def test_numbers_stay_in_order_and_words_are_sorted():
    for labels, classes in (([10, 2, 10, 2], ("2", "10")), (["b", "a", "b", "a"], ("a", "b"))):
        rows = [{"text": "a", "label": label} for label in labels]
        task = tasks.task_of(splits(train=rows, test=rows), "d")
        assert task.classes == classes
        assert [e["labels"] for e in tasks.encode(task, tiny.tokenizer(), task.train, None)] == [1, 0, 1, 0]


def test_labels_that_cannot_be_used():
    rows = [{"text": "a", "label": label} for label in ("x", "y")]
    with pytest.raises(PeftLabError, match="the label 'z' does not occur"):
        tasks.task_of(splits(train=rows, test=[{"text": "a", "label": "z"}]), "d")
    with pytest.raises(PeftLabError, match="whole number or a text, found 0.5"):
        tasks.task_of(splits(train=[{"text": "a", "label": 0.5}], test=[{"text": "a", "label": 0.5}]), "d")


def test_numbers_among_texts_are_texts_and_holes_are_told():
    rows = [{"text": number, "label": number % 2} for number in range(6)]
    task = tasks.task_of(splits(train=rows, test=rows), "d")
    assert task.train[3]["text"] == "3"
    assert tasks.encode(task, tiny.tokenizer(), task.train, None)[0]["labels"] == 0
    for value, message in (
        (None, "has a row without text"),
        (2.5, "text is a text, found 2.5"),
        (float("nan"), "without"),
    ):
        with pytest.raises(PeftLabError, match=message):
            tasks.task_of(splits(train=[{"text": value, "label": 1}] * 2, test=[{"text": value, "label": 1}]), "d")


def test_conversations_are_completions_too():
    rows = [
        {"prompt": [{"role": "user", "content": "red ?"}], "completion": [{"role": "assistant", "content": "yes ."}]}
    ]
    task = tasks.task_of(splits(train=rows, test=rows), "d")
    plain = tasks.task_of(
        splits(
            train=[{"prompt": "red ?", "completion": "yes ."}], test=rows[:0] or [{"prompt": "a", "completion": "b"}]
        ),
        "d",
    )
    tokenizer = tiny.tokenizer(chat=True)
    assert tasks.encode(task, tokenizer, task.train, None) == tasks.encode(plain, tokenizer, plain.train, None)
    scores = tasks.test(task, tiny.llama(), tokenizer, task.test, None, 2, 3)
    assert scores == {"exact_match": 0.0}
