"""What each method adds to a model and what it unfreezes, tensor by tensor.

Each method has one function from a shape and options to its tensors; its row in the catalogue names the function.
Counts and bytes are sums over these tensors. Names, sizes and defaults are those of Hugging Face peft. peft does not
have bottleneck adapters and BitFit, so for these they are the papers'. An encoder's classification head is not listed,
because it trains beside every adapter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, replace
from functools import lru_cache

from peftlab import default_targets
from peftlab.catalogue import METHODS, resolve
from peftlab.checks import one_of
from peftlab.errors import PeftLabError, did_you_mean
from peftlab.memory.counting.families import FAMILIES, class_end
from peftlab.memory.counting.modules import Module
from peftlab.memory.counting.options import Added, Options, Trained
from peftlab.memory.counting.shapes import Shape

# Options that belong to another one: the networks that make a prompt (P-tuning) or a prefix have a width and layers.
TOGETHER = {"encoder_hidden": ("encoder", "projection"), "encoder_layers": ("encoder",)}


def method_name(method: str) -> str:
    """Return a method's name in the catalogue, whatever its case.

    Raises:
        PeftLabError: a method that does not exist or cannot be counted (with near matches).
    """
    name, known = str(method).lower(), [name for name, row in METHODS.items() if row.tensors]
    if name not in known:
        raise PeftLabError(f"Unknown method {method!r}.{did_you_mean(name, known)} Known: {', '.join(known)}.")
    return name


def check_options(method: str, options: Options) -> None:
    """Refuse an option that was given and that the method does not take, and a start that it does not know.

    Raises:
        PeftLabError: it says what the method takes, and which methods take the option.
    """
    row, known = METHODS[method], [name for name, other in METHODS.items() if other.tensors]
    for one in fields(options):
        value, names = getattr(options, one.name), TOGETHER.get(one.name, (one.name,))
        if value == one.default or any(row.takes(name) for name in names):
            continue
        own = ", ".join(n for other in fields(options) if row.takes(n := other.name)) or "none"
        others = ", ".join(name for name in known if any(METHODS[name].takes(n) for n in names))
        raise PeftLabError(
            f"{one.name}={value!r} is no option of {method}, so it would change nothing; leave it out. Options of "
            f"{method}: {own}. Methods with {one.name}: {others}."
        )
    numbered = options.from_weight and "pissa" in row.starts  # the number in pissa_niter_4 may be another
    if options.init is not None and not numbered:
        one_of("init", options.init, row.starts)


def trained_by(method: str, shape: Shape, options: Options) -> Trained:
    """Return what a method trains on a shape. If `options` has no rank, the row's default is taken."""
    row = METHODS[method]
    if options.r is None:
        options = replace(options, r=row.default("r"))
    assert row.tensors is not None  # `known_method` has refused the others
    return resolve(row.tensors)(shape, options)


def full(shape: Shape, options: Options) -> Trained:
    """List the tensors of full fine-tuning: all parameters train, none is added. A tied weight is listed once.

    Weights that transformers itself freezes, such as the sines of Whisper's positions, do not train.
    """
    weights = tuple((module, "weight") for module in shape.modules if not module.tied and not module.frozen)
    return Trained(own=weights + _biases(shape.modules), whole=True)


def lora(shape: Shape, options: Options) -> Trained:
    """List LoRA's (Hu et al. 2021, section 4.1): r (d_in + d_out) per module. QLoRA has the same on a 4-bit base.

    A start from the weight (PiSSA, OLoRA) is kept beside A and B, and saved with them; peft takes it out of the weight.
    """
    found = _low_rank(shape, options, "lora", _pair)
    if not options.from_weight:
        return found
    other = next((module.path for module in found.adapted if module.kind not in ("linear", "conv1d")), None)
    if other is not None:
        raise PeftLabError(f"init={options.init!r} starts linear layers, and {other} of {shape.name} is none.")
    starts = tuple(Added(a.path, a.name.replace("lora", "start"), a.size, buffer=True) for a in found.added)
    return replace(found, added=(*found.added, *starts), saved=2 * sum(a.elements for a in found.added))


def dora(shape: Shape, options: Options) -> Trained:
    """List DoRA's (Liu et al. 2024, section 4.1): LoRA's and a magnitude, r (d_in + d_out) + d_out per module."""
    return _low_rank(
        shape, options, "dora", lambda m, r: [*_pair(m, r), Added(m.path, "lora_magnitude_vector", (m.outputs,))]
    )


def adalora(shape: Shape, options: Options) -> Trained:
    """List AdaLoRA's (Zhang et al. 2023, section 3.1): P diag(E) Q, r (d_in + d_out + 1) per module, at its first rank.

    peft also stores each module's current rank as a parameter that does not train. Its totals include it.
    """

    def tensors(m: Module, r: int) -> list[Added]:
        return [*_pair(m, r), Added(m.path, "lora_E", (r, 1)), Added(m.path, "ranknum", (1,), trains=False)]

    return _low_rank(shape, options, "adalora", tensors)


def vera(shape: Shape, options: Options) -> Trained:
    """List VeRA's (Kopiczko et al. 2024, section 3.1): two vectors per module, d_out + r, and one random pair for all.

    The pair is large enough for the largest adapted module. It is frozen, and a buffer in peft, so it is not counted.
    """

    def vectors(m: Module, r: int) -> list[Added]:
        return [Added(m.path, "vera_lambda_b", (m.outputs,)), Added(m.path, "vera_lambda_d", (r,))]

    found = _low_rank(shape, options, "vera", vectors)
    a = Added("", "vera_A", (rank_of(options), max(m.inputs for m in found.adapted)), buffer=True)
    b = Added("", "vera_B", (max(m.outputs for m in found.adapted), rank_of(options)), buffer=True)
    return replace(found, added=(a, b, *found.added))


def loha(shape: Shape, options: Options) -> Trained:
    """List LoHa's (Hyeon-Woo et al. 2021, section 2.2): two pairs of thin matrices, 2 r (d_in + d_out) per module."""

    def pairs(m: Module, r: int) -> list[Added]:
        sizes = {"a": (m.outputs, r), "b": (r, m.inputs)}
        return [Added(m.path, f"hada_w{i}_{side}", size) for i in (1, 2) for side, size in sizes.items()]

    adapted = plain_targets(shape, options.targets, "loha")
    return Trained(tuple(tensor for m in adapted for tensor in pairs(m, rank_of(options))), adapted=adapted)


def lokr(shape: Shape, options: Options) -> Trained:
    """List LoKr's (Yeh et al. 2023, section 3.3): C, (a, c), and D, (b, d), with out = a b and in = c d.

    D has two thin factors, r (b + d), unless r is at least half of its larger side. (`decompose_both` splits C, too,
    and is not counted here.)
    """

    def factors(m: Module, r: int) -> list[Added]:
        a, b = _two_factors(m.outputs, options.decompose_factor)
        c, d = _two_factors(m.inputs, options.decompose_factor)
        second = {"lokr_w2": (b, d)} if r >= max(b, d) / 2 else {"lokr_w2_a": (b, r), "lokr_w2_b": (r, d)}
        return [Added(m.path, name, size) for name, size in {"lokr_w1": (a, c), **second}.items()]

    adapted = plain_targets(shape, options.targets, "lokr")
    return Trained(tuple(tensor for m in adapted for tensor in factors(m, rank_of(options))), adapted=adapted)


def _two_factors(size: int, most: int) -> tuple[int, int]:
    """Return the two numbers into which LoKr splits a side: `factors` of `peftlab/methods/lokr.py`, without torch."""
    if most > 0 and size % most == 0:
        return most, size // most
    limit = math.isqrt(size) if most == -1 else min(most, math.isqrt(size))
    first = next((n for n in range(limit, 0, -1) if size % n == 0), 1)
    return first, size // first


def oft(shape: Shape, options: Options) -> Trained:
    """List OFT's (Qiu et al. 2023, section 3): d_in / n rotations per module, each of n (n - 1) / 2 numbers.

    n is the divisor of d_in that is nearest to `oft_block_size`. A rotation of an embedding turns its width.
    """
    adapted, wanted = shape.match(options.targets), options.oft_block_size or 32
    refuse_conv1d(shape, options.targets, "oft", adapted)
    added = []
    for m in adapted:
        width = m.outputs if m.kind == "embedding" else m.inputs
        n = _nearest_divisor(width, wanted)
        name = "oft_embedding_R" if m.kind == "embedding" else "oft_R"
        added.append(Added(m.path, name, (width // n, n * (n - 1) // 2)))
    return Trained(tuple(added), adapted=adapted)


@lru_cache
def _nearest_divisor(size: int, wanted: int) -> int:
    """Return the divisor nearest to a number: `nearest_divisor` of `peftlab/methods/oft.py`, without torch."""
    small = [n for n in range(1, math.isqrt(size) + 1) if size % n == 0]
    return min((*small, *(size // n for n in small)), key=lambda n: (abs(n - wanted), n))


def ia3(shape: Shape, options: Options) -> Trained:
    """List IA3's (Liu et al. 2022, section 3.3): a scale per output of a module, or per input of a feed-forward layer.

    The default targets are the paper's: keys, values, and the input of the last layer of the feed-forward. See
    `default_targets.IA3`. In BERT and RoBERTa `output.dense` also matches the attention's layer of that name.
    """
    known = default_targets.ia3(shape.paths, shape.family)
    if known is None and options.targets is None:
        raise default_targets.ia3_unknown(shape.linear_names(), shape.name, "targets")
    names, inputs = known or ((), ())
    # as in peft, a default that this model does not have (mT5 without a gate) is left out
    adapted = linear_targets(shape, options.targets, "ia3", names)
    # compare the end of the string, as peft does, not whole names of the path
    sizes = [(1, m.inputs) if m.path.endswith(inputs) else (m.outputs, 1) for m in adapted]
    added = (Added(m.path, "ia3_l", size) for m, size in zip(adapted, sizes, strict=True))
    return Trained(tuple(added), adapted=adapted)


def bitfit(shape: Shape, options: Options) -> Trained:
    """List BitFit's (Ben Zaken et al. 2022, section 3): every bias of the body, with those of norms. Adds nothing.

    With targets it lists the biases of these modules alone.
    """
    named = () if options.targets is None else shape.match(options.targets, norms=True)
    other = next((module.path for module in named if not module.bias), None)
    if other is not None:
        raise PeftLabError(
            f"{other} of {shape.name} has no bias, so bitfit has nothing to train there. Name modules that have one, "
            "leave targets out for every bias of the model, or use ia3 or lora."
        )
    own = _biases(named or [module for module in _body(shape) if not module.uncalled])
    past = next((module.path for module, _ in own if module.kind in ("bias", "router")), None)
    if past is not None:
        raise PeftLabError(
            f"{past}.bias of {shape.name} is not simply added to what that module returns, so it cannot be trained "
            "beside it. Name the modules whose biases train in targets, or use ia3 or lora."
        )
    if not own:
        raise PeftLabError(
            f"{shape.name} has no biases, so bitfit has nothing to train. Use ia3, which trains about as few "
            "parameters, or lora with a small r; or a model with biases, such as bert-base or gpt2."
        )
    return Trained(own=own, adapted=tuple(module for module, _ in own))


def prompt(shape: Shape, options: Options) -> Trained:
    """List prompt tuning's (Lester et al. 2021, section 2): n vectors of width d. For T5 peft makes 2 n of them.

    d is the width of the word embedding. Where the model is wider (ALBERT, small ELECTRAs), peft must be told so by
    `token_dim`; its default is the model's width, which does not fit.
    """
    _can_have(shape, "prompt", FAMILIES[shape.family].prompts, "takes no vectors in the place of words")
    return Trained((Added("", "embedding.weight", (_prompt_rows(shape, options), _hidden(shape))),))


def p_tuning(shape: Shape, options: Options) -> Trained:
    """List P-tuning's (Liu et al. 2021, "GPT Understands, Too", section 3): a prompt and the encoder that makes it.

    peft's MLP is Linear(d, h), Linear(h, h), Linear(h, d), with h = d by default: 3 (d^2 + d), and n d for the prompt.
    Its LSTM is h wide and bidirectional; Linear(2h, 2h) and Linear(2h, d) follow. A saved adapter holds only the
    finished prompt.
    """
    _can_have(shape, "prompt", FAMILIES[shape.family].prompts, "takes no vectors in the place of words")
    d = _hidden(shape)
    h = options.encoder_hidden or d
    head = [("mlp_head.0", d, h), ("mlp_head.2", h, h), ("mlp_head.4", h, d)]
    made = Added("", "embedding.weight", (_prompt_rows(shape, options), d))  # as large as the prompt
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
    """List prefix tuning's (Li and Liang 2021, section 4.2): a key and a value per token and layer, n 2 L k.

    k is the width of the keys; under grouped-query attention this is the width of the key/value heads. With
    `projection` (section 4.3) n k parameters go through Linear(k, h) and Linear(h, 2 L k), with h = k by default. Only
    the result is saved. In encoder-decoders the prefix stands in the decoder's self-attention only, so L and k are the
    decoder's. peft takes the encoder's depth and d_model instead, unless it is told `num_layers` and `token_dim`. Where
    they differ, it can build the prefix but not run it.
    """
    _can_have(shape, "prefix", FAMILIES[shape.family].prefixes, "takes no past keys and values")
    n, (depth, k) = options.virtual_tokens, _keys(shape)
    if not options.projection:
        return Trained((Added("", "embedding.weight", (n, 2 * depth * k)),))
    h = options.encoder_hidden or k
    dense = _dense("", [("transform.0", k, h), ("transform.2", h, 2 * depth * k)])
    return Trained((Added("", "embedding.weight", (n, k)), *dense), saved=n * 2 * depth * k)


def houlsby(shape: Shape, options: Options) -> Trained:
    """List the adapters of Houlsby et al. 2019, section 2.1: 2 (2 d m + m + d) per block.

    One follows the attention and one the feed-forward. m = d / reduction factor, rounded down. The adapters have no
    layer norms. There is none after the cross-attention of a T5 decoder.
    """
    return _bottlenecks(shape, options, "houlsby")


def pfeiffer(shape: Shape, options: Options) -> Trained:
    """List one adapter per block, after the feed-forward (Pfeiffer et al. 2021, AdapterFusion): 2 d m + m + d."""
    return _bottlenecks(shape, options, "pfeiffer")


def parallel(shape: Shape, options: Options) -> Trained:
    """One adapter a block, beside the feed-forward (He et al. 2022, section 3.3): the size of Pfeiffer's.

    It reads what the feed-forward reads; the path is that of the projection to whose output it adds. Beside a module
    that `targets` names it reads that module's input, which must be as wide as its output.
    """
    found = _bottlenecks(shape, options, "parallel")
    for module in found.adapted if options.targets is not None else ():
        if module.inputs != module.outputs:
            raise PeftLabError(
                f"{module.path} of {shape.name} reads {module.inputs} features and returns {module.outputs} features. "
                "A parallel adapter reads what its module reads and is added to what it returns, so both must be "
                "equally wide. Name other targets, or use houlsby."
            )
    return found


def _low_rank(
    shape: Shape, options: Options, method: str, tensors: Callable[[Module, int], Iterable[Added]]
) -> Trained:
    """A member of the LoRA family: its tensors on every target, and the biases that `bias` unfreezes.

    `bias="lora_only"` unfreezes the biases of the adapted modules, `bias="all"` every bias of the model outside a
    classification head, which trains anyway. peft adapts embeddings with LoRA and DoRA alone.
    """
    targets = options.targets
    if options.target_parameters and method != "lora":
        raise PeftLabError(
            f"{method} adapts whole modules, so it takes no target_parameters. Name modules in targets, or use lora."
        )
    if method in ("lora", "dora"):
        adapted = shape.match(targets, parameters=options.target_parameters)
    else:
        adapted = linear_targets(shape, targets, method)
    fused = [module.path for module in adapted if module.kind in ("experts", "router")]
    if fused and method == "dora":
        raise PeftLabError(
            f"The targets of {shape.name} mean parameters such as {fused[0]} (experts, routers), as in peft, "
            "and dora adapts modules alone. Name others in targets, or use lora."
        )
    unfrozen = {"none": (), "lora_only": adapted, "all": _body(shape)}
    added = tuple(tensor for module in adapted for tensor in tensors(module, rank_of(options)))
    return Trained(added, _biases(unfrozen[options.bias]), adapted)


def rank_of(options: Options) -> int:
    """Return the rank, which `trained_by` has filled in where none was given."""
    assert options.r is not None
    return options.r


def _pair(m: Module, r: int) -> list[Added]:
    """Return A, (r, d_in), and B, (d_out, r). For an embedding, d_in is the number of its rows.

    For the experts in one parameter, r is the rank of all of them together.
    """
    name, r = "lora_embedding_" if m.kind == "embedding" else "lora_", m.ranks * m.experts * r
    return [Added(m.path, name + "A", (r, m.inputs)), Added(m.path, name + "B", (m.outputs, r))]


def linear_targets(
    shape: Shape, targets: str | Iterable[str] | None, method: str, default: Iterable[str] | None = None
) -> tuple[Module, ...]:
    """Return the targets of a method that stands on linear layers alone, not on embeddings and convolutions."""
    adapted = shape.match(targets, default)
    for module in adapted:
        if module.kind in ("embedding", "convolution"):
            raise PeftLabError(
                f"{method} adapts linear layers only; target {module.path} of {shape.name} is "
                f"{'an embedding' if module.kind == 'embedding' else 'a convolution'}. "
                "Name linear layers, or use lora or dora."
            )
    return adapted


def plain_targets(shape: Shape, targets: str | Iterable[str] | None, method: str) -> tuple[Module, ...]:
    """Return the targets of a method that has no form for GPT-2's Conv1D either."""
    adapted = linear_targets(shape, targets, method)
    refuse_conv1d(shape, targets, method, adapted)
    return adapted


def refuse_conv1d(shape: Shape, targets: str | Iterable[str] | None, method: str, adapted: tuple[Module, ...]) -> None:
    """Refuse targets that are Conv1D layers, for a method that has no form for them."""
    if targets is None and all(module.kind == "conv1d" for module in adapted):
        raise PeftLabError(
            f"{shape.name} has none of the modules that the method adapts by default: its query and value projections "
            f"are Conv1D layers, for which {method} has no form. Use lora, or name other layers in targets (--targets)."
        )
    for module in adapted:
        if module.kind == "conv1d":
            raise PeftLabError(
                f"{method} has no form for Conv1D layers, such as {module.path} of {shape.name}. Name other layers in "
                "targets, or use lora."
            )


def _can_have(shape: Shape, what: str, tasks: tuple[str, ...] | None, why: str) -> None:
    """Refuse a prompt or prefix on a model that cannot have one. `tasks` of None are all."""
    if shape.task == "multiple choice":
        raise PeftLabError(
            f"{shape.name}, as a {shape.family} model whose class ends in ForMultipleChoice, reads several texts for "
            f"each example, so it has no {what}. Use lora or ia3."
        )
    if tasks is not None and shape.task not in tasks:
        others = "a prompt, or lora" if what == "prefix" and FAMILIES[shape.family].prompts is None else "lora or ia3"
        end = class_end(shape.task, shape.kind)
        raise PeftLabError(
            f"{shape.name}, as a {shape.family} model whose class ends in {end}, {why}, so it has no {what}. "
            f"Use {others}."
        )


def _biases(modules: Iterable[Module]) -> tuple[tuple[Module, str], ...]:
    return tuple((module, "bias") for module in modules if module.bias)


def _body(shape: Shape) -> list[Module]:
    return [module for module in shape.modules if module.role != "head"]


def _hidden(shape: Shape) -> int:
    """Return the width of the word embedding, the first row of every table."""
    return shape.modules[0].outputs


def _prompt_rows(shape: Shape, options: Options) -> int:
    both = shape.kind == "encoder-decoder" and shape.task not in ("encoder alone", "decoder alone")
    return options.virtual_tokens * (2 if both else 1)


def _blocks(shape: Shape) -> dict[str, list[Module]]:
    """Return {path of a block, such as `model.layers.0` or `decoder.block.3`: its modules}."""
    blocks: dict[str, list[Module]] = {}
    for module in shape.modules:
        if module.layer is not None:
            parts = module.path.split(".")
            # the first number in a path is the number of the block
            blocks.setdefault(".".join(parts[: parts.index(str(module.layer)) + 1]), []).append(module)
    return blocks


def _dense(path: str, layers: Iterable[tuple[str, int, int]]) -> Iterator[Added]:
    """Yield the tensors of linear layers with biases, given as (name, inputs, outputs)."""
    for name, inputs, outputs in layers:
        yield Added(path, f"{name}.weight", (outputs, inputs))
        yield Added(path, f"{name}.bias", (outputs,))


def _keys(shape: Shape) -> tuple[int, int]:
    """Return how many blocks keep keys, and the width of one block's keys: a decoder's, where there is one."""
    if shape.layout is not None:
        if shape.layout.latent:
            raise PeftLabError(
                f"{shape.name} makes keys and values of different widths from one narrow vector, so there is no one "
                "prefix for them. Use prompt tuning, or lora."
            )
        # Falcon's newer blocks repeat keys for each head before they keep them
        heads = shape.layout.heads if shape.layout.cut == "grouped" else shape.layout.groups
        return shape.layout.layers, heads * shape.layout.width
    blocks = _blocks(shape)
    blocks = {path: rows for path, rows in blocks.items() if "decoder." in path} or blocks
    keys = (m.outputs for rows in blocks.values() for m in rows if m.path.endswith((".k", ".k_proj", ".key")))
    return len(blocks), next(keys)


def _bottlenecks(shape: Shape, options: Options, placement: str) -> Trained:
    """List an adapter, d -> m -> d with biases, at each place in every block: 2 d m + m + d elements each.

    If `options` names targets, the adapters stand there instead. The adapter of a placement with one place per block is
    listed at the last layer of the feed-forward, wherever it stands.
    """
    if options.targets is not None:
        adapted = linear_targets(shape, options.targets, placement)
    else:
        default_targets.places(
            shape.paths, placement, lambda _: default_targets.norm_behind(shape.config.get), shape.name, "targets",
            shape.linear_names(),
        )  # fmt: skip
        adapted = _adapted_blocks(shape, both=placement == "houlsby")
    added: list[Added] = []
    for module in adapted:
        d = module.outputs
        m = max(1, d // options.reduction_factor)
        added += _dense(module.path, [("down", d, m), ("up", m, d)])
    return Trained(tuple(added), adapted=tuple(adapted), named=options.targets is not None)


def _adapted_blocks(shape: Shape, both: bool) -> tuple[Module, ...]:
    """Return of each block the last layer of the feed-forward, or also that of the attention, in the table's order.

    A feed-forward with experts has no such layer. It is listed as a whole, by a row of its own.
    """
    rows = {module.path: module for module in shape.modules}
    found = []
    for block, row in default_targets.blocks_in(shape.paths).items():
        attention = rows[f"{block}.{row.attention}"]
        path = f"{block}.{row.feed_forward}"
        whole = Module(path, "mixture", attention.outputs, attention.outputs, layer=attention.layer)
        found += [attention, rows.get(path, whole)] if both else [rows.get(path, whole)]
    return tuple(found)
