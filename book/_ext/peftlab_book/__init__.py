"""Sphinx extension of the book: tables and lists that are made from book/facts/*.toml and peftlab/results/*.json.

Directives. A page's source names one as `<!--@made claims-table-->` (portable.py), so that no reader outside the site
sees it raw. The first, {cards} and {front-picture} take a body; that of the
first says after which section an exercise can be done:
    {exercise-table}  exercises with their levels and minutes
    {claims-table}    claims in circulation: verdict, what is so, the section that shows it
    {facts-glossary}  the terms of all chapters; {term}`LoRA` refers to one
    {equations}       the names of the numbered equations
    {questions}       interview questions with folded answers, and an index of them by theme
    {guide}, {guide-table}, {guide-rules}   the decision guide (guide_page.py)
    {calculator}      the memory calculator that runs in the page (calculator_page.py)
    {front-picture}, {cards}   what the front page shows (front.py)
    {measurements}    every results file with its provenance and the command that repeats it

A fault in a facts or results file is a warning with the file's name, so a build with -W fails. Links to sections are
ordinary references, which Sphinx checks.
"""

from peftlab_book.calculator_page import Calculator, add_looks, write_archive
from peftlab_book.directives import (
    ClaimsTable,
    Equations,
    ExerciseTable,
    FactsGlossary,
    Measurements,
    Questions,
)
from peftlab_book.front import Cards, FrontPicture
from peftlab_book.guide_page import Guide, GuideRules, GuideTable


def setup(app):
    app.add_directive("calculator", Calculator)
    app.add_directive("cards", Cards)
    app.add_directive("claims-table", ClaimsTable)
    app.add_directive("equations", Equations)
    app.add_directive("exercise-table", ExerciseTable)
    app.add_directive("facts-glossary", FactsGlossary)
    app.add_directive("front-picture", FrontPicture)
    app.add_directive("guide", Guide)
    app.add_directive("guide-table", GuideTable)
    app.add_directive("guide-rules", GuideRules)
    app.add_directive("questions", Questions)
    app.add_directive("measurements", Measurements)
    app.connect("html-page-context", add_looks)
    app.connect("build-finished", write_archive)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
