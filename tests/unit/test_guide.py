"""The guide: its rules rest on measurements, its answers are whole, and mistakes are one clear line."""

import copy
import itertools
import json
import math
import shlex
import subprocess
import sys
from pathlib import Path

import numpy
import portable
import pytest
import tiny
import torch
from peftlab_book import guide

import peftlab as pl
from peftlab.commands import cli, train
from peftlab.commands.method_options import settle, trainable
from peftlab.commands.terminal import parse_targets
from peftlab.guide import evidence, plan, rules, times
from peftlab.guide import recommend as recommending
from peftlab.kit import measurements
from peftlab.memory import BUILT_IN, CARDS

BOOK = Path(__file__).resolve().parents[2] / "book"
EVIDENCE = list(rules.every_evidence())
TASKS, NEEDS = ([word.name for word in rules.words(kind)] for kind in ("task", "serving"))


# ------------------------------------------------------------------------------------------------- what carries it


def unproven(rule) -> list[str]:
    """What is wrong with a rule: its form, or what its evidence says."""
    if fault := rules.fault(rule):
        return [fault]
    found = [evidence.look_up(entry) for entry in rule["evidence"]]
    return [f"the measurements do not say so: {one.text} [{one.source}]" for one in found if not one.holds]


def named(name):
    return copy.deepcopy(next(rule for rule in rules.rules() if rule["name"] == name))


@pytest.mark.parametrize("rule", rules.rules(), ids=lambda rule: rule["name"])
def test_the_measurements_carry_a_rule(rule):
    assert unproven(rule) == []


def test_a_rule_has_a_name_of_its_own():
    names = [rule["name"] for rule in rules.rules()]
    assert len(names) == len(set(names)) > 30


@pytest.mark.parametrize(("name", "entry", "change"), [
    ("small-full", 0, {"claim": "same", "sees": 50}),  # full fine-tuning was better, so "same" is false
    ("small-full", 0, {"claim": "fewer"}),
    ("small-full", 1, {"sees": 3}),  # "same", but a difference of three points could not have been seen
    ("lora-writes", 0, {"claim": "not more", "sees": 50}),
    ("rates-of-others", 1, {"least": 0.5, "most": 1}),  # PiSSA's is a third of LoRA's
    ("not-a-variant", 2, {"sees": 6}),  # one of the eight could not have been seen to be six points better
    ("lora-in-a-field", 0, {"claim": "higher"}),
    ("lora-in-a-field", 1, {"a": {"variant": ["prefix", "IA3"]}}),  # a prefix learned more
    ("rank-for-much-that-is-new", 2, {"sees": 0.01}),
    ("rank-for-much-that-is-new", 1, {"claim": "not lower", "sees": 0.001}),
    ("everywhere", 5, {"a": {"targets": "gate_proj,up_proj,down_proj"}}),  # equal rows are not apart
    ("four-bits", 1, {"most": 0.3}),
    ("ship-model", 0, {"least": 5}),
    ("half-precision", 0, {"claim": "slower"}),
    ("batches", 1, {"per": []}),  # four examples take longer than one
    ("rate-of-small-lora", 0, {"least": 1e-2, "most": 1e-2}),
    # 1e-3 is at the edge
    ("rate-of-small-lora", 0, {"a": {"variant": "LoRA, all layers", "learning_rate": [1e-3, 3e-3, 1e-2]}}),
    ("rate-of-small-lora", 0, {"edge": True}),  # it is not at the edge
    ("one-rank-on-an-encoder", 1, {"highest": False}),  # the lowest accuracy is not the best
    ("not-a-variant", 3, {"b": {"variant": "AdaLoRA"}}),  # against the weakest, one of the others has more
])  # fmt: skip
def test_a_rule_that_the_measurements_do_not_carry_fails(name, entry, change):
    rule = named(name)
    rule["evidence"][entry] |= change
    assert len(unproven(rule)) == 1 and unproven(rule)[0].startswith("the measurements do not say so")


@pytest.mark.parametrize(("change", "told"), [
    ({"evidence": []}, "it has no evidence"), ({"because": None}, "says why"), ({"iff": {}}, "iff, which no rule has"),
    ({"if": {"tsk": "style"}}, "tsk, which is no fact"), ({"choose": {"rank": 8}}, "rank, which is no setting"),
])  # fmt: skip
def test_a_rule_without_evidence_or_form_fails(change, told):
    rule = named("rank") | change
    rule = {name: value for name, value in rule.items() if value is not None}
    assert told in unproven(rule)[0]


@pytest.mark.parametrize(("change", "told"), [
    ({"check": "share"}, "no check 'share'. Did you mean 'shares'"), ({"claim": "better"}, "claim is 'better'"),
    ({"sees": None}, "no difference is seen (same, not more, not lower) states what it sees"),
    ({"claim": "more"}, "states what it sees, and no other does"),
    ({"most": 3}, "takes no most"), ({"shown": ""}, "lacks shown"), ({"results": "lora_learnd"}, "lora_learned"),
    ({"rows": {"sektion": "rank"}}, "no column 'sektion'"), ({"a": {"r": 7}}, "no row has"),
    ({"results": "beyond", "right": "test", "items": 9, "rows": {}, "a": {"r": 4}, "b": {"r": 8}}, "on which model"),
])  # fmt: skip
def test_evidence_that_is_none_is_refused(change, told):
    entry = {name: value for name, value in (named("rank")["evidence"][0] | change).items() if value is not None}
    with pytest.raises(pl.PeftLabError, match=".") as error:
        evidence.look_up(entry)
    assert told in str(error.value)


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A function that computes an entry about made rows."""

    def found(rows, **entry):
        path = tmp_path / "made.json"
        given = {name: value for name, value in measurements.results("lora").provenance.items() if name != "runs"}
        measurements.write(path, "made", given, [{"shape": "made-1b", **row} for row in rows])
        evidence._read.cache_clear()
        groups = {"a": {"method": "a"}, "b": {"method": "b"}, "shown": "x#y"}
        return evidence.look_up({"results": str(path), **groups, **entry})

    return found


def test_the_interval_of_two_shares_by_hand(made):
    """p = 0.9 and 0.8 of 100 questions; two seeds of the first, 0.88 and 0.92."""
    rows = [{"method": "a", "right": 88, "of": 100}, {"method": "a", "right": 92, "of": 100},
            {"method": "b", "right": 80, "of": 100}]  # fmt: skip
    one = math.sqrt(0.9 * 0.1 / 100 + 0.0008 / 2 + 0.8 * 0.2 / 100)
    found = made(rows, check="shares", of="of", claim="same", sees=100 * 2.85 * one)
    interval = f"({100 * (0.1 - 2 * one):+.1f} to {100 * (0.1 + 2 * one):+.1f})"
    assert found.holds and found.at == "made-1b"
    assert found.text.endswith(f"{interval}; a difference of {100 * 2.84 * one:.1f} points would have shown")
    assert not made(rows, check="shares", of="of", claim="same", sees=100 * 2.83 * one).holds


def test_the_same_questions_are_compared_one_by_one(made):
    """Of four questions, a has 1, 1, 1/2, 0 right over two seeds and b has 1, 0, 1/2, 0: d = 0, 1, 0, 0."""
    answers = (("a", "1110"), ("a", "1100"), ("b", "1010"), ("b", "1000"))
    rows = [{"method": name, "right": each.count("1"), "of": 4, "answers": each} for name, each in answers]
    one = math.sqrt(0.25 / 4 + 2 * 0.03125 / 2)  # variance of d over 4, and of the seeds over 2, twice
    text = made(rows, check="shares", of="of", claim="same", sees=1000).text
    assert f"+25.0 points ({25 - 200 * one:+.1f} to {25 + 200 * one:+.1f})" in text


def test_the_interval_of_two_losses_by_hand(made):
    """Texts of 10 and 30 tokens: their nats count per mean token, 20, so that d = 0.1 and 0.4."""
    rows = [{"method": "a", "test_loss": 1.2, "nats": "12 38", "tokens": "10 30"},
            {"method": "b", "test_loss": 1.0, "nats": "10 30", "tokens": "10 30"}]  # fmt: skip
    one = math.sqrt(0.045 / 2)
    found = made(rows, check="losses", column="test_loss", claim="higher")
    assert found.text == f"test loss: a 1.200, b 1.000; +0.200 ({0.2 - 2 * one:+.3f} to {0.2 + 2 * one:+.3f})"
    seeds = [{"method": "a", "bits": 2.0}, {"method": "a", "bits": 2.2}, {"method": "b", "bits": 1.5}]
    one = math.sqrt(0.02 / 2)  # without texts, what the seeds did is all that is known
    found = made(seeds, check="losses", column="bits", claim="higher")
    assert found.holds and f"+0.600 ({0.6 - 2 * one:+.3f} to {0.6 + 2 * one:+.3f})" in found.text


def test_a_claim_of_no_difference_says_what_it_could_have_seen():
    """And nothing so large that the claim says nothing."""
    for name, entry in EVIDENCE:
        if entry.get("claim") in evidence.ABSENT:
            assert "would have shown" in evidence.look_up(entry).text, name
            assert entry["sees"] <= (12 if entry["check"] == "shares" else 0.07), name


def test_an_answer_says_on_what_it_was_measured(no_replay):
    found = pl.recommend("classification", "roberta-large")
    assert found.measured_on == ("minilm (23m)",) and "measured on    minilm (23m)" in str(found)
    unscored = [task for task in TASKS if not pl.recommend(task, "llama-2-7b").measured_on]
    assert unscored == ["preference"]
    assert "measured on    no scores were measured" in str(pl.recommend("dpo", "llama-2-7b"))


def test_evidence_leads_to_places_in_the_book():
    notebooks = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in BOOK.glob("*.ipynb")}
    labels = {page: portable.targets(page, portable.prose(notebook)) for page, notebook in notebooks.items()}
    places = {f"{page}#{label}" for page, found in labels.items() for label in found}
    topics = {f"appendix_measurements#measurements-{topic.replace('_', '-')}" for topic in measurements.topics()}
    assert {entry["shown"] for _, entry in EVIDENCE} <= places | topics
    own = [entry for _, entry in EVIDENCE if entry["shown"].startswith("appendix_")]
    assert all(entry["shown"].endswith(entry["results"].replace("_", "-")) for entry in own)


def test_published_runs_are_called_so():
    assert all("published" in entry["says"] for _, entry in EVIDENCE if entry["results"] == "metamathqa")


# ---------------------------------------------------------------------------------------------------- what it answers


@pytest.fixture
def no_replay(monkeypatch):
    """Memory by a rough rule, in no time: what is decided does not depend on the exact peak."""

    def peaks(shape, method, chosen, sequence, gpus):
        weight = {"full": 16, "qlora": 0.6}.get(method, 2)
        return lambda rung: int(shape.parameters * weight + rung[0] * sequence * (2e5 if rung[1] else 2e6))

    monkeypatch.setattr(recommending, "peaks", peaks)


def test_every_combination_is_answered_whole_or_refused(no_replay):
    shapes = [pl.memory.load_shape(name) for name in BUILT_IN]
    cases = itertools.product(TASKS, shapes, NEEDS, ((None, True, "T4"), (100, False, "H100")))
    methods = set()
    for task, model, serving, (examples, four_bit, card) in cases:
        options = {"serving": serving, "examples": examples, "four_bit": four_bit, "sequence": 256}
        try:
            found = pl.recommend(task, model, card, **options)
        except pl.PeftLabError as error:
            assert "decoder" in str(error) and model.kind != "decoder"
            continue
        methods.add(found.method)
        assert found.method != "qlora" or four_bit
        assert {"learning_rate", "rates", "precision", "update", "epochs", "ship"} <= found.chosen.keys()
        low, high = found.chosen["rates"]
        assert low <= found.chosen["learning_rate"] <= high
        assert found.method == "full" or {"r", "alpha", "targets"} <= found.chosen.keys()
        decided = {name for reason in found.reasons for name in reason.settings} - {"ladder"}
        assert decided == {"method", *found.chosen}  # each choice has its reason
        assert found.chosen["precision"] == ("fp16" if card == "T4" else "bf16")
    assert methods == {"full", "lora", "qlora"}


def test_a_rule_that_no_question_reaches_is_found(no_replay):
    """Each rule decides or says something for some question."""
    reached = set()
    models = ("smollm2-135m", "llama-2-7b", "minilm", "bert-base", "t5-base")
    for task, model, serving in itertools.product(TASKS, models, NEEDS):
        for card, examples, gpus in ((6, None, 1), ("T4", 200, 1), ("H200", None, 2)):
            try:
                more = {"serving": serving, "examples": examples, "gpus": gpus, "four_bit": gpus == 1}
                found = pl.recommend(task, model, card, **more)
            except pl.PeftLabError:
                continue
            reached |= {reason.because for reason in found.reasons} | set(found.more) | set(found.traps)
    gives = {rule["name"]: {rule.get("because"), rule.get("more"), rule.get("trap")} for rule in rules.rules()}
    told = {name for name, texts in gives.items() if texts & reached}
    assert told == {rule["name"] for rule in rules.rules()}


def test_the_first_that_fits_is_taken():
    ladder = [[4, False], [4, True], [1, True]]
    sizes = {(4, False, ""): 30, (4, True, ""): 20, (1, True, ""): 10}
    tried = plan.rungs(ladder, 1)
    taken = [plan.first_that_fits(tried, sizes.get, room) for room in (None, 30, 29, 10, 9)]
    assert taken == [((4, False, ""), 30, None), ((4, False, ""), 30, True), ((4, True, ""), 20, True),
                     ((1, True, ""), 10, True), ((1, True, ""), 10, False)]  # fmt: skip
    assert plan.rungs(ladder[:1], 2) == [(4, False, "ddp"), (4, False, "fsdp")]


def test_memory_is_that_of_fits():
    found = pl.recommend("style", "llama-3.2-1b", 12, serving="many")
    run = {"r": 16, "targets": "all-linear", "batch": 4, "checkpointing": found.checkpointing, "chunked_loss": True,
           "autocast": True, "optimizer": "adamw-fused", "library": "peftlab"}  # fmt: skip
    assert found.peak_bytes == pl.memory.estimate("llama-3.2-1b", "lora", **run).peak_bytes
    assert found.fits and pl.memory.fits("RTX 3060", "llama-3.2-1b", "lora", **run)


def test_what_is_too_large_is_said():
    found = pl.recommend("knowledge", "llama-3.2-1b", "T4", four_bit=False)
    assert (found.method, list(found.too_large), found.fits) == ("lora", ["full"], True)
    found = pl.recommend("instruction", "llama-2-7b", 4)
    assert found.method == "qlora" and found.fits is False and "it does not fit" in str(found)
    assert found.to_dict()["cards"][0] in CARDS


def test_a_method_that_a_model_cannot_have_is_passed_over(monkeypatch):
    estimated = recommending.peaks

    def peaks(shape, method, *rest):
        if method == "full":
            raise pl.PeftLabError("full has no form here")
        return estimated(shape, method, *rest)

    monkeypatch.setattr(recommending, "peaks", peaks)
    found = pl.recommend("style", "gpt2", "T4")
    assert found.method == "lora" and found.refused == {"full": "full has no form here"}
    assert "not possible   full: full has no form here" in str(found)


def test_time_is_given_only_where_this_step_was_measured():
    found = pl.recommend("instruction", "llama-2-7b", "H200", examples=800)
    row = pl.results("speed").one(section="7b-lora-4x512", rung="fast")
    assert found.time.seconds == row["seconds"] and found.steps == 100
    assert found.seconds == row["seconds"] * 2 * 100  # two batches in an update
    for other in ({"sequence": 600}, {"card": "A100 80GB"}, {"gpus": 2}, {"model": "mistral-7b"}):
        given = {"task": "instruction", "model": "llama-2-7b", "card": "H200", "examples": 800} | other
        assert pl.recommend(**given).time is None and "not measured" in str(pl.recommend(**given))
    assert pl.recommend("instruction", "llama-2-7b", "h100").time.source == "lora_fullsize, fullsize"


def test_measured_steps_are_of_all_linear_layers():
    """The rows that times come from count as many trained numbers as our settings."""
    for one in times.timed():
        wanted = pl.memory.count(one.shape, one.method, r=one.r, targets="all-linear").trainable
        file = one.source.partition(",")[0]
        rows = pl.results(file).where(seconds=one.seconds).rows
        assert all(row.get("trainable", wanted) == wanted for row in rows), one


@pytest.mark.parametrize(("task", "model", "more"), [
    ("style", "smollm2-135m", {}), ("style", "smollm2-135m", {"serving": "many"}),
    ("format", "llama-3.2-1b", {"serving": "file"}), ("classification", "minilm", {}),
    ("classification", "minilm", {"serving": "file"}), ("sft", "llama-3.1-8b", {"card": "T4"}),
])  # fmt: skip
def test_the_command_is_one_that_train_takes(no_replay, task, model, more):
    found = pl.recommend(task, model, **more)
    arguments = cli.parse(shlex.split(found.command("reviews", "out"))[1:])
    settle(arguments, trainable())
    train.check(arguments)
    assert (arguments.method, arguments.lr) == (found.method, found.chosen["learning_rate"])
    assert (arguments.batch_size, arguments.checkpointing) == (found.batch, found.checkpointing)
    if found.method == "full":
        with pytest.raises(pl.PeftLabError, match="attaches nothing"):
            found.config()
    else:
        made = train._config(arguments, parse_targets(arguments.targets))
        mine = found.config()
        assert all(getattr(made, name) == getattr(mine, name) for name in ("r", "alpha", "target_modules"))


def test_the_config_attaches():
    for serving in ("many", "file"):
        model = tiny.llama(layers=1)
        pl.attach(model, pl.recommend("style", model.config.to_dict(), serving=serving).config())
        assert pl.count_parameters(model).trainable


def test_what_train_cannot_do_is_said(no_replay):
    for given, told in (({"task": "dpo"}, "reads no preferences"), ({"task": "rl"}, "knows no rewards"),
                        ({"task": "style", "gpus": 2}, "runs on one GPU")):  # fmt: skip
        found = pl.recommend(model="smollm2-135m", **given)
        with pytest.raises(pl.PeftLabError, match=told):
            found.command()
        assert found.to_dict()["command"] is None and told in found.to_dict()["no_command"]


def test_the_reasons_for_one_setting(no_replay):
    found = pl.recommend("style", "smollm2-135m", serving="many")
    assert found.why("alpha") == found.why("r") and found.why("r") in found.why() and found.why("r") in found.in_full()
    place = "08_choosing#sec-choosing-rates"
    assert f"[regret, rank, smollm2-135m: scored yes, rule alpha = 16; {place}]" in found.why("r").replace(
        "\n    ", " "
    )
    with pytest.raises(pl.PeftLabError, match="Did you mean 'learning_rate'"):
        found.why("learning_rat")


def test_the_short_answer_has_one_sentence_for_each_choice(no_replay):
    """It fits two screens, and no row of a results file is in it."""
    for task, model in (("style", "llama-3.1-8b"), ("classification", "minilm"), ("knowledge", "smollm2-135m")):
        found = pl.recommend(task, model)
        lines = found.reasons_in_short().splitlines()
        begun = [line for line in lines if not line.startswith("    ")]
        assert len(begun) == len(found.reasons) and all(line.endswith(".") for line in begun if len(line) < 80)
        assert "scored yes" not in str(found) and "scored yes" in found.in_full()
        assert found.table() in str(found) and len(str(found).splitlines()) <= 75


def test_a_folder_stays_in_the_command(tmp_path, no_replay):
    (tmp_path / "config.json").write_text(json.dumps(BUILT_IN["smollm2-135m"]), encoding="utf-8")
    for given in (tmp_path, str(tmp_path / "config.json")):
        assert f"--model {tmp_path} " in pl.recommend("style", given).command()


@pytest.mark.parametrize(("given", "told"), [
    ({"task": "clasification"}, "no task 'clasification'. Did you mean 'classification'"),
    ({"task": "dp"}, "preference"), ({"model": "llama2-7b"}, "Did you mean 'llama-2-7b'"),
    ({"card": "H10"}, "Unknown card 'H10'. Did you mean 'H100'"), ({"card": 0}, "between 1 and"),
    ({"serving": "manny"}, "Did you mean 'many'"), ({"gpus": 0}, "gpus must be a positive whole number"),
    ({"examples": 5, "tokens": 5}, "not both"), ({"model": "minilm"}, "minilm is an encoder and writes no text"),
    ({"task": "dpo", "model": "t5-base"}, "No measurement is about 'preference'"),
    ({"model": "gpt2", "sequence": 4096}, "positions"),
])  # fmt: skip
def test_a_mistake_is_one_clear_line(given, told):
    with pytest.raises(pl.PeftLabError) as error:
        pl.recommend(**({"task": "style", "model": "smollm2-135m"} | given))
    assert told in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("given", "told"), [
    ({"card": "A100"}, "Did you mean 'A100 40GB' or 'A100 80GB'"), ({"card": "cpu"}, "Without a GPU leave the card"),
    ({"card": torch.tensor(float("nan"))}, "Unknown card"), ({"card": True}, "Unknown card"),
    ({"model": "x" * 5000}, "Unknown shape"), ({"model": "a\0b"}, "model must be"),
    ({"model": "llama-2-7b", "sequence": 32768}, "positions for 4,096 tokens, too few for 32,768"),
    ({"gpus": 100_000}, "at most 1,024"), ({"examples": torch.tensor(0.5)}, "positive whole number"),
    ({"examples": math.nan}, "positive whole number"), ({"gpus": True}, "positive whole number"),
])  # fmt: skip
def test_other_mistakes_are_one_clear_line_too(given, told):
    with pytest.raises(pl.PeftLabError) as error:
        pl.recommend(**({"task": "style", "model": "smollm2-135m"} | given))
    assert told in str(error.value) and "\n" not in str(error.value)


def test_a_model_for_short_texts_gets_short_ones():
    short = {**BUILT_IN["smollm2-135m"], "max_position_embeddings": 64}
    assert pl.recommend("style", short).sequence == 64
    assert "--max-length 64" in pl.recommend("style", short).command()


def test_a_card_as_people_write_it(no_replay):
    wanted = pl.recommend("style", "llama-3.2-1b", "RTX 4090")
    for name in ("rtx4090", "RTX-4090", " rtx_4090 "):
        assert pl.recommend("style", "llama-3.2-1b", name) == wanted
    for size in (24, 24.0, "24 GB", torch.tensor(24), numpy.array(24.0), numpy.float32(24)):
        assert pl.recommend("style", "llama-3.2-1b", size).card.gigabytes == 24


def test_arguments_of_the_answer(no_replay):
    found = pl.recommend("style", "llama-3.2-1b")
    assert found.why("rank") == found.why("r")  # as the table calls it
    assert found.command(Path("my data.jsonl")) == found.command("my data.jsonl")
    for wrong in ([], {}, 3, b"r", True, math.nan):
        with pytest.raises(pl.PeftLabError):
            found.why(wrong)
        with pytest.raises(pl.PeftLabError, match="data must be"):
            found.command(wrong)
    with pytest.raises(pl.PeftLabError, match="data must be"):
        found.command(None)


def test_rates_are_not_those_of_much_smaller_models(no_replay):
    """A rate that a model of 23 million parameters likes breaks one of 355 million, and DPO's are lower than others."""
    for task, model, most in (
        ("classification", "bert-base", 1e-3),
        ("classification", "roberta-large", 1e-3),
        ("instruction", "t5-base", 1e-3),
        ("dpo", "smollm2-135m", 1e-4),
        ("rl", "llama-2-7b", 1e-4),
        ("style", "qwen2.5-0.5b", 1e-3),
    ):
        for serving in NEEDS:
            found = pl.recommend(task, model, "T4", serving=serving, examples=3000)
            assert found.chosen["learning_rate"] <= most, (task, model, serving)
    assert pl.recommend("classification", "minilm").chosen["learning_rate"] == 3e-3


def test_a_hundred_labels_are_seen_more_than_once(no_replay):
    for model in ("minilm", "llama-3.2-1b", "t5-base"):
        assert pl.recommend("classification", model, examples=100).chosen["epochs"] == 8
        assert pl.recommend("classification", model, examples=5000).chosen["epochs"] == 1


def test_weights_that_are_stored_in_float32_take_their_room():
    """`peftlab train` loads weights as they are stored."""
    config = {**BUILT_IN["llama-3.2-1b"]}
    narrow, wide = (pl.recommend("style", {**config, key: dtype}, 24, serving="many").peak_bytes
                    for key, dtype in (("dtype", "bfloat16"), ("torch_dtype", "float32")))  # fmt: skip
    parameters = pl.memory.load_shape("llama-3.2-1b").parameters
    assert wide - narrow >= 2 * parameters  # the weights, and what flows between the layers


def test_tokens_stand_for_examples(no_replay):
    by_tokens = pl.recommend("style", "llama-3.2-1b", tokens=512 * 100 - 5)
    assert by_tokens.examples == 100 and by_tokens.chosen["epochs"] == 8


def test_the_command_line_prints_what_the_function_gives(capsys):
    line = ["recommend", "classify", "minilm", "--card", "T4", "--serving", "small", "--examples", "3000"]
    assert cli.main(line) == 0
    found = pl.recommend("classification", "minilm", "T4", serving="file", examples=3000)
    assert capsys.readouterr().out == f"{found}\n"
    assert cli.main([*line, "--why"]) == 0
    assert capsys.readouterr().out == f"{found.in_full()}\n"
    assert cli.main([*line, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == found.to_dict()
    assert max(map(len, f"{found}\n{found.in_full()}".splitlines())) <= 88
    assert cli.main(["recommend", "clasify", "minilm"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_recommending_loads_no_torch():
    code = """
import sys
from peftlab.commands.cli import main
main(["recommend", "style", "smollm2-135m", "--card", "T4"])
print([name for name in ("torch", "numpy", "transformers") if name in sys.modules], file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=BOOK.parent)
    assert done.stderr == "[]\n"


# ------------------------------------------------------------------------------------------------------ the book's page


def test_the_stored_peaks_are_those_of_the_estimator():
    """All that an answer of the page may need is there, and some of it is estimated again."""
    stored = guide.stored()
    assert list(stored) == list(BUILT_IN), "run python tools/guide_peaks.py"
    for name in ("minilm", "smollm2-135m", "gpt2", "llama-2-7b"):
        steps = guide.steps_of(pl.memory.load_shape(name))
        needed = {(guide.variant(method, chosen), guide.rung_name(rung)) for method, chosen, rung in steps}
        for sequence, found in stored[name].items():
            assert found.keys() == {variant for variant, _ in needed}
            there = {(variant, rung) for variant, peaks in found.items() if isinstance(peaks, dict) for rung in peaks}
            wanted = {(variant, rung) for variant, rung in needed if isinstance(found[variant], dict)}
            assert there == wanted, f"{name}, {sequence}: run python tools/guide_peaks.py"
    for name, sequence, variant, rung in (
        ("llama-3.2-1b", 1024, "lora/16/all-linear", (4, True, "")),
        ("llama-3.2-3b", 512, "qlora/64/all-linear", (1, True, "")),
        ("minilm", 512, "lora/8/query-value", (32, False, "")),
        ("smollm2-135m", 512, "full", (8, False, "")),
        ("smollm2-135m", 2048, "lora/1/query-value", (4, True, "")),
    ):
        method, *size = variant.split("/")
        chosen = {"r": int(size[0]), "targets": size[1]} if size else {}
        peak = plan.peaks(pl.memory.load_shape(name), method, chosen, sequence, 1)(rung)
        told = f"{name}, {sequence}, {variant}: run python tools/guide_peaks.py --anew"
        assert stored[name][str(sequence)][variant][guide.rung_name(rung)] == peak, told
    assert set(stored["minilm"]["1024"].values()) == {"minilm has positions for 512 tokens, too few for 1,024."}


def test_no_border_of_a_rule_lies_between_the_numbers_of_examples():
    """The page's peaks are made for these numbers, so each side of a border needs one."""
    borders = [rule["if"]["examples"] for rule in rules.rules() if "examples" in rule.get("if", {})]
    sides = {side for border in borders for side in (border.get("most"), border.get("least"))} - {None}
    assert sides <= set(guide.EXAMPLES)
