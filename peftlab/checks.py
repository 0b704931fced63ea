"""Checks of a value that a person gives: a whole number, a number, one of a list, or what an annotation says.

Each check of one value returns it as a plain Python value. For a value that is not allowed it raises a `PeftLabError`,
which names the value and says what is allowed and what was found. For words it adds near matches.

`@checked()` stands on every public function. It holds each argument to the annotation in the function's signature, so
that `None` or a wrong type is one clear line instead of an error somewhere inside a library.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import math
import operator
import os
import reprlib
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from numbers import Integral, Real
from typing import Any, NamedTuple, ParamSpec, TypeVar

from peftlab.errors import PeftLabError, did_you_mean

SHORT = reprlib.Repr()
SHORT.maxstring = SHORT.maxother = SHORT.maxlong = 80
Given = ParamSpec("Given")
Result = TypeVar("Result")

LARGEST = 1e30  # of a config's number: it meets float32 tensors, which end at 3e38
# For each limit: its words in an error, and the comparison.
LIMITS = {
    "least": ("of at least", operator.ge), "above": ("above", operator.gt),
    "most": ("of at most", operator.le), "below": ("below", operator.lt), "ceiling": ("of at most", operator.le),
}  # fmt: skip


def whole(name: str, value: Any, *, usual: str = "", optional: bool = False, **limits: int) -> Any:
    """Require a whole number, Python's or numpy's; `True` and `False` are refused.

    Args:
        name: what the error calls the value.
        usual: the usual values, for the error.
        optional: allow `None` too.
        limits: `least` and `most` (allowed themselves), `above` and `below` (not allowed themselves); and `ceiling`, a
            `most` far beyond sense, of which only those hear who go beyond it.
    """
    return _check(name, value, Integral, "whole number", usual, optional, limits)


def number(name: str, value: Any, *, usual: str = "", optional: bool = False, **limits: float) -> Any:
    """Require a finite number. The arguments are those of `whole`; a whole number stays whole."""
    words = "number" if {"most", "below"} & limits.keys() else "finite number"
    return _check(name, value, Real, words, usual, optional, limits)


def one_of(name: str, value: Any, known: Iterable[Any]) -> Any:
    """Require one of the known values."""
    values = {one: one for one in known}
    try:
        return values[value]
    except (KeyError, TypeError):  # TypeError: a list, for example, cannot be looked up
        near = did_you_mean(shown(value).strip("'"), [one for one in values if isinstance(one, str)])
        listed = ", ".join(map(repr, values))
        raise PeftLabError(f"{name} must be one of {listed}; found {shown(value)}.{near}") from None


def device(value: Any, torch: Any) -> Any:
    """Require a device that torch has here, by name or as a `torch.device`, and return the latter.

    Args:
        torch: the library; this file must not load it.
    """
    try:
        found = torch.device(value)
    except (RuntimeError, TypeError):
        raise PeftLabError(f'{shown(value)} is not a device: use "cpu", "cuda", "cuda:1" or "mps".') from None
    here = torch.cuda.device_count()
    if found.type == "cuda" and (found.index or 0) >= here:
        raise PeftLabError(f"There is no device {found} here: torch sees {here} CUDA devices.")
    if found.type not in ("cuda", "cpu", "meta"):
        try:
            torch.empty(0, device=found)
        except (RuntimeError, ImportError, AssertionError) as error:  # torch was built without this kind of device
            reason = " ".join(str(error).split()).partition(". ")[0][:160]
            raise PeftLabError(f"There is no device {found} here ({reason}). Leave it out, or take cpu.") from None
    return found


def check_fields(config: Any, check: Callable[..., Any], *names: str, **limits: Any) -> None:
    """Check fields of a frozen dataclass, and keep what the check returns, so that a numpy integer becomes an `int`."""
    if check is number:
        limits = {"ceiling": LARGEST, **limits}
    for name in names:
        object.__setattr__(config, name, check(name, getattr(config, name), **limits))


def shown(value: Any) -> str:
    """Return one short line about a value of any kind, for an error."""
    if isinstance(value, type):
        return f"the class {value.__name__} itself"
    try:
        text = SHORT.repr(value)
    except Exception:  # a whole number of thousands of digits, or an object whose own code fails
        text = ""
    plain = text and len(text) <= 100 and text.isprintable() and not text.startswith("<")
    return text if plain else _a(type(value).__name__)


def _a(name: str) -> str:
    return f"an {name}" if name[0].lower() in "aeiou" else f"a {name}"


def scalar(value: Any) -> Any:
    """Return the Python value in a tensor or an array without axes, such as `torch.tensor(3)`; else the value itself.

    >>> import numpy
    >>> from peftlab.checks import scalar
    >>> scalar(numpy.array(3)), scalar("3")
    (3, '3')
    """
    if getattr(value, "shape", None) != () or not hasattr(value, "item"):
        return value
    try:
        return value.item()
    except Exception:  # a tensor of the meta device has no value
        return value


def _check(
    name: str, value: Any, kind: Any, words: str, usual: str, optional: bool, limits: Mapping[str, float]
) -> Any:
    if value is None and optional:
        return None
    given, value = value, scalar(value)
    # abs(value) < inf is false for NaN too
    fits = isinstance(value, kind) and not isinstance(value, bool) and abs(value) < math.inf
    if fits and all(LIMITS[limit][1](value, bound) for limit, bound in limits.items()):
        return int(value) if isinstance(value, Integral) else float(value)
    lowest = {"least": 1} if kind is Integral else {"above": 0}
    positive = lowest.items() <= limits.items()
    if not (fits and value > limits.get("ceiling", math.inf)):
        limits = {limit: bound for limit, bound in limits.items() if limit != "ceiling"}
    told = [f"{LIMITS[limit][0]} {bound:,}" for limit, bound in limits.items() if not (positive and limit in lowest)]
    allowed = " ".join([*["positive"] * positive, words, " and ".join(told)]).rstrip()
    raise PeftLabError(f"{name} must be a {allowed}{f' (usually {usual})' if usual else ''}, found {shown(given)}.")


# ------------------------------------------------------------------------------------------------------- annotations


class Kind(NamedTuple):
    """What an annotation allows.

    Attributes:
        words: for an error, such as "a whole number".
        fits: whether a value is allowed.
        advice: what to do, for an error.
    """

    words: str
    fits: Callable[[Any], bool]
    advice: str = ""

    def require(self, name: str, value: Any) -> Any:
        """Return the value, or the number that a tensor without axes holds. Refuse one that is not allowed.

        Args:
            name: what the error calls it.
        """
        if self.fits(value):
            return value
        found = scalar(value)
        if found is not value and self.fits(found):
            return found
        advice = f" {self.advice}." if self.advice else ""
        raise PeftLabError(f"{name} must be {self.words}, found {shown(value)}.{advice}")


def checked(*unchecked: str) -> Callable[[Callable[Given, Result]], Callable[Given, Result]]:
    """Hold the arguments of a function to its annotations. An argument that does not fit is a `PeftLabError`.

    What is annotated with `Any`, or with a name that only a type checker knows, is not held to anything. Of a list, a
    tuple or a dict each entry is looked at; of everything else that can be iterated over, none.

    Args:
        unchecked: parameters that the function checks itself, because it takes more than they say or can say more.
    """

    def check(function: Callable[Given, Result]) -> Callable[Given, Result]:
        @functools.cache  # read at the first call, when all names of the function's file are known
        def kinds() -> tuple[tuple[str, ...], dict[str, Kind]]:
            inner: Any = inspect.unwrap(function)
            code, hints = inner.__code__, inner.__annotations__
            names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
            held = [name for name in names if name in hints and name not in unchecked]
            found = {name: kind_of(hints[name], inner.__globals__) for name in held}
            return names[: code.co_argcount], {name: kind for name, kind in found.items() if kind is not None}

        @functools.wraps(function)
        def run(*args: Given.args, **kwargs: Given.kwargs) -> Result:
            places, known = kinds()
            first: Any = [*args]
            named: Any = {**kwargs}
            for place, (name, value) in enumerate(zip(places, args, strict=False)):  # how many is for Python to tell
                if name in known:
                    first[place] = known[name].require(name, value)
            for name, value in kwargs.items():
                if name in known:
                    named[name] = known[name].require(name, value)
            return function(*first, **named)

        return run

    return check


def check_kinds(config: Any, *names: str) -> None:
    """Hold fields of a dataclass to their annotations."""
    file = vars(sys.modules[type(config).__module__])
    for one in fields(config):
        kind = kind_of(one.type, file) if one.name in names else None
        if kind is not None:
            kind.require(one.name, getattr(config, one.name))


def kind_of(hint: Any, names: dict[str, Any]) -> Kind | None:
    """Return what an annotation allows, or `None` where it allows anything. `names` are those of its file."""
    if isinstance(hint, str):
        try:
            hint = eval(hint, names)
        except NameError:  # imported for type checkers alone
            return None
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if hint is None or hint is types.NoneType:
        return Kind("None", lambda value: value is None)
    if origin is typing.Annotated:
        return next((one for one in inside if isinstance(one, Kind)), None) or kind_of(inside[0], names)
    if origin in (typing.Union, types.UnionType):
        return _union([kind_of(one, names) for one in inside], inside)
    if hint in PLAIN:
        return PLAIN[hint]
    container = hint if origin is None else origin
    if container is Callable:
        return Kind("a function", callable)
    if container in (Any, object) or not isinstance(container, type):
        return None
    if getattr(container, "_is_protocol", False):
        return None  # what an interface asks for, the function knows better
    if issubclass(container, Mapping):
        return _mapping([kind_of(one, names) for one in inside])
    if issubclass(container, Iterable) and (origin is not None or container in (list, tuple)):
        return _listing(container, [kind_of(one, names) for one in inside if one is not ...])
    name = container.__name__
    return Kind(NAMES.get(name, _a(name)), lambda value: isinstance(value, container), LOAD if name == "Module" else "")


def _finite(value: Any) -> bool:
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number larger than the largest float
        return False


def _path(value: Any) -> bool:
    """Whether a value can name a file or a folder: a text that is not blank and has no NUL, or a path."""
    if not isinstance(value, (str, os.PathLike)):
        return False
    text = os.fspath(value)
    return isinstance(text, str) and bool(text.strip()) and "\0" not in text


PLAIN: dict[Any, Kind] = {
    str: Kind("a string", lambda value: isinstance(value, str)),
    bool: Kind("True or False", lambda value: isinstance(value, bool) or type(value).__name__ == "bool"),
    int: Kind("a whole number", lambda value: isinstance(value, Integral) and not isinstance(value, bool)),
    float: Kind("a finite number", _finite),
}
LOAD = 'Load one first: model, tokenizer = pl.load_model("smollm2-135m")'
NAMES = {"Module": "a torch.nn.Module", "Tensor": "a torch.Tensor", "dtype": "a floating dtype such as torch.float32"}
PATH = Kind("the path of a file or a folder", _path)
# A tokenizer of transformers, or what works like one
TOKENIZER = Kind(
    "a tokenizer", lambda value: callable(value) and hasattr(value, "eos_token_id") and not isinstance(value, type),
    LOAD,
)  # fmt: skip
Tokenizer = typing.Annotated[Any, TOKENIZER]


def _union(kinds: list[Kind | None], hints: tuple[Any, ...]) -> Kind | None:
    known = [kind for kind in kinds if kind is not None]
    if len(known) < len(kinds):
        return None
    plain = [typing.get_origin(hint) or hint for hint in hints]
    is_path = [isinstance(hint, type) and issubclass(hint, (str, os.PathLike)) for hint in plain]
    if str in hints and sum(is_path) > 1:  # a text here is a path
        known = [PATH, *(kind for kind, path in zip(known, is_path, strict=True) if not path)]
    listed = [kind.words for kind in known]
    fits = tuple(kind.fits for kind in known)
    advice = next((kind.advice for kind in known if kind.advice), "")
    return Kind(" or ".join(dict.fromkeys(listed)), lambda value: any(one(value) for one in fits), advice)


def _mapping(entries: list[Kind | None]) -> Kind:
    key, held = entries or (None, None)

    def fits(value: Any) -> bool:
        if not isinstance(value, Mapping):
            return False
        return not isinstance(value, dict) or (_all(key, value) and _all(held, value.values()))

    words = "a dict" if held is None else f"a dict whose values are each {held.words}"
    return Kind(words, fits)


def _listing(container: type, entries: list[Kind | None]) -> Kind:
    entry = entries[0] if entries else None

    def fits(value: Any) -> bool:
        if isinstance(value, (str, bytes, Mapping, type)):
            return False
        if container is tuple and not isinstance(value, (list, tuple)):
            return False
        if isinstance(value, (list, tuple)):
            if container is tuple and len(entries) > 1:
                return len(value) == len(entries) and all(
                    one is None or one.fits(held) for one, held in zip(entries, value, strict=True)
                )
            return _all(entry, value)
        if hasattr(value, "__getitem__") and hasattr(value, "__len__"):  # a column of a data set, an array, a tensor
            return getattr(value, "shape", None) != () and _all(entry, itertools.islice(value, 1))
        return container is Iterable and isinstance(value, Iterable)

    many = f" of {len(entries)}" if container is tuple and len(entries) > 1 else ""
    return Kind(f"a list{many}" if entry is None else f"a list{many}, each {entry.words}", fits)


def _all(kind: Kind | None, values: Iterable[Any]) -> bool:
    return kind is None or all(map(kind.fits, values))
