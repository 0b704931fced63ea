"""What each method adds to a model and what it unfreezes, tensor by tensor.

A method is one function from a shape and its options to the tensors it brings; the catalogue's row names it. Counts and
bytes are sums over these tensors. Names, sizes and defaults are Hugging Face peft's, and the papers' for the bottleneck
adapters and BitFit, which peft has not. An encoder's classification head is not listed: it trains beside every adapter.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from peftlab.catalogue import METHODS, resolve
from peftlab.errors import PeftLabError, did_you_mean
from peftlab.memory.counting.families import FAMILIES, Module
from peftlab.memory.counting.options import Added, Options, Trained
from peftlab.memory.counting.shapes import Shape


def method_name(method: str) -> str:
    """A method's name in the catalogue, whatever its case.

    Raises:
        PeftLabError: a method that is not there or that is not counted, with near matches.
    """
    name, known = str(method).lower(), [name for name, row in METHODS.items() if row.tensors]
    if name not in known:
        raise PeftLabError(f"Unknown method {method!r}.{did_you_mean(name, known)} Known: {', '.join(known)}.")
    return name


def trained_by(method: str, shape: Shape, options: Options) -> Trained:
    """What a method of the catalogue trains on a shape. Without a rank in `options`, that of its row is taken."""
    row = METHODS[method]
    if options.r is None:
        options = replace(options, r=row.default("r"))
    assert row.tensors is not None  # `known_method` has refused the others
    return resolve(row.tensors)(shape, options)


def full(shape: Shape, options: Options) -> Trained:
    """Full fine-tuning: every parameter trains and none is added. A tied weight is listed once."""
    weights = tuple((module, "weight") for module in shape.modules if not module.tied)
    return Trained(own=weights + _biases(shape.modules), whole=True)


def lora(shape: Shape, options: Options) -> Trained:
    """LoRA (Hu et al. 2021, section 4.1): r (d_in + d_out) a module. QLoRA trains the same on a 4-bit base."""
    return _low_rank(shape, options, "lora", _pair)


def dora(shape: Shape, options: Options) -> Trained:
    """DoRA (Liu et al. 2024, section 4.1): LoRA and a magnitude for each output, r (d_in + d_out) + d_out a module."""
    return _low_rank(
        shape, options, "dora", lambda m, r: [*_pair(m, r), Added(m.path, "lora_magnitude_vector", (m.outputs,))]
    )


def adalora(shape: Shape, options: Options) -> Trained:
    """AdaLoRA (Zhang et al. 2023, section 3.1): P diag(E) Q, r (d_in + d_out + 1) a module, at the rank it starts with.

    peft also keeps the current rank of each module as a parameter that does not train; its totals include it.
    """

    def tensors(m: Module, r: int) -> list[Added]:
        return [*_pair(m, r), Added(m.path, "lora_E", (r, 1)), Added(m.path, "ranknum", (1,), trains=False)]

    return _low_rank(shape, options, "adalora", tensors)


def vera(shape: Shape, options: Options) -> Trained:
    """VeRA (Kopiczko et al. 2024, section 3.1): two vectors, d_out + r a module, around one random pair for all.

    The pair is as large as the largest adapted module asks, is frozen, and is a buffer in peft: not counted.
    """

    def vectors(m: Module, r: int) -> list[Added]:
        return [Added(m.path, "vera_lambda_b", (m.outputs,)), Added(m.path, "vera_lambda_d", (r,))]

    found = _low_rank(shape, options, "vera", vectors)
    a = Added("", "vera_A", (rank_of(options), max(m.inputs for m in found.adapted)), buffer=True)
    b = Added("", "vera_B", (max(m.outputs for m in found.adapted), rank_of(options)), buffer=True)
    return replace(found, added=(a, b, *found.added))


def ia3(shape: Shape, options: Options) -> Trained:
    """IA3 (Liu et al. 2022, section 3.3): a scale for each output of a module, for each input of a feed-forward one.

    The default targets are the paper's: keys, values, and what enters the last layer of the feed-forward. They are also
    peft's, but for Gemma and Qwen, where peft names the queries in the place of the keys. For BERT and RoBERTa
    ``output.dense`` is the attention's too. XLM-RoBERTa and CamemBERT, which peft lacks, are as RoBERTa.
    """
    if options.bias != "none":
        raise PeftLabError(f"ia3 trains no biases; found bias={options.bias!r}. Leave it out, or use lora or bitfit.")
    family, targets = FAMILIES[shape.family], options.targets
    if targets is None:  # as in peft, a default that this model has not (mT5 without a gate) is left out
        targets = tuple(name for name in family.ia3 if any(m.path.endswith(f".{name}") for m in shape.modules))
    adapted = _linear(shape, targets, "ia3")
    # the end of the string, as in peft, and not the end of the path
    sizes = [(1, m.inputs) if m.path.endswith(family.ia3_inputs) else (m.outputs, 1) for m in adapted]
    added = (Added(m.path, "ia3_l", size) for m, size in zip(adapted, sizes, strict=True))
    return Trained(tuple(added), adapted=adapted)


def bitfit(shape: Shape, options: Options) -> Trained:
    """BitFit (Ben Zaken et al. 2022, section 3): every bias of the body, those of the norms too. Nothing is added."""
    own = _biases(_body(shape))
    if not own:
        raise PeftLabError(
            f"{shape.name} has no biases, so bitfit has nothing to train. Use ia3, which trains about as few "
            "parameters, or lora with a small r; or a model with biases, such as bert-base or gpt2."
        )
    return Trained(own=own, adapted=tuple(module for module, _ in own))


def prompt(shape: Shape, options: Options) -> Trained:
    """Prompt tuning (Lester et al. 2021, section 2): n vectors, n d; for T5 2 n, of which peft gives the decoder n."""
    return Trained((Added("", "embedding.weight", (_prompt_rows(shape, options), _hidden(shape))),))


def p_tuning(shape: Shape, options: Options) -> Trained:
    """P-tuning (Liu et al. 2021, "GPT Understands, Too", section 3): a prompt, and the encoder that makes it.

    peft's MLP is Linear(d, h), Linear(h, h), Linear(h, d), with h = d by default: 3 (d^2 + d) beside the prompt's n d.
    Its LSTM runs both ways, h wide, before Linear(2h, 2h), Linear(2h, d). A saved adapter holds the made prompt alone.
    """
    d = _hidden(shape)
    h = options.encoder_hidden or d
    head = [("mlp_head.0", d, h), ("mlp_head.2", h, h), ("mlp_head.4", h, d)]
    made = Added("", "embedding.weight", (_prompt_rows(shape, options), d))  # as large as the prompt itself
    added = [made]
    if options.encoder == "lstm":
        for i in range(options.encoder_layers):
            for way in (f"l{i}", f"l{i}_reverse"):
                # four gates of width h; a layer after the first reads both directions of the one before
                for kind, inputs in (("ih", 2 * h if i else d), ("hh", h)):
                    added.append(Added("", f"lstm_head.weight_{kind}_{way}", (4 * h, inputs)))
                    added.append(Added("", f"lstm_head.bias_{kind}_{way}", (4 * h,)))
        head = [("mlp_head.0", 2 * h, 2 * h), ("mlp_head.2", 2 * h, d)]
    return Trained((*added, *_dense("", head)), saved=made.elements)


def prefix(shape: Shape, options: Options) -> Trained:
    """Prefix tuning (Li and Liang 2021, section 4.2): a key and a value for each of n tokens and L layers, n 2 L k.

    k is the width of the keys, so under grouped-query attention that of the key/value heads. With ``projection``
    (section 4.3) n k parameters go through Linear(k, h), Linear(h, 2 L k), with h = k by default; only the result is
    saved. For T5 peft gives a prefix to the decoder's self-attention alone, yet takes the encoder's depth for L and
    d_model for k. Where the decoder's depth or the attention's width is another, it builds this but cannot run it.
    """
    n, depth = options.virtual_tokens, len([b for b in _blocks(shape) if not b.startswith("decoder.")])
    k = next((m.outputs for m in shape.modules if m.path.endswith(".self_attn.k_proj")), _hidden(shape))
    if not options.projection:
        return Trained((Added("", "embedding.weight", (n, 2 * depth * k)),))
    h = options.encoder_hidden or k
    dense = _dense("", [("transform.0", k, h), ("transform.2", h, 2 * depth * k)])
    return Trained((Added("", "embedding.weight", (n, k)), *dense), saved=n * 2 * depth * k)


def houlsby(shape: Shape, options: Options) -> Trained:
    """Houlsby et al. 2019, section 2.1: adapters after attention and after the feed-forward, 2 (2 d m + m + d) a block.

    m = d / reduction factor, rounded down. No layer norms of their own; none after a T5 decoder's cross-attention.
    """
    return _bottlenecks(shape, options, FAMILIES[shape.family].outputs)


def pfeiffer(shape: Shape, options: Options) -> Trained:
    """One adapter a block, after the feed-forward (Pfeiffer et al. 2021, AdapterFusion): 2 d m + m + d."""
    return _bottlenecks(shape, options, FAMILIES[shape.family].outputs[1:])


def parallel(shape: Shape, options: Options) -> Trained:
    """One adapter a block, beside the feed-forward (He et al. 2022, section 3.3): the size of Pfeiffer's.

    It reads what the feed-forward reads; the path is that of the projection to whose output it adds.
    """
    return _bottlenecks(shape, options, FAMILIES[shape.family].outputs[1:])


def _low_rank(
    shape: Shape, options: Options, method: str, tensors: Callable[[Module, int], Iterable[Added]]
) -> Trained:
    """A member of the LoRA family: its tensors on every target, and the biases that ``bias`` unfreezes.

    ``bias="lora_only"`` unfreezes the biases of the adapted modules, ``bias="all"`` every bias of the model outside a
    classification head, which trains anyway. peft adapts embeddings with LoRA and DoRA alone.
    """
    adapted = shape.match(options.targets) if method in ("lora", "dora") else _linear(shape, options.targets, method)
    unfrozen = {"none": (), "lora_only": adapted, "all": _body(shape)}
    added = tuple(tensor for module in adapted for tensor in tensors(module, rank_of(options)))
    return Trained(added, _biases(unfrozen[options.bias]), adapted)


def rank_of(options: Options) -> int:
    """Return the rank, which `trained_by` has filled in where none was given."""
    assert options.r is not None
    return options.r


def _pair(m: Module, r: int) -> list[Added]:
    """A is (r, d_in) and B is (d_out, r); an embedding counts its rows as d_in."""
    name = "lora_embedding_" if m.kind == "embedding" else "lora_"
    return [Added(m.path, name + "A", (r, m.inputs)), Added(m.path, name + "B", (m.outputs, r))]


def _linear(shape: Shape, targets: str | Iterable[str] | None, method: str) -> tuple[Module, ...]:
    """The targets of a method that peft refuses to put on an embedding."""
    adapted = shape.match(targets)
    for module in adapted:
        if module.kind == "embedding":
            raise PeftLabError(
                f"{method} adapts linear layers only; target {module.path} of {shape.name} is an embedding. "
                "Name linear layers, or use lora or dora."
            )
    return adapted


def _biases(modules: Iterable[Module]) -> tuple[tuple[Module, str], ...]:
    return tuple((module, "bias") for module in modules if module.bias)


def _body(shape: Shape) -> list[Module]:
    return [module for module in shape.modules if module.role != "head"]


def _hidden(shape: Shape) -> int:
    """The width of the word embedding, the first row of every table."""
    return shape.modules[0].outputs


def _prompt_rows(shape: Shape, options: Options) -> int:
    return options.virtual_tokens * (2 if shape.kind == "encoder-decoder" else 1)


def _blocks(shape: Shape) -> dict[str, list[Module]]:
    """The transformer blocks by path (``model.layers.0``, ``decoder.block.3``), each with its modules."""
    blocks: dict[str, list[Module]] = {}
    for module in shape.modules:
        if module.layer is not None:
            parts = module.path.split(".")
            # the first number of a path is its block's
            blocks.setdefault(".".join(parts[: parts.index(str(module.layer)) + 1]), []).append(module)
    return blocks


def _dense(path: str, layers: Iterable[tuple[str, int, int]]) -> Iterator[Added]:
    """Linear layers with biases, from (name, inputs, outputs)."""
    for name, inputs, outputs in layers:
        yield Added(path, f"{name}.weight", (outputs, inputs))
        yield Added(path, f"{name}.bias", (outputs,))


def _bottlenecks(shape: Shape, options: Options, places: Iterable[str]) -> Trained:
    """In every block an adapter at each of ``places``: d -> m -> d with biases, 2 d m + m + d."""
    # the whole rest of the path, since in BERT "output.dense" also ends the attention's "attention.output.dense"
    place = re.compile("|".join(places))
    blocks = _blocks(shape).items()
    adapted = [module for path, block in blocks for module in block if place.fullmatch(module.path[len(path) + 1 :])]
    added: list[Added] = []
    for module in adapted:
        d = module.outputs
        m = max(1, d // options.reduction_factor)
        added += _dense(module.path, [("down", d, m), ("up", m, d)])
    return Trained(tuple(added), adapted=tuple(adapted))
