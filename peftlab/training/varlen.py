"""Packed rows by torch's variable-length attention, a kernel that visits only the pairs of tokens that may attend.

With a mask of blocks, attention in a row of n examples computes scores for all (t_1 + ... + t_n)^2 pairs of tokens and
throws most of them away. The variable-length ("varlen") kernel is given the places where examples begin,

    starts = [0, t_1, t_1 + t_2, ..., t_1 + ... + t_n],

and computes only the t_1^2 + ... + t_n^2 pairs inside the examples. It is the kernel of FlashAttention-2 (Dao, 2023),
which torch brings along from 2.11 on. It takes bf16 and fp16, on NVIDIA GPUs from the Ampere generation on.

It does not always pay. On an H200 (2026-11-27, torch 2.11, a Llama of 1.2 billion parameters, about 18,000 tokens a
step, in one process) a step by the kernel took 3% longer than one by the mask in rows of 206 tokens, and 11% longer in
rows of 1,265. In rows of 5,652 it took 15% less time and 3 GB less memory. So shorter rows than `LONG` stay with the
mask.

`transformers` looks attention functions up by name, so this one is registered under a name of its own, `NAME`. A run
gives the model that name for its steps and its old one back afterwards. The borders are found in `position_ids`, as
`transformers` finds them for its masks. Wherever there is a padding mask or a cache, SDPA answers as before.
"""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from peftlab.core.records import unwrap
from peftlab.errors import PeftLabError
from peftlab.training.borders import needs_masks
from peftlab.training.model_facts import ModelFacts

NAME = "peftlab_varlen"
HALF = (torch.bfloat16, torch.float16)
AMPERE = (8, 0)  # the compute capability
LONG = 4096  # tokens of a row, padding included, from which on the kernel is used
# what configs call the dropout of attention
DROPOUTS = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob", "attn_dropout")


@cache
def kernel() -> Callable[..., Any] | None:
    """Return torch's function for variable-length attention; None if this torch has none that knows causal windows."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if "window_size" in inspect.signature(varlen_attn).parameters else None


class Starts(NamedTuple):
    """Where the examples begin in all rows laid end to end (n + 1,), in int32, and the longest one's length."""

    starts: Tensor
    longest: int


def starts_of(position_ids: Tensor) -> Starts:
    """Find where examples begin in rows (b, t): at each row's first token, and wherever positions do not go on by 1.

    >>> from peftlab.training.varlen import starts_of
    >>> starts_of(torch.tensor([[0, 1, 2, 0, 1], [0, 1, 0, 0, 0]]))
    Starts(starts=tensor([0, 3, 5, 7, 8, 9, 10], dtype=torch.int32), longest=3)
    """
    begins = torch.ones_like(position_ids, dtype=torch.bool)
    begins[:, 1:] = position_ids.diff(dim=1) != 1
    starts = torch.cat([begins.flatten().nonzero().flatten(), torch.tensor([begins.numel()], device=begins.device)])
    return Starts(starts.int(), int(starts.diff().max()))


class Last:
    """The starts in the positions that were seen last: all blocks of a model ask about the same ones.

    Reading the longest length makes the CPU wait for the GPU, so it is done once for each batch, not in each block.
    Several threads may train at once, so what is known is one tuple, which changes as a whole.
    """

    def __init__(self) -> None:
        # a weak reference to the positions, how often they were written to, their rows, and the starts
        self.known: tuple[Callable[[], Tensor | None], int, int, Starts] | None = None

    def of(self, position_ids: Tensor, rows: int) -> Starts:
        """Return the starts of positions (b, t), or (1, t) where all of b rows have the same ones."""
        known, version = self.known, position_ids._version
        if known is not None and known[0]() is position_ids and known[1:3] == (version, rows):
            return known[3]
        found = starts_of(position_ids.expand(rows, -1))
        self.known = weakref.ref(position_ids), version, rows, found
        return found


last = Last()


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_ids: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attend within examples: query (b, h, t, d), key and value (b, h_kv, t, d). Return (b, t, h, d) and None."""
    varlen = kernel()
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    whole = attention_mask is None and query.shape[2] == key.shape[2]  # neither padding nor a cache
    if varlen is None or position_ids is None or not (whole and causal) or dropout or query.shape[2] < LONG:
        others |= {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, "position_ids": position_ids}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **others)
    b, h, t, _ = query.shape
    starts, longest = last.of(position_ids, b)
    groups = h // key.shape[1]
    given: dict[str, Any] = {"scale": scaling, "window_size": (-1, 0)}  # no limit to the left, nothing to the right
    if "enable_gqa" in inspect.signature(varlen).parameters:
        given["enable_gqa"] = groups > 1
    else:
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    # norms and rotations may have made q and k float32; v comes from a linear layer, in the dtype of the products
    q, k, v = (each.transpose(1, 2).flatten(0, 1).to(value.dtype) for each in (query, key, value))
    mixed = varlen(q, k, v, starts, starts, longest, longest, **given)
    return mixed.unflatten(0, (b, t)), None


def mask(
    batch_size: int, q_length: int, kv_length: int, attention_mask: Tensor | None = None, **others: Any
) -> Tensor | None:
    """Return no mask where `attention` needs none. Short rows, padding and a cache need the mask of SDPA."""
    if q_length == kv_length >= LONG and (attention_mask is None or bool(attention_mask.all())):
        return None
    return sdpa_mask(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, attention_mask=attention_mask, **others
    )


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, mask)


def can_run_on(device: torch.device) -> bool:
    """Whether this is a device that the kernel was written for."""
    return device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) >= AMPERE


def why_not(model: nn.Module, facts: ModelFacts, device: torch.device, dtype: torch.dtype) -> str:
    """Say why packed rows of this model cannot go to the kernel; nothing if they can. The model itself is tried.

    Args:
        dtype: of the products.
    """
    config: Any = facts.config
    windows = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    parts = (module for module in unwrap(model).modules() if isinstance(module, PreTrainedModel))
    known = {part.config._attn_implementation for part in parts}
    dropouts = [getattr(config, name, None) or 0 for name in DROPOUTS]
    if kernel() is None:
        return f"torch {torch.__version__} has no varlen_attn with windows"
    if not can_run_on(device):
        return f"{device} is no NVIDIA GPU of the Ampere generation or a later one"
    if dtype not in HALF:
        return f"the products are in {str(dtype).removeprefix('torch.')}, not in bf16 or fp16"
    if known != {"sdpa"}:
        return f"the model's attention is {' and '.join(sorted(map(str, known))) or 'its own'}, not sdpa"
    if windows is not None or kinds or getattr(config, "attention_chunk_size", None):
        return "its attention has windows, or layers of several kinds"
    if any(dropouts):
        return f"its attention has dropout, {max(dropouts)}"
    try:
        with used(model), in_rows_from(1):
            return "the model does not find borders in position_ids" if needs_masks(model, facts) else ""
    except (PeftLabError, RuntimeError, ValueError, TypeError) as error:  # such as a head that the kernel cannot take
        return " ".join(str(error).split())[:200]


@contextlib.contextmanager
def in_rows_from(tokens: int) -> Iterator[None]:
    """Let rows from this many tokens on go to the kernel inside the block: a trial of a model has short ones."""
    global LONG
    before, LONG = LONG, tokens
    try:
        yield
    finally:
        LONG = before


@contextlib.contextmanager
def used(model: nn.Module) -> Iterator[None]:
    """Let the model attend by the kernel inside the block."""
    core: Any = unwrap(model)
    before = core.config._attn_implementation
    core.set_attn_implementation(NAME)
    try:
        yield
    finally:
        core.set_attn_implementation(before)
