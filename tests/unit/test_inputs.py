"""Data in the forms that people have it in: each is read, or one line says why not."""

import time
from collections import UserDict

import datasets
import numpy
import pandas
import pytest
import tiny
import torch
import transformers as tf

import peftlab as pl
from peftlab.errors import PeftLabError
from peftlab.training import metrics
from peftlab.training.encoding import Collator
from peftlab.training.identity import data_digest
from peftlab.training.inputs import Inputs
from peftlab.training.losses import causal_lm_loss

ROWS = tiny.examples(12)
SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def run(data, model=None, **settings):
    """The losses of a short run."""
    settings = {"steps": 3, "batch_size": 4, "learning_rate": 0.01, "progress": False, **settings}
    return [row["loss"] for row in pl.train(model or tiny.llama(), data, **settings).steps]


def columns(rows=ROWS):
    return {key: [row[key] for row in rows] for key in rows[0]}


def with_text():
    return [
        {"text": "the cat", "id": f"a{place}", "score": 0.5, "meta": {"a": 1}, **row} for place, row in enumerate(ROWS)
    ]


class MapStyle(torch.utils.data.Dataset):
    """A torch data set of tensors."""

    def __len__(self):
        return len(ROWS)

    def __getitem__(self, index):
        return {key: torch.tensor(value) for key, value in ROWS[index].items()}


class Stream(torch.utils.data.IterableDataset):
    """A torch data set without a length."""

    def __iter__(self):
        return iter(ROWS)


FORMS = {
    "list": lambda: ROWS,
    "tuple": lambda: tuple(ROWS),
    "numpy rows": lambda: [{key: numpy.array(value) for key, value in row.items()} for row in ROWS],
    "other columns": with_text,
    "data set": lambda: datasets.Dataset.from_list(ROWS),
    "data set with other columns": lambda: datasets.Dataset.from_list(with_text()),
    "data set of torch": lambda: datasets.Dataset.from_list(with_text()).with_format("torch", ["input_ids", "labels"]),
    "splits": lambda: datasets.DatasetDict(
        test=datasets.Dataset.from_list(ROWS[:1]), train=datasets.Dataset.from_list(ROWS)
    ),
    "splits of lists": lambda: {"train": ROWS, "test": ROWS[:1]},
    "columns": columns,
    "columns as of a tokenizer": lambda: UserDict(columns()),
    "data frame": lambda: pandas.DataFrame(ROWS),
    "data frame with another index": lambda: pandas.DataFrame(with_text(), index=range(50, 62)),
    "series": lambda: {key: pandas.Series(value, index=range(5, 17)) for key, value in columns().items()},
    "arrow": lambda: datasets.Dataset.from_list(ROWS).data.table,
    "torch data set": MapStyle,
    "generator": lambda: (row for row in ROWS),
    "iterator": lambda: iter(ROWS),
    "stream of datasets": lambda: datasets.Dataset.from_list(with_text()).to_iterable_dataset(),
    "stream of torch": Stream,
    "streams by split": lambda: datasets.IterableDatasetDict(
        train=datasets.Dataset.from_list(ROWS).to_iterable_dataset()
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_trains_alike(form):
    assert run(FORMS[form]()) == run(ROWS)


@pytest.mark.parametrize("form", [form for form in FORMS if "splits" not in form and "split" not in form])
def test_every_form_is_measured_alike(form):
    assert metrics.mean_loss(tiny.llama(), FORMS[form](), Collator()) == metrics.mean_loss(
        tiny.llama(), ROWS, Collator()
    )


def test_a_generator_gives_what_the_steps_take_and_no_more():
    taken = []

    def endless():
        while True:
            taken.append(len(taken))
            yield ROWS[taken[-1] % len(ROWS)]

    assert len(run(endless(), steps=5, batch_size=2, accumulation=2)) == 5
    assert len(taken) == 20
    assert len(run((row for row in ROWS[:3]), steps=4)) == 4, "a short one is gone through again"
    for settings in ({"steps": None}, {"steps": None, "epochs": 1}):
        with pytest.raises(PeftLabError, match="train_data is a generator, which has no length.*steps="):
            run((row for row in ROWS), **settings)
    with pytest.raises(PeftLabError, match="evaluation_data is a generator.*islice"):
        run(ROWS, evaluation_data=(row for row in ROWS))


def test_evaluation_data_in_splits_is_the_validation_split():
    data = datasets.DatasetDict(
        train=datasets.Dataset.from_list(ROWS[4:]), validation=datasets.Dataset.from_list(ROWS[:4])
    )
    made = tiny.llama()
    history = pl.train(made, data, evaluation_data=data, steps=2, progress=False)
    assert history.evaluations[-1]["loss"] == pytest.approx(metrics.mean_loss(made, ROWS[:4], Collator()))


def test_labels_may_be_called_as_transformers_calls_them():
    torch.manual_seed(0)
    made = tf.BertForSequenceClassification(tf.BertConfig(**SMALL))
    rows = [{"input_ids": [5, 6, place], "labels": place % 2} for place in range(8)]
    for name in ("label", "label_ids"):
        renamed = [{"text": "a", "input_ids": row["input_ids"], name: row["labels"]} for row in rows]
        for data in (renamed, datasets.Dataset.from_list(renamed)):
            assert metrics.mean_loss(made, data, Collator()) == metrics.mean_loss(made, rows, Collator())


def test_a_classification_data_set_trains_as_it_comes():
    features = datasets.Features(
        {
            "sentence": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["bad", "good"]),
            "idx": datasets.Value("int32"),
        }
    )
    raw = datasets.Dataset.from_list(
        [{"sentence": "the cat runs", "label": place % 2, "idx": place} for place in range(8)], features=features
    )
    tokenizer = tiny.tokenizer()
    encoded = raw.map(lambda row: tokenizer(row["sentence"]))
    torch.manual_seed(0)
    made = tf.BertForSequenceClassification(tf.BertConfig(**SMALL))
    assert len(run(encoded, made, tokenizer=tokenizer)) == 3
    assert set(metrics.predict_labels(made, encoded, tokenizer)) <= {0, 1}


def test_columns_that_are_not_used_are_not_decoded():
    """A picture that is not there is no fault where nobody looks at it."""
    pictures = datasets.Dataset.from_list([{"picture": "/nowhere.png", **row} for row in ROWS])
    pictures = pictures.cast_column("picture", datasets.Image())
    assert run(pictures) == run(ROWS)


def test_a_loss_of_ones_own_reads_any_column_of_numbers():
    seen = []

    def weighted(model, batch):
        seen.append(batch["weight"])
        inputs = {key: value for key, value in batch.items() if key != "weight"}
        return causal_lm_loss(model, inputs)

    run([{"weight": 0.5, "text": "the cat", **row} for row in ROWS], loss=weighted)
    assert seen[0].tolist() == [0.5] * 4


def test_a_collate_of_ones_own_gets_the_rows_as_they_are():
    def collate(rows):
        assert {row["text"] for row in rows} == {"the cat"}
        return Collator()([{key: row[key] for key in ("input_ids", "labels")} for row in rows])

    assert run(with_text(), collate=collate, evaluation_data=with_text()) == run(ROWS)
    assert metrics.mean_loss(tiny.llama(), with_text(), collate) > 0


def test_what_is_read_of_an_example_decides_whether_a_run_is_the_same():
    """A run's folder knows its data by the columns that are used, so that of plain examples stays what it was."""
    inputs = Inputs(tiny.llama(), Collator())
    assert data_digest(inputs.examples(ROWS, "d")) == data_digest(ROWS)
    assert data_digest(inputs.examples(with_text(), "d")) == data_digest(ROWS)


BAD = {
    "nothing": (None, "train_data is None"),
    "a name": ("reviews", "train_data is 'reviews'"),
    "a number": (3, "train_data is 3"),
    "texts": (["the cat", "a dog"], "train_data is a str .'"),
    "pairs": ([("the cat", 1)], "train_data is a tuple"),
    "one example": ({"input_ids": 5, "labels": 1}, "'input_ids' is one int. Put one example into a list"),
    "one example's lists": ({"input_ids": [5, 6], "labels": [5, 6]}, "input_ids is one number, .* Put one example"),
    "columns of two lengths": ({"input_ids": [[5]], "labels": [[5], [6]]}, "columns of different lengths"),
    "no train split": ({"test": ROWS}, "splits 'test'; it has none called 'train'"),
    "no rows": ([], "no example"),
    "two columns of one name": (pandas.DataFrame([[1, 2]], columns=["a", "a"]), "two columns of one name: a, a"),
    "a hole in a frame": (
        pandas.DataFrame({"input_ids": [[5, 6], None], "labels": [[5, 6]] * 2}),
        "Example 1 of train_data: input_ids is None",
    ),
    "a column of a data set": (datasets.Dataset.from_list(ROWS)["input_ids"], "train_data is a list"),
    "no input_ids": ([{"text": "a", "labels": [1]}], "columns 'text', 'labels', and Llama.* reads 'input_ids'"),
    "text alone": (datasets.Dataset.from_dict({"text": ["a"]}), "LlamaForCausalLM reads 'input_ids'"),
    "empty": ([{"input_ids": [5, 6], "labels": [5, 6]}, {"input_ids": [], "labels": []}], "Example 1 of .* is empty"),
    "text in input_ids": ([{"input_ids": "the cat", "labels": [5]}], "input_ids is 'the cat'"),
    "nothing in input_ids": ([{"input_ids": None, "labels": [5]}], "input_ids is None"),
    "halves": ([{"input_ids": [5.5, 6.0], "labels": [5, 6]}], "input_ids are whole numbers, found float32"),
    "beyond the vocabulary": ([{"input_ids": [5, 32], "labels": [5, 6]}], "hold 32, .*vocabulary.*0 to 31.*resize"),
    "below it": ([{"input_ids": [5, -1], "labels": [5, 6]}], "input_ids hold -1"),
    "a short mask": ([{"input_ids": [5, 6], "attention_mask": [1], "labels": [5, 6]}], "2 input_ids and 1 attention"),
    "no labels": ([{"input_ids": [5, 6]}], "have no 'labels'"),
    "other columns in a row": ([ROWS[0], {"input_ids": [5, 6]}], "differ in their fields"),
    "a loader": (torch.utils.data.DataLoader(ROWS), "gives batches; give the examples"),
    "a function": (lambda: iter(ROWS), "has no examples. Call it"),
    "a set": ({5, 6}, "train_data is a int"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_what_cannot_be_read_is_told_in_one_line(what):
    data, message = BAD[what]
    model = tiny.llama()
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(PeftLabError, match=message) as raised:
        run(data, model, steps=1, batch_size=2)
    assert "\n" not in str(raised.value)
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def test_splits_are_not_chosen_for_a_measure():
    with pytest.raises(PeftLabError, match="holds the splits 'train', 'test'. Choose one: data\\['train'\\]"):
        metrics.mean_loss(tiny.llama(), {"train": ROWS, "test": ROWS}, Collator())


@pytest.mark.parametrize(
    ("name", "settings", "tokens", "limit"),
    [
        ("GPT2LMHeadModel", {"n_positions": 8, "n_embd": 32, "n_layer": 1, "n_head": 4}, 9, 8),
        ("BertForMaskedLM", {**SMALL, "max_position_embeddings": 8}, 9, 8),
        ("RobertaForMaskedLM", {**SMALL, "max_position_embeddings": 10}, 9, 8),
        ("OPTForCausalLM", {**SMALL, "ffn_dim": 32, "word_embed_proj_dim": 32, "max_position_embeddings": 8}, 9, 8),
    ],
)
def test_a_text_longer_than_the_positions(name, settings, tokens, limit):
    kind = getattr(tf, name)
    made = kind(kind.config_class(**{"vocab_size": 64, "pad_token_id": 1, **settings}))
    rows = [{"input_ids": [5] * 3, "labels": [6] * 3}, {"input_ids": [5] * tokens, "labels": [6] * tokens}]
    with pytest.raises(PeftLabError, match=f"Example 1 of train_data has 9 tokens, .* {limit} positions; .*={limit}"):
        run(rows, made)
    cut = [{key: value[:limit] for key, value in row.items()} for row in rows]
    assert len(run(cut, made)) == 3, "the longest that fits does"


def test_token_types_that_a_model_does_not_have():
    made = tf.RobertaForMaskedLM(tf.RobertaConfig(**SMALL, type_vocab_size=1))
    with pytest.raises(PeftLabError, match="token_type_ids hold 1, and those of RobertaForMaskedLM go from 0 to 0"):
        run([{"input_ids": [5, 6], "token_type_ids": [0, 1], "labels": [6, 7]}], made)
    plain = [{**row, "token_type_ids": [0] * len(row["input_ids"])} for row in ROWS]
    assert run(plain) == run(ROWS), "a Llama reads none"


def test_what_a_model_raises_of_a_batch_is_told_in_one_line():
    made = tf.ViTForImageClassification(
        tf.ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, image_size=8, patch_size=4)
    )
    with pytest.raises(
        PeftLabError, match=r"ViTForImageClassification cannot read a batch of pixel_values \(2, 3, 4, 4\): ValueError"
    ):
        run([{"pixel_values": torch.zeros(3, 4, 4), "labels": 0}] * 2, made, batch_size=2)
    with pytest.raises(PeftLabError, match="another shape in each example"):
        run([{"pixel_values": torch.zeros(3, side, side), "labels": 0} for side in (4, 8)], made, batch_size=2)
    bart = {
        "vocab_size": 64,
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
        "eos_token_id": 2,
    }
    made = tf.BartForSequenceClassification(tf.BartConfig(**bart))
    with pytest.raises(PeftLabError, match="same number of <eos> tokens"):
        run([{"input_ids": [5, 2], "labels": 0}, {"input_ids": [5, 6], "labels": 0}], made, batch_size=2)


@pytest.mark.parametrize("missing", ["pad_token_id", "decoder_start_token_id"])
def test_an_encoder_decoder_whose_config_lacks_what_it_starts_from(missing):
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 4}
    made = tf.T5ForConditionalGeneration(
        tf.T5Config(**sizes, **({} if "start" in missing else {"decoder_start_token_id": 0}))
    )
    made.config.pad_token_id = None if "pad" in missing else 0
    with pytest.raises(PeftLabError, match=f"T5ForConditionalGeneration cannot read a batch of .*{missing}"):
        run([{"input_ids": [5, 6], "labels": [7, 8]}], made)


@pytest.mark.parametrize("collate", [None, 3])
def test_a_collate_that_is_none(collate):
    with pytest.raises(PeftLabError, match=f"collate must be a function, found {collate}"):
        metrics.mean_loss(tiny.llama(), ROWS, collate)
    with pytest.raises(PeftLabError, match="collate gave a NoneType"):
        run(ROWS, collate=lambda rows: None)


def test_lengths_are_grouped_only_where_there_are_some():
    made = tf.ViTForImageClassification(
        tf.ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, image_size=8, patch_size=4)
    )
    rows = [{"pixel_values": torch.zeros(3, 8, 8), "labels": 0}] * 4
    with pytest.raises(PeftLabError, match="group_by_length needs input_ids"):
        run(rows, made, group_by_length=True)
    assert run(datasets.Dataset.from_list(with_text()), group_by_length=True) == run(ROWS, group_by_length=True)


@pytest.mark.slow
def test_reading_and_checking_cost_little_beside_a_step():
    """On one core, 8 examples of 256 tokens: beside a step of a model of 10 million parameters, less than 2%."""
    rows = [{"input_ids": [5 + place % 50] * 256, "labels": [5 + place % 50] * 256} for place in range(8)]
    inputs, collate = Inputs(tiny.llama(vocab_size=64, max_position_embeddings=512), Collator()), Collator()
    examples = inputs.examples(rows, "d")

    def seconds(work):
        best = float("inf")
        for _ in range(30):
            began = time.perf_counter()
            work()
            best = min(best, time.perf_counter() - began)
        return best

    plain = seconds(lambda: collate([rows[place] for place in range(8)]))
    checked = seconds(lambda: inputs([examples[place] for place in range(8)]))
    assert checked - plain < 0.002


def test_texts_of_one_length_without_padding_are_searched_for_it_too():
    """A classifier looks for the last token before the padding, and takes a last token of that id for padding."""

    def model(pad):
        return tf.LlamaForSequenceClassification(tiny.llama(num_labels=2, pad_token_id=pad).config)

    rows = [{"input_ids": ids, "labels": 0} for ids in ([3, 4, 5], [6, 7, 8])]
    with pytest.raises(PeftLabError, match="finds the end of a text by config.pad_token_id"):
        Inputs(model(None), Collator())(rows)
    with pytest.warns(UserWarning, match="A text ends in the token 8, which is config.pad_token_id"):
        Inputs(model(8), Collator())(rows)
    assert Inputs(model(9), Collator())(rows)["input_ids"].tolist() == [[3, 4, 5], [6, 7, 8]]
