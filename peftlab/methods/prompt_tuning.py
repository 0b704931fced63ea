"""Prompt tuning: learned vectors in front of the input, and everything else frozen.

Lester et al., *The Power of Scale for Parameter-Efficient Prompt Tuning*, 2021, arXiv:2104.08691, section 2; a prompt
in front of every layer is VPT-deep of Jia et al., *Visual Prompt Tuning*, 2022, arXiv:2203.12119, section 3.2.

    X' = [P; X],    X: (t, d),  P: (n, d)

and, deep, the layers' outputs at the first n positions are replaced by a prompt of the next layer's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peftlab.core.hooks import active_prompt, adapters_on
from peftlab.core.interface import Part, Placement
from peftlab.core.records import as_transformer
from peftlab.errors import PeftLabError
from peftlab.methods.caches import cache_in
from peftlab.methods.in_front import prompt_parts
from peftlab.methods.states import blocks, states_of
from peftlab.methods.virtual import (
    Table,
    VirtualTokens,
    check_start,
    in_front,
    initial_tokens,
    is_encoder_decoder,
    path_of,
    submodules,
    text_ids,
    word_embeddings,
)

INITS = ("vocabulary", "text", "random")


@dataclass(frozen=True, kw_only=True)
class PromptTuningConfig(VirtualTokens):
    """A prompt of learned vectors.

    Attributes:
        num_virtual_tokens, modules_to_save, task_type: as for every method with virtual tokens.
        init: where the vectors start: `"vocabulary"` (the embeddings of tokens drawn at random), `"text"` (those of
            `init_text`, repeated or cut to the length), or `"random"` (standard normal, the default of Hugging Face
            peft, often far longer than any embedding).
        init_text: the text for `init="text"`, or its token ids.
        tokenizer: the tokenizer of that text, or its name; not needed with token ids.
        deep: a prompt in front of each layer, n L d parameters instead of n d. Hugging Face peft has no such method.

    Raises:
        PeftLabError: a value that is out of range, with what was found.
    """

    init: str = "vocabulary"
    init_text: str | Iterable[int] | None = None
    tokenizer: Any = field(default=None, repr=False, compare=False)
    deep: bool = False

    method: ClassVar[str] = "prompt"
    peft_type: ClassVar[str] = "PROMPT_TUNING"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_start(self, INITS)

    def parts(self, model: nn.Module) -> Iterator[Placement]:
        """Yields the prompt in front of the input, those of the deeper layers, and the copies of heads."""
        embeddings, n = word_embeddings(model), self.num_virtual_tokens
        rows = n if self.deep else n * submodules(model)
        tokens = None
        if self.init != "random":
            tokens = initial_tokens(model, rows, text_ids(self) if self.init == "text" else None)
        start = torch.randn(rows, embeddings.embedding_dim) if tokens is None else looked_up(embeddings, tokens)
        front, *rest = prompt_parts(model, Table(start), n)
        if self.deep:
            # not Hugging Face's name: there this prompt would load as a shallow one, and mean something else
            front.part.keys = {"source.rows": "deep_prompt_embeddings"}
        yield front
        yield from rest
        if self.deep:
            yield from self.deeper(model, tokens)
        yield from self.task_heads(model)

    def deeper(self, model: nn.Module, tokens: Tensor | None) -> Iterator[Placement]:
        """Yields a prompt for each block but the first."""
        stack = as_transformer(model).get_encoder() if is_encoder_decoder(model) else model
        found = blocks(stack)
        if not found:
            raise PeftLabError(f"{type(stack).__name__} has no list of blocks; use a shallow prompt (deep=False).")
        # what enters each block for those tokens, so that a prompt of real text computes at first what the text would
        states = None if tokens is None else states_of(model, stack, found, tokens)
        for index, block in enumerate(found[1:], 1):
            width = word_embeddings(model).embedding_dim
            start = torch.randn(self.num_virtual_tokens, width) if states is None else states[index]
            yield Placement(path_of(model, block), "prompt", DeepPrompt(start))

    def to_peft(self, model: nn.Module, hosts: Mapping[str, nn.Module]) -> dict[str, Any]:
        """The fields of Hugging Face's `adapter_config.json` for prompt tuning.

        A text to start from is left out: peft would ask for its tokenizer again, and the vectors are in the file.
        """
        start = "SAMPLE_VOCAB" if self.init == "vocabulary" else "RANDOM"
        deep = {"deep": True} if self.deep else {}
        return {**self.shared_fields(model), "prompt_tuning_init": start, **deep}

    @staticmethod
    def from_peft(fields: Mapping[str, Any]) -> dict[str, Any]:
        """The reverse of `to_peft`: the keyword arguments for this class. How the prompt began no longer matters."""
        return {
            "num_virtual_tokens": fields.get("num_virtual_tokens"),
            "init": "random",
            "deep": bool(fields.get("deep", False)),
        }


class DeepPrompt(Part):
    """A prompt for this layer. It overwrites the previous layer's output at the prompt positions.

    Attributes:
        rows: (n, d).
    """

    keys = {"rows": "{path}.prompt_embeddings"}

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows = nn.Parameter(rows)
        self.compatibility_key = f"a deep prompt of {len(rows)} virtual tokens"

    def make_prompt(self, host: nn.Module) -> Tensor:
        """This layer's prompt, (n, d)."""
        return self.rows

    def before(self, host: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Replace the first n of the states (b, n + t, d), unless this call goes on with a text in the cache."""
        # A checkpointed block runs again in the backward pass, after other calls of the model: it has no cache then.
        cached = not host.training or cache_in((*args, *kwargs.values())) is not None
        if cached and not adapters_on(host).activity.text_begins:
            return args, kwargs
        if not args:
            raise PeftLabError(f"{type(host).__name__} is not called with its states first; a deep prompt cannot act.")
        states = args[0]
        prompt = active_prompt(host, len(states))
        # H_i' = [P_i; H_i[n:]]
        return (in_front(prompt, states[:, prompt.shape[1] :]), *args[1:]), kwargs


def looked_up(embeddings: nn.Embedding, tokens: Tensor) -> Tensor:
    """The embeddings of tokens, as the model itself looks them up (some scale them), detached."""
    with torch.no_grad():
        return embeddings(tokens).detach().clone()
