"""The default loss is the one of the model's task: transformers' own, on small models of many families."""

import copy

import pytest
import tiny
import torch
import transformers as tf
from torch import nn

import peftlab as pl
from peftlab.errors import PeftLabError
from peftlab.training import losses, metrics
from peftlab.training.encoding import IGNORE, Collator

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
BART = {
    "vocab_size": 64, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 32,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2,
}  # fmt: skip
T5 = {
    "vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 4,
    "decoder_start_token_id": 0,
}  # fmt: skip
DISTIL = {"vocab_size": 64, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
VIT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip


def model(name, config, seed=0, **settings):
    torch.manual_seed(seed)
    kind = getattr(tf, name)
    made = kind(kind.config_class(**{**config, **settings}))
    with torch.no_grad():
        for parameter in made.parameters():  # an untouched head says the same of everything
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return made.eval()


def rows(labels, seed=0, lengths=(5, 9, 3, 7)):
    draw = torch.Generator().manual_seed(seed)
    ids = [torch.randint(3, 60, (length,), generator=draw).tolist() for length in lengths]
    return [{"input_ids": tokens, **labels(place, tokens)} for place, tokens in enumerate(ids)]


def continuation(place, tokens):
    return {"labels": [IGNORE] * (place % 3) + tokens[place % 3 :]}


def masked(place, tokens):
    return {"labels": [(token + 7) % 60 if at % 3 == place % 2 else IGNORE for at, token in enumerate(tokens)]}


def tags(place, tokens):
    return {"labels": [IGNORE if at == 0 else token % 3 for at, token in enumerate(tokens)]}


def span(place, tokens):
    return {"start_positions": place % 3, "end_positions": min(place % 3 + 1, len(tokens) - 1)}


def own_loss(made, examples):
    """What transformers gives for one batch; its config is put back, for it notes the kind of problem there."""
    config = copy.deepcopy(made.config)
    with torch.no_grad():
        loss = made(**Collator()(examples)).loss.item()
    made.config.problem_type = getattr(config, "problem_type", None)
    return loss


FAMILIES = [
    ("LlamaForCausalLM", SMALL, continuation),
    ("GPT2LMHeadModel", GPT2, continuation),
    ("OPTForCausalLM", {**SMALL, "ffn_dim": 32, "word_embed_proj_dim": 32, "pad_token_id": 1}, continuation),
    ("BertLMHeadModel", {**SMALL, "is_decoder": True}, continuation),
    ("BertForMaskedLM", SMALL, masked),
    ("RobertaForMaskedLM", {**SMALL, "max_position_embeddings": 32}, masked),
    ("DistilBertForMaskedLM", DISTIL, masked),
    ("BertForTokenClassification", {**SMALL, "num_labels": 3}, tags),
    ("DistilBertForTokenClassification", {**DISTIL, "num_labels": 3}, tags),
    ("LlamaForTokenClassification", {**SMALL, "num_labels": 3}, tags),
    ("T5ForTokenClassification", {**T5, "num_labels": 3}, tags),
    ("T5ForConditionalGeneration", T5, lambda place, tokens: {"labels": tokens[::-1][:3]}),
    ("BartForConditionalGeneration", BART, lambda place, tokens: {"labels": [2, *tokens[1:4]]}),
    ("MarianMTModel", BART, lambda place, tokens: {"labels": tokens[:2]}),
    ("BertForQuestionAnswering", SMALL, span),
    ("RobertaForQuestionAnswering", {**SMALL, "max_position_embeddings": 32}, span),
    ("DistilBertForQuestionAnswering", DISTIL, span),
    ("BartForQuestionAnswering", BART, span),
]
CLASSIFIERS = [
    ("BertForSequenceClassification", SMALL),
    ("RobertaForSequenceClassification", {**SMALL, "max_position_embeddings": 32}),
    ("DistilBertForSequenceClassification", DISTIL),
    ("LlamaForSequenceClassification", {**SMALL, "pad_token_id": 0}),
    ("GPT2ForSequenceClassification", {**GPT2, "pad_token_id": 0}),
]


@pytest.mark.parametrize(("name", "config", "labels"), FAMILIES, ids=[name for name, *_ in FAMILIES])
def test_a_models_own_loss_in_each_family(name, config, labels):
    made, examples = model(name, config), rows(labels)
    assert metrics.mean_loss(made, examples, Collator(), batch_size=4) == pytest.approx(
        own_loss(made, examples), abs=1e-6
    )


@pytest.mark.parametrize(("name", "config"), CLASSIFIERS, ids=[name for name, _ in CLASSIFIERS])
@pytest.mark.parametrize(
    ("settings", "labels"),
    [
        ({"num_labels": 3}, lambda place: place % 3),
        ({"num_labels": 3}, lambda place: [float(place == at) for at in range(3)]),
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, lambda place: [1.0, 0.0, place % 2 / 1]),
        ({"num_labels": 1}, lambda place: 0.5 * place),
        ({"num_labels": 1}, lambda place: place),
        ({"num_labels": 3, "problem_type": "regression"}, lambda place: [0.5 * place, 2.0, -7.0]),
    ],
    ids=["one class", "several", "several, said so", "a number", "a whole number", "three numbers"],
)
def test_a_classifiers_own_loss_for_each_kind_of_labels(name, config, settings, labels):
    made, examples = model(name, config, **settings), rows(lambda place, tokens: {"labels": labels(place)})
    ours = metrics.mean_loss(made, examples, Collator(), batch_size=4)
    assert made.config.problem_type == settings.get("problem_type"), "nothing is noted behind the user's back"
    if settings["num_labels"] == 1 and isinstance(labels(1), int):  # transformers subtracts whole numbers as they are
        examples = [{**row, "labels": float(row["labels"])} for row in examples]
    assert ours == pytest.approx(own_loss(made, examples), abs=1e-6)


def test_images_have_classes_too():
    made = model("ViTForImageClassification", VIT, num_labels=3)
    draw = torch.Generator().manual_seed(0)
    examples = [{"pixel_values": torch.randn(3, 8, 8, generator=draw), "labels": place % 3} for place in range(4)]
    right = made(pixel_values=torch.stack([row["pixel_values"] for row in examples]), labels=torch.tensor([0, 1, 2, 0]))
    assert metrics.mean_loss(made, examples, Collator()) == pytest.approx(right.loss.item(), abs=1e-6)


def test_multiple_choice_and_the_next_sentence():
    made = model("BertForMultipleChoice", SMALL)
    draw = torch.Generator().manual_seed(0)
    examples = [{"input_ids": torch.randint(3, 60, (2, 6), generator=draw), "labels": place % 2} for place in range(4)]
    ids, labels = torch.stack([row["input_ids"] for row in examples]), torch.tensor([0, 1, 0, 1])
    right = made(input_ids=ids, labels=labels).loss.item()
    assert metrics.mean_loss(made, examples, Collator()) == pytest.approx(right, abs=1e-6)
    with pytest.raises(PeftLabError, match="labels hold 2, and the classes.*0 to 1"):
        metrics.mean_loss(made, [{**examples[0], "labels": 2}], Collator())
    made, examples = model("BertForNextSentencePrediction", SMALL), rows(lambda place, tokens: {"labels": place % 2})
    assert metrics.mean_loss(made, examples, Collator()) == pytest.approx(own_loss(made, examples), abs=1e-6)


def test_whole_numbers_for_each_class_are_several_labels():
    """transformers refuses whole numbers here; a row of 0 and 1 as wide as the classes can mean nothing else."""
    made = model("BertForSequenceClassification", SMALL, num_labels=3)
    examples = rows(lambda place, tokens: {"labels": [place % 2, 1, 0]})
    floats = [{**row, "labels": [float(one) for one in row["labels"]]} for row in examples]
    assert metrics.mean_loss(made, examples, Collator()) == pytest.approx(own_loss(made, floats), abs=1e-6)


@pytest.mark.parametrize("split", [1, 2, 4])
@pytest.mark.parametrize(
    ("name", "config", "labels"),
    [
        ("BertForTokenClassification", {**SMALL, "num_labels": 3}, tags),
        (
            "BertForSequenceClassification",
            {**SMALL, "num_labels": 3},
            lambda place, _: {"labels": [1.0, 0.0, place % 2]},
        ),
        ("BertForSequenceClassification", {**SMALL, "num_labels": 1}, lambda place, _: {"labels": place / 3}),
    ],
)
def test_a_mean_does_not_depend_on_the_batches(name, config, labels, split):
    made, examples = model(name, config).double(), rows(labels)
    whole = metrics.mean_loss(made, examples, Collator(), batch_size=4)
    assert metrics.mean_loss(made, examples, Collator(), batch_size=split) == pytest.approx(whole, rel=1e-6)


def test_a_span_behind_the_texts_end_counts_as_none():
    made = model("DistilBertForQuestionAnswering", DISTIL)
    examples = rows(
        lambda place, tokens: {"start_positions": 99 if place == 1 else 1, "end_positions": 99 if place == 1 else 2}
    )
    assert metrics.mean_loss(made, examples, Collator()) == pytest.approx(own_loss(made, examples), abs=1e-6)
    with pytest.raises(PeftLabError, match="Example 2 of the examples: end_positions hold -1"):
        metrics.mean_loss(made, [*examples[:2], {**examples[2], "end_positions": -1}], Collator())
    with pytest.raises(PeftLabError, match="need start_positions and end_positions"):
        metrics.mean_loss(made, [{"input_ids": [5, 6]}], Collator())


def test_answers_behind_virtual_tokens_and_of_embeddings():
    """The logits of virtual tokens are no tokens of the text, and a text may come as embeddings."""
    made = model("BertForQuestionAnswering", SMALL)
    batch = Collator()(rows(span))
    batch["start_positions"][0] = batch["input_ids"].shape[1]  # just behind the text, so that it counts as none
    expected, count = losses.question_answering_loss(made, batch)
    assert count == 7
    embeddings = {key: value for key, value in batch.items() if key != "input_ids"}
    embeddings["inputs_embeds"] = made.get_input_embeddings()(batch["input_ids"])
    found, count = losses.question_answering_loss(made, embeddings)
    assert count == 7 and found.item() == pytest.approx(expected.item(), rel=1e-6)
    pl.attach(made, pl.PromptTuningConfig(num_virtual_tokens=3))
    output = made(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    found, count = losses.question_answering_loss(made, batch)
    wanted = 0.0
    for side in ("start", "end"):
        of_text = output[f"{side}_logits"][:, -batch["input_ids"].shape[1] :].log_softmax(1)
        places = [(row, place) for row, place in enumerate(batch[f"{side}_positions"]) if place < of_text.shape[1]]
        wanted -= sum(of_text[row, place] for row, place in places)
    assert count == 7 and found.item() == pytest.approx(wanted.item(), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_of_16_bit_models_are_summed_in_float32(dtype):
    made = model("BertForSequenceClassification", SMALL, num_labels=3).to(dtype)
    batch = Collator()(rows(lambda place, tokens: {"labels": [0.1, 0.7, place / 3]}))
    logits = made(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
    labels = batch["labels"]
    for loss, right in (
        (losses.multi_label_loss, -(labels * logits.sigmoid().log() + (1 - labels) * (-logits).sigmoid().log()).sum()),
        (losses.regression_loss, (logits - labels).square().sum()),
    ):
        total, count = loss(made, batch)
        assert total.dtype == torch.float32 and count == 12
        assert total.item() == pytest.approx(right.item(), rel=1e-6)


def test_taggers_learn_this_tokens_tag():
    made = model("RobertaForTokenClassification", {**SMALL, "max_position_embeddings": 32}, num_labels=4)
    pl.attach(made, pl.LoRAConfig(r=8, alpha=32, task_type="TOKEN_CLS", target_modules="all-linear"))
    examples = rows(lambda place, tokens: {"labels": [token % 4 for token in tokens]}, lengths=[8] * 48)
    pl.train(made, examples, steps=120, batch_size=16, learning_rate=2e-2, progress=False)
    found = metrics.predict_labels(made, examples)
    assert (
        sum(
            tag == label
            for a, row in zip(found, examples, strict=True)
            for tag, label in zip(a, row["labels"], strict=True)
        )
        > 0.95 * 48 * 8
    )


def test_causal_models_of_transformers_that_do_not_shift_learn_the_next_token():
    """BartForCausalLM leaves the shift to its caller; here a label stands at its own token, whatever the class."""
    made = model("BartForCausalLM", {**BART, "is_decoder": True, "is_encoder_decoder": False})
    examples = [{"input_ids": ids, "labels": ids} for ids in ([5, 6, 7, 8, 9, 10], [20, 5, 6, 7], [8, 9, 10])]
    history = pl.train(made, examples, steps=60, batch_size=3, learning_rate=1e-2, progress=False)
    assert history.steps[-1]["loss"] < 0.5
    assert made.eval()(torch.tensor([[5, 6, 7, 8]])).logits.argmax(-1).tolist()[0][:3] == [6, 7, 8]


def test_a_mixture_of_experts_that_balances_its_routers():
    made = model(
        "MixtralForCausalLM", {**SMALL, "num_key_value_heads": 2, "num_local_experts": 4, "output_router_logits": True}
    )
    examples = rows(continuation, lengths=(6, 6, 6))
    batch = Collator()(examples)
    with torch.no_grad():
        right, (total, count) = made(**batch).loss.item(), losses.causal_lm_loss(made, batch)
    assert (total / count).item() == pytest.approx(right, abs=1e-6)


def test_a_class_made_from_one_of_transformers_has_its_task():
    class Tagger(tf.BertForTokenClassification):
        """A name that says nothing."""

    assert (
        losses.default_loss(Tagger(tf.BertConfig(**SMALL)), {"labels": torch.zeros(2, 3).long()}) is losses.token_loss
    )


def test_the_default_loss_goes_by_the_task_and_not_by_the_shape():
    one, each = {"labels": torch.zeros(2).long()}, {"labels": torch.zeros(2, 3).long()}
    decoder = tiny.llama()
    assert losses.default_loss(decoder, each) is losses.causal_lm_loss
    with pytest.raises(PeftLabError, match="causal language modelling: its labels are one whole number a token"):
        losses.default_loss(decoder, one)
    decoder.config.is_encoder_decoder = True  # a causal model stays one, whatever lies beside it
    assert losses.default_loss(decoder, each) is losses.causal_lm_loss
    with pytest.raises(PeftLabError, match="no 'labels'"):
        losses.default_loss(decoder, {"input_ids": each["labels"]})
    classifier = model("BertForSequenceClassification", SMALL, num_labels=4)
    assert losses.default_loss(classifier, one) is losses.classification_loss
    with pytest.raises(PeftLabError, match=r"num_labels=4.*int64 labels \(2, 3\)"):
        losses.default_loss(classifier, each)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("BertModel", SMALL),
        ("BertForPreTraining", SMALL),
        ("ElectraForPreTraining", {**SMALL, "embedding_size": 32}),
        ("XLNetLMHeadModel", {"vocab_size": 64, "d_model": 32, "n_layer": 1, "n_head": 4, "d_inner": 32}),
        (
            "Wav2Vec2ForXVector",
            {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32},
        ),
    ],
)
def test_what_is_not_known_is_refused(name, config):
    kind = getattr(tf, name)
    with torch.device("meta"):
        made = kind(kind.config_class(**config))
    with pytest.raises(PeftLabError, match=f"loss of {name} is not known here. Pass loss="):
        pl.train(made, rows(continuation), steps=1, progress=False)


class Own(nn.Module):
    """A module of a person's own, with logits for each token."""

    def __init__(self, outputs=64):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(64, 8), nn.Linear(8, outputs)

    def forward(self, input_ids, attention_mask=None):
        return self.head(self.embedding(input_ids))


def test_a_module_of_ones_own_is_a_causal_model_where_the_labels_are_the_tokens():
    pl.train(Own(), rows(continuation), steps=1, progress=False)
    for labels in (tags, masked):
        with pytest.raises(PeftLabError, match="task is not known.*token_loss"):
            pl.train(Own(), rows(labels), steps=1, progress=False)
        assert pl.train(Own(), rows(labels), steps=1, loss=losses.token_loss, progress=False).steps[0]["tokens"] > 0


def test_labels_that_do_not_fit_are_told():
    bert = model("BertForSequenceClassification", SMALL, num_labels=3), 0
    several = bert[0], [0, 1, 0]
    tagger = model("BertForTokenClassification", SMALL, num_labels=3), [0, 1, 2]
    masker, decoder = (model("BertForMaskedLM", SMALL), [IGNORE, 9, 9]), (tiny.llama(), [5, 6, 7])
    for (made, good), label, message in (
        (bert, 3, "Example 1 of train_data: labels hold 3, and the classes .* 0 to 2"),
        (bert, -1, "labels hold -1"),
        (bert, 0.5, "3 numbers an example .for one class of several they are whole"),
        (bert, [1, 0], "labels has another shape in each example"),
        (bert, "good", "labels is 'good', not a number"),
        (bert, None, "labels is None"),
        (bert, float("nan"), "labels is nan"),
        (several, [0.0, 1.5, 1.0], "the label 1.5 lies outside 0 to 1.*'regression'"),
        (several, [0, 2, 1], "the label 2 lies outside 0 to 1"),
        (several, [1, 0], "the label -100 lies outside 0 to 1"),
        (tagger, [0, 1, 7], "labels hold 7, and the classes"),
        (tagger, [0, 1], "3 input_ids and 2 labels.*for each token, not for each word"),
        (masker, [IGNORE, -7, 3], "labels hold -7"),
        (masker, [IGNORE, 64, 3], "labels hold 64, and the tokens .* 0 to 63"),
        (decoder, [5, 6, 32], "labels hold 32, and the tokens .* 0 to 31"),
        (decoder, [5, -7, 6], "labels hold -7"),
        (decoder, [5, 6, 7, 8], "3 input_ids and 4 labels"),
        (decoder, [[5, 6], [7]], "3 input_ids and 2 labels"),
        (decoder, [5, "x", 7], "labels of an example cannot become a tensor"),
    ):
        examples = [{"input_ids": [5, 6, 7], "labels": good}, {"input_ids": [5, 6, 7], "labels": label}]
        with pytest.raises(PeftLabError, match=message):
            pl.train(made, examples, steps=1, batch_size=2, progress=False)
    one = model("BertForSequenceClassification", SMALL, num_labels=1)
    for made, label, number in ((bert[0], [1, 0], "3 numbers"), (one, [0.5, 1.0], "one number")):
        with pytest.raises(PeftLabError, match=rf"{number} an example \(see"):
            pl.train(made, [{"input_ids": [5, 6, 7], "labels": label}], steps=1, progress=False)
    with pytest.raises(PeftLabError, match="token classification: its labels are one whole number a token"):
        pl.train(tagger[0], [{"input_ids": [5, 6, 7], "labels": 1}], steps=1, progress=False)


@pytest.mark.parametrize("width", [3, 5])
@pytest.mark.parametrize("fast", ["auto", False])
@pytest.mark.parametrize("loss_in_chunks", [True, False])
def test_each_token_has_one_label(width, fast, loss_in_chunks):
    """Fewer would be taken for those of the last tokens, and more would be cut off."""
    made = pl.attach(tiny.llama(), pl.LoRAConfig(r=2, target_modules=["q_proj"]))
    settings = {"steps": 1, "batch_size": 2, "fast": fast, "chunked_loss": loss_in_chunks, "progress": False}

    def collate(_):
        return {"input_ids": torch.ones(2, 4, dtype=torch.long), "labels": torch.ones(2, width, dtype=torch.long)}

    with pytest.raises(PeftLabError, match=rf"labels \(2, {width}\) beside input_ids \(2, 4\); each token has one"):
        pl.train(made, tiny.examples(4), collate=collate, **settings)
    with pytest.raises(PeftLabError, match="The labels of a batch are a list; a batch is a dict of tensors"):
        pl.train(made, tiny.examples(4), collate=lambda _: {**collate(_), "labels": [[1] * 4] * 2}, **settings)


def test_labels_of_another_shape_are_never_those_of_other_rows():
    values = torch.arange(2 * 4 * 3.0).view(2, 4, 3)
    for shape in ((2, 3), (2, 5), (8,), (1, 4)):
        with pytest.raises(PeftLabError, match=r"do not go with outputs \(2, 4, 3\), one a row"):
            losses.learned_rows(values, torch.ones(shape, dtype=torch.long), 3)


def test_config_problem_type_is_obeyed_or_refused():
    made = model("BertForSequenceClassification", SMALL, num_labels=2, problem_type="single_label_classification")
    with pytest.raises(PeftLabError, match="of which one is right"):
        metrics.mean_loss(made, rows(lambda place, tokens: {"labels": [1.0, 0.0]}), Collator())
    vars(made.config)["problem_type"] = "ranking"  # some releases of transformers check what is assigned
    with pytest.raises(PeftLabError, match="'ranking'; transformers knows"):
        metrics.mean_loss(made, rows(lambda place, tokens: {"labels": 1}), Collator())


def test_a_prediction_is_of_the_models_task():
    examples = rows(lambda place, tokens: {"labels": [1, 0, 1]})
    batch = Collator()([{"input_ids": row["input_ids"]} for row in examples])
    several = model("BertForSequenceClassification", SMALL, num_labels=3)
    right = (several(**batch).logits > 0).long().tolist()
    assert len({tuple(row) for row in right}) > 1 and metrics.predict_labels(several, examples) == right
    bare = [{"input_ids": row["input_ids"]} for row in examples]
    assert metrics.predict_labels(several, bare) == several(**batch).logits.argmax(-1).tolist()
    several.config.problem_type = "multi_label_classification"
    assert metrics.predict_labels(several, bare, batch_size=2) == right
    number = model("DistilBertForSequenceClassification", DISTIL, num_labels=1)
    assert metrics.predict_labels(number, bare) == pytest.approx(number(**batch).logits[:, 0].tolist(), abs=1e-6)
    tagger = model("BertForTokenClassification", SMALL, num_labels=3)
    alone = [tagger(torch.tensor([row["input_ids"]])).logits.argmax(-1).tolist()[0] for row in bare]
    assert metrics.predict_labels(tagger, bare, batch_size=2) == alone, "and nothing is said of padding"
    with pytest.raises(PeftLabError, match="is for causal language modelling; predict_labels"):
        metrics.predict_labels(tiny.llama(), bare)


def test_perplexity_is_of_models_that_predict_the_next_token():
    tokenizer = tiny.tokenizer()
    for made in (model("T5ForConditionalGeneration", T5), model("BertForMaskedLM", SMALL)):
        with pytest.raises(PeftLabError, match="reads a text whole"):
            metrics.perplexity(made, ["the cat runs"], tokenizer)
    with pytest.raises(PeftLabError, match="is for classification; perplexity"):
        metrics.perplexity(model("BertForSequenceClassification", SMALL), [{"input_ids": [5], "labels": 0}])


def test_an_encoder_is_not_given_the_answer():
    """In a decoder's form the answer stands in input_ids: whatever the collate, that is refused."""
    made, examples = (
        model("BartForConditionalGeneration", BART),
        rows(lambda p, t: {"labels": [IGNORE, IGNORE, *t[2:]]}),
    )
    for call in (
        lambda: pl.train(made, examples, steps=1, progress=False),
        lambda: pl.train(made, examples, steps=1, collate=Collator(), progress=False),
        lambda: metrics.mean_loss(made, examples, Collator()),
        lambda: metrics.mean_loss(made, examples, lambda chosen: Collator()(chosen)),
        lambda: metrics.perplexity(made, examples),
    ):
        with pytest.raises(PeftLabError, match="has its answer in input_ids.*model=model"):
            call()


def test_one_answer_among_sound_examples_is_found():
    made = model("BartForConditionalGeneration", BART)
    sound = [{"input_ids": [5, 6, 7], "labels": [9, 8, 7, 6, 5]}] * 2
    with pytest.raises(PeftLabError, match="Example 2 of train_data has its answer in input_ids"):
        pl.train(made, [*sound, {"input_ids": [5, 6, 7], "labels": [IGNORE, 6, 7]}], batch_size=3, progress=False)


def test_labels_that_can_be_copied_are_warned_of():
    same = rows(lambda place, tokens: {"labels": tokens})
    with pytest.warns(UserWarning, match="encoder of T5ForConditionalGeneration reads the very tokens"):
        metrics.mean_loss(model("T5ForConditionalGeneration", T5), same, Collator())
    with pytest.warns(UserWarning, match="every token that it is to predict stands in input_ids"):
        metrics.mean_loss(model("RobertaForMaskedLM", {**SMALL, "max_position_embeddings": 32}), same, Collator())


def test_random_answers_cannot_be_learned_from_the_prompt():
    """The entropy of three of 57 tokens and an end is 3.03 a label; below it the encoder has read the answer."""
    draw = torch.Generator().manual_seed(3)
    examples = rows(
        lambda place, tokens: {"labels": torch.randint(3, 60, (3,), generator=draw).tolist() + [1]}, lengths=[5] * 320
    )
    made = model("T5ForConditionalGeneration", T5, dropout_rate=0.0)
    pl.train(made, examples[:256], steps=60, batch_size=32, learning_rate=1e-2, progress=False)
    assert metrics.mean_loss(made, examples[256:], Collator(), batch_size=32) > 3.0


@pytest.mark.parametrize(
    "config",
    [
        pl.LoRAConfig(r=4, task_type="SEQ_CLS"),
        pl.PrefixTuningConfig(num_virtual_tokens=3, task_type="SEQ_CLS"),
        pl.PromptTuningConfig(num_virtual_tokens=3, task_type="SEQ_CLS"),
    ],
    ids=lambda config: type(config).__name__,
)
def test_an_adapter_learns_several_labels(config):
    made = model(
        "DistilBertForSequenceClassification" if isinstance(config, pl.LoRAConfig) else "BertForSequenceClassification",
        DISTIL if isinstance(config, pl.LoRAConfig) else SMALL,
        num_labels=3,
    )
    pl.attach(made, config)
    examples = rows(
        lambda place, tokens: {"labels": [float(tokens[0] > 30), float(tokens[0] <= 30), 1.0]}, lengths=[4] * 32
    )
    history = pl.train(made, examples, steps=40, batch_size=16, learning_rate=2e-2, progress=False)
    assert history.steps[-1]["tokens"] == 48 and history.steps[-1]["loss"] < 0.8 * history.steps[0]["loss"]


@pytest.mark.parametrize(("name", "labels"), [("BertForTokenClassification", tags), ("BertForMaskedLM", masked)])
def test_virtual_tokens_in_front_are_not_labelled(name, labels):
    """Under a prompt the loss is transformers' own, and a row's is the same whatever its padding."""
    made, examples = model(name, SMALL, num_labels=3), rows(labels)
    pl.attach(made, pl.PromptTuningConfig(num_virtual_tokens=3))
    alone = [metrics.mean_loss(made, [row], Collator()) for row in examples]
    padded = [metrics.mean_loss(made, [row], Collator(multiple_of=12)) for row in examples]
    assert padded == pytest.approx(alone, abs=1e-5)
    assert metrics.mean_loss(made, examples, Collator()) == pytest.approx(own_loss(made, examples), abs=1e-6)
