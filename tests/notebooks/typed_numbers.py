"""Finds numbers in a text that were typed by hand where a computed one should stand.

`typed(text, code)` yields them. rules.py applies it to the prose, captions and descriptions of figures in notebooks, to
the facts of the appendices and to the pages. The docstring of rules.no_typed_numbers says what may be typed, and why.
"""

import ast
import calendar
import math
import re
from dataclasses import dataclass, field

import portable

from peftlab.memory import CARDS

BOUND, CITED = "\u2022", "\ue000"  # stand in the place of a value and of a citation
# What is not searched keeps its place, with other characters for digits and quotes, so that a report can show it.
COVERED = {ord(plain): chr(0xE010 + place) for place, plain in enumerate('0123456789"“”')}
SHOWN = {ord(covered): chr(plain) for plain, covered in COVERED.items()} | {ord(CITED): ""}

# What is no prose. A formula or a piece of code that is a number and nothing else counts as prose.
FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,}).*?^[ \t]*\1[ \t]*$", re.MULTILINE | re.DOTALL)
DISPLAYED = re.compile(r"\$\$.*?\$\$", re.DOTALL)
CITATION = re.compile(r"\{cite:\w\}`[^`]*`")
ROLE = re.compile(r"\{[a-z][\w:-]*\}`[^`]*`")
CODE = re.compile(r"(`+)(.+?)\1", re.DOTALL)
FORMULA = re.compile(r"\$([^$\n]+(?:\n[^$\n]+)?)\$")
NUMBER_ALONE = re.compile(r"\s*[-+−]?\d[\d.,]*\s*(?:\\?%)?\s*")
HIDDEN = re.compile(r"<!--.*?-->|<[^>]+>", re.DOTALL)
LINK = re.compile(r"!?\[(?P<text>[^\]]*)\]\((?P<url>[^)]*)\)")
QUOTED = re.compile(r'"[^"\n]*(?:\n[^"\n]+)?"|“[^”]*”')
SENTENCE_END = re.compile(r"(?<=[.?!:])[\"”)*]*\s+(?=[A-Z\"“*(\[\u2022])|\n\s*\n|\n[ \t]*(?=[-|>])")

# Numbers that name something and measure nothing.
END = r"(?!\w|[.,]\d)"
AND = r"(?:,? and|,? or| to|,|[-–])\s*"
WHOLE = rf"(?<![\w.,])\d+{END}"
SERIES = rf"{WHOLE}(?:{AND}\d+{END})*"
PLACES = rf"\d+(?:\.\d+)*{END}(?:{AND}\d+(?:\.\d+)*{END})*"
NAME = re.compile(r"(?<![\w.])[^\W\d]\w*(?:[-.]\w+)*")
STRUCTURE = (
    re.compile(r"^#+\s+\d+(?:\.\d+)*\s", re.MULTILINE),  # a heading
    re.compile(r"^\s*\d+\.\s", re.MULTILINE),  # an item of a list
    re.compile(r"\*\*Figure [\d.]*\*\*"),
    re.compile(r"\*\*\d+\. [^*]*\*\* \([^)]*\)"),  # an exercise: number, title, difficulty, minutes
    re.compile(rf"\b(?:[Cc]hapter|[Ss]ection|[Ee]xercise|[Ff]igure|[Tt]able)s?\s+{PLACES}"),
    re.compile(rf"\b(?:[Bb]lock|[Ll]ayer|[Ss]tep|[Rr]ow|[Ss]eed)s?\s+{SERIES}"),
    re.compile(rf"{SERIES}[\s-]bits?\b"),
    re.compile(r"(?<![\w.,])(?:[1-9]|1[0-6])(?:(?: or| and| to|,) (?:[1-9]|1[0-6]))*\s+bytes?\b"),
    re.compile(rf"{SERIES}\s+(?:minutes?|hours?)\b"),
    re.compile(r"^\|\s*\d+(?:-\d+)?\s*\|", re.MULTILINE),  # a table's first column: the minutes of a plan
    re.compile(rf"(?:\d\d? )?\b(?:{'|'.join(calendar.month_name[1:])}) \d{{4}}\b|\b(?:in|of|since) 20[12]\d\b"),
    re.compile(r"\b\d+(?:\.\d+)?(?:B\b|M(?= (?:model|shape|base)))"),  # a model by its size
    re.compile(r"\b(?:" + "|".join(re.escape(name) for name in sorted(CARDS, key=len, reverse=True)) + r")\b"),
)
SIZES = "(?:" + "|".join(sorted({f"{size:g}" for size in CARDS.values()}, key=len, reverse=True)) + ")"
A_CARD = re.compile(
    rf"\b(?:cards?|GPUs?)\s(?:\w+\s){{0,2}}(?:of|has|have|with)\s(?:{SIZES}(?:,| or| and)\s)*{SIZES}\sGB\b"
    rf"|(?<![\w.,])(?:{SIZES}(?:,| or| and)\s)*{SIZES}\sGB(?:\sof\s\w+)?\scards?\b"
)

EXERCISE = re.compile(r"^\*\*\d+\. ", re.MULTILINE)
SECTION = re.compile(rf"^## |{EXERCISE.pattern}", re.MULTILINE)
LABEL = re.compile(r'<a id="(sec-[\w-]+)"></a>')
NUMBER = re.compile(r"(?<![\w.,])[-+−]?(?P<digits>\d+(?:,\d{3})*(?:\.\d+)?(?:e[-+]?\d+)?|\.\d+)")
SCALES = {
    "%": 0.01, "per cent": 0.01, "points": 0.01, "point": 0.01, "times": 1, "x": 1,
    "GB": 1e9, "MB": 1e6, "kB": 1e3, "KB": 1e3, "TB": 1e12, "GiB": 2**30, "MiB": 2**20, "TFLOP": 1e12,
    "billion": 1e9, "million": 1e6, "thousand": 1e3, "B": 1e9, "M": 1e6, "k": 1e3,
    "seconds": 1, "second": 1, "s": 1, "milliseconds": 1e-3, "ms": 1e-3, "microseconds": 1e-6,
    "nats": 1, "nat": 1, "degrees": 1, "bytes": 1,
}  # fmt: skip
UNIT = re.compile(
    r"(?:(?:,? and|,? or| to|,|\s?[-–])\s*[-+−]?\d[\d,.]*(?<!,))*[\s-]?(?P<unit>"
    + "|".join(re.escape(unit) for unit in sorted(SCALES, key=len, reverse=True))
    + r")(?!\w)(?!\s*\d)"
)
NO_CHANCE = 3  # significant digits
MAGIC = re.compile(r"^([ \t]*)[%!](?:.*\\\n)*.*$", re.MULTILINE)  # a line of IPython's own, which may be continued


@dataclass
class Code:
    """The inputs that the code near a text gives: the numbers that stand in it, and the words of its strings."""

    numbers: set[float] = field(default_factory=set)
    words: str = ""

    def __or__(self, other: "Code") -> "Code":
        return Code(self.numbers | other.numbers, f"{self.words}\n{other.words}")

    def gives(self, digits: str, unit: str | None) -> bool:
        """Whether a number is an input here. One with a unit must be here in a way that is no chance."""
        value, scale = float(digits.replace(",", "")), SCALES.get(unit)
        like = [value] if unit is None or no_chance(digits) else []
        if scale and (scale >= 1e3 or no_chance(digits)):
            like.append(value * scale)
        rounded = "." in digits and digits.endswith("0")  # 0.010 was measured, 0.01 may be a setting
        if not rounded and any(math.isclose(number, one, rel_tol=1e-9) for number in self.numbers for one in like):
            return True
        behind = r"\s?" + re.escape(unit) + r"(?!\w)" if unit else r"(?![\d,.]*\d)"
        return bool(re.search(rf"(?<![\d.,]){re.escape(digits)}{behind}", self.words))

    def of_no_chance(self) -> "Code":
        """What also counts in another section."""
        return Code({number for number in self.numbers if no_chance(f"{number:.9g}")})


def no_chance(digits: str) -> bool:
    """Whether a number has so many significant digits that the same one is no coincidence."""
    return len(digits.split("e")[0].replace(",", "").replace(".", "").strip("0")) >= NO_CHANCE


def inputs(source: str) -> Code:
    """The literals of a code cell. What it prints, and a table's caption, are texts themselves and give nothing."""
    tree = ast.parse(MAGIC.sub(r"\1pass", source))
    texts = set()
    for node in ast.walk(tree):
        told = isinstance(node, ast.Call) and ast.unparse(node.func) == "print"
        if told or isinstance(node, ast.JoinedStr) or isinstance(node, ast.keyword) and node.arg == "caption":
            inside = (part for part in ast.walk(node) if isinstance(part, ast.Constant))
            texts |= {id(part) for part in inside if isinstance(part.value, str)}
    found = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in texts]
    numbers = {float(value) for value in found if isinstance(value, (int, float)) and not isinstance(value, bool)}
    return Code(numbers, "\n".join(value for value in found if isinstance(value, str)))


def string_words(node: ast.AST, told: bool = True) -> str:
    """The words that an expression writes itself: its strings, with BOUND where an f-string computes.

    What an f-string computes writes words only in f-strings of its own: {"; ".join(f"{n} tokens" for n in lengths)}.
    """
    if isinstance(node, ast.Constant):
        return node.value if told and isinstance(node.value, str) else ""
    if isinstance(node, ast.FormattedValue):  # without its format: ".1f" is no word
        return BOUND + string_words(node.value, told=False) + BOUND
    told = told or isinstance(node, ast.JoinedStr)
    return "".join(string_words(part, told) for part in ast.iter_child_nodes(node))


def table_captions(source: str):
    """The captions that a code cell gives to its tables, without what it computes in them."""
    for node in ast.walk(ast.parse(MAGIC.sub(r"\1pass", source))):
        if isinstance(node, ast.keyword) and node.arg == "caption":
            yield string_words(node.value)


def template_words(template: str) -> str:
    """What an f-string of a cell's metadata says beside what it computes."""
    return string_words(ast.parse('f"""' + template + '"""', mode="eval").body)


def computes(template: str) -> bool:
    """Whether an f-string of a cell's metadata names a variable of its cell."""
    return any(isinstance(node, ast.Name) for node in ast.walk(ast.parse('f"""' + template + '"""', mode="eval")))


def prose(text: str) -> str:
    """A text with BOUND for each value, CITED for each citation, and without code, formulas and structure."""

    def cover(found):
        return found[0].translate(COVERED)

    def alone(found):
        inner = found[found.re.groups]
        return inner if NUMBER_ALONE.fullmatch(inner) else cover(found)

    def link(found):
        outside = found["url"].startswith("http") and not found["url"].startswith(portable.SITE)
        return found["text"] + CITED * outside

    def filled(found):
        words, cites = found["text"] or "", found["kind"].startswith("cite")
        if found["kind"] != "page":  # the words of a page's link are the author's
            words = words.translate(COVERED)
        return words + CITED * cites

    text = portable.VALUE.sub(BOUND, text)
    text = portable.LINK.sub(filled, DISPLAYED.sub(" ", FENCE.sub(" ", text)))
    text = ROLE.sub(cover, CITATION.sub(CITED, text))
    text = FORMULA.sub(alone, CODE.sub(alone, text))
    text = LINK.sub(link, HIDDEN.sub("", text))
    for pattern in (A_CARD, *STRUCTURE, NAME):
        text = pattern.sub(cover, text)
    return text


def numbers(text: str) -> list[tuple[re.Match, str | None]]:
    """The numbers of a text, with their units; in "8 or 9 GB" both have one."""
    found = [(number, UNIT.match(text, number.end())) for number in NUMBER.finditer(text)]
    return [(number, unit["unit"] if unit else None) for number, unit in found]


def quotations(text: str) -> str:
    """The quotations of a text: claims of others, whose numbers the text around them may repeat."""
    return " ".join(QUOTED.findall(prose(text)))


def typed(text: str, code: Code, given: str = ""):
    """Yield each number of a text that is typed and that nothing gives, with the words around it.

    code: the inputs near the text; given: another text, such as a claim, whose numbers this one may repeat.
    """
    is_task = bool(EXERCISE.search(text))
    text = prose(text)
    said = [(number["digits"], SCALES.get(unit)) for number, unit in numbers(prose(given) + " " + quotations(text))]
    text = QUOTED.sub(lambda found: found[0].translate(COVERED), text)
    ends = [0, *(found.start() for found in SENTENCE_END.finditer(text)), len(text)]
    for number, unit in numbers(text):
        digits, scale = number["digits"], SCALES.get(unit)
        sentence = next(text[a:b] for a, b in zip(ends, ends[1:], strict=False) if b >= number.end())
        if CITED in sentence or (unit is None and (is_task or digits in ("0", "1"))):
            continue
        if any(digits == one and scale in (None, other) for one, other in said) or code.gives(digits, unit):
            continue
        if is_task and code.gives(digits, None):
            continue
        around = " ".join(text[max(0, number.start() - 60) : number.end() + 40].translate(SHOWN).split())
        yield f"{number[0]}{' ' + unit if unit else ''}: ...{around}..."


def sections(notebook):
    """Yield each section of a notebook as (its cells, the inputs of its code); an exercise is one of its own.

    Numbers that stand nowhere by chance are inputs of the whole chapter.
    """
    found = [[]]
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and SECTION.search(cell.source):
            found.append([])
        found[-1].append(cell)
    codes = [together(inputs(cell.source) for cell in cells if cell.cell_type == "code") for cells in found]
    everywhere = together(codes).of_no_chance()
    for cells, code in zip(found, codes, strict=True):
        yield cells, code | everywhere


def together(codes) -> Code:
    made = Code()
    for code in codes:
        made = made | code
    return made


def code_by_label(notebooks) -> dict[str, Code]:
    """The inputs of each section by its label, and those of each chapter by its name: {path stem: notebook}."""
    found = {}
    for page, notebook in notebooks.items():
        for cells, code in sections(notebook):
            found[page] = found.get(page, Code()) | code
            prose_of = (cell.source for cell in cells if cell.cell_type == "markdown")
            found |= {label: code for source in prose_of for label in LABEL.findall(source)}
    return found
