"""The settings of `train`, each written once: name, type, default, meaning and check.

The signature and documentation of `peftlab.train`, the options of `peftlab train` and the checks all come from
`Settings`. The file stands outside `peftlab.training` because the command line reads it before torch is loaded.
"""

from __future__ import annotations

import inspect
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import Field, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

from peftlab.checks import check_fields, check_kinds, number, one_of, whole
from peftlab.errors import PeftLabError, did_you_mean

SCHEDULES = ("linear", "cosine", "constant")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
MOST_STEPS, MOST_EXAMPLES = 1_000_000_000, 1_000_000  # far beyond any run; a typo must not fill the memory
OPTIMIZERS = ("adamw", "adamw8bit", "paged-adamw8bit", "sgd")

Model = TypeVar("Model")
Data = TypeVar("Data")
Result = TypeVar("Result")
Given = ParamSpec("Given")


def setting(
    default: Any, doc: str, check: Callable[..., Any] | None = None, *, option: str = "", more: str = "", **limits: Any
) -> Any:
    """Make the field of one setting.

    Args:
        doc: its meaning, for the documentation of `train` and for the help of the command line.
        check: `whole`, `number` or `one_of`; `limits` are what it takes beside the name and the value.
        option: its name on the command line, if it has one.
        more: what only a caller in Python needs to know.
    """
    known = {"doc": doc, "check": check and partial(check, **limits), "option": option, "more": more}
    return field(default=default, metadata=known)


def blocks_or(name: str, value: Any, known: Sequence[Any]) -> Any:
    """Require one of the known values, or a number of blocks. True is not the number 1 here."""
    if isinstance(value, int) and not isinstance(value, bool):
        return whole(name, value, least=0, ceiling=MOST_EXAMPLES)
    return one_of(name, value, known)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of a run of training, checked before a model is touched.

    Raises:
        PeftLabError: a value that no run can have, or two that do not go together.
    """

    # fmt: off
    tokenizer: Any = setting(None, "gives the padding id; only the default `collate` needs it")
    evaluation_data: Sequence[Mapping[str, Any]] | None = setting(
        None, "encoded examples for the evaluation loss; without them only `metrics` are evaluated")
    steps: int | None = setting(
        None, "number of updates; give this or epochs", whole, least=1, ceiling=MOST_STEPS, optional=True,
        option="steps")
    epochs: float | None = setting(
        None, "times through the training data; one if neither this nor steps is given",
        number, above=0, ceiling=MOST_STEPS, optional=True, option="epochs")
    batch_size: int = setting(
        8, "examples in memory at once", whole, least=1, ceiling=MOST_EXAMPLES, option="batch-size")
    accumulation: int = setting(
        1, "batches in one update", whole, least=1, ceiling=MOST_EXAMPLES, option="accumulation",
        more="How `batch_size` x `accumulation` is split changes memory and time, but not the result.")
    learning_rate: float = setting(2e-4, "peak learning rate", number, above=0, most=1000, option="lr")
    weight_decay: float = setting(
        0.0, "decay of matrices; biases, norms and other vectors do not decay", number, least=0, ceiling=1000)
    loraplus_lr_ratio: float | None = setting(
        None, "LoRA+: the learning rate of LoRA's B, divided by that of A, which is learning_rate; 16, say",
        number, above=0, most=1e6, optional=True, option="loraplus-lr-ratio",
        more="The groups and their weight decay are then those of Hugging Face peft's `create_loraplus_optimizer` "
        "(`peftlab.training.loraplus`): vectors other than biases and `nn.LayerNorm`'s scales decay, too.")
    loraplus_lr_embedding: float | None = setting(
        None, "LoRA+: the learning rate of the A and B of embeddings; 1e-6 if not given",
        number, above=0, most=1000, optional=True, option="loraplus-lr-embedding")
    warmup: float = setting(
        0.0, "length of the warm-up: below 1 a share of the steps, from 1 on a number of steps",
        number, least=0, option="warmup")
    schedule: str = setting(
        "linear", "how the learning rate goes on after the warm-up", one_of, known=SCHEDULES, option="schedule",
        more="The formulas are in `peftlab.training.schedule.learning_rate_at`.")
    max_grad_norm: float | None = setting(
        1.0, "gradients are scaled down to this global norm; None leaves them", number, above=0, optional=True)
    precision: str = setting(
        "auto", "what is computed in; auto chooses for the device and the model", one_of, known=PRECISIONS,
        option="precision",
        more="'fp32' is without autocast: each module computes in its own dtype.")
    checkpointing: bool | str | int = setting(
        False, "recompute activations in the backward pass instead of keeping them: all, or of as many blocks as 'fit' "
        "finds are needed for the step to fit the GPU",
        blocks_or, known=(True, False, "fit", "reentrant", "pinned"), option="checkpointing",
        more="'reentrant' is torch's older kind. A number means so many blocks, the first ones. 'fit' lets "
        "`peftlab.memory` choose this number, with its margin; `History.checkpointing` says what it chose, or why all "
        "are recomputed. With 'pinned' the inputs of the blocks, from which they are recomputed, wait in the "
        "computer's main memory; only the fast path does that.")
    compile: str | None = setting(
        None, "'layers' compiles each repeated block of the model, which takes a minute at the start",
        one_of, known=(None, "layers"), option="compile",
        more="Batches are padded to a few lengths, and the last bits of a result change. Where a compiler fails, the "
        "run goes on without it: `History.compiled` says what happened (`peftlab.training.compiling`).")
    fast: bool | str = setting(
        "auto", "LoRA on a Llama-like decoder by a step written by hand, with the same result in less time",
        one_of, known=("auto", True, False), option="fast",
        more="'auto' takes it where it can, and `History.path` says which path ran and why. True refuses a run that it "
        "cannot take (`peftlab.training.eligible` has the list). The model's weights are views of common buffers while "
        "the run lasts, and its own again after it; a tensor taken from it before, such as one of `state_dict()`, "
        "keeps the values of then.")
    chunked_loss: bool | str = setting(
        "auto", "compute a language model's loss in chunks of positions, without its whole logits",
        one_of, known=("auto", True, False), option="chunked-loss",
        more="'auto' does so where the head is a plain linear layer, frozen or trained, and the logits of a batch "
        "would take more than 64 MB. Elsewhere they are whole, and `History.logits` says why; with True that is an "
        "error.")
    optimizer: str = setting(
        "adamw", "the 8-bit ones are bitsandbytes'; without it you get a warning and adamw",
        one_of, known=OPTIMIZERS, option="optimizer")
    seed: int = setting(
        0, "decides the order of the data and every random number of the run", whole, least=-(2**63),
        ceiling=2**64 - 1, option="seed",
        more="The global generators of torch, Python and numpy are used during the run and put back after it.")
    group_by_length: bool = setting(
        False, "put examples of similar length into a batch, for less padding",
        one_of, known=(True, False), option="group-by-length")
    packing: bool = setting(
        False, "lay the examples of a batch into as few rows as they fill, instead of padding each to the longest",
        one_of, known=(True, False), option="packing",
        more="Positions restart and attention does not cross (`peftlab.training.packing`), so that time and memory "
        "change, but not the result. `batch_size` counts examples, not rows. For causal language models; one that "
        "would mix the examples is refused. A loss of your own gets the packed rows.")
    evaluate_every: int | None = setting(
        None, "evaluate every N steps and after the last", whole, least=1, optional=True, option="eval-every",
        more="Without it there is one evaluation, after the last step.")
    patience: int | None = setting(
        None, "stop after so many evaluations without a better `monitor`", whole, least=1, optional=True)
    monitor: str = setting(
        "loss", "what is watched: 'loss', where lower is better, or the name of a metric, where higher is better")
    restore_best: bool = setting(
        False, "end with the parameters of the best evaluation instead of those of the last step",
        one_of, known=(True, False))
    folder: str | Path | Callable[[], Path] | None = setting(
        None, "where to keep the run, so that it can be killed at any moment and go on to the same result",
        more="On the same machine the result is the same to the bit. Only trained values are stored; make the model "
        "and its adapters again before you go on. A function is called for it once all else is known to be good.")
    save_every: int | None = setting(
        None, "steps between saved states, 50 if not given; the first and the last state are saved too",
        whole, least=1, optional=True, option="save-every")
    resume: bool = setting(
        True, "go on with the run in the folder, if there is one", one_of, known=(True, False), option="resume",
        more="False refuses a folder that holds a run.")
    progress: bool = setting(True, "show a progress bar", one_of, known=(True, False))
    loss: Callable[..., Any] | None = setting(
        None, "`(model, batch) -> (sum, number of labels)`; by default that of the model's task "
        "(`peftlab.training.losses`)")
    metrics: Mapping[str, Callable[[Any], float]] | None = setting(
        None, "by name, functions of the model (in eval mode, without gradients) that give a number")
    collate: Callable[[list[Any]], dict[str, Any]] | None = setting(
        None, "makes a batch of a list of examples; by default `Collator(tokenizer)`")
    callback: Callable[[Any, dict[str, Any]], None] | None = setting(
        None, "called with the model and the step's row after each update, while the gradients are still there")
    # fmt: on

    def __post_init__(self) -> None:
        for one in fields(self):
            if one.metadata["check"]:
                check_fields(self, one.metadata["check"], one.name)
        check_kinds(self, "monitor", "folder", "loss", "metrics", "collate", "callback")
        if self.steps is not None and self.epochs is not None:
            raise PeftLabError(f"Give steps ({self.steps}) or epochs ({self.epochs}), not both.")
        if self.loraplus_lr_embedding is not None and self.loraplus_lr_ratio is None:
            raise PeftLabError(
                "loraplus_lr_embedding is a part of LoRA+; give loraplus_lr_ratio, too (16, say), or leave it out."
            )
        if self.packing and self.batch_size == 1:
            raise PeftLabError(
                "packing puts the examples of a batch into few rows, and batch_size=1 leaves nothing to share a row. "
                "Raise batch_size (examples, not rows) and lower accumulation, or leave packing out."
            )
        if isinstance(self.evaluation_data, Sized) and not len(self.evaluation_data):
            raise PeftLabError("The evaluation data holds no example; pass evaluation_data=None to do without.")
        self._check_evaluation()

    @property
    def batch(self) -> int:
        """The number of examples in one update."""
        return self.batch_size * self.accumulation

    @property
    def evaluates(self) -> bool:
        """Whether there is something to evaluate."""
        return self.evaluation_data is not None or bool(self.metrics)

    def total_examples(self, examples: int) -> int:
        """Return the number of examples in the whole run, counted with repetition.

        Args:
            examples: the number of examples in the training data.
        """
        if self.steps is not None:
            return self.steps * self.batch
        return max(1, math.ceil((1 if self.epochs is None else self.epochs) * examples))

    def _check_evaluation(self) -> None:
        metrics = sorted(self.metrics or ())
        taken = {"step", "loss"} & set(metrics)
        if taken:
            raise PeftLabError(
                f"A metric cannot be called {sorted(taken)[0]!r}: the evaluation's own rows use that name."
            )
        wants = [name for name in ("evaluate_every", "patience", "restore_best") if getattr(self, name)]
        if wants and not self.evaluates:
            raise PeftLabError(f"{wants[0]} needs something to evaluate: pass evaluation_data or metrics.")
        if self.patience and not self.evaluate_every:
            raise PeftLabError("patience counts evaluations: say how often with evaluate_every=...")
        one_of("monitor", self.monitor, ("loss", *metrics))
        if self.monitor == "loss" and self.evaluation_data is None and (self.patience or self.restore_best):
            raise PeftLabError(f"monitor='loss' needs evaluation_data; or choose one of the metrics {metrics}.")


def settings_from(given: Mapping[str, Any], kind: type[Settings] = Settings) -> Settings:
    """Make the settings from keyword arguments.

    Raises:
        PeftLabError: a name that is no setting (with near matches), or a value that is not allowed.
    """
    options = {one.metadata["option"]: one.name for one in fields(kind)}
    names = [one.name for one in fields(kind)]
    for name in given:
        if name not in names:
            near = did_you_mean(options.get(name, name), names) or f" There are {', '.join(names)}."
            raise PeftLabError(f"train has no setting {name!r}.{near}")
    return kind(**given)


def known_values(one: Field[Any]) -> tuple[Any, ...]:
    """Return the values that a setting may have if there is a list of them, else an empty tuple."""
    return one.metadata["check"].keywords.get("known", ()) if one.metadata["check"] else ()


def takes(
    kind: Callable[Given, Settings],
) -> Callable[[Callable[Concatenate[Model, Data, ...], Result]], Callable[Concatenate[Model, Data, Given], Result]]:
    """Show the settings in a function's signature, instead of `**given`, and at `{settings}` in its docstring."""

    def show(function: Any) -> Any:
        own = list(inspect.signature(function).parameters.values())[:-1]
        every = inspect.signature(kind).parameters.values()
        function.__signature__ = inspect.signature(function).replace(parameters=[*own, *every])
        told = "\n".join(map(_described, fields(cast(type[Settings], kind))))
        function.__doc__ = inspect.cleandoc(function.__doc__ or "").replace("    {settings}", told)
        return function

    return show


def _described(one: Field[Any]) -> str:
    """Return the lines of a docstring about one setting."""
    words = known_values(one)
    told = f"{one.name}: {one.metadata['doc']}" + (f" ({', '.join(map(repr, words))})." if words[2:] else ".")
    return textwrap.fill(
        f"{told} {one.metadata['more']}".rstrip(), 112, initial_indent=" " * 4, subsequent_indent=" " * 8,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
