"""What the guide answers: `Recommendation`."""

from __future__ import annotations

import os
import shlex
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from peftlab.assets.catalogue import catalogue
from peftlab.catalogue import METHODS
from peftlab.checks import checked, shown
from peftlab.errors import PeftLabError, did_you_mean
from peftlab.guide.evidence import address, look_up
from peftlab.guide.plan import Card, targets_of
from peftlab.guide.rules import meaning
from peftlab.guide.times import Timed
from peftlab.memory.cards import CARDS, that_hold, with_margin
from peftlab.memory.units import format_bytes, format_count

WIDTH = 88  # columns of what is printed
PREFERENCES, REWARDS = (address(f"09_training_recipes#sec-recipes-{name}") for name in ("dpo", "reward"))
NO_COMMAND = {
    "preference": f"peftlab train reads no preferences: train with pl.train, as in {PREFERENCES}",
    "reward": f"peftlab train knows no rewards: train with pl.train, as in {REWARDS}",
}
SEVERAL = "peftlab train runs on one GPU: with several, use FSDP2 or the Trainer, which take an attached model as it is"
TARGETS = {"all-linear": "all linear layers", "query-value": "queries and values"}
WAYS = {"ddp": "; each GPU holds a whole copy (DDP)", "fsdp": "; the GPUs share the weights (FSDP)"}
SPOKEN = {"r": "rank", "ladder": "batch", "ship": "afterwards", "rates": "range", "update": "examples in an update"}
MEASURED = "The measurements behind it: peftlab recommend ... --why, or .why() in Python"
UNSCORED = "no scores were measured"
NOTHING_ATTACHED = "full fine-tuning attaches nothing: train the model as it is, with peftlab train --method full."
PRECISIONS = {"bf16": "computed in bf16", "fp16": "computed in fp16 with a scaled loss"}


@dataclass(frozen=True)
class Reason:
    """Why something was chosen: the settings that it is about, the rule's words, and the entries of its evidence."""

    settings: tuple[str, ...]
    because: str
    evidence: tuple[Mapping[str, Any], ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the reason with its evidence computed from the results files."""
        found = [look_up(entry).to_dict() for entry in self.evidence]
        return {"settings": list(self.settings), "because": self.because, "evidence": found}


@dataclass(frozen=True, kw_only=True)
class Recommendation:
    """A method with its settings, what it needs, and why. `print` shows it as a table with the reasons in short.

    Attributes:
        task, serving, model, kind, parameters, card, gpus, sequence, examples, four_bit: what it was asked for.
        method: the method's name, as `peftlab train` takes it.
        chosen: its settings: `r`, `alpha`, `targets`, `dropout`, `learning_rate` with `rates` (the range to try),
            `precision`, `update` (examples in an update), `epochs`, `ship`.
        batch, checkpointing, accumulation, parallel: a step. An update adds up `accumulation` batches.
        peak_bytes: the estimated peak of a step.
        fits: whether it fits the card, with the measured margin. None if no card was given.
        too_large: the methods that come before it, and do not fit: {name: estimated peak in bytes}.
        refused: the methods that come before it, and that this model cannot have: {name: why}.
        time: the same step as it was measured on this card, or None.
        more: what to try if the result is not good enough.
        traps: what to look out for.
        reasons: why, with the measurements.
    """

    task: str
    serving: str
    model: str
    source: str | None
    kind: str
    parameters: int
    card: Card | None
    gpus: int
    sequence: int
    examples: int | None
    four_bit: bool
    method: str
    chosen: Mapping[str, Any]
    batch: int
    checkpointing: bool
    accumulation: int
    parallel: str
    peak_bytes: int
    fits: bool | None
    too_large: Mapping[str, int]
    refused: Mapping[str, str]
    time: Timed | None
    more: tuple[str, ...]
    traps: tuple[str, ...]
    reasons: tuple[Reason, ...] = field(repr=False)

    @property
    def measured_on(self) -> tuple[str, ...]:
        """The models whose scores speak for the method. Empty if none was scored."""
        found = map(look_up, self.reasons[0].evidence)
        return tuple(dict.fromkeys(one.at for one in found if one.scores))

    @property
    def steps(self) -> int | None:
        """The number of updates, or None if the number of examples is not known."""
        if self.examples is None:
            return None
        return max(1, -(-self.chosen["epochs"] * self.examples // (self.batch * self.accumulation * self.gpus)))

    @property
    def seconds(self) -> float | None:
        """The seconds of the whole training, or None where the step was not measured or the examples are not known."""
        if self.time is None or self.steps is None:
            return None
        return self.time.seconds * self.accumulation * self.steps

    def config(self) -> Any:
        """Return the method's config, ready for `pl.attach`. With `qlora`, quantise the model before.

        Raises:
            PeftLabError: full fine-tuning attaches nothing.

        >>> pl.recommend("style", "smollm2-135m", "T4", serving="many").config().r
        16
        """
        row = METHODS[self.method]
        if row.config is None:
            raise PeftLabError(NOTHING_ATTACHED)
        fields = [name for name in ("r", "alpha", "dropout") if row.takes(name) and name in self.chosen]
        given = {name: self.chosen[name] for name in fields}
        if self.task == "classification" and self.kind == "encoder":
            given["task_type"] = "SEQ_CLS"
        return row.config_class()(target_modules=targets_of(self.chosen), **given, **row.fixed)

    def no_command(self) -> str | None:
        """Return why `peftlab train` cannot do it, or None if it can."""
        return NO_COMMAND.get(self.task) or (SEVERAL if self.gpus > 1 else None)

    @checked()
    def command(self, data: str | os.PathLike[str] = "my.jsonl", out: str | os.PathLike[str] = "run1") -> str:
        """Return the `peftlab train` line.

        Args:
            data: the file or data set to train on.
            out: the folder for the adapter.

        Raises:
            PeftLabError: `peftlab train` does not know the task, or there are several GPUs.

        >>> pl.recommend("style", "smollm2-135m", "T4").command("support-desk")
        'peftlab train --model smollm2-135m --data support-desk --out run1 --method full --lr 0.0001 ...'
        """
        if reason := self.no_command():
            raise PeftLabError(reason)
        known = self.model in catalogue()
        model = self.source or (self.model if known else f"path/to/{self.model}")
        line = ["peftlab", "train", "--model", model, "--data", os.fspath(data), "--out", os.fspath(out)]
        line += ["--method", self.method]
        row = METHODS[self.method]
        for name in ("r", "alpha"):
            if row.takes(name) and name in self.chosen:
                line += [f"--{name}", plain(self.chosen[name])]
        if row.takes("targets") and targets_of(self.chosen):
            line += ["--targets", str(targets_of(self.chosen))]
        line += ["--lr", plain(self.chosen["learning_rate"]), "--batch-size", str(self.batch)]
        if self.accumulation > 1:
            line += ["--accumulation", str(self.accumulation)]
        if self.checkpointing:
            line += ["--checkpointing"]
        return shlex.join([*line, "--epochs", plain(self.chosen["epochs"]), "--max-length", str(self.sequence)])

    def to_dict(self) -> dict[str, Any]:
        """Return everything as `peftlab recommend --json` prints it: plain numbers, texts and lists.

        >>> pl.recommend("style", "smollm2-135m", "T4").to_dict()["method"]
        'full'
        """
        chosen = self.chosen
        return {
            "task": self.task, "serving": self.serving, "model": self.model, "kind": self.kind,
            "parameters": self.parameters, "card": self.card.name if self.card else None,
            "card_gb": self.card.gigabytes if self.card else None, "gpus": self.gpus, "sequence": self.sequence,
            "examples": self.examples, "four_bit": self.four_bit,
            "method": self.method, "measured_on": list(self.measured_on),
            "r": chosen.get("r"), "alpha": chosen.get("alpha"), "targets": chosen.get("targets"),
            "dropout": chosen.get("dropout"),
            "learning_rate": chosen["learning_rate"], "rates": list(chosen["rates"]), "precision": chosen["precision"],
            "batch": self.batch, "accumulation": self.accumulation, "checkpointing": self.checkpointing,
            "parallel": self.parallel or None, "epochs": chosen["epochs"], "steps": self.steps, "ship": chosen["ship"],
            "fits": self.fits, "peak_bytes": self.peak_bytes, "with_margin_bytes": with_margin(self.peak_bytes),
            "cards": that_hold(self.peak_bytes), "too_large": dict(self.too_large),
            "refused": dict(self.refused),
            "step_seconds": self.time.seconds * self.accumulation if self.time else None, "seconds": self.seconds,
            "time_source": self.time.source if self.time else None,
            "more": list(self.more), "traps": list(self.traps),
            "command": None if self.no_command() else self.command(), "no_command": self.no_command(),
            "reasons": [reason.to_dict() for reason in self.reasons],
        }  # fmt: skip

    def rows(self) -> list[tuple[str, str]]:
        """Return the table's rows without the reasons: (label, text)."""
        chosen, rates = self.chosen, self.chosen["rates"]
        rows = [
            ("task", meaning("task", self.task)),
            ("serving", meaning("serving", self.serving)),
            ("model", f"{self.model}, {format_count(self.parameters)} parameters"),
            ("card", self._cards()),
            ("method", self.method),
            ("measured on", "; ".join(self.measured_on) or UNSCORED),
        ]
        if "r" in chosen:
            rows += [("rank", f"{chosen['r']}, alpha {plain(chosen['alpha'])}"), ("targets", words_of_targets(chosen))]
        again = "activations computed again" if self.checkpointing else "activations kept"
        batches = f", {self.accumulation} batches in an update" if self.accumulation > 1 else ""
        way = WAYS.get(self.parallel, "")
        rows += [
            ("learning rate", f"{plain(chosen['learning_rate'])}; try {plain(rates[0])} to {plain(rates[1])}"),
            ("precision", PRECISIONS[chosen["precision"]]),
            ("step", f"{self.batch} x {self.sequence:,} tokens, {again}{batches}{way}"),
            ("epochs", plain(chosen["epochs"]) + (f", {self.steps:,} updates" if self.steps else "")),
            ("expected peak", self._memory()),
            *[("too large", f"{name}: {format_bytes(with_margin(size))}") for name, size in self.too_large.items()],
            *[("not possible", f"{name}: {reason}") for name, reason in self.refused.items()],
            ("expected time", self._time()),
            ("afterwards", chosen["ship"]),
        ]
        if self.no_command():
            return [*rows, ("command", str(self.no_command()))]
        return [*rows, ("command", self.command())]

    def _cards(self) -> str:
        if self.card is None:
            return "not given"
        return f"{self.gpus} x {self.card}" if self.gpus > 1 else str(self.card)

    def _memory(self) -> str:
        needs = f"{format_bytes(self.peak_bytes)}, {format_bytes(with_margin(self.peak_bytes))} with the margin"
        if self.fits:
            return needs
        held = ", ".join(that_hold(self.peak_bytes)) or f"none of {', '.join(CARDS)}"
        return f"{needs}; {'it does not fit; ' if self.fits is False else ''}cards that hold it: {held}"

    def _time(self) -> str:
        if self.time is None:
            return "not measured"
        whole = f", {duration(self.seconds)} in all" if self.seconds is not None else ""
        return f"{self.time.seconds * self.accumulation:.3g} s for an update{whole}; {self.time.source}"

    def table(self) -> str:
        """Return the recommendation as a table, with what to try next and what to look out for, without the reasons."""
        rows = self.rows()
        left = max(len(label) for label, _ in rows) + 2
        lines = [line for label, text in rows for line in _wrapped(f"{label:<{left}}{text}", left)]
        for title, texts in (("If it is not enough", self.more), ("Look out", self.traps)):
            if texts:
                lines += ["", title, *(line for text in texts for line in _wrapped(f"  {text}", 2))]
        return "\n".join(lines)

    def why(self, setting: str | None = None) -> str:
        """Return the reasons with the measurements that carry them: all, or those for one setting.

        Each measurement ends with its file, the section of the file, the condition on its rows, and the place in the
        book that shows it.

        Args:
            setting: such as `"method"`, `"r"` or `"learning_rate"`, or as the table calls it: `"rank"`.

        Raises:
            PeftLabError: nothing was decided about such a setting (with near matches).
        """
        known = {name: reason for reason in self.reasons for name in reason.settings}
        if isinstance(setting, str):
            setting = {spoken(name): name for name in known}.get(setting, setting)
        if setting is not None and (not isinstance(setting, str) or setting not in known):
            near = did_you_mean(str(setting), known)
            raise PeftLabError(f"No reason is about {shown(setting)}.{near} There are: {', '.join(known)}.")
        lines = []
        for reason in self.reasons if setting is None else (known[setting],):
            lines += _wrapped(f"{', '.join(map(spoken, reason.settings))}: {reason.because}", 0)
            for one in map(look_up, reason.evidence):
                lines += _wrapped(f"  - {one.text} [{one.source}; {one.page}]", 4)
        return "\n".join(lines)

    def reasons_in_short(self) -> str:
        """Return the first sentence of each reason, without the measurements."""
        lines = []
        for reason in self.reasons:
            first = reason.because.split(". ")[0].rstrip(".")
            lines += _wrapped(f"  {', '.join(map(spoken, reason.settings))}: {first}.", 4)
        return "\n".join(lines)

    def in_full(self) -> str:
        """Return the table, and all reasons with the measurements that carry them."""
        words = f"The words are explained at {address('appendix_glossary')}"
        places = f"The sections are at {address('PAGE#SECTION')}\n{words}"
        return f"{self.table()}\n\nWhy\n{self.why()}\n{places}"

    def __str__(self) -> str:
        return f"{self.table()}\n\nWhy, in short\n{self.reasons_in_short()}\n{MEASURED}"


def words_of_targets(chosen: Mapping[str, Any]) -> str:
    """Return the targets in words."""
    return TARGETS[chosen["targets"]]


def spoken(setting: str) -> str:
    """Return the name of a setting in words."""
    return SPOKEN.get(setting, setting.replace("_", " "))


def plain(number: float) -> str:
    """Return a number without an exponent: `0.0002`."""
    return f"{number:.10f}".rstrip("0").rstrip(".")


def duration(seconds: float | None) -> str:
    """Return a time in words."""
    if seconds is None:
        return "not measured"
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def _wrapped(text: str, indent: int) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)
