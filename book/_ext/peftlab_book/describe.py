"""What a page is, in a sentence or two: for its card on the front page, and for searches and links from elsewhere.

Nothing is written for this alone. A chapter has the question of its facts file and the sentence that its opening marks
as the answer; any other page has its first sentences.
"""

import functools
import json
import re
import tomllib
from pathlib import Path

import portable

SHORTEST, LONGEST = 50, 160  # characters of a description: what a search shows whole
# pages that Sphinx makes, and the one for what is not found
MADE = {
    "genindex": "The index of PEFT Lab: every term of its glossary, in alphabetical order, with a link to the entry.",
    "search": "Search PEFT Lab, a book on parameter-efficient fine-tuning: chapters, claims, questions, glossary.",
    "404": "PEFT Lab has no page at this address. Search the book, or go on from one of its main pages.",
}
COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
LINK = re.compile(r"!?\[([^\]]*)\]\([^)]*\)")


def title(page: str, folder: Path) -> str:
    """The title of a page without code: its first heading."""
    found = re.search(r"^# (.*)$", source(page, folder), re.MULTILINE)
    return found[1] if found else page


def source(page: str, folder: Path) -> str:
    """The text of a page without code. `folder` is that of the book; the front page lies above it."""
    return (folder.parent if page == portable.FRONT else folder).joinpath(f"{page}.md").read_text(encoding="utf-8")


def plain(text: str) -> str:
    """Markdown without its marks, on one line."""
    text = LINK.sub(lambda m: m[1], COMMENT.sub("", text))
    return " ".join(re.sub(r"[*`$]|\\(?=\W)", "", text).split())


@functools.cache  # a card and the head of its page ask for the same
def chapter(page: str, folder: Path) -> tuple[dict, str]:
    """What the facts say of a chapter, and the answer that its opening marks, as Markdown."""
    facts = tomllib.loads((folder / "facts" / f"{page}.toml").read_text(encoding="utf-8"))["chapter"]
    notebook = json.loads((folder / f"{page}.ipynb").read_text(encoding="utf-8"))
    answers = portable.answers(portable.prose(notebook))
    if len(answers) != 1:
        raise ValueError(f"{page} marks {len(answers)} sentences as its answer; one is needed")
    return facts, answers[0]


def first_sentences(text: str) -> str:
    """The first sentences of a page's prose, as many as fit into a description."""
    blocks = [block for block in text.split("\n\n") if re.match(r"[\w*\[`\"]", block)]
    told = ""
    for sentence in re.split(r"(?<=[.?!])\s+", plain("\n\n".join(blocks))):
        if len(told) >= SHORTEST and len(told) + 1 + len(sentence) > LONGEST:
            break
        told = f"{told} {sentence}".strip()
    return shortened(told)


def shortened(text: str) -> str:
    if len(text) <= LONGEST:
        return text
    return text[: LONGEST - 1].rsplit(" ", 1)[0].rstrip(",;:") + "…"


def description(page: str, folder: Path) -> str:
    """What a page is, in 50 to 160 characters: `description("02_lora", Path("book"))`."""
    if page in MADE:
        return MADE[page]
    if portable.chapter_number(page) is None:
        return first_sentences(source(page, folder))
    facts, answer = chapter(page, folder)
    both = f"{facts['question']} {plain(answer)}"
    return both if len(both) <= LONGEST else shortened(plain(answer))
