"""Put learned vectors P in front of the input, and freeze everything else.

    X' = [P; X],                X: (t, d),  P: (n, d)
    H_i' = [P_i; H_i[n:]],      H_i: (n + t, d),  P_i: (n, d),  for a deep prompt in every layer i after the first

`InFront` in `methods/in_front.py` computes the first formula, since P-tuning shares it. `DeepPrompt` below computes the
second.

Paper: Lester et al., *The Power of Scale for Parameter-Efficient Prompt Tuning*, 2021, arXiv:2104.08691, section 2. The
deep prompt is VPT-deep of Jia et al., *Visual Prompt Tuning*, 2022, arXiv:2203.12119, section 3.2.
Book: section 4.1, "Vectors that no word has"; also 4.2, "Why the start decides", and 4.5, "Shallow and deep".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peftlab.catalogue import METHODS
from peftlab.checks import check_fields, one_of
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


class DeepPrompt(Part):
    """Hold a prompt for this layer. It overwrites the previous layer's output at the prompt positions.

        H_i' = [P_i; H_i[n:]]

    Attributes:
        rows: P_i, (n, d).
    """

    keys = {"rows": "{path}.prompt_embeddings"}

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows = nn.Parameter(rows)
        self.compatibility_key = f"a deep prompt of {len(rows)} virtual tokens"

    def make_prompt(self, host: nn.Module) -> Tensor:
        """Return this layer's prompt, (n, d)."""
        return self.rows

    def before(self, host: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Replace the first n of the states (b, n + t, d), unless this call continues a text that is in the cache."""
        # A checkpointed block runs again in the backward pass. Then `text_begins` may be of a later call, but the block
        # has no cache, which shows that its text begins.
        cached = not host.training or cache_in((*args, *kwargs.values())) is not None
        if cached and not adapters_on(host).activity.text_begins:
            return args, kwargs
        if not args:
            raise PeftLabError(
                f"{type(host).__name__} does not get its states as first argument, so a deep prompt cannot replace "
                "them; use deep=False."
            )
        states = args[0]
        prompt = active_prompt(host, len(states))
        # H_i' = [P_i; H_i[n:]]
        return (in_front(prompt, states[:, prompt.shape[1] :]), *args[1:]), kwargs


@dataclass(frozen=True, kw_only=True)
class PromptTuningConfig(VirtualTokens):
    """Say how many learned vectors a prompt has and where they start.

    Attributes:
        num_virtual_tokens, modules_to_save, task_type: as for every method with virtual tokens.
        init: where the vectors start. `"vocabulary"` takes the embeddings of tokens drawn at random. `"text"` takes
            those of `init_text`, repeated or cut to the length. `"random"` is standard normal, the default of Hugging
            Face peft; such vectors are often far longer than any embedding.
        init_text: the text for `init="text"`, or its token ids.
        tokenizer: the tokenizer of that text, or its name; not needed with token ids.
        deep: put a prompt in front of each layer, n L d parameters instead of n d. Hugging Face peft has no such
            method.

    Raises:
        PeftLabError: a value is out of range; the message says what was found.

    >>> model = pl.attach(model, pl.PromptTuningConfig(num_virtual_tokens=4))
    >>> pl.count_parameters(model).trainable
    64
    """

    init: str = "vocabulary"
    init_text: str | Iterable[int] | None = None
    tokenizer: Any = field(default=None, repr=False, compare=False)
    deep: bool = False

    method: ClassVar[str] = "prompt"
    peft_type: ClassVar[str] = "PROMPT_TUNING"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_start(self, METHODS["prompt"].starts)
        check_fields(self, one_of, "deep", known=(True, False))

    def parts(self, model: nn.Module) -> Iterator[Placement]:
        """Yield the prompt in front of the input, the prompts of the deeper layers, and the copies of heads."""
        embeddings, n = word_embeddings(model), self.num_virtual_tokens
        rows = n if self.deep else n * submodules(model)
        tokens = None
        if self.init != "random":
            tokens = initial_tokens(model, rows, text_ids(self) if self.init == "text" else None)
        start = torch.randn(rows, embeddings.embedding_dim) if tokens is None else looked_up(embeddings, tokens)
        front, *rest = prompt_parts(model, Table(start), n)
        if self.deep:
            # not Hugging Face's name, or peft would load this prompt as a shallow one
            front.part.keys = {"source.rows": "deep_prompt_embeddings"}
        yield front
        yield from rest
        if self.deep:
            yield from self.deeper(model, tokens)
        yield from self.task_heads(model)

    def deeper(self, model: nn.Module, tokens: Tensor | None) -> Iterator[Placement]:
        """Yield a prompt for each block but the first."""
        stack = as_transformer(model).get_encoder() if is_encoder_decoder(model) else model
        found = blocks(stack)
        if not found:
            raise PeftLabError(f"{type(stack).__name__} has no list of blocks; use a shallow prompt (deep=False).")
        # Start from what enters each block for those tokens. A prompt of real text then first acts like the text.
        states = None if tokens is None else states_of(model, stack, found, tokens)
        for index, block in enumerate(found[1:], 1):
            width = word_embeddings(model).embedding_dim
            start = torch.randn(self.num_virtual_tokens, width) if states is None else states[index]
            yield Placement(path_of(model, block), "prompt", DeepPrompt(start))

    def to_peft(self, model: nn.Module, hosts: Mapping[str, nn.Module]) -> dict[str, Any]:
        """Return the fields of Hugging Face's `adapter_config.json` for prompt tuning.

        A text to start from is left out: peft would ask for its tokenizer again, and the vectors are in the file.
        """
        start = "SAMPLE_VOCAB" if self.init == "vocabulary" else "RANDOM"
        deep = {"deep": True} if self.deep else {}
        return {**self.shared_fields(model), "prompt_tuning_init": start, **deep}

    @staticmethod
    def from_peft(fields: Mapping[str, Any]) -> dict[str, Any]:
        """Return the keyword arguments for this class: the reverse of `to_peft`.

        How the prompt began no longer matters.
        """
        return {
            "num_virtual_tokens": fields.get("num_virtual_tokens"),
            "init": "random",
            "deep": bool(fields.get("deep", False)),
        }


def looked_up(embeddings: nn.Embedding, tokens: Tensor) -> Tensor:
    """Return the embeddings of tokens, detached, as the model itself looks them up (some models scale them)."""
    with torch.no_grad():
        return embeddings(tokens).detach().clone()
