"""Find the word embeddings of a model, which not every model has."""

from __future__ import annotations

from torch import nn

from peftlab.core.hooks import base_modules
from peftlab.core.records import as_transformer


def word_embeddings(model: nn.Module) -> tuple[str, nn.Embedding] | None:
    """Return the path and the module of a model's input embeddings of tokens.

    None for a model that reads images or sound, that compares texts with these (CLIP names no embedding), or that is
    not of transformers.
    """
    try:
        words = as_transformer(model).get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    if not isinstance(words, nn.Embedding):  # a model of images embeds patches
        return None
    return next(((path, module) for path, module in base_modules(model).items() if module is words), None)
