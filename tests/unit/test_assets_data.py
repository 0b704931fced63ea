"""Data: the same splits everywhere, nothing shared between them, and whatever `datasets` can load."""

import json
import socket
import warnings
from collections import Counter

import datasets
import numpy
import pytest

import peftlab as pl
from peftlab.assets import data
from peftlab.errors import PeftLabError

pytestmark = pytest.mark.xdist_group("data")  # fetched, read and loaded by one worker


@pytest.fixture(scope="module", autouse=True)
def brought():
    pl.fetch(["reviews", "news", "digits"], progress=False)


@pytest.fixture(scope="module")
def loaded():
    return {name: pl.load_data(name) for name in ("reviews", "news")}


@pytest.mark.parametrize(("name", "rows", "classes"), [("reviews", 12_808, 2), ("news", 2_225, 5)])
def test_splits_are_whole_stratified_and_share_no_text(loaded, name, rows, classes):
    splits = loaded[name]
    assert list(splits) == ["train", "validation", "test"]
    assert sum(len(split) for split in splits.values()) == rows
    assert splits["train"].features["label"].num_classes == classes
    keys = {name: {data._plain(text) for text in split["text"]} for name, split in splits.items()}
    headlines = {name: {data._plain(text.split("\n")[0]) for text in split["text"]} for name, split in splits.items()}
    for a, b in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert not keys[a] & keys[b]
        assert not headlines[a] & headlines[b]
    whole = Counter(label for split in splits.values() for label in split["label"])
    for part in ("validation", "test"):
        counts = Counter(splits[part]["label"])
        for label, count in whole.items():
            assert abs(counts[label] / len(splits[part]) - count / rows) < 0.005
        assert abs(len(splits[part]) / rows - 0.1) < 0.002


def test_the_splits_never_change(loaded):
    # The first words and the label of each split: a change here changes every number in the book.
    first = {
        name: {k: (split[0]["text"][:28], split[0]["label"]) for k, split in s.items()} for name, s in loaded.items()
    }
    assert first == {
        "reviews": {
            "train": ("Where Bowling for Columbine ", 1),
            "validation": ("Consistently clever and susp", 1),
            "test": ("Oliver Parker brings the wit", 1),
        },
        "news": {
            "train": ("Ray DVD beats box office tak", 1),
            "validation": ("All Black magic: New Zealand", 3),
            "test": ("Air Jamaica back in state co", 0),
        },
    }


def test_labels_mean_what_they_say(loaded):
    names = loaded["reviews"]["train"].features["label"].names
    assert names == ["rotten", "fresh"]
    gem = next(row for row in loaded["reviews"]["train"] if row["text"].startswith("A small gem of a movie"))
    assert names[gem["label"]] == "fresh"
    names = loaded["news"]["train"].features["label"].names
    assert names == ["business", "entertainment", "politics", "sport", "tech"]
    # A plot summary, which is no opinion, is much longer than any sentence of a review.
    assert max(len(text) for split in loaded["reviews"].values() for text in split["text"]) < 300
    asia = next(row for row in loaded["news"]["train"] if row["text"].startswith("Asia shares"))
    assert names[asia["label"]] == "business"
    pound = [row["text"] for split in loaded["news"].values() for row in split if "�" in row["text"]]
    assert pound == []


def test_digits_are_images_of_ten_kinds_in_splits_that_never_change():
    splits = pl.load_data("digits")
    assert {split: Counter(rows["label"]) for split, rows in splits.items()} == {
        split: dict.fromkeys(range(10), count) for split, count in {"train": 400, "validation": 50, "test": 50}.items()
    }
    images = numpy.array(splits["test"]["image"])
    assert images.shape == (500, 28, 28) and images.min() == 0 and images.max() == 255
    assert [splits[split]["label"][:6] for split in splits] == [
        [5, 0, 6, 3, 5, 2],
        [9, 7, 6, 2, 3, 7],
        [3, 7, 2, 6, 8, 6],
    ]
    # a nought is empty in its middle, and a one is not
    middle = {digit: images[numpy.array(splits["test"]["label"]) == digit, 12:16, 13:15].mean() for digit in (0, 1)}
    assert middle[0] < 30 and middle[1] > 180
    assert pl.load_data("digits", sizes=(5, 0, 2))["test"].to_list() == splits["test"].select(range(2)).to_list()


def test_fewer_rows_are_the_first_ones(loaded):
    small = pl.load_data("reviews", sizes=(50, 20, 10))
    assert [len(split) for split in small.values()] == [50, 20, 10]
    assert small["train"].to_list() == loaded["reviews"]["train"].select(range(50)).to_list()
    for name, split in loaded["reviews"].items():
        assert 0.4 < sum(split["label"][:200]) / 200 < 0.75, name  # mixed from the start, not by class


def test_like_texts_are_one_group():
    texts = ["One.", "two", "ONE", "Head\n\nbody", "head!\n\nanother body", "body", "two  "]
    assert sorted(map(sorted, data._groups(texts))) == [[0, 2], [1, 6], [3, 4], [5]]


def test_nothing_is_printed_and_no_network_used(monkeypatch, capfd, tmp_path):
    def refuse(*_, **__):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    datasets.enable_progress_bars()  # a notebook's beginning switches them off for the whole process
    (tmp_path / "rows.csv").write_text("text,label\nhello,1\nthere,0\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pl.load_data("news")
        pl.load_data("support-desk", sizes=(8, 4, 4))
        assert pl.load_data(str(tmp_path / "rows.csv"))["train"][0] == {"text": "hello", "label": 1}
    assert capfd.readouterr() == ("", "")
    assert not datasets.are_progress_bars_disabled()


def test_local_files_and_folders(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"text": "a", "label": 0}, {"text": "b", "label": 1}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert pl.load_data(str(tmp_path / "rows.jsonl"))["train"].to_list() == rows
    (tmp_path / "rows.tsv").write_text("text\tlabel\na\t0\nb\t1\n")
    assert pl.load_data(str(tmp_path / "rows.tsv"))["train"].to_list() == rows
    folder = tmp_path / "folder"
    folder.mkdir()
    for split in ("train", "test"):
        (folder / f"{split}.csv").write_text(f"text,label\n{split},1\n")
    loaded = pl.load_data(str(folder))
    assert {split: loaded[split]["text"][0] for split in loaded} == {"train": "train", "test": "test"}
    loaded.save_to_disk(tmp_path / "saved")
    assert list(pl.load_data(str(tmp_path / "saved"))) == ["train", "test"]
    loaded["test"].save_to_disk(tmp_path / "one")
    assert pl.load_data(str(tmp_path / "one"))["train"].to_list() == [{"text": "test", "label": 1}]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"name": "review"},
            "no data set 'review'. Did you mean 'reviews'.* Known: reviews, news, support-desk, digits",
        ),
        ({"name": "support_desk"}, "Did you mean 'support-desk'"),
        ({"name": "news", "difficulty": 0.5}, "difficulty is a dial of support-desk; 'news' has none"),
        ({"name": "news", "sizes": (1, 2)}, "sizes must be three whole numbers"),
        ({"name": "news", "sizes": (1, 2, -3)}, "each of the sizes must be a whole number of at least 0, found -3"),
        ({"name": "support-desk", "difficulty": 2}, "difficulty must be a number .* of at most 1, found 2"),
        ({"name": "org/data", "sizes": (1, 1, 1)}, "sizes is for reviews, news, support-desk, digits only"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(PeftLabError, match=message):
        pl.load_data(**arguments)


def test_a_file_of_an_unknown_kind_and_a_broken_one(tmp_path):
    (tmp_path / "rows.docx").write_text("x")
    with pytest.raises(PeftLabError, match=r"a \.docx file is not known; use \.csv"):
        pl.load_data(str(tmp_path / "rows.docx"))
    (tmp_path / "rows.json").write_text('{"text": ')
    with pytest.raises(PeftLabError, match="cannot be loaded: .*JSON"):
        pl.load_data(str(tmp_path / "rows.json"))


def test_the_support_desk_comes_in_three_splits():
    desk = pl.load_data("support-desk", sizes=(30, 20, 10), difficulty=0.0)
    assert [len(split) for split in desk.values()] == [30, 20, 10]
    row = desk["train"][0]
    assert set(row) == {"message", "ticket", "intent", "product", "urgency", "prompt"}
    assert json.loads(row["ticket"]) == {field: row[field] for field in ("intent", "product", "urgency")}
    assert row["prompt"][-1] == {"role": "user", "content": row["message"]}


@pytest.mark.parametrize("form", ["rows.csv", "rows.tsv", "folder"])
def test_tables_are_read_as_they_are_written(tmp_path, form):
    """pandas takes "NA", "null" and "None" for missing values, and a column of numbers for numbers."""
    cells = ["NA", "null", "None", "nan", "N/A", "007", "1.50", "-"]
    separator = "\t" if form.endswith("tsv") else ","
    lines = [separator.join(("prompt", "completion", "label"))]
    lines += [separator.join((cell, f'"{cell}"', "3")) for cell in cells] + [separator.join(("x", "", "4"))]
    path = tmp_path / form
    if form == "folder":
        path.mkdir()
    (path / "train.csv" if form == "folder" else path).write_text("\n".join(lines) + "\n")
    rows = pl.load_data(str(path))["train"]
    assert rows["prompt"][:] == [*cells, "x"]
    assert rows["completion"][:] == [*cells, None], "an empty cell alone is missing"
    assert rows["label"][:] == [3] * len(cells) + [4]


@pytest.mark.parametrize("name, content", [
    ("rows.csv", b""), ("rows.csv", b"text,label\n\n"), ("rows.tsv", b"text\tlabel"), ("rows.txt", b"\n \n"),
    ("rows.jsonl", b""),
])  # fmt: skip
def test_a_file_without_rows(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PeftLabError, match=f"{name} holds no rows"):
        pl.load_data(str(tmp_path / name))


def test_a_table_of_another_encoding_says_what_to_do(tmp_path):
    (tmp_path / "rows.csv").write_bytes("text,label\ncafé,1\n".encode("latin-1"))
    with pytest.raises(PeftLabError, match="cannot be loaded: .*Save it as UTF-8"):
        pl.load_data(str(tmp_path / "rows.csv"))


def test_a_comma_too_many_in_each_row_moves_no_column(tmp_path):
    """pandas would take the first cells for names of rows: "Well" would be gone, and " yes" the prompt."""
    (tmp_path / "rows.csv").write_text("prompt,completion\nWell, yes,no\nOh, no,yes\n")
    for path in (tmp_path / "rows.csv", tmp_path):
        with pytest.raises(PeftLabError, match="more cells than there are headings"):
            pl.load_data(str(path))


def test_a_link_to_itself_is_no_data_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(PeftLabError, match="There is no data set 'loop'"):
        pl.load_data("loop")
