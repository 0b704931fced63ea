"""`peftlab train`: one fine-tuning run from the shell, from names to an adapter folder.

FOLDER holds, at the end, the adapter (or, after full fine-tuning, `model/`), `metrics.json`, `settings.json` and
`run/`, the state of the training. It is to be new, empty or an earlier run's: no other file is replaced or removed.
Everything random comes from the seed, so the same command goes on after a kill as if nothing had happened; another
command in the same folder is refused.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

from peftlab.adapters.card import CARD
from peftlab.assets.catalogue import catalogue
from peftlab.catalogue import LEARNING_RATE, METHODS, Method
from peftlab.checks import PATH, whole
from peftlab.commands import tasks
from peftlab.commands.method_options import options_of, settle, trainable
from peftlab.commands.reading import read
from peftlab.commands.run_folder import LOCK, STATE, Place, claim, locked, look, save, write_card, write_metrics
from peftlab.commands.terminal import SwitchOrFit, memory_for
from peftlab.errors import PeftLabError, did_you_mean
from peftlab.memory.units import format_both, format_count, format_percent
from peftlab.settings import Settings, known_values

# Arguments that do not change what is learned. A run continues even if they differ.
INCIDENTAL = (
    "command", "run", "json", "out", "resume", "save_every", "device", "test_limit", "max_new_tokens", "fast",
    "compile", "chunked_loss",
)  # fmt: skip
# The training settings that have an option, by the name of the option
OPTIONS = {one.metadata["option"]: one for one in fields(Settings) if one.metadata["option"]}
LOG_SECONDS = 30.0
EVA_BATCHES, EVA_BATCH = 64, 16  # what --init eva reads of the training data, at the most
# What to do when the memory does not suffice
SMALLER_MODEL = "Take a smaller model; peftlab memory says what it needs, and what --method qlora needs after loading."
SMALLER_STEP = (
    "Take a smaller --batch-size with more --accumulation, --checkpointing, or a smaller --max-length (with "
    "--no-resume if the run had begun); peftlab memory says what a step needs."
)
SMALLER_TEST = "What was trained is saved. Run the command again with a smaller --test-limit or --max-new-tokens."
TEST_LIMIT = {"chat": 200, "completion": 64, "classification": 1000, "text": 200}


def add_options(command: argparse.ArgumentParser) -> None:
    """Add the options of `peftlab train`, except those that describe the method."""
    add = command.add_argument
    unusual = {name: row.learning_rate for name, row in trainable().items() if row.learning_rate != LEARNING_RATE}
    rates = ", ".join(f"{method} {rate:g}" for method, rate in unusual.items())
    add("--model", required=True, metavar="M", help="smollm2-135m, minilm, a local folder or a hub id")
    add(
        "--data",
        required=True,
        metavar="D",
        help="support-desk, reviews, news, or a JSONL or CSV file, a folder of them, or one of datasets, with the "
        "columns messages; conversations; prompt and completion; instruction, input and output; text and label; or "
        "text",
    )
    add("--out", required=True, metavar="FOLDER", help="where the adapter and metrics.json go")
    defaults = {"lr": f"{rates}; others {LEARNING_RATE:g}", "resume": "yes; --no-resume starts again"}
    for option, one in OPTIONS.items():
        default = None if option == "lr" else one.default
        add(f"--{option}", default=default, **_as_argument(one, defaults.get(option, _told(one.default))))
    add(
        "--adapter-dtype", "--adapter-precision", choices=("fp32", "bf16"),
        help="of what the method adds; bf16 trains with float32 masters (default: that of the layer, fp32 on a base in "
        "16 or 4 bits)",
    )  # fmt: skip
    add("--device", metavar="D", help="cpu, cuda, cuda:1 (default: a GPU where there is one)")
    add("--limit", type=int, metavar="N", help="use the first N training examples")
    add("--max-length", type=int, metavar="N", help="tokens of an example (default: 512, or what the model can take)")
    add(
        "--train-on",
        choices=("assistant", "last"),
        help="what of a chat is learned: all turns of the assistant, or the last (default: assistant)",
    )
    add(
        "--add-tokens",
        metavar="T",
        help="new tokens, comma-separated, each with the words that it starts from if you like: "
        "'<refund>=money back,<order>'; their rows train, and the tokenizer is saved beside the adapter",
    )
    add("--test-limit", type=int, metavar="N", help="examples of the final test (default: 64 answers, 1000 texts)")
    add("--max-new-tokens", type=int, default=64, metavar="N", help="longest answer in the final test (default: 64)")


def _as_argument(one: Field[Any], default: str) -> dict[str, Any]:
    """Return argparse's arguments for a setting."""
    known = known_values(one)
    kind: dict[str, Any] = {"type": float, "metavar": "X"}
    if "fit" in known:
        kind = {"action": SwitchOrFit}
    elif True in known:
        kind = {"action": argparse.BooleanOptionalAction}
    elif known:
        kind = {"choices": [value for value in known if value is not None]}
    elif one.metadata["check"].func is whole:
        kind = {"type": int, "metavar": "N"}
    return kind | {"help": one.metadata["doc"] + (f" (default: {default})" if default else "")}


def _told(default: Any) -> str:
    """Return the help's words for a default, or an empty string for `None`."""
    if default is None or isinstance(default, bool):
        return {None: "", True: "yes", False: "no"}[default]
    return f"{default:g}" if isinstance(default, float) else str(default)


def run(arguments: argparse.Namespace, targets: Any) -> dict[str, Any]:
    """Train, save and test. Return the contents of `metrics.json`.

    Raises:
        PeftLabError: a mistake in the arguments or the data, a run of other settings in the folder, or no memory left.
    """
    check(arguments)
    left_out = INCIDENTAL + foreign(arguments.method)
    settings = {key: value for key, value in vars(arguments).items() if key not in left_out}
    named = {*catalogue(), "support-desk"}
    inputs = [given for given in (arguments.model, arguments.data) if given not in named]
    asked = (arguments.out, settings, arguments.resume, inputs, METHODS[arguments.method].config is None)
    folder = look(*asked).folder
    if (folder / LOCK).exists():
        with locked(folder):
            pass  # a run that is writing there is told of now, not after the model is loaded
    with contextlib.ExitStack() as held:

        def begin() -> Place:
            held.enter_context(locked(folder))
            return claim(*asked)

        try:
            place, measured = _train(arguments, targets, begin)
            result = {"settings": settings, **measured}
        except KeyboardInterrupt:
            raise KeyboardInterrupt("interrupted; the same command goes on from the last saved state") from None
        write_metrics(place, result)
        return result


def check(arguments: argparse.Namespace) -> None:
    """Refuse what cannot work, before anything is loaded."""
    known = trainable()
    method = arguments.method = arguments.method.lower()
    if method not in known:
        raise PeftLabError(f"train knows the methods {', '.join(known)}, not {method!r}.{did_you_mean(method, known)}")
    PATH.require("--out", arguments.out)
    if arguments.steps is not None and arguments.epochs is not None:
        raise PeftLabError("Give --steps or --epochs, not both.")
    row = known[method]
    if arguments.add_tokens is not None:
        arguments.add_tokens = new_tokens(arguments.add_tokens)
        able = [name for name, one in known.items() if trains_rows(one)]
        if method not in able:
            raise PeftLabError(f"--add-tokens needs a method that trains new rows: {', '.join(able)}; not {method}.")
    if arguments.lr is None:
        arguments.lr = row.learning_rate
    settle(arguments, known)
    for name, one in OPTIONS.items():
        one.metadata["check"](f"--{name}", _given(arguments, name))
    for name in ("limit", "max-length", "test-limit", "max-new-tokens", "virtual-tokens"):
        whole(f"--{name}", _given(arguments, name), least=1, optional=True)


def new_tokens(text: str) -> dict[str, str | None]:
    """Return {token: the words that it starts from, or None} of what was given to --add-tokens."""
    parts = [part.strip() for part in text.split(",")]
    pairs = [(token.strip(), words.strip() or None) for token, _, words in (part.partition("=") for part in parts)]
    found = dict(pairs)
    if not all(found) or len(found) < len(pairs):
        raise PeftLabError(
            f"--add-tokens is {text!r}; give different tokens, comma-separated, such as '<refund>=money back,<order>'."
        )
    return found


def trains_rows(row: Method) -> bool:
    """Say whether a method can train the rows of new tokens: all of them, or those alone."""
    return row.whole or (row.config is not None and hasattr(row.config_class(), "trainable_tokens"))


def _given(arguments: argparse.Namespace, option: str) -> Any:
    return getattr(arguments, option.replace("-", "_"))


def foreign(method: str) -> tuple[str, ...]:
    """Return the options that only other methods take. They do not belong to this run."""
    return tuple(name for name in options_of(METHODS) if not METHODS[method].takes(name))


def _train(arguments: argparse.Namespace, targets: Any, begin: Callable[[], Place]) -> tuple[Place, dict[str, Any]]:
    """The run itself.

    Args:
        begin: takes the folder; called once model, data and settings are known to be good.
    """
    import torch

    from peftlab.adapters.injection import attach, count_parameters
    from peftlab.assets.models import load_model
    from peftlab.core.steps import schedules
    from peftlab.training import train
    from peftlab.training.encoding import Collator
    from peftlab.training.files import newest

    started, row = time.monotonic(), METHODS[arguments.method]
    if row.config:
        _config(arguments, targets, tokenizer=arguments.model)  # report a mistake in it before anything is loaded
    data = read(arguments.data)
    task = tasks.task_of(data, arguments.data, arguments.seed, arguments.limit, arguments.train_on)
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(arguments.seed)  # the seed decides the start of a new head and of the adapter
    with memory_for(f"loading {arguments.model}", SMALLER_MODEL):
        # weights that train are held in float32: in 16 bits most updates are rounded away
        dtype = "float32" if row.whole else None
        model, tokenizer = load_model(arguments.model, num_labels=len(task.classes) or None, dtype=dtype, device=device)
    tasks.check_model(task, model, arguments.model)
    if model.config.pad_token_id is None:  # a decoder that classifies looks for the last token before the padding
        model.config.pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    if arguments.add_tokens:
        from peftlab.adapters.new_tokens import add_tokens

        add_tokens(model, tokenizer, arguments.add_tokens)
    if row.four_bit:
        from peftlab.quantization.model import quantize_model

        with memory_for(f"quantising {arguments.model}", SMALLER_MODEL):
            quantize_model(model)
    max_length = _max_length(arguments, model)
    say(task.told)
    examples = tasks.encode(task, tokenizer, task.train, max_length, say)
    if row.config:
        task_type = "SEQ_CLS" if task.kind == "classification" else None
        config = _config(arguments, targets, tokenizer=tokenizer, task_type=task_type)
        batches = None
        if getattr(config, "init", None) == "eva":
            firsts = range(0, min(len(examples), EVA_BATCHES * EVA_BATCH), EVA_BATCH)
            batches = [Collator(tokenizer)(examples[first : first + EVA_BATCH]) for first in firsts]
        attach(model, config, adapter_dtype=arguments.adapter_dtype, data=batches)
    counted = count_parameters(model)
    watched = tasks.encode(task, tokenizer, task.validation or task.test, max_length) if arguments.eval_every else None
    places: list[Place] = []

    def state_folder() -> Path:
        places.append(begin())
        if done := newest(places[0].folder / STATE):
            say(f"going on from the state after step {int(done.name.removeprefix('step-')):,}")
        if schedules(model):
            say(schedules(model))
        return places[0].folder / STATE

    say(f"{arguments.model} on {device}, {len(examples):,} examples, {counted}")
    with memory_for("training", SMALLER_STEP):
        history = train(
            model,
            examples,
            tokenizer=tokenizer,
            evaluation_data=watched,
            folder=state_folder,
            callback=None if sys.stderr.isatty() else _log(),
            **{one.name: _given(arguments, option) for option, one in OPTIONS.items()},
        )
    (place,) = places
    about = {
        "data": arguments.data, "training examples": len(examples), "steps": len(history.steps),
        "learning rate": arguments.lr, "seed": arguments.seed,
        **({"learning rate of B / of A (LoRA+)": ratio} if (ratio := arguments.loraplus_lr_ratio) else {}),
    }  # fmt: skip
    if task.classes:
        about["classes"] = ", ".join(f"{index} {name}" for index, name in enumerate(task.classes))
    size = save(model, tokenizer, place, row.config is not None, about, bool(arguments.add_tokens))
    rows = task.test[: arguments.test_limit or TEST_LIMIT[task.kind]]
    batch = 2 * arguments.batch_size
    say(f"saved; testing on {len(rows):,} examples")
    with memory_for("testing", SMALLER_TEST):
        scores = tasks.test(task, model, tokenizer, rows, max_length, batch, arguments.max_new_tokens)
    if row.config:
        write_card(model, place, about | {"test examples": len(rows), "metrics": scores})
    return place, {
        "trainable": counted.trainable,
        "total": counted.total,
        "percent": counted.percent,
        "steps": len(history.steps),
        "final_loss": _last_loss(history),
        "evaluations": [dict(row) for row in history.evaluations],
        "test": {"examples": len(rows), **scores},
        "classes": list(task.classes),
        "saved_bytes": size,
        "device": device,
        "path": history.path,
        **({"schedule": history.schedule} if history.schedule else {}),
        **({"compiled": history.compiled} if history.compiled else {}),
        "training_seconds": history.seconds,
        "seconds": time.monotonic() - started,
    }


def _config(arguments: argparse.Namespace, targets: Any, **more: Any) -> Any:
    """Make the method's config from the options of its row, and from those in `more` that it has a field for."""
    row = METHODS[arguments.method]
    config = row.config_class()
    given = {option.config_field: getattr(arguments, option.name) for option in row.options}
    if "target_modules" in given:
        given["target_modules"] = targets
    if given.get("target_parameters") is not None:
        given["target_parameters"] = [name for name in map(str.strip, given["target_parameters"].split(",")) if name]
    if "init" in given and given["init"] is None:
        if arguments.init_text:
            given["init"] = "text"
        else:  # the method's own default
            del given["init"]
    has = {field.name for field in fields(config)}
    return config(**given, **row.fixed, **{name: value for name, value in more.items() if name in has})


def _max_length(arguments: argparse.Namespace, model: Any) -> int | None:
    """Return the most tokens of an example. Virtual tokens take positions too."""
    asked, most = arguments.max_length, getattr(model.config, "max_position_embeddings", None)
    virtual = arguments.virtual_tokens if METHODS[arguments.method].takes("virtual_tokens") else 0
    if most is not None:
        most -= virtual
        if most < 1:
            raise PeftLabError(f"--virtual-tokens is {virtual}, and the model has {most + virtual} positions.")
    if most is not None and asked is not None and asked > most:
        beside = f" beside {virtual} virtual ones" if virtual else ""
        raise PeftLabError(f"--max-length is {asked}, and the model takes {most} tokens{beside} at the most.")
    return asked or (512 if most is None else min(512, most))


def _last_loss(history: Any) -> float | None:
    """Return the mean loss of the last ten steps, because a single batch says little."""
    losses = [row["loss"] for row in history.steps][-10:]
    return sum(losses) / len(losses) if losses else None


def say(line: str) -> None:
    """Print a line for a person to stderr, apart from the result on stdout."""
    print(line, file=sys.stderr, flush=True)


def _log() -> Callable[[Any, dict[str, Any]], None]:
    """Print a line now and then if no bar is drawn, for a log file."""
    said = time.monotonic()

    def callback(model: Any, row: dict[str, Any]) -> None:
        nonlocal said
        if time.monotonic() - said >= LOG_SECONDS:
            said = time.monotonic()
            say(f"step {row['step']:,}: loss {row['loss']:.4f}")

    return callback


def summary(result: dict[str, Any], folder: str) -> list[tuple[str, str]]:
    """Return the result as rows for a person."""
    settings, test = result["settings"], result["test"]
    saved = "model" if METHODS[settings["method"]].whole else "adapter"
    rows = [
        ("model", settings["model"]),
        ("method", settings["method"]),
        ("trainable", f"{format_count(result['trainable'])} ({format_percent(result['percent'])})"),
        ("steps", format_count(result["steps"])),
        ("path", result["path"]),
        *([("compiled", result["compiled"])] if "compiled" in result else []),
        ("final loss", "none" if result["final_loss"] is None else f"{result['final_loss']:.4f}"),
    ]
    if result["evaluations"]:
        rows.append(("validation loss", f"{result['evaluations'][-1]['loss']:.4f}"))
    for name, value in test.items():
        if name != "examples":
            rows.append((name.replace("_", " "), f"{value:.3f} on {test['examples']} test examples"))
    rows += [
        ("saved", f"{saved} in {folder}, {format_both(result['saved_bytes'])}"),
        *([("how to load it", f"{Path(folder) / CARD} says it")] if saved == "adapter" else []),
        ("seconds", f"{result['training_seconds']:.1f} of training, {result['seconds']:.1f} in all"),
    ]
    return rows
