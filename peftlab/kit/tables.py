"""Rows of results as tables, in HTML and in plain text. The same rows always give the same text."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable
from typing import Any

from peftlab.checks import checked, shown
from peftlab.errors import PeftLabError, did_you_mean
from peftlab.kit.measurements import Results

Columns = dict[Any, Any]  # {column: heading} or {column: (heading, format)}
UNBROKEN = 24  # characters: a column whose cells are no longer than that does not wrap them
SIGNED_ZERO = re.compile(r"[-+]0+(\.0*)?%?")


@checked()
def lay_out(
    rows: Iterable[dict[str, Any]], columns: Columns | None = None
) -> tuple[list[str], list[list[str]], list[bool]]:
    """Return the texts of a table.

    Args:
        rows: dicts.
        columns: {column: heading} or {column: (heading, format)}, in order; None takes all columns as they are.

    Returns:
        (headings, cells, numeric): a list of str; a list of lists of str; a list of bool, True for columns of numbers.

    Raises:
        PeftLabError: no row has a column of that name.
    """
    listed = list(rows)
    names = list(dict.fromkeys(name for row in listed for name in row))
    columns = {name: name for name in names} if columns is None else columns
    for name in columns:
        if name not in names:
            raise PeftLabError(f"no row has a column {name!r}; there are: {', '.join(names)}."
                               + did_you_mean(name, names))
    headings: list[str] = []
    cells: list[list[str]] = [[] for _ in listed]
    for name, wish in columns.items():
        heading, fmt = wish if isinstance(wish, tuple) else (wish, "")
        headings.append(str(heading))
        for row, line in zip(listed, cells, strict=True):
            line.append(_text(row.get(name), fmt))
    numeric = [all(isinstance(row.get(name), (int, float, type(None))) for row in listed) for name in columns]
    return headings, cells, numeric


def _check_widths(headings: list[str], *lines: list[Any]) -> None:
    for line in lines:
        if len(line) != len(headings):
            raise PeftLabError(f"a table of {len(headings)} columns has a row of {len(line)}: {shown(line)}.")


def _text(value: Any, fmt: Any) -> str:
    if value is None:
        return ""
    text = str(fmt(value)) if callable(fmt) else format(value, fmt)
    return text[1:] if SIGNED_ZERO.fullmatch(text) else text  # what rounds to zero has no sign


@checked()
def as_html(
    headings: list[str],
    cells: list[list[str]],
    numeric: list[bool],
    caption: str | None = None,
    source: Results | None = None,
) -> str:
    """Return a table in a region of its own, which scrolls on a narrow screen, also from the keyboard.

    Below it stands the badge of the `Results` from which its rows come.
    """
    _check_widths(headings, numeric, *cells)
    columns = list(zip(*cells, strict=True)) if cells else [()] * len(headings)
    short = [all(len(cell) <= UNBROKEN for cell in column) for column in columns]  # a range or a name stays on one line
    sides = [f' style="text-align: {"right" if right else "left"}{"; white-space: nowrap" * one_line}"'
             for right, one_line in zip(numeric, short, strict=True)]
    tops = [f' style="text-align: {"right" if right else "left"}"' for right in numeric]
    head = "".join(f'<th scope="col"{side}>{html.escape(h)}</th>' for h, side in zip(headings, tops, strict=True))
    body = "\n".join("<tr>" + "".join(f"<td{side}>{html.escape(c)}</td>" for c, side in zip(line, sides, strict=True))
                     + "</tr>" for line in cells)
    label = html.escape(caption or ", ".join(headings), quote=True)
    parts = [f'<div role="region" tabindex="0" aria-label="{label}" style="overflow-x: auto">']
    parts += ['<table class="dataframe table">']  # the class of pandas: themes know it in light and dark
    parts += [f'<caption style="caption-side: top; color: inherit">{html.escape(caption)}</caption>'] if caption else []
    parts += [f"<thead><tr>{head}</tr></thead>", f"<tbody>\n{body}\n</tbody>", "</table>", "</div>"]
    parts += [badge(source)] if source else []
    return "\n".join(parts)


@checked()
def badge(source: Results) -> str:
    """Return one small line, machine and date, that folds out the versions and the command. It needs no script."""
    given = source.provenance
    return (
        '<details class="provenance" style="font-size: 85%">'
        f"<summary>Measured on {html.escape(source.machine)}, {html.escape(source.when)}</summary>\n"
        f"<p>Versions: {html.escape(source.versions)}.<br>\n"
        f"To repeat it: <code>{html.escape(given['command'])}</code></p></details>"
    )


@checked()
def as_text(
    headings: list[str], cells: list[list[str]], caption: str | None = None, source: Results | None = None
) -> str:
    """Return a table as columns of plain text, with the whole provenance in a line below it."""
    _check_widths(headings, *cells)
    widths = [max(map(len, column)) for column in zip(headings, *cells, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
             for line in [headings, *cells]]
    return "\n".join(([caption] if caption else []) + lines + ([source.cite()] if source else []))
