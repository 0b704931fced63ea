"""Sphinx extension of the book: tables and lists that are made from book/facts/*.toml and peftlab/results/*.json.

Directives. Only the first two take a body: it describes the drawing in words, and says after which section an exercise
can be done:
    {block-drawing}   a transformer block with the place of a method coloured; its argument is the method
    {exercise-table}  exercises with their levels and minutes
    {chapter-table}   chapters with their questions and measured run times
    {claims-table}    claims in circulation: verdict, what is so, the section that shows it
    {facts-glossary}  the terms of all chapters; {term}`LoRA` refers to one
    {questions}       interview questions with folded answers, and an index of them by theme
    {measurements}    every results file with its provenance and the command that repeats it

A fault in a facts or results file is a warning with the file's name, so a build with -W fails. Links to sections are
ordinary references, which Sphinx checks.
"""

from peftlab_book.directives import (
    BlockDrawing,
    ChapterTable,
    ClaimsTable,
    ExerciseTable,
    FactsGlossary,
    Measurements,
    Questions,
)


def setup(app):
    app.add_directive("block-drawing", BlockDrawing)
    app.add_directive("chapter-table", ChapterTable)
    app.add_directive("claims-table", ClaimsTable)
    app.add_directive("exercise-table", ExerciseTable)
    app.add_directive("facts-glossary", FactsGlossary)
    app.add_directive("questions", Questions)
    app.add_directive("measurements", Measurements)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
