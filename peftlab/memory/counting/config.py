"""Reading a ``config.json`` with care."""

from __future__ import annotations

from typing import Any

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
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise PeftLabError(f"{self.source}: {name} must be a positive whole number, found {value!r}.")
            return value
        if default is None:
            raise PeftLabError(f"{self.source}: {names[0]} is missing; a {self.values['model_type']} config needs it.")
        return default

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false under ``name``."""
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise PeftLabError(f"{self.source}: {name} must be true or false, found {value!r}.")
        return value

    def share(self, name: str, default: float) -> float:
        """A number from 0 up to 1, as a dropout's probability."""
        value = self.values.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
            raise PeftLabError(f"{self.source}: {name} must lie between 0 and 1, found {value!r}.")
        return float(value)

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
