"""The tables of encoder-decoders: T5, BART and models like it, Whisper.

See `encoder_tables` for what a function yields.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from peftlab.errors import PeftLabError
from peftlab.memory.counting.config import Config
from peftlab.memory.counting.encoder_heads import classifier, one_layer, two_layers
from peftlab.memory.counting.modules import Module, layer_norm, linear, rms, vector


def t5(c: Config, task: str = "language model", feed_forward: str = "relu") -> Iterator[Module]:
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
    decoder = [] if task == "encoder alone" else [("decoder", c.size("num_decoder_layers", default=depth))]
    for stack, layers in [("encoder", depth), *decoder]:
        yield Module(f"{stack}.embed_tokens", "embedding", vocabulary, hidden, tied=True)
        for i in range(layers):
            attentions = ["SelfAttention"] if stack == "encoder" else ["SelfAttention", "EncDecAttention"]
            for j, name in enumerate(attentions):
                at = f"{stack}.block.{i}.layer.{j}."
                for part in ("q", "k", "v"):
                    yield linear(f"{at}{name}.{part}", hidden, attention, layer=i)
                yield linear(f"{at}{name}.o", attention, hidden, layer=i)
                if i == 0 and name == "SelfAttention":
                    path = f"{at}{name}.relative_attention_bias"
                    yield Module(path, "embedding", buckets, heads, layer=i)
                yield rms(at + "layer_norm", hidden, layer=i)
            at = f"{stack}.block.{i}.layer.{len(attentions)}."
            for part in ("wi_0", "wi_1") if gated else ("wi",):
                yield linear(f"{at}DenseReluDense.{part}", hidden, inner, layer=i)
            yield linear(at + "DenseReluDense.wo", inner, hidden, layer=i, asked=True)
            yield rms(at + "layer_norm", hidden, layer=i)
        yield rms(f"{stack}.final_layer_norm", hidden)
    if task == "language model":
        yield linear("lm_head", hidden, vocabulary, tied=True, role="output")


@dataclass(frozen=True)
class Translator:
    """What differs between BART and the encoder-decoders that are built like it, with what a configuration may omit."""

    vocabulary: int = 50265
    hidden: int = 1024
    layers: int = 12
    heads: int = 16
    inner: int = 4096
    positions: str = "learned"  # "learned" (two stand before the first), "sines" (which do not train) or "none"
    first_norm: bool = True  # a norm behind the embeddings of each stack
    last_norm: bool = False  # a norm at the end of each stack
    labels: int = 2


BART = Translator(labels=3)
MBART = Translator(last_norm=True)
PLBART = Translator(vocabulary=50005, hidden=768, layers=6, heads=12, inner=3072)
PEGASUS = Translator(positions="sines", first_norm=False, last_norm=True)
MARIAN = Translator(vocabulary=58101, positions="sines", first_norm=False)
M2M_100 = Translator(vocabulary=128112, positions="none", first_norm=False, last_norm=True)


def bart(c: Config, task: str = "language model", kind: Translator = BART) -> Iterator[Module]:
    """Yield the modules of BART and of models like it: one embedding of words for both stacks and the head.

    As `"decoder alone"` (`BartForCausalLM`) it has its decoder and head.
    """
    if not c.flag("share_encoder_decoder_embeddings", True):
        raise PeftLabError(
            f"{c.source}: share_encoder_decoder_embeddings is false. Models with one vocabulary for the encoder and "
            "another for the decoder are not counted."
        )
    c = _by_own_names(c).with_defaults(vocab_size=kind.vocabulary, d_model=kind.hidden, max_position_embeddings=1024)
    vocabulary, hidden, positions = c.size("vocab_size"), c.size("d_model"), c.size("max_position_embeddings")
    whole, tied = task != "decoder alone", c.flag("tie_word_embeddings", True)
    at = "" if task == "body" else "model."
    if whole:
        yield Module(at + "shared", "embedding", vocabulary, hidden)
    for stack in ("encoder", "decoder") if whole else ("decoder",):
        yield Module(f"{at}{stack}.embed_tokens", "embedding", vocabulary, hidden, tied=whole and tied)
        if kind.positions != "none":
            rows, sines = positions + (2 if kind.positions == "learned" else 0), kind.positions == "sines"
            yield Module(f"{at}{stack}.embed_positions", "embedding", rows, hidden, frozen=sines)
        if kind.first_norm:
            yield layer_norm(f"{at}{stack}.layernorm_embedding", hidden)
        yield from _stack(c, f"{at}{stack}.", stack, hidden, kind.layers, kind.heads, kind.inner)
        if kind.last_norm:
            yield layer_norm(f"{at}{stack}.layer_norm", hidden)
    if task in ("language model", "decoder alone"):
        yield linear("lm_head", hidden, vocabulary, tied=tied, role="output")
    elif task == "classifier":  # peft does not take this head for one, so it is as any layer
        yield from two_layers("classification_head", hidden, c.labels(kind.labels), role="body")
    elif task == "question answering":  # a start and an end, whatever the configuration says of labels
        yield from one_layer(task, hidden, 2)


def whisper(c: Config, task: str = "language model") -> Iterator[Module]:
    """Yield the modules of Whisper: two convolutions before the encoder, whose positions are sines and do not train.

    As `"sound classifier"` it has its encoder alone, as `"decoder alone"` (`WhisperForCausalLM`) its decoder and head.
    """
    c = _by_own_names(c).with_defaults(vocab_size=51865, d_model=384)
    vocabulary, hidden, tied = c.size("vocab_size"), c.size("d_model"), c.flag("tie_word_embeddings", True)
    classes = task == "sound classifier"
    at = "" if task == "body" or classes else "model."
    stacks = {"sound classifier": ("encoder",), "decoder alone": ("decoder",)}.get(task, ("encoder", "decoder"))
    if "decoder" in stacks:
        yield Module(at + "decoder.embed_tokens", "embedding", vocabulary, hidden)
        targets = c.size("max_target_positions", default=448)
        yield Module(at + "decoder.embed_positions", "embedding", targets, hidden)
    if "encoder" in stacks:
        yield Module(at + "encoder.conv1", "convolution", 3 * c.size("num_mel_bins", default=80), hidden, True)
        yield Module(at + "encoder.conv2", "convolution", 3 * hidden, hidden, True)
        sources = c.size("max_source_positions", default=1500)
        yield Module(at + "encoder.embed_positions", "embedding", sources, hidden, frozen=True)
    for stack in stacks:
        yield from _stack(c, f"{at}{stack}.", stack, hidden, 4, 6, 1536, key_bias=False)
        yield layer_norm(f"{at}{stack}.layer_norm", hidden)
    if classes:
        narrow = c.size("classifier_proj_size", default=256)
        if c.flag("use_weighted_layer_sum"):
            yield vector("layer_weights", c.size("encoder_layers", default=4) + 1)
        yield linear("projector", hidden, narrow, True)
        yield classifier(narrow, c.labels())
    elif task != "body":
        yield linear("proj_out", hidden, vocabulary, tied=tied, role="output")


def _by_own_names(c: Config) -> Config:
    """Return a configuration in which sizes under the names of other models, which go first, have BART's names."""
    others = {"hidden_size": "d_model", "num_hidden_layers": "encoder_layers"}
    others["num_attention_heads"] = "encoder_attention_heads"
    renamed = {own: c.values[name] for name, own in others.items() if c.values.get(name) is not None}
    return Config({**c.values, **renamed}, c.source)


def _stack(
    c: Config, at: str, stack: str, hidden: int, layers: int, heads: int, inner: int, key_bias: bool = True
) -> Iterator[Module]:
    """Yield the blocks of BART and Whisper. `layers`, `heads` and `inner` are what a configuration may leave out."""
    inner = c.size(f"{stack}_ffn_dim", default=inner)
    c.divided(hidden, c.size(f"{stack}_attention_heads", default=heads))
    for i in range(c.size(f"{stack}_layers", default=layers)):
        block = f"{at}layers.{i}."
        for name in ("self_attn", "encoder_attn") if stack == "decoder" else ("self_attn",):
            for part in ("k_proj", "v_proj", "q_proj", "out_proj"):
                yield linear(f"{block}{name}.{part}", hidden, hidden, key_bias or part != "k_proj", layer=i)
            yield layer_norm(f"{block}{name}_layer_norm", hidden, layer=i)
        yield linear(block + "fc1", hidden, inner, True, layer=i)
        yield linear(block + "fc2", inner, hidden, True, layer=i)
        yield layer_norm(block + "final_layer_norm", hidden, layer=i)
