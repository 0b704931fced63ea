"""A setting of `train` is written once: signature, documentation, command line and check come from its field."""

import argparse
import dataclasses
import inspect
import re

import pytest
import tiny

import peftlab as pl
from peftlab import settings
from peftlab.checks import number, whole
from peftlab.commands import cli, train
from peftlab.settings import Settings, setting, settings_from, takes

FIELDS = dataclasses.fields(Settings)


def one_line(text):
    return " ".join(text.split())


def options():
    _, commands = cli.build_parser()
    return {action.option_strings[0].removeprefix("--"): action for action in commands["train"]._actions}


@pytest.mark.parametrize("one", FIELDS, ids=lambda one: one.name)
def test_each_setting_is_in_the_signature_and_the_documentation(one):
    shown = inspect.signature(pl.train).parameters[one.name]
    assert (shown.default, shown.annotation, shown.kind) == (one.default, one.type, inspect.Parameter.KEYWORD_ONLY)
    assert f" {one.name}: {one.metadata['doc']}" in one_line(pl.train.__doc__)
    assert one.metadata["more"] in one_line(pl.train.__doc__)


@pytest.mark.parametrize("one", train.OPTIONS.values(), ids=lambda one: one.name)
def test_each_option_has_the_meaning_and_the_default_of_its_setting(one):
    action = options()[one.metadata["option"]]
    assert action.help.startswith(one.metadata["doc"])
    assert action.default == (None if one.name == "learning_rate" else one.default)  # a method has its own rate
    assert action.dest == one.metadata["option"].replace("-", "_")


def test_help_shows_the_settings_in_the_place_of_keywords():
    assert list(inspect.signature(pl.train).parameters) == ["model", "train_data", *(one.name for one in FIELDS)]
    assert "{settings}" not in pl.train.__doc__
    assert max(map(len, pl.train.__doc__.splitlines())) <= 120


def test_one_changed_field_changes_signature_documentation_option_and_check(monkeypatch):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Changed(Settings):
        batch_size: int = setting(3, "puppies in a basket", whole, least=2, option="basket")
        sparkle: float = setting(0.5, "how much it shines", number, below=1, option="sparkle")

    @takes(Changed)
    def play(model, data, **given):
        """Play.

        Args:
            {settings}
        """
        return settings_from(given, Changed)

    assert inspect.signature(play).parameters["batch_size"].default == 3
    assert "    batch_size: puppies in a basket.\n" in play.__doc__
    assert play.__doc__.rstrip().endswith("    sparkle: how much it shines.")

    changed = {one.metadata["option"]: one for one in dataclasses.fields(Changed) if one.metadata["option"]}
    monkeypatch.setattr(train, "OPTIONS", changed)
    parser = argparse.ArgumentParser()
    train.add_options(parser)
    assert re.search(r"--basket N +puppies in a basket \(default: 3\)", parser.format_help())
    assert re.search(r"--sparkle X +how much it shines \(default: 0.5\)", parser.format_help())
    assert "--batch-size" not in parser.format_help()
    given = parser.parse_args("--model m --data d --out o --sparkle 0.7".split())
    assert (given.basket, given.sparkle) == (3, 0.7)

    assert play(None, None, sparkle=0.7) == Changed(sparkle=0.7)
    with pytest.raises(pl.PeftLabError, match="batch_size must be a whole number of at least 2, found 1"):
        play(None, None, batch_size=1)
    with pytest.raises(pl.PeftLabError, match="sparkle must be a number below 1, found 1"):
        play(None, None, sparkle=1)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("bach_size", "train has no setting 'bach_size'. Did you mean 'batch_size'?"),
        ("lr", "train has no setting 'lr'. Did you mean 'learning_rate'?"),  # as the command line calls it
        ("eval_every", "train has no setting 'eval_every'. Did you mean 'evaluate_every'"),
        ("num_epochs", "train has no setting 'num_epochs'. Did you mean 'epochs'"),
        ("zzz", "train has no setting 'zzz'. There are tokenizer, evaluation_data, steps, "),
    ],
)
def test_an_unknown_setting_is_an_error_with_near_matches(name, told):
    with pytest.raises(pl.PeftLabError, match=re.escape(told)):
        pl.train(tiny.llama(), tiny.examples(), **{name: 1})


@pytest.mark.parametrize("one", [one for one in FIELDS if one.metadata["check"]], ids=lambda one: one.name)
def test_each_checked_setting_refuses_what_it_cannot_be(one):
    with pytest.raises(pl.PeftLabError, match=f"^{one.name} must be .* found 'nonsense'"):
        pl.train(tiny.llama(), tiny.examples(), **{one.name: "nonsense"})


def test_the_names_are_those_that_training_has():
    from peftlab.training.optimizers import OPTIMIZERS
    from peftlab.training.precision import AUTOCAST

    assert settings.OPTIMIZERS == tuple(OPTIMIZERS)
    assert settings.PRECISIONS == ("auto", *AUTOCAST)


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("--batch-size", "0", "--batch-size must be a positive whole number, found 0."),
        ("--lr", "nan", "--lr must be a positive number of at most 1,000, found nan."),
        ("--warmup", "-1", "--warmup must be a finite number of at least 0, found -1.0."),
        ("--seed", str(2**64), "--seed must be a whole number of at least -9,223,372,036,854,775,808 and of at most"),
        ("--out", "", "--out must be the path of a file or a folder, found ''."),
        ("--out", "a\0b", "--out must be the path of a file or a folder, found 'a\\x00b'."),
        ("--limit", "0", "--limit must be a positive whole number, found 0."),
    ],
)
def test_the_command_line_checks_before_anything_is_loaded(tmp_path, capsys, option, value, told):
    out = tmp_path / "out"
    assert cli.main([*f"train --model none --data none --out {out} {option}".split(), value]) == 2
    assert told in capsys.readouterr().err
    assert not out.exists()
