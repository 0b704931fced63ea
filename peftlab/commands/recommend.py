"""`peftlab recommend`: which method for this task, this model and this card."""

from __future__ import annotations

import argparse
from typing import Any

from peftlab.commands.terminal import print_json
from peftlab.guide.recommend import recommend
from peftlab.guide.rules import words
from peftlab.memory.cards import CARDS
from peftlab.memory.counting.builtin import BUILT_IN


def add_options(command: argparse.ArgumentParser) -> None:
    """Add the task, the model, and the options that describe what there is and what is needed."""
    add = command.add_argument
    add("task", metavar="TASK", help="; ".join(f"{one.name}: {one.text}" for one in words("task")))
    add("shape", metavar="MODEL", help=f"{', '.join(BUILT_IN)}; or the path of a config.json")
    add("--card", metavar="C", help=f"{', '.join(CARDS)}; or its memory in GB (default: memory is no matter)")
    add("--gpus", type=int, default=1, metavar="N", help="how many of this card (default: 1)")
    add("--examples", type=int, metavar="N", help="training examples")
    add("--tokens", type=int, metavar="N", help="instead: the tokens of all training examples")
    add(
        "--sequence",
        type=int,
        metavar="N",
        help="tokens of the longest example (default: 512, or what the model takes)",
    )
    needs = "; ".join(f"{one.name}: {one.text}" for one in words("serving"))
    add("--serving", default="one", metavar="S", help=f"what matters when it is used. {needs} (default: one)")
    add("--why", action="store_true", help="also print every reason with the measurements that carry it")
    switch: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
    add("--four-bit", **switch, default=True, help="whether the base may be held in four bits (default: yes)")


def run(arguments: argparse.Namespace) -> int:
    """Run `peftlab recommend`."""
    found = recommend(
        arguments.task, arguments.shape, arguments.card, gpus=arguments.gpus, examples=arguments.examples,
        tokens=arguments.tokens, sequence=arguments.sequence, serving=arguments.serving, four_bit=arguments.four_bit,
    )  # fmt: skip
    if arguments.json:
        return print_json(found.to_dict())
    print(found.in_full() if arguments.why else found)
    return 0
