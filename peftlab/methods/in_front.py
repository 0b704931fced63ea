"""Put a prompt in front of a model's input: X' = [P; X]. Prompt tuning and P-tuning share this part."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peftlab.core.hooks import active_prompt, adapters_on
from peftlab.core.interface import Part, Placement
from peftlab.core.records import as_transformer
from peftlab.errors import PeftLabError
from peftlab.methods.caches import begins, given_cache, require_cache_argument
from peftlab.methods.virtual import (
    by_name,
    check_room,
    in_front,
    is_encoder_decoder,
    lengthened,
    path_of,
    pools_the_last,
    require_one_text,
    room_for,
    stored_names,
    word_embeddings,
)
from peftlab.methods.within import within

# What models read: text, sound or images
READ = ("input_ids", "input_features", "input_values", "pixel_values")


class InFront(Part):
    """Put a prompt in front of the input of a model, or of an encoder-decoder's encoder.

        X' = [P; X],    P: (n, d),  X: (t, d),  X': (n + t, d)

    The book derives it in section 4.1.

    Attributes:
        source: a module that makes the prompt. Called, it gives (rows, d), and the first n rows are used. (For an
            encoder-decoder, Hugging Face peft stores 2 n rows and uses n, and so does this part.)
    """

    on_forward = True

    def __init__(self, source: nn.Module, count: int, limit: int | None = None) -> None:
        super().__init__()
        self.source, self.count, self.limit = source, count, limit
        self.compatibility_key = f"a prompt of {count} virtual tokens"
        self.keys, self.encoder_keys = stored_names(source)

    @property
    def made(self) -> Tensor:
        """Return what the source makes, (rows, d)."""
        return self.source()

    def make_prompt(self, host: nn.Module) -> Tensor:
        """Return the prompt, (n, d)."""
        return self.source()[: self.count]

    def before(self, host: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Turn token ids (b, t) into embeddings (b, n + t, d) with the prompt in front.

        The attention mask is lengthened too. So are labels and token types, if there is one for each token.
        Caller-supplied position_ids raise an error in training, are dropped in eval, and are shifted inside
        `text_positions`.
        """
        kwargs = by_name(host, args, kwargs)
        activity = adapters_on(host).activity
        embeddings, ids = kwargs.get("inputs_embeds"), kwargs.get("input_ids")
        if embeddings is None and ids is None:
            raise PeftLabError(
                f"{type(host).__name__} was called without input_ids or inputs_embeds, and a prompt stands in front of "
                "the embeddings of tokens. Use lora, or another method that stands on layers."
            )
        tokens = kwargs["input_ids" if embeddings is None else "inputs_embeds"].shape[1]
        activity.text_begins = begins(given_cache(kwargs), tokens, kwargs.get("attention_mask"), self.count)
        given = kwargs.get("position_ids")
        if given is not None and host.training:
            raise PeftLabError(
                "position_ids were given, but a prompt takes the first positions. Leave them out; packed sequences "
                "cannot be trained under a prompt."
            )
        if not activity.text_positions:
            given = None
        kwargs = {name: value for name, value in kwargs.items() if name not in ("position_ids", "cache_position")}
        if given is not None:
            kwargs["position_ids"] = given + self.count
        mask = kwargs["attention_mask"] = lengthened(kwargs.get("attention_mask"), self.count)
        if not activity.text_begins:  # the cache holds the prompt, and these tokens follow
            return (), kwargs
        if embeddings is None:
            embeddings = word_embeddings(host)(ids)
        kwargs.pop("input_ids", None)
        batch, length = embeddings.shape[:2]
        check_room(length, self.count, self.limit)
        if pools_the_last(host) and mask is not None:
            # Such a host cannot find padding among embeddings, so it reads the last column. Move the text to end there.
            order = kwargs["attention_mask"][:, self.count :].bool().long().argsort(dim=1, stable=True)
            embeddings = embeddings.gather(1, order[..., None].expand_as(embeddings))
            kwargs["attention_mask"] = torch.cat([mask[:, : self.count], mask[:, self.count :].gather(1, order)], 1)
            kwargs["position_ids"] = self.count + order
        if kwargs.get("position_ids") is not None:
            virtual = torch.arange(self.count, device=embeddings.device).expand(batch, -1)
            kwargs["position_ids"] = torch.cat([virtual, kwargs["position_ids"].expand(batch, -1)], 1)
        # X' = [P; X]. P is repeated for the rows before it is cast,
        # so that the rows' gradients are summed in P's own dtype.
        kwargs["inputs_embeds"] = in_front(active_prompt(host, batch), embeddings)
        for name, fill in (("labels", -100), ("token_type_ids", 0)):
            value = kwargs.get(name)
            # labels for whole examples (one each, or a vector of scores) stay as they are
            if value is not None and value.shape == (batch, length) and not value.is_floating_point():
                kwargs[name] = torch.cat([value.new_full((batch, self.count), fill), value], dim=1)
        return (), kwargs


class LongerMemory(Part):
    """Lengthen the mask of the encoder's output, on a decoder whose encoder reads a prompt."""

    on_forward = True

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count, self.compatibility_key = count, f"a prompt of {count} virtual tokens"

    def before(self, host: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Lengthen `encoder_attention_mask` (b, t) to the length of the encoder's states."""
        kwargs = by_name(host, args, kwargs)
        mask, states = kwargs.get("encoder_attention_mask"), kwargs.get("encoder_hidden_states")
        if mask is not None and states is not None and mask.shape[-1] == states.shape[1] - self.count:
            kwargs["encoder_attention_mask"] = lengthened(mask, self.count)
        return (), kwargs


def require_vectors(model: nn.Module, host: nn.Module) -> None:
    """Refuse a model, or an encoder, that reads its input alone and no vectors in the place of words."""
    taken: Mapping[str, inspect.Parameter] = inspect.signature(type(host).forward).parameters
    if any(one.kind is one.VAR_KEYWORD for one in taken.values()):  # it hands what it does not know to its body
        body: Any = getattr(host, "base_model", host)
        taken = {**taken, **inspect.signature(type(body).forward).parameters}
    if "inputs_embeds" not in taken and any(name in taken for name in READ):
        raise PeftLabError(
            f"{type(model).__name__} takes no vectors in the place of words, so it has no prompt. Use lora or ia3."
        )


def prompt_parts(model: nn.Module, source: nn.Module, count: int) -> Iterator[Placement]:
    """Yield the parts of a prompt: one on the model; or, for an encoder-decoder, one on each half."""
    require_one_text(model, "prompt")
    if not is_encoder_decoder(model):
        require_vectors(model, model)
        require_cache_argument(model)
        front = InFront(source, count, room_for(model, count))
        yield Placement("", "prompt", front)
        yield from within(model, "", model, "prompt", front.compatibility_key)
        return
    encoder, decoder = as_transformer(model).get_encoder(), as_transformer(model).get_decoder()
    require_vectors(model, encoder)
    front, path = InFront(source, count, room_for(encoder, count)), path_of(model, encoder)
    yield Placement(path, "prompt", front)
    yield Placement(path_of(model, decoder), "prompt", LongerMemory(count))
    yield from within(model, path, encoder, "prompt", front.compatibility_key)
