"""Find the word embeddings of a model, and say which rows of its table an embedding looks up in a call."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peftlab.core.hooks import base_modules
from peftlab.core.parameters import Value, run_with
from peftlab.core.records import as_transformer, own_tensor
from peftlab.errors import PeftLabError


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


def looked_up(host: nn.Embedding, args: tuple, kwargs: dict) -> tuple[Tensor, Tensor | None]:
    """Return (ids, scale) of a call: an embedding with the table W returns scale W[ids]. None is a scale of 1.

    Only a plain embedding is called with its ids. A table of positions may get a mask (OPT), the tokens (BART) or only
    their shape (Pegasus), and Gemma's scales what it finds. So the forward of such a module is run on another table,
    whose row i is (i, 1): it returns (scale i, scale).

    Raises:
        PeftLabError: the forward does something else with its table.
    """
    forward = type(host).forward
    if forward is nn.Embedding.forward:
        return (args[0] if args else next(iter(kwargs.values()))), None
    weight = own_tensor(host, "weight")
    dtype = torch.float32 if weight.device.type == "mps" else torch.float64

    def table() -> Tensor:
        ids = torch.arange(host.num_embeddings, dtype=dtype, device=weight.device)
        return torch.stack((ids, torch.ones_like(ids)), 1)

    with torch.no_grad():
        found = run_with({"weight": Value(table, ())}, host, forward.__get__(host), args, kwargs)
    if not isinstance(found, Tensor) or found.dtype != dtype or found.shape[-1:] != (2,):
        raise PeftLabError(
            f"{type(host).__name__} does more than to look up rows of its table, so an adapter cannot follow it. Name "
            "other modules, or leave this one out."
        )
    ids, scale = found.unbind(-1)
    return (ids / scale).round().long(), scale[..., None]


def scaled(rows: Tensor, scale: Tensor | None) -> Tensor:
    """Return scale rows, multiplied in at least 32 bits, in the rows' dtype."""
    if scale is None:
        return rows
    return (rows * scale.to(torch.promote_types(rows.dtype, torch.float32))).to(rows.dtype)
