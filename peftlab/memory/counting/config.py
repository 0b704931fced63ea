"""Reading a ``config.json`` with care."""

from __future__ import annotations

from typing import Any

from peftlab.checks import number, whole
from peftlab.errors import PeftLabError


class Config:
    """A ``config.json`` read with care: a wrong or missing value is named, never guessed."""

    def __init__(self, values: dict[str, Any], source: str):
        self.values = values
        self.source = source

    def size(self, *names: str, default: int | None = None) -> int:
        """A positive whole number under the first of ``names`` that is present; required when there is no default."""
        for name in names:
            value = self.values.get(name)
            if value is None:
                continue
            return whole(f"{self.source}: {name}", value, least=1)
        if default is None:
            raise PeftLabError(f"{self.source}: {names[0]} is missing; a {self.values['model_type']} config needs it.")
        return default

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false under ``name``."""
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise PeftLabError(f"{self.source}: {name} must be true or false, not {value!r}.")
        return value

    def share(self, name: str, default: float) -> float:
        """A number from 0 up to 1, as a dropout's probability."""
        value = self.values.get(name)
        return default if value is None else float(number(f"{self.source}: {name}", value, least=0, below=1))

    def text(self, name: str, default: str) -> str:
        """A string under ``name``."""
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, str):
            raise PeftLabError(f"{self.source}: {name} must be a text, found {value!r}.")
        return value

    def per_head(self, hidden: int, heads: int, default: int | None = None) -> int:
        """The width of an attention head: ``head_dim`` where given, else hidden / heads."""
        if default is None and self.values.get("head_dim") is None and hidden % heads:
            raise PeftLabError(f"{self.source}: hidden_size {hidden} is no multiple of the {heads} attention heads.")
        return self.size("head_dim", default=default or hidden // heads)

    def refuse(self, name: str) -> None:
        """An option that adds modules which no table here has."""
        if self.values.get(name):
            raise PeftLabError(f"{self.source}: {name} is set; models with it are not counted.")

    def labels(self) -> int:
        """The number of classes, as transformers reads it: two unless the configuration says otherwise."""
        named = self.values.get("id2label")
        return len(named) if isinstance(named, dict) and named else self.size("num_labels", default=2)
