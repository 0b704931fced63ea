"""The command line: `peftlab COMMAND ...`.

Every command prints a table to stdout, or one JSON value with `--json`. Progress and errors go to stderr. A user's
mistake is reported in one line, with exit status 2. Heavy libraries are imported only by a command that needs them.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

from peftlab import __version__, bench
from peftlab.assets.cache import cache_folder
from peftlab.assets.catalogue import catalogue
from peftlab.commands import count_and_memory, doctor, preflight, recommend, train
from peftlab.commands.method_options import add_method_options, trainable
from peftlab.commands.terminal import memory_for, parse_targets, print_json, print_table
from peftlab.errors import PeftLabError, did_you_mean
from peftlab.memory.units import format_bytes

INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it
BROKEN_PIPE = 141  # 128 + SIGPIPE


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status: 0, 1 (it failed), 2 (a user's mistake), 130 (Ctrl-C)."""
    try:
        if sys.stdout is None:  # closed by `>&-`
            raise PeftLabError("the standard output is closed; send it to a file, or to /dev/null.")
        try:
            arguments = parse(argv)
            with memory_for(f"running {arguments.command}", "Close other programs, or use a larger machine."):
                return arguments.run(arguments)
        finally:
            sys.stdout.flush()  # here and not at Python's exit, so that a closed pipe is noticed in time
    except PeftLabError as error:
        return _say(error, 2)
    except KeyboardInterrupt as error:
        return _say(str(error) or "interrupted", INTERRUPTED)
    except BrokenPipeError:
        # The reader of the output has closed it (`| head`). Python would raise again when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except OSError as error:
        return _say(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}", 1)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the arguments. The result has `run`, the function of the chosen command."""
    parser, commands = build_parser()
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        chosen = commands[arguments.command]
        known = [option for action in chosen._actions for option in action.option_strings]
        chosen.error(f"unknown argument {unknown[0]!r}.{did_you_mean(unknown[0].split('=')[0], known)}")
    return arguments


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors, and near matches for unknown choices."""

    def _print_message(self, message: str, file: Any = None) -> None:
        """Print help; argparse itself would hide that the disk is full."""
        print(message, end="", file=file or sys.stderr)

    def error(self, message: str) -> NoReturn:
        wrong = re.search(r"argument (\S+): invalid choice: '([^']*)' \(choose from (.*)\)", message)
        if wrong:
            known = re.findall(r"[\w.-]+", wrong[3])
            message = f"{wrong[1]} {wrong[2]!r} is none of {', '.join(known)}.{did_you_mean(wrong[2], known)}"
        full_stop = "" if message.endswith((".", "?")) else "."
        self.exit(2, f"{self.prog}: {message}{full_stop} See {self.prog} --help.\n")


def build_parser() -> tuple[Parser, dict[str, Parser]]:
    """Build the parser of the command line. Return it, and the parsers of its commands by name."""
    parser = Parser(
        prog="peftlab",
        description="Parameter-efficient fine-tuning, from the book PEFT Lab.",
        epilog="Each command has examples: peftlab count --help",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"peftlab {__version__}")
    places = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    commands: dict[str, Parser] = {}
    for name, summary, examples, options, run in COMMANDS:
        commands[name] = command = places.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog="examples:\n" + "\n".join(f"  peftlab {line}" for line in examples),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        options(command)
        command.add_argument("--json", action="store_true", help="print JSON for programs")
        command.set_defaults(run=run)
    return parser, commands


def _fetch_options(command: Parser) -> None:
    command.add_argument("names", nargs="*", metavar="NAME", help="models and data by name (default: all of them)")


def _fetch(arguments: argparse.Namespace) -> int:
    from peftlab.assets.fetch import fetch

    folders = fetch(arguments.names or None, say=lambda line: print(line, file=sys.stderr, flush=True))
    if arguments.json:
        return print_json({"cache": str(cache_folder()), "assets": {n: str(f) for n, f in folders.items()}})
    sizes = {name: sum(file["bytes"] for file in catalogue()[name]["files"].values()) for name in folders}
    print_table([(name, f"{format_bytes(sizes[name])}, verified, in {folder}") for name, folder in folders.items()])
    return 0


def _doctor_options(command: Parser) -> None:
    command.add_argument(
        "names", nargs="*", metavar="NAME", help="models, data, packages or chapters that must be there"
    )
    command.add_argument("--verify", action="store_true", help="hash every file of the cache again; all must be there")
    command.add_argument(
        "--offline", action="store_true",
        help="check that every chapter runs here without a network; one line per fault",
    )  # fmt: skip


def _doctor(arguments: argparse.Namespace) -> int:
    if arguments.offline:
        if arguments.names:
            raise PeftLabError("doctor --offline checks everything and takes no names: give one or the other.")
        report = preflight.check()
        print_json(report) if arguments.json else print(preflight.render(report))
        return 0 if report["ready"] else 1
    report = doctor.examine(verify=arguments.verify, names=arguments.names)
    print_json(report) if arguments.json else print(doctor.render(report))
    return 1 if report["problems"] or report["faults"] else 0


def _count_options(command: Parser) -> None:
    count_and_memory.add_count_options(command)


def _count(arguments: argparse.Namespace) -> int:
    return count_and_memory.count(arguments)


def _memory_options(command: Parser) -> None:
    count_and_memory.add_memory_options(command)


def _memory(arguments: argparse.Namespace) -> int:
    return count_and_memory.memory(arguments)


def _recommend_options(command: Parser) -> None:
    recommend.add_options(command)


def _recommend(arguments: argparse.Namespace) -> int:
    return recommend.run(arguments)


def _train_options(command: Parser) -> None:
    train.add_options(command)
    add_method_options(command, trainable())


def _train(arguments: argparse.Namespace) -> int:
    result = train.run(arguments, parse_targets(arguments.targets))
    if arguments.json:
        return print_json(result)
    print_table(train.summary(result, arguments.out))
    return 0


def _export_options(command: Parser) -> None:
    command.add_argument("folder", metavar="FOLDER", help="the folder of a LoRA adapter, ours or Hugging Face peft's")
    command.add_argument("out", metavar="OUT", help="the folder to write")
    command.add_argument("--name", default="default", help="the adapter's name, if it lies in a subfolder of its name")


def _export(arguments: argparse.Namespace) -> int:
    from peftlab.adapters.exporting import export_adapter

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        folder = export_adapter(arguments.folder, arguments.out, arguments.name)
    for one in caught:
        print(f"peftlab: {one.message}", file=sys.stderr)
    if arguments.json:
        return print_json({"folder": str(folder), "programs": ["llama.cpp", "vLLM", "SGLang"]})
    print(f"The adapter is in {folder}, in the form that llama.cpp, vLLM and SGLang read.")
    return 0


def _bench_options(command: Parser) -> None:
    command.add_argument("topic", metavar="TOPIC", help=f"what to measure: {', '.join(bench.TOPICS)}")
    command.add_argument("--out", required=True, metavar="FILE", help="the results file to write")
    command.add_argument("--only", metavar="S", help="sections of the topic, comma-separated (default: all)")
    command.add_argument(
        "--jobs", type=int, default=1, metavar="N",
        help="processes for what is not timed, spread over cores and GPUs (default: 1)",
    )  # fmt: skip


def _bench(arguments: argparse.Namespace) -> int:
    only = arguments.only.split(",") if arguments.only else None
    bench.run(arguments.topic, arguments.out, only=only, jobs=arguments.jobs)
    if arguments.json:
        with open(arguments.out, encoding="utf-8") as file:
            return print_json(json.load(file))
    print(f"Results are in {arguments.out}.")
    return 0


COMMANDS = (
    (
        "fetch",
        "bring models and data into the cache, each file verified",
        ("fetch", "fetch smollm2-135m reviews"),
        _fetch_options,
        _fetch,
    ),
    (
        "doctor",
        "say what this machine can run, chapter by chapter",
        ("doctor", "doctor --verify", "doctor --offline", "doctor 2 minilm", "doctor --json"),
        _doctor_options,
        _doctor,
    ),
    (
        "count",
        "count the parameters that a method trains",
        (
            "count llama-2-7b --method lora --r 16",
            "count gpt2 --method lora --targets c_attn,c_proj",
            "count llama-3.1-8b --method qlora --r 64 --targets all-linear --json",
            "count gpt2 --method prefix --virtual-tokens 30",
            "count path/to/config.json --method full",
        ),
        _count_options,
        _count,
    ),
    (
        "memory",
        "predict the GPU memory of a training step, before it is started",
        (
            "memory llama-2-7b --method lora --r 16 --targets all-linear --checkpointing",
            "memory llama-3.1-8b --method qlora --r 64 --batch 4 --sequence 2048 --checkpointing",
            "memory llama-2-7b --method full --precision mixed --optimizer adamw8bit --json",
            "memory qwen2.5-7b --method qlora --sequence 1024 --checkpointing --card T4",
        ),
        _memory_options,
        _memory,
    ),
    (
        "recommend",
        "recommend a method and its settings for a task, a model and a card, by measurements",
        (
            "recommend instruction llama-3.1-8b --card L4 --examples 5000",
            "recommend classification minilm --card 8 --serving file",
            "recommend knowledge llama-3.2-3b --card H100 --gpus 4 --no-four-bit --json",
        ),
        _recommend_options,
        _recommend,
    ),
    (
        "train",
        "fine-tune a model; the same command goes on after an interruption",
        (
            "train --model smollm2-135m --data support-desk --alpha 32 --steps 70 --lr 5e-3 --warmup 0.1 --out desk",
            "train --model minilm --data reviews --method lora --epochs 1 --out reviews",
            "train --model minilm --data news --method pfeiffer --reduction-factor 8 --lr 1e-3 --out news",
            "train --model minilm --data reviews --method prefix --virtual-tokens 10 --out prefix",
            "train --model path/to/model --data my.jsonl --targets all-linear --r 16 --out run1",
        ),
        _train_options,
        _train,
    ),
    (
        "export",
        "write a LoRA adapter in a form that llama.cpp, vLLM and SGLang read rightly",
        ("export my-adapter for-serving", "export run1 for-serving --json"),
        _export_options,
        _export,
    ),
    (
        "bench",
        "measure on this machine, with provenance",
        ("bench lora --out lora.json",),
        _bench_options,
        _bench,
    ),
)


def _say(message: object, status: int) -> int:
    text = " ".join(str(message).split())
    try:
        print(f"peftlab: {text}", file=sys.stderr, flush=True)
    except OSError:  # nobody reads stderr either
        pass
    return status


if __name__ == "__main__":
    sys.exit(main())
