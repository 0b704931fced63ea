"""The examples in the docstrings of the public names run, and no public function or config is without one."""

import doctest
import inspect

import pytest
import tiny
import torch

import peftlab as pl

FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
PUBLIC = {name: getattr(pl, name) for name in pl.__all__}
DOCUMENTED = {name: value for name, value in PUBLIC.items() if inspect.isfunction(value) or inspect.isclass(value)}


def examples(name: str) -> list[doctest.DocTest]:
    """Return the examples of a public name and of its methods, which share no names with one another."""
    found = doctest.DocTestFinder().find(DOCUMENTED[name], name, module=False, globs={})
    return [test for test in found if test.examples]


def is_config(value: object) -> bool:
    return inspect.isclass(value) and hasattr(value, "peft_type")


@pytest.mark.parametrize("name", [name for name in DOCUMENTED if examples(name)])
def test_an_example_gives_what_it_shows(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # examples write into the current folder
    monkeypatch.delenv("PEFTLAB_STRICT", raising=False)  # `expect` raises under it
    for test in examples(name):
        test.globs = {"pl": pl, "torch": torch, "model": tiny.llama(), "tokenizer": tiny.tokenizer()}
        report: list[str] = []
        doctest.DocTestRunner(optionflags=FLAGS, verbose=False).run(test, out=report.append)
        assert not report, "".join(report)


def test_every_public_function_and_config_has_an_example():
    expected = {name for name, value in DOCUMENTED.items() if inspect.isfunction(value) or is_config(value)}
    assert {"attach", "train", "LoRAConfig"} <= expected
    missing = {name for name in expected if not examples(name)}
    assert not missing, f"Give these a short example in their docstrings: {', '.join(sorted(missing))}"
