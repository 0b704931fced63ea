"""The support desk: the same messages everywhere, held-out phrasings, labels that the text decides, a fair score."""

import json
import subprocess
import sys
from collections import Counter
from itertools import combinations

import pytest

from peftlab.assets import phrases, support_desk
from peftlab.errors import PeftLabError

SPLITS = ("train", "validation", "test")
TABLES = ("OTHERS", "PASSING", "FEELINGS", "TIMES", "OPENINGS", "CLOSINGS")


def pools(split):
    """Every list of sentences of a split, with a name."""
    for intent, lists in phrases.INTENTS.items():
        yield f"intent {intent}", lists[split]
    for urgency in phrases.URGENCY:
        yield f"urgency {urgency}", phrases.URGENCY[urgency][split]
        yield f"implied {urgency}", phrases.IMPLIED[urgency][split]
    for product, lists in phrases.DESCRIBED.items():
        yield f"described {product}", lists[split]
    for table in TABLES:
        yield table, getattr(phrases, table)[split]


def sentences(split):
    return [sentence for _, pool in pools(split) for sentence in pool if sentence]


@pytest.fixture(scope="module")
def rows():
    return {split: support_desk.generate(split) for split in SPLITS}


def test_thousands_of_distinct_messages_with_balanced_labels(rows):
    assert {split: len(found) for split, found in rows.items()} == support_desk.SIZES
    everything = [row["message"] for found in rows.values() for row in found]
    assert len(set(everything)) == len(everything) >= 5000
    block = Counter((row["intent"], row["product"], row["urgency"]) for row in rows["train"][:120])
    assert len(block) == 120 and set(block.values()) == {1}
    lengths = [len(row["message"].split()) for row in rows["train"]]
    assert 15 < sum(lengths) / len(lengths) < 45


def test_no_sentence_of_one_split_is_in_another():
    every = {split: {s.casefold() for s in sentences(split)} for split in SPLITS}
    for split in SPLITS:  # what states the urgency is also among its other words, so it stands apart from the pools
        every[split] |= {s.casefold() for lists in phrases.STATED.values() for s in lists[split] if s}
    for a, b in combinations(SPLITS, 2):
        shared = every[a] & every[b]
        assert not shared, f"{a} and {b} share {shared}"
    for split in SPLITS:
        assert not [s for s, n in Counter(sentences(split)).items() if n > 1]


def test_no_held_out_request_is_hidden_in_a_training_message(rows):
    training = "\n".join(row["message"].casefold() for row in rows["train"])
    for split in ("validation", "test"):
        for lists in phrases.INTENTS.values():
            for template in lists[split]:
                for product in phrases.PRODUCTS:
                    assert template.replace("{p}", product).casefold() not in training


@pytest.mark.parametrize("difficulty", [0.0, 0.5, 1.0])
def test_the_text_decides_the_labels(difficulty):
    """Exactly one request, one product in it, and at most one sentence on urgency, each of the ticket's label."""
    for split in SPLITS:
        for row in support_desk.generate(split, 240, difficulty=difficulty):
            named = (row["product"], *phrases.DESCRIBED[row["product"]][split])
            requests = {
                intent
                for intent, lists in phrases.INTENTS.items()
                for template in lists[split]
                for name in named
                if template.replace("{p}", name) in row["message"]
            }
            assert requests == {row["intent"]}, row
            said = {
                urgency
                for table in (phrases.STATED, phrases.URGENCY, phrases.IMPLIED)
                for urgency, lists in table.items()
                for sentence in lists[split]
                if sentence and sentence in row["message"]
            }
            assert said <= {row["urgency"]}, row
            if row["urgency"] != "normal":
                assert said, row


def test_messages_are_the_same_in_another_process(rows):
    program = "import peftlab.assets.support_desk as d; print(d.generate('test', 50)[-1]['message'])"
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == rows["test"][49]["message"]


def test_the_draw_is_pinned():
    """Values of the generator of chance itself, which no change of phrases moves."""
    draw = support_desk.Draw("0/train/0.500000")
    assert [draw.below(1000) for _ in range(5)] == [480, 774, 270, 921, 303]
    assert support_desk.Draw("x").shuffled("abcdef") == support_desk.Draw("x").shuffled("abcdef")


def test_a_smaller_size_gives_the_first_of_a_larger_one(rows):
    assert support_desk.generate("train", 130) == rows["train"][:130]
    other = support_desk.generate("train", 130, seed=1)
    assert other != rows["train"][:130]
    assert {row["ticket"] for row in other[:120]} == {row["ticket"] for row in rows["train"][:120]}


def test_the_dial_adds_distractors_and_takes_names_away():
    def describe(difficulty):
        rows = support_desk.generate("test", 240, difficulty=difficulty)
        length = sum(len(row["message"]) for row in rows) / len(rows)
        others = sum(sum(p in row["message"] for p in phrases.PRODUCTS if p != row["product"]) > 0 for row in rows)
        unnamed = sum(row["product"] not in row["message"] for row in rows)
        return length, others / len(rows), unnamed / len(rows)

    easy, middle, hard = map(describe, (0.0, 0.5, 1.0))
    assert easy[0] < middle[0] < hard[0]
    assert easy[1] == 0 < 0.3 < middle[1] < 0.7 < hard[1]
    assert easy[2] == middle[2] == 0 < 0.3 < hard[2]


def test_the_prompt_is_short_and_tells_nothing_of_the_answer(rows):
    row = rows["test"][0]
    system, user = support_desk.prompt(row["message"])
    assert (system["role"], user["role"], user["content"]) == ("system", "user", row["message"])
    assert not any(value in system["content"] for value in (*support_desk.INTENTS, *support_desk.PRODUCTS))


def test_scores():
    wanted = support_desk.ticket("refund", "lamp", "urgent")
    assert json.loads(wanted) == {"intent": "refund", "product": "lamp", "urgency": "urgent"}
    answers = {
        wanted: (1, 1, 1, 1, 1),
        '  { "urgency" : "urgent",\n "product":"lamp", "intent":"refund"}\n': (1, 1, 1, 1, 1),
        support_desk.ticket("repair", "lamp", "urgent"): (0, 0, 1, 1, 1),
        '{"intent":"refund","product":"lamp"}': (0, 1, 1, 0, 1),
        '{"intent":"refund","product":"lamp","urgency":"urgent","note":""}': (0, 1, 1, 1, 1),
        '{"intent":["refund"],"product":null,"urgency":3}': (0, 0, 0, 0, 1),
        wanted[:-1]: (0, 0, 0, 0, 0),
        f"Here it is: {wanted}": (0, 0, 0, 0, 0),
        f"[{wanted}]": (0, 0, 0, 0, 0),
        '"refund"': (0, 0, 0, 0, 0),
        "NaN": (0, 0, 0, 0, 0),
        "[" * 100_000: (0, 0, 0, 0, 0),
        "": (0, 0, 0, 0, 0),
    }
    names = ("exact", "intent", "product", "urgency", "valid")
    for answer, expected in answers.items():
        assert tuple(support_desk.score([answer], [wanted]).values()) == expected, answer[:80]
    assert support_desk.score([wanted, ""], [wanted, wanted]) == dict.fromkeys(names, 0.5)
    with pytest.raises(PeftLabError, match="one answer for each ticket; got 1 and 2"):
        support_desk.score([wanted], [wanted, wanted])
    with pytest.raises(PeftLabError, match="got 0 and 0"):
        support_desk.score([], [])


def test_mistakes():
    with pytest.raises(PeftLabError, match="split must be one of 'train', 'validation', 'test'; found 'dev'"):
        support_desk.generate("dev")
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(PeftLabError, match="difficulty must be a number of at least 0 and of at most 1"):
            support_desk.generate("test", difficulty=wrong)


def test_every_pool_is_of_sentences_and_not_of_letters():
    for split in SPLITS:
        for name, pool in pools(split):
            assert all(len(sentence) > 3 for sentence in pool if sentence), (split, name)


def test_impossibly_many_messages_fail_at_once(monkeypatch):
    drawn = 0
    monkeypatch.setattr(support_desk, "PATIENCE", 300)

    def message(split, intent, product, urgency, difficulty, draw):
        nonlocal drawn
        drawn += 1
        return f"{intent} {product} {urgency} {draw.below(4)}"

    monkeypatch.setattr(support_desk, "message", message)
    with pytest.raises(PeftLabError, match="made 480. Ask for fewer"):
        support_desk.generate("train", 100_000)
    assert drawn < 5000
    assert len(support_desk.generate("train", 480)) == 480  # all that there are: failures are counted in a row


def test_more_messages_than_the_phrases_can_make(monkeypatch):
    monkeypatch.setattr(phrases, "INTENTS", {intent: {"test": ("The {p}.",)} for intent in phrases.INTENTS})
    monkeypatch.setattr(phrases, "URGENCY", {urgency: {"test": (urgency,)} for urgency in phrases.URGENCY})
    monkeypatch.setattr(phrases, "OPENINGS", {"test": ("",)})
    monkeypatch.setattr(phrases, "CLOSINGS", {"test": ("",)})
    with pytest.raises(PeftLabError, match="Difficulty 0.0 makes no 120 distinct messages for 'test'; it made"):
        support_desk.generate("test", 120, difficulty=0.0)


def test_generating_needs_no_torch():
    program = "import sys, peftlab.assets.support_desk as d; d.generate('test', 8); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
