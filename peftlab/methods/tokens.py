"""Train some rows of an embedding, and of a head that shares its weight, beside an adapter.

    W'[t] = rows[i] for the i-th trained token t, and W'[t] = W[t] for all others,    W: (vocabulary, width)

So a new token is learned without training, or saving, the whole embedding. The part holds the whole rows, not their
change: it does not matter from what values the rows of a lengthened vocabulary start where the adapter is loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftlab.checks import shown, whole
from peftlab.core.embeddings import looked_up, scaled, word_embeddings
from peftlab.core.hooks import base_modules
from peftlab.core.interface import Part, Placement
from peftlab.core.records import own_tensor, tensor_at
from peftlab.core.targets import check_called, heads, no_match_error
from peftlab.errors import PeftLabError
from peftlab.methods.parts import first_input, widened
from peftlab.quantization.weights import is_quantized

Tokens = tuple[int, ...]


class TrainedRows(Part):
    """Replace rows of an embedding, or of a linear head, by trained ones.

    One part may stand on an embedding and on the heads that are tied to it.

    Attributes:
        rows: (tokens, width), at the start the base's own.
    """

    def __init__(self, host: nn.Module, tokens: Tokens, key: str) -> None:
        super().__init__()
        self.keys = {"rows": key}
        self.rows = nn.Parameter(torch.empty(len(tokens), own_tensor(host, "weight").shape[1]))
        known, order = torch.tensor(tokens).sort()
        self.register_buffer("tokens", torch.tensor(tokens), persistent=False)
        self.register_buffer("known", known, persistent=False)
        self.register_buffer("order", order, persistent=False)

    def settle(self, host: nn.Module) -> None:
        """Start from the base's own rows."""
        weight = own_tensor(host, "weight")
        self.rows.copy_(weight[self.buffer("tokens").to(weight.device)])

    def buffer(self, name: str) -> Tensor:
        """Return a buffer as the tensor that it is."""
        value = getattr(self, name)
        assert isinstance(value, Tensor)
        return value

    def after(self, host: nn.Module, args: tuple, kwargs: dict, output: Tensor, base: Tensor) -> Tensor:
        """Replace what the trained rows give. An embedding's output: (..., width); a head's: (..., vocabulary)."""
        weight = own_tensor(host, "weight")
        rows, tokens = self.rows.to(weight.dtype), self.buffer("tokens")
        if not isinstance(host, nn.Embedding):
            return HeadWithRows.apply(first_input(args, kwargs), weight, rows, tokens, tensor_at(host, "bias"), output)
        x, scale = looked_up(host, args, kwargs)
        known = self.buffer("known")
        place = torch.searchsorted(known, x).clamp(max=len(known) - 1)
        # y = rows[i] where the token is one of these. Gemma scales what it looks up, so this is scaled too.
        found = scaled(F.embedding(self.buffer("order")[place], rows, self.padding(host)), scale)
        return torch.where((known[place] == x)[..., None], found.to(output.dtype), output)

    def padding(self, host: nn.Embedding) -> int | None:
        """Return which of the rows is the padding token's, which torch gives no gradient."""
        tokens = self.buffer("tokens").tolist()
        return tokens.index(host.padding_idx) if host.padding_idx in tokens else None

    def merged(self, host: nn.Module) -> dict[str, Tensor]:
        """Return the host's weight with the trained rows in it."""
        weight = widened(own_tensor(host, "weight"))
        return {"weight": weight.index_copy(0, self.buffer("tokens"), widened(self.rows))}


class HeadWithRows(torch.autograd.Function):
    """Compute y = W' x + b from the head's own y: only the columns of the trained rows are computed anew.

    The gradient of x comes from one product with W', so that it is rounded once, as in Hugging Face peft.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, rows: Tensor, tokens: Tensor, bias: Any, output: Tensor) -> Tensor:
        """Return y: (..., vocabulary). x: (..., width), weight: (vocabulary, width), rows: (tokens, width)."""
        # y[t] = rows[i] x + b[t]
        columns = F.linear(x, rows, None if bias is None else bias[tokens])
        ctx.save_for_backward(x, weight, rows, tokens)
        ctx.dtype = columns.dtype  # under autocast another one than the weight's
        return output.index_copy(-1, tokens, columns.to(output.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        """Return the gradients of x and of the rows: dx = W'^T dy, drows = dy[t] x^T."""
        x, weight, rows, tokens = ctx.saved_tensors
        dy = gradients[0].to(ctx.dtype)
        dx = drows = None
        if ctx.needs_input_grad[0]:
            dx = (dy @ weight.index_copy(0, tokens, rows).to(ctx.dtype)).to(x.dtype)
        if ctx.needs_input_grad[2]:
            drows = (dy[..., tokens].flatten(0, -2).T @ x.to(ctx.dtype).flatten(0, -2)).to(rows.dtype)
        return dx, None, drows, None, None, None


def trained_rows(model: nn.Module, config: Any, targets: Iterable[str]) -> Iterator[Placement]:
    """Yield the part that `trainable_tokens` asks for, on each module that it names, and on what is tied to it.

    Modules that share the weight of the word embeddings share the part, as in Hugging Face peft, unless they are named
    too and given other tokens.

    Raises:
        PeftLabError: a name matches no embedding or head, a token lies outside the vocabulary, or a module is trained
            otherwise as well.
    """
    named = by_path(model, config.trainable_tokens)
    modules, copied, adapted = base_modules(model), heads(model, config), set(targets)
    words = word_embeddings(model)
    tied = [path for path, module in modules.items() if words and getattr(module, "weight", None) is words[1].weight]
    together = words is not None and words[0] in named
    together = together and len({named[path] for path in tied if path in named}) == 1
    for path, tokens in named.items():
        shared = tied if together and path in tied else [path]
        if path != next(one for one in named if one in shared):
            continue  # it shares the part of one that was named before
        for one in shared:
            check_host(model, one, modules[one], tokens)
            if one in adapted or any(one == other or one.startswith(other + ".") for other in copied):
                field = "target_modules" if one in adapted else "modules_to_save"
                raise PeftLabError(
                    f"{one} is in {field} and its rows are in trainable_tokens; train it in one of the two ways, and "
                    "leave it out of the other."
                )
        owner = words[0] if words and words[0] in shared else path
        part = TrainedRows(modules[path], tokens, "{root}" + f"{owner}.token_adapter.trainable_tokens_delta")
        yield from (Placement(one, "rows", part) for one in shared)


def by_path(model: nn.Module, given: Tokens | Mapping[str, Tokens] | None) -> dict[str, Tokens]:
    """Return {path of an embedding or head: its tokens}, for what a config gives in either form."""
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        words = word_embeddings(model)
        if words is None:
            raise PeftLabError(
                f"trainable_tokens names tokens, and {type(model).__name__} does not say which module embeds them. "
                'Name it: trainable_tokens={"embed_tokens": [...]}.'
            )
        return {words[0]: given}
    modules = {path: module for path, module in base_modules(model).items() if path}
    found: dict[str, Tokens] = {}
    for name, tokens in given.items():
        matched = [path for path in modules if path.endswith(name)]
        if not matched:
            raise no_match_error(name, modules, f"trainable_tokens names {name!r}, which matches no module")
        for path in matched:
            if found.setdefault(path, tokens) != tokens:
                raise PeftLabError(f"trainable_tokens names {path} twice, with different tokens; name it once.")
    return found


def check_host(model: nn.Module, path: str, host: nn.Module, tokens: Tokens) -> None:
    """Refuse a module without rows for these tokens."""
    check_called(model, path)
    weight = host._parameters.get("weight")
    if not isinstance(host, (nn.Embedding, nn.Linear)) or weight is None or is_quantized(weight):
        raise PeftLabError(
            f"trainable_tokens names {path}, a {type(host).__name__}; rows train only in an Embedding or Linear layer "
            "in full precision."
        )
    if isinstance(host, nn.Embedding) and (host.max_norm is not None or host.scale_grad_by_freq or host.sparse):
        raise PeftLabError(
            f"trainable_tokens names {path}, an embedding with max_norm, scale_grad_by_freq or sparse; rows of it "
            "cannot train apart from the others."
        )
    outside = [token for token in tokens if token >= len(weight)]
    if outside:
        raise PeftLabError(
            f"trainable_tokens names {outside[0]}, and {path} has {len(weight)} rows, 0 to {len(weight) - 1}. For a "
            "new token, lengthen the vocabulary first: pl.add_tokens(model, tokenizer, [...])."
        )


def check_tokens(config: Any) -> None:
    """Bring `trainable_tokens` to one form: a tuple of whole numbers, a table of such tuples, or None."""
    given = config.trainable_tokens
    if isinstance(given, Mapping):
        wrong = [name for name in given if not isinstance(name, str) or not name]
        if wrong:
            raise PeftLabError(f"trainable_tokens names {wrong[0]!r}; its keys are names of modules, as strings.")
        value: Any = {name: _numbers(f"trainable_tokens[{name!r}]", tokens) for name, tokens in given.items()} or None
    else:
        value = None if given is None else _numbers("trainable_tokens", given)
    object.__setattr__(config, "trainable_tokens", value)


def _numbers(name: str, given: Any) -> Tokens:
    if isinstance(given, (str, bytes)) or not isinstance(given, Iterable):
        raise PeftLabError(f"{name} is {shown(given)}; give a list of token ids, such as [49152, 49153].")
    listed = sorted(given) if isinstance(given, (set, frozenset)) else list(given)
    tokens = tuple(whole(f"a token in {name}", token, least=0) for token in listed)
    if not tokens:
        raise PeftLabError(f"{name} is empty; leave it out, or give the ids of the tokens to train.")
    if len(set(tokens)) < len(tokens):
        twice = next(token for token in tokens if tokens.count(token) > 1)
        raise PeftLabError(f"{name} holds {twice} twice; name each token once.")
    return tokens
