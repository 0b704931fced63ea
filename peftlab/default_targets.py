"""The modules that a method stands on when none are named, found by the names in a model.

`attach` asks with the paths of a model's modules, and `count` with those of a shape's table. Both get the same answer,
or the same refusal. This file imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import NamedTuple

from peftlab.errors import PeftLabError

# The names of the query and value projections in the architectures of transformers, most specific first.
QUERY_VALUE = (
    ("q_proj", "v_proj"),
    ("query", "value"),
    ("query_proj", "value_proj"),
    ("q_lin", "v_lin"),
    ("query_key_value",),
    ("c_attn",),
    ("qkv_proj",),
    ("Wqkv",),
    ("q", "v"),
)
# For each architecture, what IA3 scales: the layers of keys and of values (where one layer makes queries, keys and
# values, that layer), and the last layer of the feed-forward, whose input is scaled. The same as in Hugging Face peft,
# except where peft names queries instead of keys (Gemma, Qwen, OPT, BART, GPT-J, Phi), and for the architectures of
# which peft knows no default.
IA3 = (
    ("k_proj", "v_proj", "down_proj"),
    ("key", "value", "output.dense"),
    ("c_attn", "mlp.c_proj"),
    ("k", "v", "wo"),
    ("k_proj", "v_proj", "fc2"),
    ("k_proj", "v_proj", "output_dense"),
    ("k_proj", "v_proj", "mlp.c_proj"),
    ("k_proj", "v_proj", "fc_out"),
    ("qkv_proj", "down_proj"),
    ("query_key_value", "dense_4h_to_h"),
    ("k_lin", "v_lin", "lin2"),
    ("key", "value", "ffn_output"),
    ("key_proj", "value_proj", "output.dense"),
    ("k", "v", "output.dense"),
    ("Wqkv", "mlp.Wo"),
)
MT5 = ("k", "v", "wi_1")  # T5's layers; peft scales the output of wi_1, which is the same function


def query_value(endings: Iterable[str], model: str, option: str) -> tuple[str, ...]:
    """Return the names of a model's query and value projections.

    Args:
        endings: the last names of the paths of its linear layers.
        model: its name, for the error.
        option: what the caller names targets by, for the error.
    """
    endings = set(endings)
    for names in QUERY_VALUE:
        if endings.issuperset(names):
            return names
    raise PeftLabError(
        f"{option} is not set, and {model} has no query and value projections under a known name. Name the modules to "
        f"adapt in {option}; its linear layers end in {', '.join(sorted(endings)) or 'nothing'}."
    )


def ia3(paths: Iterable[str], model_type: str | None) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """Return (the names that IA3 scales, those of them whose input is scaled) of a known architecture, or None."""
    if model_type == "mt5":
        return MT5, ()
    dotted = ["." + path for path in paths]
    for names in IA3:
        if all(any(path.endswith("." + name) for path in dotted) for name in names):
            return names, names[-1:]
    return None


def ia3_unknown(endings: Iterable[str], model: str, option: str) -> PeftLabError:
    """Return the error for a model whose layers have names that IA3 does not know."""
    return PeftLabError(
        f"The names of the keys, values and feed-forward of {model} are not known. Name them in {option}, and the last "
        "layer of the feed-forward in feedforward_modules of IA3Config too. Linear layers here end in "
        f"{', '.join(dict.fromkeys(endings)) or 'nothing'}."
    )


class Row(NamedTuple):
    """How the blocks of an architecture are built: the places of bottleneck adapters, as paths inside a block.

    Attributes:
        block: a block, as a regular expression for its whole path.
        attention: the last layer of its attention.
        feed_forward: the last layer of its feed-forward, or all of it, if it has experts.
        whole: the module that is the feed-forward; None where no module is.
        end: the module that adds the feed-forward to the residual; "" is the block itself.
        norm: the norm behind this sum. Where models of the same names differ, both `end` and `norm` are given.
        residual: the module that is given the feed-forward's result and the residual, and adds them.
        needs: a further module by which the architecture is known.
    """

    block: str
    attention: str
    feed_forward: str
    whole: str | None = None
    end: str | None = ""
    norm: str | None = None
    residual: str | None = None
    needs: str | None = None

    def names(self) -> Iterator[str]:
        """Yield the modules that a block of this architecture has."""
        norm = self.norm if self.end is None else None
        names = (self.attention, self.feed_forward, self.whole, self.end, norm, self.residual, self.needs)
        yield from filter(None, names)


_LAYERS, _H, _LAYER = r"(.*\.)?layers\.\d+", r"(.*\.)?h\.\d+", r"(.*\.)?layer\.\d+"
_BERT = {"end": None, "norm": "output.LayerNorm", "residual": "output"}
ROWS = (
    Row(_LAYERS, "self_attn.o_proj", "mlp.down_proj", "mlp"),  # Llama, Mistral, Qwen, Gemma
    Row(_LAYERS, "self_attn.o_proj", "mlp.c_proj", "mlp"),  # StarCoder 2
    Row(_LAYERS, "self_attn.o_proj", "feed_forward.down_proj", "feed_forward"),  # Llama 4
    Row(_LAYERS, "self_attn.o_proj", "mlp", "mlp", needs="mlp.experts"),  # Mixtral, mixtures of Qwen
    Row(_LAYERS, "self_attn.o_proj", "feed_forward", "feed_forward", needs="feed_forward.experts"),  # Llama 4's
    Row(_LAYERS, "self_attn.dense", "mlp.fc2", "mlp"),  # Phi
    Row(_LAYERS, "self_attn.out_proj", "mlp.fc2", "mlp"),  # CLIP
    Row(_LAYERS, "self_attn.out_proj", "fc2", norm="final_layer_norm"),  # OPT, BART, Whisper
    Row(  # wav2vec2
        _LAYERS, "attention.out_proj", "feed_forward.output_dense", "feed_forward", norm="final_layer_norm",
    ),
    Row(_LAYERS, "attention.o_proj", "mlp.fc2", "mlp"),  # ViT
    Row(_LAYERS, "attention.dense", "mlp.dense_4h_to_h", "mlp"),  # GPT-NeoX
    Row(_LAYERS, "attn.Wo", "mlp.Wo", "mlp"),  # ModernBERT
    Row(_H, "attn.c_proj", "mlp.c_proj", "mlp"),  # GPT-2
    Row(_H, "attn.out_proj", "mlp.fc_out", "mlp"),  # GPT-J
    Row(_H, "self_attention.dense", "mlp.dense_4h_to_h", "mlp"),  # BLOOM, Falcon
    Row(_LAYER, "attention.output.dense", "output.dense", **_BERT),  # BERT, RoBERTa, ELECTRA, DeBERTa
    Row(_LAYER, "attention.attn.o", "output.dense", **_BERT),  # MPNet
    Row(_LAYER, "attention.out_lin", "ffn.lin2", "ffn", end=None, norm="output_layer_norm"),  # DistilBERT
    Row(r"(.*\.)?albert_layers\.\d+", "attention.dense", "ffn_output", end=None, norm="full_layer_layer_norm"),
    *(  # T5: an encoder's block, and a decoder's, which has a cross-attention between the two
        Row(
            rf"(.*\.)?{half}\.block\.\d+", "layer.0.SelfAttention.o", f"layer.{i}.DenseReluDense.wo",
            f"layer.{i}.DenseReluDense", end=f"layer.{i}",
        ) for half, i in (("encoder", 1), ("decoder", 2))
    ),
)  # fmt: skip
PLACEMENTS = ("houlsby", "pfeiffer", "parallel")
# Whether the blocks of these models norm the sum, as BERT's do, or what a sub-layer reads, by `model_type`.
NORM_BEHIND = {
    **dict.fromkeys(("bart", "plbart", "marian"), True),
    **dict.fromkeys(("mbart", "pegasus", "m2m_100", "whisper"), False),
}


class Place(NamedTuple):
    """Where a bottleneck adapter stands: the module, and how.

    Attributes:
        how: "after" a module; "beside" it; "around a norm", whose input it adds to; or "beside a residual".
    """

    path: str
    how: str


def norm_behind(setting: Callable[[str], object]) -> bool | None:
    """Say whether a model's blocks norm the sum, and not what a sub-layer reads; None if its config does not say.

    Args:
        setting: returns a setting of the config by its name, or None.
    """
    for name in ("do_layer_norm_before", "do_stable_layer_norm"):  # OPT; wav2vec2 and models made from it
        if isinstance(setting(name), bool):
            return not setting(name)
    return NORM_BEHIND.get(str(setting("model_type")))


def blocks_in(paths: Collection[str]) -> dict[str, Row]:
    """Return {path of a block: its architecture} of the blocks that are known."""
    found: dict[str, Row] = {}
    for path in paths:
        if path.rpartition(".")[2].isdigit():
            fits = (r for r in ROWS if re.fullmatch(r.block, path) and all(f"{path}.{n}" in paths for n in r.names()))
            row = next(fits, None)
            if row is not None:
                found[path] = row
    return found


def places_in(block: str, row: Row, placement: str, behind: bool | None) -> list[Place]:
    """Return the places of a placement in a block; none if they are not known.

    Args:
        behind: whether the norm comes behind the sum, where that is not the same for all models of this architecture.
    """

    def at(name: str, how: str) -> list[Place]:
        return [Place(f"{block}.{name}".rstrip("."), how)]

    if placement == "houlsby":
        return at(row.attention, "after") + at(row.feed_forward, "after")
    if placement == "parallel":
        if row.residual is not None:
            return at(row.residual, "beside a residual")
        return [] if row.whole is None else at(row.whole, "beside")
    if row.norm is None:
        return at(row.end or "", "after")
    if row.end is None or behind:
        return at(row.norm, "around a norm")
    return [] if behind is None else at(row.end, "after")


def places(
    paths: Collection[str], placement: str, behind: Callable[[str], bool | None], model: str, option: str,
    endings: Iterable[str],
) -> list[Place]:  # fmt: skip
    """Return the places of a placement in all blocks of a model.

    Args:
        paths: those of all its modules.
        behind: says of a block whether its norm comes behind the sum.
        model, option, endings: as for `query_value`.

    Raises:
        PeftLabError: no block is of a known architecture, or not all are; or the placement has no place in one.
    """
    known = blocks_in(paths)
    named = f"Name the modules after which (or beside which) it stands in {option}."
    if not known:
        raise PeftLabError(
            f"The places of a {placement} adapter in {model} are not known. {named} Linear layers here end in "
            f"{', '.join(dict.fromkeys(endings)) or 'nothing'}."
        )
    other = next(_unknown_blocks(paths, known), None)
    if other is not None:
        inside = dict.fromkeys(p[len(other) + 1 :].partition(".")[0] for p in paths if p.startswith(other + "."))
        raise PeftLabError(
            f"The places of a {placement} adapter are known in some blocks of {model}, such as {next(iter(known))}, "
            f"but not in {other}, which holds {', '.join(inside)}. {named}"
        )
    found: list[Place] = []
    for block, row in known.items():
        there = places_in(block, row, placement, behind(block))
        if not there and placement == "parallel":
            raise PeftLabError(
                f"The feed-forward of {block} in {model} is no module of its own, so a parallel adapter cannot read "
                f"what it reads and add to what it returns. Use houlsby or pfeiffer, or name modules in {option}."
            )
        if not there:
            raise PeftLabError(
                f"{block} of {model} has a {row.norm}, and its config does not say whether this norms the sum or what "
                f"the feed-forward reads, so the place of a {placement} adapter is not known. Use houlsby. Or: {named}"
            )
        found += there
    return found


def _unknown_blocks(paths: Collection[str], known: Collection[str]) -> Iterator[str]:
    """Yield the blocks that are not known: numbered modules beside known ones, and those that hold an attention."""
    inside: dict[str, list[str]] = {}  # of each outermost numbered module: the paths in it
    for path in paths:
        numbered = re.match(r"(?:[^.]*[^.\d][^.]*\.)*\d+(?=\.|$)", path)
        if numbered:
            inside.setdefault(numbered[0], []).append(path[numbered.end() :].lower())
    covered = {block for block in inside if any(f"{one}.".startswith(f"{block}.") for one in known)}
    lists = {block.rpartition(".")[0] for block in covered}
    for block, names in inside.items():
        attends = any("attn" in name or "attention" in name for name in names)
        if block not in covered and (attends or block.rpartition(".")[0] in lists):
            yield block
