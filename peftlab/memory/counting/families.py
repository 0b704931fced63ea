"""One function per architecture: from a `config.json` to the table of its modules.

Each row has the module's path in transformers, so a target matches the same modules here as in the real model. Which
layer has a bias and which weights are tied follows transformers' model files. Tests compare the tables with those
models row by row on the meta device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from peftlab.errors import PeftLabError
from peftlab.memory.counting.config import Config


@dataclass(frozen=True)
class Module:
    """One module that holds parameters.

    `inputs` and `outputs` are the two sizes of its weight: the features of a linear layer, or the rows and the width of
    an embedding. A norm has `outputs` weights. A `bias` adds `outputs` more.
    """

    path: str
    kind: str  # "linear", "conv1d", "embedding" or "norm"
    inputs: int
    outputs: int
    bias: bool = False
    tied: bool = False  # its weight is another module's, and is counted there
    role: str = "body"  # "body", "output" (a language-model head) or "head" (a classification head)
    layer: int | None = None  # the number of the block it belongs to; None outside the blocks

    @property
    def weight(self) -> int:
        """The number of elements of its own weight; 0 if the weight is another module's (tied)."""
        if self.tied:
            return 0
        return self.outputs if self.kind == "norm" else self.inputs * self.outputs

    @property
    def parameters(self) -> int:
        """The number of elements of the weight and the bias."""
        return self.weight + (self.outputs if self.bias else 0)


def _linear(path: str, inputs: int, outputs: int, bias: bool = False, **more: Any) -> Module:
    return Module(path, "linear", inputs, outputs, bias, **more)


def _rms(path: str, width: int, **more: Any) -> Module:
    return Module(path, "norm", width, width, **more)


def _layer_norm(path: str, width: int, **more: Any) -> Module:
    return Module(path, "norm", width, width, True, **more)


def _gated_decoder(
    c: Config,
    qkv_bias: bool | None = None,  # None: as attention_bias says, the output projection too
    mlp_bias: bool = False,
    kv_default: int | None = None,
    head_dim: int | None = None,
    tied: bool = False,
    head_norms: bool = False,
    sandwich: bool = False,
) -> Iterator[Module]:
    """Yield Llama's modules, and its relatives': grouped key/value heads, a gated MLP, RMS norms, rotary positions."""
    vocabulary, hidden, inner = c.size("vocab_size"), c.size("hidden_size"), c.size("intermediate_size")
    layers, heads = c.size("num_hidden_layers"), c.size("num_attention_heads")
    # null means one key/value head per head. A missing key means the architecture's own default.
    groups = heads if "num_key_value_heads" in c.values or kv_default is None else kv_default
    groups = c.size("num_key_value_heads", default=groups)
    if heads % groups:
        raise PeftLabError(f"{c.source}: {heads} attention heads cannot share {groups} key/value heads evenly.")
    width = c.per_head(hidden, heads, head_dim)
    query, key = heads * width, groups * width
    out_bias = c.flag("attention_bias") if qkv_bias is None else False
    in_bias = out_bias if qkv_bias is None else qkv_bias
    mlp_bias = c.flag("mlp_bias") if mlp_bias else False

    yield Module("model.embed_tokens", "embedding", vocabulary, hidden)
    for i in range(layers):
        at = f"model.layers.{i}."
        yield _linear(at + "self_attn.q_proj", hidden, query, in_bias, layer=i)
        yield _linear(at + "self_attn.k_proj", hidden, key, in_bias, layer=i)
        yield _linear(at + "self_attn.v_proj", hidden, key, in_bias, layer=i)
        yield _linear(at + "self_attn.o_proj", query, hidden, out_bias, layer=i)
        if head_norms:
            yield _rms(at + "self_attn.q_norm", width, layer=i)
            yield _rms(at + "self_attn.k_norm", width, layer=i)
        yield _linear(at + "mlp.gate_proj", hidden, inner, mlp_bias, layer=i)
        yield _linear(at + "mlp.up_proj", hidden, inner, mlp_bias, layer=i)
        yield _linear(at + "mlp.down_proj", inner, hidden, mlp_bias, layer=i)
        yield _rms(at + "input_layernorm", hidden, layer=i)
        yield _rms(at + "post_attention_layernorm", hidden, layer=i)
        if sandwich:
            yield _rms(at + "pre_feedforward_layernorm", hidden, layer=i)
            yield _rms(at + "post_feedforward_layernorm", hidden, layer=i)
    yield _rms("model.norm", hidden)
    yield _linear("lm_head", hidden, vocabulary, tied=c.flag("tie_word_embeddings", tied), role="output")


def _gpt2(c: Config) -> Iterator[Module]:
    """GPT-2: learned positions, one Conv1D for queries, keys and values together, LayerNorms with biases."""
    c.refuse("add_cross_attention")
    vocabulary, hidden = c.size("vocab_size"), c.size("n_embd", "hidden_size")
    layers, heads = c.size("n_layer", "num_hidden_layers"), c.size("n_head", "num_attention_heads")
    if hidden % heads:
        raise PeftLabError(f"{c.source}: n_embd {hidden} is no multiple of the {heads} attention heads.")
    inner = c.size("n_inner", default=4 * hidden)

    yield Module("transformer.wte", "embedding", vocabulary, hidden)
    yield Module("transformer.wpe", "embedding", c.size("n_positions", "max_position_embeddings", default=1024), hidden)
    for i in range(layers):
        at = f"transformer.h.{i}."
        yield _layer_norm(at + "ln_1", hidden, layer=i)
        yield Module(at + "attn.c_attn", "conv1d", hidden, 3 * hidden, True, layer=i)
        yield Module(at + "attn.c_proj", "conv1d", hidden, hidden, True, layer=i)
        yield _layer_norm(at + "ln_2", hidden, layer=i)
        yield Module(at + "mlp.c_fc", "conv1d", hidden, inner, True, layer=i)
        yield Module(at + "mlp.c_proj", "conv1d", inner, hidden, True, layer=i)
    yield _layer_norm("transformer.ln_f", hidden)
    yield _linear("lm_head", hidden, vocabulary, tied=c.flag("tie_word_embeddings", True), role="output")


def _bert(c: Config, prefix: str = "bert") -> Iterator[Module]:
    """BERT and RoBERTa for classification: BERT with its pooler and one linear head, RoBERTa with a head of two."""
    c.refuse("add_cross_attention")
    hidden, inner = c.size("hidden_size"), c.size("intermediate_size")
    layers, heads = c.size("num_hidden_layers"), c.size("num_attention_heads")
    if hidden % heads:
        raise PeftLabError(f"{c.source}: hidden_size {hidden} is no multiple of the {heads} attention heads.")
    positions, types = c.size("max_position_embeddings", default=512), c.size("type_vocab_size", default=2)

    yield Module(f"{prefix}.embeddings.word_embeddings", "embedding", c.size("vocab_size"), hidden)
    yield Module(f"{prefix}.embeddings.position_embeddings", "embedding", positions, hidden)
    yield Module(f"{prefix}.embeddings.token_type_embeddings", "embedding", types, hidden)
    yield _layer_norm(f"{prefix}.embeddings.LayerNorm", hidden)
    for i in range(layers):
        at = f"{prefix}.encoder.layer.{i}."
        for name in ("query", "key", "value"):
            yield _linear(f"{at}attention.self.{name}", hidden, hidden, True, layer=i)
        yield _linear(at + "attention.output.dense", hidden, hidden, True, layer=i)
        yield _layer_norm(at + "attention.output.LayerNorm", hidden, layer=i)
        yield _linear(at + "intermediate.dense", hidden, inner, True, layer=i)
        yield _linear(at + "output.dense", inner, hidden, True, layer=i)
        yield _layer_norm(at + "output.LayerNorm", hidden, layer=i)
    if prefix == "bert":
        yield _linear("bert.pooler.dense", hidden, hidden, True)
        yield _linear("classifier", hidden, c.labels(), True, role="head")
    else:
        yield _linear("classifier.dense", hidden, hidden, True, role="head")
        yield _linear("classifier.out_proj", hidden, c.labels(), True, role="head")


def _t5(c: Config, feed_forward: str = "relu") -> Iterator[Module]:
    """Yield the modules of T5: encoder and decoder, no biases, relative positions in the first block, tied vocabulary.

    transformers 5 always ties the output head. `tie_word_embeddings` then only decides whether the logits are scaled.
    """
    vocabulary, hidden = c.size("vocab_size"), c.size("d_model", "hidden_size")
    heads, width = c.size("num_heads", "num_attention_heads"), c.size("d_kv", "head_dim", default=64)
    inner, attention = c.size("d_ff"), heads * width
    depth = c.size("num_layers", "num_hidden_layers")
    buckets = c.size("relative_attention_num_buckets", default=32)
    gated = c.text("feed_forward_proj", feed_forward).startswith("gated-")

    yield Module("shared", "embedding", vocabulary, hidden)
    for stack, layers in (("encoder", depth), ("decoder", c.size("num_decoder_layers", default=depth))):
        yield Module(f"{stack}.embed_tokens", "embedding", vocabulary, hidden, tied=True)
        for i in range(layers):
            attentions = ["SelfAttention"] if stack == "encoder" else ["SelfAttention", "EncDecAttention"]
            for j, name in enumerate(attentions):
                at = f"{stack}.block.{i}.layer.{j}."
                for part in ("q", "k", "v"):
                    yield _linear(f"{at}{name}.{part}", hidden, attention, layer=i)
                yield _linear(f"{at}{name}.o", attention, hidden, layer=i)
                if i == 0 and name == "SelfAttention":
                    path = f"{at}{name}.relative_attention_bias"
                    yield Module(path, "embedding", buckets, heads, layer=i)
                yield _rms(at + "layer_norm", hidden, layer=i)
            at = f"{stack}.block.{i}.layer.{len(attentions)}."
            for part in ("wi_0", "wi_1") if gated else ("wi",):
                yield _linear(f"{at}DenseReluDense.{part}", hidden, inner, layer=i)
            yield _linear(at + "DenseReluDense.wo", inner, hidden, layer=i)
            yield _rms(at + "layer_norm", hidden, layer=i)
        yield _rms(f"{stack}.final_layer_norm", hidden)
    yield _linear("lm_head", hidden, vocabulary, tied=True, role="output")


@dataclass(frozen=True)
class Family:
    """An architecture: the function that makes its table, the kind of model, and the default targets of methods."""

    table: Callable[..., Iterator[Module]]
    options: dict[str, Any]
    kind: str  # "decoder", "encoder" or "encoder-decoder"
    query_value: tuple[str, ...]  # the modules that LoRA adapts when no targets are named
    ia3: tuple[str, ...]  # those that IA3 scales: keys, values, the down projection
    ia3_inputs: tuple[str, ...]  # IA3 scales the inputs of these, the outputs of all others
    outputs: tuple[str, str]  # in a block, by regular expression: the last projection of attention and of feed-forward


def _decoder(**options: Any) -> Family:
    query_value, ia3 = ("q_proj", "v_proj"), ("k_proj", "v_proj", "down_proj")
    outputs = (r"self_attn\.o_proj", r"mlp\.down_proj")
    return Family(_gated_decoder, options, "decoder", query_value, ia3, ("down_proj",), outputs)


def _encoder(prefix: str) -> Family:
    ia3, outputs = ("key", "value", "output.dense"), (r"attention\.output\.dense", r"output\.dense")
    return Family(_bert, {"prefix": prefix}, "encoder", ("query", "value"), ia3, ("output.dense",), outputs)


def _encoder_decoder(ia3: str, ia3_inputs: tuple[str, ...], **options: Any) -> Family:
    outputs = (r"layer\.0\.SelfAttention\.o", r"layer\.\d\.DenseReluDense\.wo")
    return Family(_t5, options, "encoder-decoder", ("q", "v"), ("k", "v", ia3), ia3_inputs, outputs)


FAMILIES: dict[str, Family] = {
    "llama": _decoder(mlp_bias=True),
    "mistral": _decoder(qkv_bias=False, kv_default=8),
    "qwen2": _decoder(qkv_bias=True, kv_default=32),
    "qwen3": _decoder(kv_default=32, head_dim=128, head_norms=True),
    "gemma": _decoder(kv_default=16, head_dim=256, tied=True),
    "gemma2": _decoder(kv_default=4, head_dim=256, tied=True, sandwich=True),
    "gemma3_text": _decoder(kv_default=4, head_dim=256, tied=True, head_norms=True, sandwich=True),
    "gpt2": Family(
        _gpt2, {}, "decoder", ("c_attn",), ("c_attn", "mlp.c_proj"), ("mlp.c_proj",), (r"attn\.c_proj", r"mlp\.c_proj")
    ),
    "bert": _encoder("bert"),
    "roberta": _encoder("roberta"),
    "xlm-roberta": _encoder("roberta"),
    "camembert": _encoder("roberta"),
    "t5": _encoder_decoder("wo", ("wo",)),
    "mt5": _encoder_decoder("wi_1", (), feed_forward="gated-gelu"),
}
