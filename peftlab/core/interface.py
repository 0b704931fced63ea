"""Declare what a method provides: a config, which yields placements, and parts, which stand on modules of a model.

Read this file to add a method. `Part` and `Config` list everything that the rest of the package asks of a method.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import Field
from typing import Any, ClassVar, NamedTuple, Protocol, Self, runtime_checkable

from torch import Tensor, nn


class Part(nn.Module):
    """Hold trained parameters, and stand on a host: one of the base's own modules.

    A subclass overrides what it needs. A host gets a hook only for a `before` or an `after` that a part overrides, so
    what a part leaves out costs nothing.

    Which parts run, with what weight and for which rows of a batch, is decided outside: a part computes as if it were
    alone. When several adapters are active, each starts from the same input and output of the host, and the changes
    that they make are added up.

    Attributes:
        keys: {own parameter: its key in Hugging Face's adapter file}. In a key, `{path}` stands for
            `base_model.model.` and the host's path, `{module}` for the host's path alone, and `{root}` for
            `base_model.model.` alone. A parameter that several modules share has a tuple of keys.
        encoder_keys: {own parameter: its key in the file beside}. For parameters that Hugging Face's file leaves out
            because it holds only the tensor that they compute, such as the encoder of a prompt.
        drawn_keys: {own tensor: its key}, as in `keys`, for tensors that a file of this adapter leaves out because the
            part has the same numbers by itself, drawn from a seed. A file that holds one must hold these numbers.
        replaces_base_parameters: whether the part's parameters take the place of the base's own, as a trained copy of a
            bias does. They then count once among all parameters, not twice.
        compatibility_key: None for a part whose results can be mixed. A part that makes the input longer has a text
            here, such as "a prompt of 20 virtual tokens", which error messages show. Its results cannot be mixed, so
            the prompts are: only parts with equal texts can be active together, and of these one runs its `before`,
            with the mixture that `hooks.active_prompt` makes of what each of them returns from `make_prompt`.
        on_forward: whether the part also runs when somebody calls its host's `forward` and not the host. A part that
            stands on a whole model has it; modules inside a model are called.
        on_rest: whether the base was quantised together with this part (QPiSSA, LoftQ), so that it fits no other base.
        parameter: the name of the host's own parameter that has another value while the host runs, as `value` computes
            it; None for a part that leaves the host's parameters alone.
        frozen: names of own parameters that never train.
        skips: whether a step of training may leave the part out by chance, so that it gets no gradient in it.
    """

    keys: Mapping[str, str | tuple[str, ...]] = {}
    encoder_keys: Mapping[str, str] = {}
    drawn_keys: Mapping[str, str] = {}
    replaces_base_parameters: ClassVar[bool] = False
    compatibility_key: str | None = None
    on_forward: ClassVar[bool] = False
    parameter: str | None = None
    on_rest: bool = False
    frozen: ClassVar[tuple[str, ...]] = ()
    skips: bool = False

    def settle(self, host: nn.Module) -> None:
        """Compute the values that depend on the base's weights.

        This runs once, without gradients, when the part has its device and dtype but does not stand on the host yet. A
        value computed in `__init__` would be rounded to float32, since a part is moved to its host's dtype afterwards.
        When an adapter is loaded, the tensors of its file are copied in after this, and replace the values computed
        here.
        """

    def before(self, host: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Return the inputs that the host is called with."""
        return args, kwargs

    def after(self, host: nn.Module, args: tuple, kwargs: dict, output: Any, base: Any) -> Any:
        """Return the output that the host's caller gets.

        Args:
            args, kwargs: the inputs that the host was called with.
            output: the host's output, as changed by the parts of the same adapter that ran before this one.
            base: the host's own output.
        """
        return output

    def value(self, stored: Tensor) -> Tensor:
        """Return the value that `parameter` has while the host runs.

        It is made twice for a training step, and has to be the same bit for bit.

        Args:
            stored: the host's own; for 4-bit codes, the numbers that they stand for.
        """
        raise NotImplementedError

    def merged(self, host: nn.Module) -> dict[str, Tensor]:
        """Return {parameter of the host: its value with the part folded in}, not yet rounded to the host's dtype.

        `merge` refuses an adapter with a part that does not override this.
        """
        raise NotImplementedError

    def as_saved(self, root: nn.Module, path: str, own: str, tensor: Tensor) -> Tensor:
        """Return a tensor of an adapter file in the form in which this part saves it; most parts have only one form.

        This runs after `settle`, and may refuse the file.

        Args:
            root, path: the model, and where on it the part will stand.
            own: the name in `keys` of what the tensor stands for.
        """
        return tensor

    def weight_in_peft(self, host: nn.Module) -> Tensor | None:
        """Return the host's weight as Hugging Face peft has changed it for this adapter; None where it leaves it alone.

        peft saves it beside an adapted output head.
        """
        return None

    def values_from(self, own: str, tensor: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
        """Yield (a tensor of this part, its value) for a tensor of an adapter file.

        A part overrides this where a name in `keys` is computed from several of its tensors.

        Args:
            own: as in `as_saved`.
        """
        owner, _, name = own.rpartition(".")
        yield getattr(self.get_submodule(owner), name), tensor

    def make_prompt(self, host: nn.Module) -> Tensor:
        """Return this part's own prompt, (n, width); it does not depend on the input."""
        raise NotImplementedError

    def gathered(self) -> dict[str, Tensor]:
        """Return what the part has gathered in training beside its parameters: a killed run needs it to go on."""
        return {}

    def take(self, gathered: Mapping[str, Tensor]) -> None:
        """Take what `gathered` returned. The tensors may lie on another device."""

    def overrides(self, method: str) -> bool:
        """Say whether this kind of part has a `before`, an `after` or a `merged` of its own."""
        return getattr(type(self), method) is not getattr(Part, method)


BESIDE = ("bias", "copy", "rows")


class Placement(NamedTuple):
    """Hold a part and where it stands.

    Attributes:
        path: the host's path in the model; "" is the model itself.
        name: the part's name among the parts of its adapter on this host. A method's own name will do. The names in
            `BESIDE` have a meaning: `copy` is a trained copy of a module, `bias` a trained bias, and `rows` trained
            rows of an embedding; `copy_sinks` is one of a single parameter. Their hosts are no targets, and are left
            out of `target_modules` in an adapter's file.
        part: the part.
    """

    path: str
    name: str
    part: Part

    @property
    def kind(self) -> str:
        """Return the part's name without that of a parameter: "copy" for "copy_sinks"."""
        return self.name.partition("_")[0]


@runtime_checkable
class Config(Protocol):
    """Hold the settings of a method, and say what the method places on a model.

    A config is a frozen dataclass. `Targets` (for methods that stand on chosen modules) and `VirtualTokens` (for
    prompts) hold the common fields and the defaults of what is listed here.

    Attributes:
        method: the method's name on the command line.
        peft_type: its name in Hugging Face's `adapter_config.json`. Several methods may share one. A method that peft
            does not have takes a name that `peft.PeftType` does not have.
        requires: fields of `adapter_config.json` that a folder of this method always uses, such as `use_dora`.
        unsupported: fields that Hugging Face's method has and this one does not. A folder that uses one of them is not
            loaded as this method: it would compute something else.
    """

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]
    peft_type: ClassVar[str]
    requires: ClassVar[tuple[str, ...]]
    unsupported: ClassVar[tuple[str, ...]]
    modules_to_save: Iterable[str] | None
    task_type: str | None

    @property
    def method(self) -> str: ...

    def parts(self, model: nn.Module) -> Iterable[Placement]:
        """Yield what the method places on a model, and changes nothing yet."""
        ...

    def start_from(self, model: nn.Module, data: Any) -> tuple[Self, Mapping[str, Mapping[str, Tensor]]]:
        """Return what the data make of this config, and {path: {parameter of the part there: its start}}.

        Args:
            data: what `attach` was given; None if nothing. Most methods start from no data, and refuse some.
        """
        ...

    def as_stored(self) -> Self:
        """Return the config of what Hugging Face's format keeps of the adapter: a prompt without its encoder, say."""
        ...

    def to_peft(self, model: nn.Module, hosts: Mapping[str, nn.Module]) -> dict[str, Any]:
        """Return the fields of `adapter_config.json` that only this method has.

        Args:
            hosts: the modules that the adapter's parts stand on, by path.
        """
        ...

    @staticmethod
    def from_peft(fields: Mapping[str, Any]) -> dict[str, Any]:
        """Return keyword arguments for the config: the reverse of `to_peft`."""
        ...


@runtime_checkable
class InTraining(Protocol):
    """Say what a config has as well if its method takes part in training steps, as AdaLoRA does.

    `core/steps.py` asks for it, of the adapters that run and train.
    """

    def for_run(self, placements: Sequence[Placement], steps: int) -> Self:
        """Return the config of a run of so many steps: what depends on this number is chosen."""
        ...

    def schedule(self) -> str:
        """Return what happens in a run, and when, in one line."""
        ...

    def added_loss(self, placements: Sequence[Placement]) -> Tensor | None:
        """Return what is added to the loss of a step, a scalar with gradients, or None.

        It does not depend on the batch, so a step has it once, however many parts its batch has.
        """
        ...

    def after_step(self, placements: Sequence[Placement], step: int, usable: bool = True) -> Sequence[nn.Parameter]:
        """Work after an optimiser step, while the gradients are still there. Return the parameters that it changed.

        Args:
            step: the step's number, from 1.
            usable: whether the gradients can be used; those of a step that was skipped, since they overflowed, cannot.
        """
        ...

    def as_it_stands(self, placements: Sequence[Placement]) -> Self:
        """Return the config with what training has changed in the parts, for the adapter's file."""
        ...
