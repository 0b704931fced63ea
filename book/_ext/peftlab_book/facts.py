"""Reads book/facts/*.toml: what the appendices say about each chapter, one file per chapter.

    [chapter]
    number = 2
    title = "LoRA"
    question = "Why does a low-rank update suffice?"
    know = ["matrix products"]            # what the reader needs to know first

    [run]                                 # measured; may be missing while a chapter is being written
    cpu = "two cores"
    seconds_cpu = 150
    gpu = "NVIDIA H100 80GB HBM3"
    seconds_gpu = 60
    memory_gb = 3.1                       # greatest resident memory of the run on the CPU, 1 GB = 1e9 bytes
    date = 2026-11-22

    [[claim]]                             # a claim in circulation that the chapter checks
    id = "H18"                            # unique in the book
    claim = "..."
    verdict = "wrong"                     # right, half right, wrong
    truth = "..."                         # what is so
    seen = "..."                          # where it was seen; may be missing
    shown = ["sec-lora-merge"]            # labels of the sections that show it

    [[term]]                              # an entry of the glossary; refer to it with {term}`LoRA`
    term = "LoRA"
    also = ["low-rank adaptation"]        # further names for the same entry
    text = "..."

    [[equation]]                          # a name for a numbered equation, by which the search finds it
    label = "eq-lora"
    name = "LoRA update"

    [[question]]                          # an interview question
    theme = "settings"                    # one of THEMES
    level = "easy"                        # one of LEVELS
    question = "..."
    answer = "..."
    shown = ["sec-lora-merge"]            # may be missing if the answer holds no number

A file of what belongs to no single chapter, such as practice.toml, begins with a table [topic] that holds a title, in
place of [chapter] and [run].

The texts are MyST: mathematics, citations and references work in them. A measured number is a value that a chapter's
cell computes, named as in a chapter: `LoRA trains <!--=lora-percent--> of the weights`.
"""

import datetime
import math
import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

NUMBER, TEXT, TEXTS, DATE = (int, float), (str,), (list,), (datetime.date,)
VERDICTS = ("right", "half right", "wrong")
LEVELS = ("easy", "medium", "hard")
# The themes of the questions: {as a file names it: as the page shows it}, in the order of the page.
THEMES = {
    "methods": "How the methods work",
    "derivations": "Derivations and counts",
    "memory": "Memory",
    "speed": "Time and arithmetic",
    "settings": "Rank, rate and place",
    "bits": "Precision and four bits",
    "runs": "Running a training",
    "choosing": "Comparing and choosing",
    "forgetting": "Forgetting",
    "shipping": "Merging, storing and serving",
}
# What each table may hold: {key: types}; the keys in the second part may be missing.
TABLES = {
    "chapter": ({"number": (int,), "title": TEXT, "question": TEXT}, {"know": TEXTS}),
    "topic": ({"title": TEXT}, {}),
    "run": ({"cpu": TEXT, "seconds_cpu": NUMBER, "memory_gb": NUMBER, "date": DATE},
            {"gpu": TEXT, "seconds_gpu": NUMBER}),
    "claim": ({"id": TEXT, "claim": TEXT, "verdict": TEXT, "truth": TEXT, "shown": TEXTS}, {"seen": TEXT}),
    "term": ({"term": TEXT, "text": TEXT}, {"also": TEXTS}),
    "equation": ({"label": TEXT, "name": TEXT}, {}),
    "question": ({"theme": TEXT, "level": TEXT, "question": TEXT, "answer": TEXT}, {"shown": TEXTS}),
}
# {(table, key): the texts that it may hold}
ALLOWED = {("claim", "verdict"): VERDICTS, ("question", "level"): LEVELS, ("question", "theme"): tuple(THEMES)}
LISTS = ("claim", "term", "equation", "question")


@dataclass
class Facts:
    """One file's facts. ``page`` is its name without the ending, for a chapter that of the notebook, "02_lora".

    ``chapter`` is None where the facts belong to no single chapter.
    """

    page: str
    title: str
    chapter: dict | None = None
    run: dict | None = None
    claims: list[dict] = field(default_factory=list)
    terms: list[dict] = field(default_factory=list)
    equations: list[dict] = field(default_factory=list)
    questions: list[dict] = field(default_factory=list)


def load(folder):
    """Read all facts.

    Returns:
        (list of Facts, the chapters in their order and then the others, list of faults): a fault is a sentence that
        begins with the file's name. A file with a fault in its head is left out.
    """
    found, faults = [], []
    for path in sorted(Path(folder).glob("*.toml")):
        facts, own = _read(path)
        faults += [f"{path.name}: {fault}" for fault in own]
        if facts:
            found.append(facts)
    found.sort(key=lambda facts: facts.chapter["number"] if facts.chapter else math.inf)
    faults += _twice("chapter number", [(facts.page, str(facts.chapter["number"])) for facts in found if facts.chapter])
    faults += _twice("claim id", [(facts.page, claim["id"]) for facts in found for claim in facts.claims])
    faults += _twice("term", [(facts.page, name.lower()) for facts in found for term in facts.terms
                              for name in [term["term"], *term.get("also", [])]])
    for key in ("label", "name"):
        named = [(facts.page, entry[key].lower()) for facts in found for entry in facts.equations]
        faults += _twice(f"equation's {key}", named)
    faults += _twice("question", [(facts.page, entry["question"]) for facts in found for entry in facts.questions])
    return found, faults


def _read(path):
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        return None, [f"no valid TOML: {error}"]
    faults = [f"unknown table [{name}]; there are: {', '.join(TABLES)}" for name in content if name not in TABLES]
    head = next((name for name in ("chapter", "topic") if isinstance(content.get(name), dict)), None)
    if head is None:
        return None, [*faults, "the table [chapter] is missing"]
    if wrong := _faults(head, content[head], f"[{head}]"):
        return None, faults + wrong
    run = content.get("run")
    if run is not None:
        faults += _faults("run", run, "[run]")
    kept = {}
    for name in LISTS:
        entries = content.get(name, [])
        if not isinstance(entries, list):
            faults.append(f"write [[{name}]] with two brackets: there may be several")
            entries = []
        kept[name] = []
        for place, entry in enumerate(entries, 1):
            own = _faults(name, entry, f"[[{name}]] {place}")
            faults += own
            kept[name] += [entry] if not own else []
    made = Facts(path.stem, content[head]["title"], content.get("chapter"), run, *(kept[name] for name in LISTS))
    return made, faults


def _faults(name, entry, where):
    required, optional = TABLES[name]
    known = required | optional
    faults = [f"{where}: unknown key {key!r}; there are: {', '.join(known)}" for key in entry if key not in known]
    faults += [f"{where}: {key!r} is missing" for key in required if key not in entry]
    for key, value in entry.items():
        types = known.get(key)
        if types and (not isinstance(value, types) or isinstance(value, bool)):
            faults.append(f"{where}: {key!r} is to be {_words(types)}, found {value!r}")
        elif isinstance(value, str) and not value.strip():
            faults.append(f"{where}: {key!r} is empty")
        elif isinstance(value, list) and not all(isinstance(item, str) and item.strip() for item in value):
            faults.append(f"{where}: {key!r} is to be a list of texts, found {value!r}")
        elif isinstance(value, (int, float)) and value <= 0:
            faults.append(f"{where}: {key!r} is to be above zero, found {value!r}")
    for (table, key), texts in ALLOWED.items():
        if name == table and isinstance(entry.get(key), str) and entry[key] not in texts:
            faults.append(f"{where}: {key} {entry[key]!r} is none of: {', '.join(texts)}")
    if name == "claim" and isinstance(entry.get("id"), str) and not re.fullmatch(r"[A-Z]\d+[a-z]?", entry["id"]):
        faults.append(f"{where}: id {entry['id']!r} is no letter and number such as H18 or H19a")
    if name == "claim" and entry.get("shown") == []:
        faults.append(f"{where}: 'shown' names no section: a claim is checked by a cell")
    return faults


def _words(types):
    words = {NUMBER: "a number", TEXT: "a text", TEXTS: "a list of texts", DATE: "a date"}
    return words.get(types, "a whole number")


def _twice(what, names):
    seen, faults = {}, []
    for page, name in names:
        if name in seen:
            faults.append(f"{page}.toml: the {what} {name!r} is also in {seen[name]}.toml")
        seen.setdefault(name, page)
    return faults
