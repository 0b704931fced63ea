"""Read a `config.json` and check its values."""

from __future__ import annotations

from typing import Any

from peftlab.checks import number, whole
from peftlab.errors import PeftLabError

# Every block is listed, so their number is bounded; other sizes only enter sums and products.
MOST_LAYERS, MOST_SIZE = 1_000, 10**12
MOST = 2**24  # of what a person chooses: tokens, examples, GPUs, a rank, classes


class Config:
    """The values of a `config.json`. A wrong or missing value is an error that names it, never a guess."""

    def __init__(self, values: dict[str, Any], source: str):
        self.values = values
        self.source = source

    def size(self, *names: str, default: int | None = None) -> int:
        """Return the positive whole number under the first of `names` that is there. Without a default, one must be."""
        for name in names:
            value = self.values.get(name)
            if value is None:
                continue
            ceiling = MOST_LAYERS if "layer" in name else MOST_SIZE
            return whole(f"{self.source}: {name}", value, least=1, ceiling=ceiling)
        if default is None:
            raise PeftLabError(f"{self.source}: {names[0]} is missing; a {self.values['model_type']} config needs it.")
        return default

    def flag(self, name: str, default: bool = False) -> bool:
        """Return the true or false under `name`."""
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise PeftLabError(f"{self.source}: {name} must be true or false, not {value!r}.")
        return value

    def share(self, name: str, default: float, most: float | None = None) -> float:
        """Return the number under `name`, from 0 to below 1 (or up to `most`), such as the probability of a dropout."""
        value = self.values.get(name)
        if value is None:
            return default
        name = f"{self.source}: {name}"
        return float(number(name, value, least=0, below=1) if most is None else number(name, value, least=0, most=most))

    def count(self, name: str, default: int) -> int:
        """Return the whole number under `name`, which may be 0."""
        value = self.values.get(name)
        return default if value is None else whole(f"{self.source}: {name}", value, least=0, ceiling=MOST_SIZE)

    def whole(self, name: str, default: int) -> int:
        """Return the whole number under `name`, which may be negative where that means that something is off."""
        value = self.values.get(name)
        return default if value is None else whole(f"{self.source}: {name}", value, ceiling=MOST_SIZE)

    def words(self, name: str) -> list[str]:
        """Return the words under `name`: a list, or one string in which `|` parts them. Nothing is an empty list."""
        value = self.values.get(name)
        if isinstance(value, str):
            return [word.strip() for word in value.lower().split("|")]
        if value is not None and not (isinstance(value, list) and all(isinstance(one, str) for one in value)):
            raise PeftLabError(f"{self.source}: {name} must be a list of strings, found {str(value)[:80]}.")
        return list(value or [])

    def pair(self, name: str, default: int) -> tuple[int, int]:
        """Return the height and the width under `name`; one number stands for both."""
        value = self.values.get(name)
        if not isinstance(value, (list, tuple)):
            one = self.size(name, default=default)
            return one, one
        if len(value) != 2:
            raise PeftLabError(f"{self.source}: {name} must be one number or a height and a width, found {value!r}.")
        height, width = (whole(f"{self.source}: {name}", one, least=1, ceiling=MOST_SIZE) for one in value)
        return height, width

    def part(self, name: str, default: str) -> Config:
        """Return the configuration of a part, such as `text_config`. A missing one leaves all to its defaults."""
        value = self.values.get(name)
        if value is not None and not isinstance(value, dict):
            raise PeftLabError(
                f"{self.source}: {name} must be an object with the settings of that part, found {str(value)[:80]}."
            )
        return Config({"model_type": default, **(value or {})}, f"{self.source}: {name}")

    def numbers(self, name: str) -> list[int] | None:
        """Return the list of whole numbers under `name`, or None."""
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, (list, tuple)) or not all(isinstance(one, int) for one in value):
            raise PeftLabError(f"{self.source}: {name} must be a list of whole numbers, found {str(value)[:80]}.")
        return [int(one) for one in value]

    def with_defaults(self, **defaults: int) -> Config:
        """Return a configuration in which what is missing has these values."""
        return Config({**defaults, **{k: v for k, v in self.values.items() if v is not None}}, self.source)

    def text(self, name: str, default: str) -> str:
        """Return the string under `name`."""
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, str):
            raise PeftLabError(f"{self.source}: {name} must be a string, found {value!r}.")
        return value

    def per_head(self, hidden: int, heads: int, default: int | None = None) -> int:
        """Return the width of an attention head: `head_dim` if given, else hidden / heads."""
        if default is None and self.values.get("head_dim") is None and hidden % heads:
            raise PeftLabError(
                f"{self.source}: hidden_size {hidden} is not a multiple of the {heads} attention heads. Give the width "
                "of a head as head_dim, or correct one of the two."
            )
        return self.size("head_dim", default=default or hidden // heads)

    def divided(self, hidden: int, heads: int) -> int:
        """Return hidden / heads, the width of a head in a model whose heads have no width of their own."""
        if hidden % heads:
            raise PeftLabError(
                f"{self.source}: the width {hidden} is no multiple of the {heads} attention heads. Correct one of "
                "the two."
            )
        return hidden // heads

    def refuse(self, name: str) -> None:
        """Refuse an option that adds modules which the tables here do not have."""
        if self.values.get(name):
            raise PeftLabError(
                f"{self.source}: {name} is set. It adds layers to the model that cannot be counted here; without them, "
                "set it to false or leave it out."
            )

    def labels(self, default: int = 2) -> int:
        """Return the number of classes as transformers reads it: two (BART: three) unless the configuration says it."""
        named = self.values.get("id2label")
        return len(named) if isinstance(named, dict) and named else self.size("num_labels", default=default)
