"""The tables of encoders and encoder-decoders: one function per architecture, from a `config.json` and a task to rows.

The task is one of `families.TASKS`: `"classifier"`, `"body"` (a model without a head, whose paths have no prefix), or
`"masked"` (a language model of single words).
"""

from __future__ import annotations

from collections.abc import Iterator

from peftlab.errors import PeftLabError
from peftlab.memory.counting.config import Config
from peftlab.memory.counting.modules import Module, layer_norm, linear, rms


def bert(c: Config, task: str = "classifier", prefix: str = "bert") -> Iterator[Module]:
    """Yield the modules of BERT or RoBERTa. As classifiers, BERT has a pooler and one linear head, RoBERTa two layers.

    Without a head, both have a pooler.
    """
    c.refuse("add_cross_attention")
    hidden, inner = c.size("hidden_size"), c.size("intermediate_size")
    layers, heads = c.size("num_hidden_layers"), c.size("num_attention_heads")
    if hidden % heads:
        raise PeftLabError(f"{c.source}: hidden_size {hidden} is no multiple of the {heads} attention heads.")
    positions, types = c.size("max_position_embeddings", default=512), c.size("type_vocab_size", default=2)

    at = "" if task == "body" else f"{prefix}."
    yield Module(f"{at}embeddings.word_embeddings", "embedding", c.size("vocab_size"), hidden)
    yield Module(f"{at}embeddings.position_embeddings", "embedding", positions, hidden)
    yield Module(f"{at}embeddings.token_type_embeddings", "embedding", types, hidden)
    yield layer_norm(f"{at}embeddings.LayerNorm", hidden)
    for i in range(layers):
        block = f"{at}encoder.layer.{i}."
        for name in ("query", "key", "value"):
            yield linear(f"{block}attention.self.{name}", hidden, hidden, True, layer=i)
        yield linear(block + "attention.output.dense", hidden, hidden, True, layer=i)
        yield layer_norm(block + "attention.output.LayerNorm", hidden, layer=i)
        yield linear(block + "intermediate.dense", hidden, inner, True, layer=i)
        yield linear(block + "output.dense", inner, hidden, True, layer=i)
        yield layer_norm(block + "output.LayerNorm", hidden, layer=i)
    if task == "body" or (prefix == "bert" and task == "classifier"):
        yield linear(at + "pooler.dense", hidden, hidden, True)
    if task == "classifier" and prefix == "bert":
        yield linear("classifier", hidden, c.labels(), True, role="head")
    elif task == "classifier":
        yield linear("classifier.dense", hidden, hidden, True, role="head")
        yield linear("classifier.out_proj", hidden, c.labels(), True, role="head")
    elif task == "masked":
        yield from _masked_head(c, hidden, prefix == "bert")


def _masked_head(c: Config, hidden: int, bert: bool) -> Iterator[Module]:
    """Yield the head that guesses hidden words, whose last matrix is the word embedding."""
    tied, vocabulary = c.flag("tie_word_embeddings", True), c.size("vocab_size")
    at, norm = ("cls.predictions.transform.", "LayerNorm") if bert else ("lm_head.", "layer_norm")
    yield linear(at + "dense", hidden, hidden, True)
    yield layer_norm(at + norm, hidden)
    last = "cls.predictions.decoder" if bert else "lm_head.decoder"
    yield linear(last, hidden, vocabulary, True, tied=tied, role="output")


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
    for stack, layers in (("encoder", depth), ("decoder", c.size("num_decoder_layers", default=depth))):
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
            yield linear(at + "DenseReluDense.wo", inner, hidden, layer=i)
            yield rms(at + "layer_norm", hidden, layer=i)
        yield rms(f"{stack}.final_layer_norm", hidden)
    if task == "language model":
        yield linear("lm_head", hidden, vocabulary, tied=True, role="output")
