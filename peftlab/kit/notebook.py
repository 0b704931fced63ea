"""What every chapter needs besides its code: a quiet start, source code on the page, numbers in prose, tables.

The outputs look the same in the rendered book, in Jupyter and on Colab. They are the same each time a notebook runs, so
stored outputs can be compared with fresh ones. IPython is imported only when something is shown.
"""

from __future__ import annotations

import ast
import inspect
import logging
import os
import random
import re
import sys
import textwrap
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from peftlab.checks import checked, whole
from peftlab.errors import PeftLabError
from peftlab.kit import tables
from peftlab.kit.measurements import Results

# Libraries whose messages on stderr say nothing about the reader's own code.
NOISY = ("accelerate", "bitsandbytes", "datasets", "huggingface_hub", "kernels", "peft", "torch", "torchao",
         "tqdm", "traitlets", "transformers", "triton")
GLUE_PREFIX = "application/papermill.record/"  # a MIME type that nothing displays; the book's glue role reads it


@checked()
def start(seed: int = 0) -> None:
    """Quiet the libraries, set the seeds and use the book's figure style. Every chapter calls this first."""
    quiet()
    set_seed(seed)
    from peftlab.kit import figures

    figures.use_style()


def quiet() -> None:
    """Keep messages of libraries (progress bars, advice, their own deprecations) out of the notebook.

    Errors, and warnings from the reader's own code, are still shown. Call it before the first model is loaded, because
    some libraries read these settings when they are imported.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # otherwise each fork prints a warning
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    pattern = rf"({'|'.join(NOISY)})(\.|$)"
    for entry in warnings.filters:
        if entry[0] == "ignore" and getattr(entry[3], "pattern", None) == pattern:
            break
    else:
        warnings.filterwarnings("ignore", module=pattern)
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    _quiet_if_loaded()


def _quiet_if_loaded() -> None:
    """Quiet transformers and datasets if they are imported already: then they have switches of their own."""
    if "transformers" in sys.modules:
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
    if "datasets" in sys.modules:
        sys.modules["datasets"].disable_progress_bars()


@checked()
def set_seed(seed: int = 0) -> None:
    """Seed Python, NumPy and torch (every device)."""
    seed = whole("seed", seed, least=0, most=2**32 - 1)  # as NumPy wants it
    random.seed(seed)
    import numpy

    numpy.random.seed(seed)
    import torch

    torch.manual_seed(seed)


@checked()
def show_source(
    *objects: Any,
    docstring: bool = True,
    methods: str | Sequence[str] | None = None,
    between: tuple[str, str] | None = None,
) -> None:
    """Show the source of functions, classes or modules of the package as a highlighted block of code.

    The source is read from the installed package, so a page always shows the code that runs.

    Args:
        objects: what to show, one below the other.
        docstring: False leaves out every docstring, of the object and of its methods.
        methods: for a class, the names of the methods to show. Its first lines stay, the rest is left out.
        between: a pair of strings. The lines from the one with the first string to the one with the second are shown.

    Raises:
        PeftLabError: a method or a line to cut at does not exist, or there is no Python source.

    >>> pl.show_source(pl.memory.format_count, docstring=False)
    def format_count(number: int) -> str:
        return f"{number:,}"
    """
    if not objects:
        raise PeftLabError("show_source needs an object of the package, for example pl.LoRAConfig")
    code = "\n\n\n".join(_source(item, docstring, methods, between) for item in objects)
    fence = "```" if "```" not in code else "~~~~"
    _display({"text/markdown": f"{fence}python\n{code}\n{fence}", "text/plain": code})


def _source(item: Any, docstring: bool, methods: str | Sequence[str] | None, between: tuple[str, str] | None) -> str:
    name = str(getattr(item, "__qualname__", None) or getattr(item, "__name__", repr(item)))
    try:
        code = textwrap.dedent(inspect.getsource(item)).rstrip()
    except (TypeError, OSError):
        raise PeftLabError(f"there is no Python source to show for {name}; "
                           "give the function, class or module itself, not an instance") from None
    code = re.sub(r"\A@checked\(.*\)\n", "", code)  # every public function has this line, and it explains nothing
    if methods is not None:
        code = _only_methods(code, name, [methods] if isinstance(methods, str) else methods)
    if not docstring:
        code = _without_docstrings(code)
    if between is not None:
        code = _cut(code, name, *between)
    return code


def _only_methods(code: str, name: str, methods: Sequence[str]) -> str:
    """Return the class's header (up to its first function) and the named methods, in the given order."""
    body = ast.parse(code).body[0]
    functions = {n.name: n for n in getattr(body, "body", []) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))}
    unknown = [method for method in methods if method not in functions]
    if unknown:
        raise PeftLabError(f"{name} defines no {', '.join(unknown)}; it defines: {', '.join(functions) or 'no method'}")
    lines = code.splitlines()
    first = min(_first_line(n) for n in functions.values())
    parts = ["\n".join(lines[:first - 1]).rstrip()]
    parts += ["\n".join(lines[_first_line(functions[m]) - 1:functions[m].end_lineno]) for m in methods]
    return "\n\n".join(parts)


def _first_line(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])


def _without_docstrings(code: str) -> str:
    lines = code.splitlines()
    drop: set[int] = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and len(node.body) > 1:
            if ast.get_docstring(node, clean=False) is not None:
                end = node.body[0].end_lineno or node.body[0].lineno
                drop.update(range(node.body[0].lineno, end + 1))
                if end < len(lines) and not lines[end].strip():
                    drop.add(end + 1)  # the empty line below it
    return "\n".join(line for number, line in enumerate(lines, 1) if number not in drop).strip("\n")


def _cut(code: str, name: str, first: str, last: str) -> str:
    lines = code.splitlines()
    start_at = next((i for i, line in enumerate(lines) if first in line), None)
    if start_at is None:
        raise PeftLabError(f"the source of {name} has no line with {first!r}")
    end_at = next((i for i in range(start_at, len(lines)) if last in lines[i]), None)
    if end_at is None:
        raise PeftLabError(f"the source of {name} has no line with {last!r} after the one with {first!r}")
    return textwrap.dedent("\n".join(lines[start_at:end_at + 1]))


@checked()
def glue(name: str, value: Any, fmt: str = "") -> None:
    """Store a number under a name, so that the page's prose can use it: ``{glue:text}`name` ``.

    Nothing is displayed. Print the number in the same cell for readers who run it. The text is stored as it will stand
    in the sentence, so round it here. It belongs to the stored output and is compared at each run. So glue only what is
    the same every time: counts, values from results files, rounded numbers, comparisons.

    Args:
        name: unique in the notebook, such as "lora-saving".
        value: a number or a string, or a tensor with one element.
        fmt: a format such as ".1%" or ",", or a text with one pair of braces, such as "{:.1f} GB".

    Raises:
        PeftLabError: the format does not fit the value.

    >>> pl.glue("example-peak", 14_400_000_000 / 1e9, "{:.1f} GB")
    >>> pl.glue("example-share", "half", ".1%")
    Traceback (most recent call last):
    peftlab.errors.PeftLabError: glue 'example-share': the format '.1%' does not fit 'half' ...
    """
    try:
        if hasattr(value, "item") and not isinstance(value, (int, float, str)):
            value = value.item()
        text = fmt.format(value) if "{" in fmt else format(value, fmt)
    except (ValueError, TypeError, LookupError, RuntimeError) as error:
        raise PeftLabError(f"glue {name!r}: the format {fmt!r} does not fit {value!r} ({error})") from None
    _display({GLUE_PREFIX + "text/plain": repr(text)}, {"scrapbook": {"name": name, "mime_prefix": GLUE_PREFIX}})


@checked()
def expect(claim: str, holds: bool) -> None:
    """Compare a result of a live run with what the page says about it.

    If the claim holds, nothing is shown. If not, a line says so and the cell goes on, because results of training
    differ a little between machines and releases. In the book's own tests, which set PEFTLAB_STRICT, it is an error.

    Args:
        claim: what the page says, as the end of a sentence that begins "Expected: ".
        holds: whether it is true in this run.

    Raises:
        PeftLabError: the claim does not hold, and PEFTLAB_STRICT is set.

    >>> pl.expect("the loss falls", 3 < 2)
    Expected: the loss falls. It came out otherwise here: results differ between machines and releases.
    """
    if holds:
        return
    if os.environ.get("PEFTLAB_STRICT"):
        raise PeftLabError(f"expected: {claim}; this run gave something else")
    print(f"Expected: {claim}. It came out otherwise here: results differ between machines and releases.")


@checked()
def table(
    rows: Iterable[dict[str, Any]],
    columns: tables.Columns | None = None,
    caption: str | None = None,
    source: Any = None,
) -> None:
    """Show rows as a table. Below rows from `pl.results` stands a badge that says where they were measured.

    Args:
        rows: dicts, or `Results`.
        columns: {column: heading} or {column: (heading, format)}, in order. By default all columns are shown.
            A format is one of Python's (".1%", ",") or a function of the value.
        caption: a line above the table.
        source: the `Results` from which the rows were computed, to be cited below the table.

    Raises:
        PeftLabError: no row has a column of that name.

    >>> pl.table([{"r": 8, "loss": 0.713}, {"r": 16, "loss": 0.702}], {"r": "rank", "loss": ("loss", ".2f")})
    rank  loss
    8     0.71
    16    0.70
    """
    headings, cells, numeric = tables.lay_out(rows, columns)
    source = rows if source is None else source
    source = source if isinstance(source, Results) else None
    _display({"text/html": tables.as_html(headings, cells, numeric, caption, source),
              "text/plain": tables.as_text(headings, cells, caption, source)})


@checked()
def provenance(source: Results) -> None:
    """Show the badge of measurements: machine and date, which fold out the versions and the command.

    `table` shows it by itself. Call this for a figure that is drawn from measurements.

    Raises:
        PeftLabError: these are no measurements from `pl.results`.

    >>> pl.provenance(pl.results("memory"))
    Measured on NVIDIA H100 80GB HBM3, 2026-11-24 (...). To repeat it: peftlab bench memory --out memory.json
    """
    if not isinstance(source, Results):
        raise PeftLabError(f"provenance needs measurements from pl.results, found {type(source).__name__}. "
                           'Call it as pl.provenance(pl.results("memory")), for example.')
    _display({"text/html": tables.badge(source), "text/plain": source.cite()})


def _display(data: dict[str, Any], metadata: dict[str, Any] | None = None) -> None:
    """Show a bundle of MIME types. Outside a notebook, print its text if it has one."""
    try:
        from IPython import get_ipython
        from IPython.display import display
    except ImportError:
        inside = False
    else:
        inside = get_ipython() is not None
    if not inside:
        if "text/plain" in data:
            print(data["text/plain"])
        return
    display(data, metadata=metadata, raw=True)
