"""The tables of text encoders: one function per architecture, from a `config.json` and a task to rows.

The task is a value of `families.TASKS`. Without a head (`"body"`) a model's paths have no prefix. The first row is the
word embedding.
"""

from __future__ import annotations

from collections.abc import Iterator

from peftlab.memory.counting.config import Config
from peftlab.memory.counting.encoder_heads import (
    HIDDEN_WORDS,
    classifier,
    guessed_words,
    one_layer,
    two_layers,
)
from peftlab.memory.counting.modules import Module, layer_norm, linear, rms

BERT_SIZES = {
    "vocab_size": 30522, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
    "intermediate_size": 3072, "max_position_embeddings": 512,
}  # fmt: skip


def bert(c: Config, task: str = "classifier", prefix: str = "bert") -> Iterator[Module]:
    """Yield the modules of BERT or RoBERTa. As classifiers, BERT has a pooler and one linear head, RoBERTa two layers.

    Without a head, both have a pooler.
    """
    c.refuse("add_cross_attention")
    c = c.with_defaults(max_position_embeddings=512, type_vocab_size=2)
    hidden, labels = c.size("hidden_size"), c.labels()
    c.divided(hidden, c.size("num_attention_heads"))
    at = "" if task == "body" else f"{prefix}."
    yield from _embeddings(c, at, hidden, types=c.size("type_vocab_size"))
    yield from _blocks(c, f"{at}encoder.layer.", hidden)
    pooled = ("body", "multiple choice", "pretraining", "next sentence", *(["classifier"] if prefix == "bert" else []))
    if task in pooled:
        yield linear(at + "pooler.dense", hidden, hidden, True)
    if task == "classifier" and prefix != "bert":
        yield from two_layers("classifier", hidden, labels)
    elif task in HIDDEN_WORDS or task == "pretraining":
        last = "cls.predictions" if prefix == "bert" else "lm_head"
        first, norm = (f"{last}.transform.", "LayerNorm") if prefix == "bert" else ("lm_head.", "layer_norm")
        yield linear(first + "dense", hidden, hidden, True)
        yield layer_norm(first + norm, hidden)
        yield from guessed_words(c, f"{last}.decoder", hidden, shared_bias=last)
    else:
        yield from one_layer(task, hidden, labels)
    if task in ("pretraining", "next sentence"):
        yield linear("cls.seq_relationship", hidden, 2, True)


def electra(c: Config, task: str) -> Iterator[Module]:
    """Yield the modules of ELECTRA: BERT's blocks, over word embeddings that may be narrower than the model."""
    c.refuse("add_cross_attention")
    c = c.with_defaults(**BERT_SIZES | {"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024})
    hidden, narrow = c.size("hidden_size"), c.size("embedding_size", default=128)
    c.divided(hidden, c.size("num_attention_heads"))
    at = "" if task == "body" else "electra."
    yield from _embeddings(c, at, narrow, types=c.size("type_vocab_size", default=2))
    if narrow != hidden:
        yield linear(at + "embeddings_project", narrow, hidden, True)
    yield from _blocks(c, f"{at}encoder.layer.", hidden)
    if task == "classifier":
        yield from two_layers("classifier", hidden, c.labels())
    elif task == "pretraining":
        yield linear("discriminator_predictions.dense", hidden, hidden, True)
        yield linear("discriminator_predictions.dense_prediction", hidden, 1, True)
    elif task in HIDDEN_WORDS:
        yield layer_norm("generator_predictions.LayerNorm", narrow)
        yield linear("generator_predictions.dense", hidden, narrow, True)
        yield from guessed_words(c, "generator_lm_head", narrow)
    else:
        if task == "multiple choice" and c.flag("summary_use_proj", True):
            outputs = c.labels() if c.flag("summary_proj_to_labels") else hidden
            yield linear("sequence_summary.summary", hidden, outputs, True)
        yield from one_layer(task, hidden, c.labels())


def distilbert(c: Config, task: str) -> Iterator[Module]:
    """Yield the modules of DistilBERT. Its classifier has two layers, both of which peft trains as the head.

    A size under the name that most models have for it goes before DistilBERT's own name, as in transformers.
    """
    c = c.with_defaults(vocab_size=30522, max_position_embeddings=512)
    hidden, inner = c.size("hidden_size", "dim", default=768), c.size("hidden_dim", default=3072)
    c.divided(hidden, c.size("num_attention_heads", "n_heads", default=12))
    at = "" if task == "body" else "distilbert."
    yield from _embeddings(c, at, hidden, frozen=c.flag("sinusoidal_pos_embds"))
    for i in range(c.size("num_hidden_layers", "n_layers", default=6)):
        block = f"{at}transformer.layer.{i}."
        for name in ("q_lin", "k_lin", "v_lin", "out_lin"):
            yield linear(f"{block}attention.{name}", hidden, hidden, True, layer=i)
        yield layer_norm(block + "sa_layer_norm", hidden, layer=i)
        yield linear(block + "ffn.lin1", hidden, inner, True, layer=i)
        yield linear(block + "ffn.lin2", inner, hidden, True, layer=i)
        yield layer_norm(block + "output_layer_norm", hidden, layer=i)
    if task == "masked":
        yield linear("vocab_transform", hidden, hidden, True)
        yield layer_norm("vocab_layer_norm", hidden)
        yield from guessed_words(c, "vocab_projector", hidden)
    elif task in ("classifier", "multiple choice"):
        yield linear("pre_classifier", hidden, hidden, True, role="head")
    yield from one_layer(task, hidden, c.labels())


def albert(c: Config, task: str) -> Iterator[Module]:
    """Yield the modules of ALBERT. Its blocks share their weights: each module is listed once and used often."""
    c = c.with_defaults(
        vocab_size=30000, hidden_size=4096, num_attention_heads=64, intermediate_size=16384, max_position_embeddings=512
    )
    hidden, narrow, inner = c.size("hidden_size"), c.size("embedding_size", default=128), c.size("intermediate_size")
    c.divided(hidden, c.size("num_attention_heads"))
    at = "" if task == "body" else "albert."
    yield from _embeddings(c, at, narrow, types=c.size("type_vocab_size", default=2))
    yield linear(at + "encoder.embedding_hidden_mapping_in", narrow, hidden, True)
    for group in range(c.size("num_hidden_groups", default=1)):
        for i in range(c.size("inner_group_num", default=1)):
            block = f"{at}encoder.albert_layer_groups.{group}.albert_layers.{i}."
            yield layer_norm(block + "full_layer_layer_norm", hidden, layer=group)
            for name in ("query", "key", "value", "dense"):
                yield linear(f"{block}attention.{name}", hidden, hidden, True, layer=group)
            yield layer_norm(block + "attention.LayerNorm", hidden, layer=group)
            yield linear(block + "ffn", hidden, inner, True, layer=group)
            yield linear(block + "ffn_output", inner, hidden, True, layer=group)
    if task in ("body", "classifier", "multiple choice", "pretraining"):
        yield linear(at + "pooler", hidden, hidden, True)
    if task in ("masked", "pretraining"):
        yield layer_norm("predictions.LayerNorm", narrow)
        yield linear("predictions.dense", hidden, narrow, True)
        yield from guessed_words(c, "predictions.decoder", narrow, shared_bias="predictions")
    if task == "pretraining":
        yield linear("sop_classifier.classifier", hidden, c.labels(), True)
    yield from one_layer(task, hidden, c.labels())


def deberta(c: Config, task: str) -> Iterator[Module]:
    """Yield the modules of DeBERTa v2 and v3: relative positions with an embedding of their own, as the config says."""
    c = c.with_defaults(
        vocab_size=128100, hidden_size=1536, num_hidden_layers=24, num_attention_heads=24, intermediate_size=6144
    )
    hidden, narrow = c.size("hidden_size"), c.size("embedding_size", default=c.size("hidden_size"))
    inner, positions = c.size("intermediate_size"), c.size("max_position_embeddings", default=512)
    heads = c.divided(hidden, c.size("num_attention_heads"))
    attention = c.size("attention_head_size", default=heads) * c.size("num_attention_heads")
    relative, own = c.flag("relative_attention"), []
    if relative and not c.flag("share_att_key"):
        kinds = c.words("pos_att_type")
        own = [name for kind, name in (("c2p", "pos_key_proj"), ("p2c", "pos_query_proj")) if kind in kinds]

    at = "" if task == "body" else "deberta."
    yield Module(at + "embeddings.word_embeddings", "embedding", c.size("vocab_size"), narrow)
    if c.flag("position_biased_input", True):
        yield Module(at + "embeddings.position_embeddings", "embedding", positions, narrow)
    if types := c.count("type_vocab_size", 0):
        yield Module(at + "embeddings.token_type_embeddings", "embedding", types, narrow)
    if narrow != hidden:
        yield linear(at + "embeddings.embed_proj", narrow, hidden)
    yield layer_norm(at + "embeddings.LayerNorm", hidden)
    for i in range(c.size("num_hidden_layers")):
        block = f"{at}encoder.layer.{i}."
        for name in ("query_proj", "key_proj", "value_proj", *own):
            yield linear(f"{block}attention.self.{name}", hidden, attention, True, layer=i)
        yield from _after_attention(block, hidden, inner, i)
    if relative:
        reach = max(c.whole("max_relative_positions", -1), 0) or positions
        buckets = max(c.whole("position_buckets", -1), 0)
        yield Module(at + "encoder.rel_embeddings", "embedding", 2 * (buckets or reach), hidden)
    if "layer_norm" in c.words("norm_rel_ebd"):
        yield layer_norm(at + "encoder.LayerNorm", hidden)
    if kernel := max(c.whole("conv_kernel_size", 0), 0):
        groups = c.size("conv_groups", default=1)
        yield Module(at + "encoder.conv.conv", "convolution", hidden * kernel, hidden, True, groups=groups)
        yield layer_norm(at + "encoder.conv.LayerNorm", hidden)

    pooled = c.size("pooler_hidden_size", default=hidden)
    if task in ("classifier", "multiple choice"):
        yield linear("pooler.dense", pooled, pooled, True)
        yield from one_layer(task, pooled, c.labels())
    elif task == "masked" and c.flag("legacy", True):
        yield linear("cls.predictions.transform.dense", hidden, narrow, True)
        yield layer_norm("cls.predictions.transform.LayerNorm", narrow)
        yield from guessed_words(c, "cls.predictions.decoder", narrow, shared_bias="cls.predictions")
    elif task == "masked":
        yield linear("lm_predictions.lm_head.dense", hidden, hidden, True, role="output")
        yield layer_norm("lm_predictions.lm_head.LayerNorm", hidden)
        yield Module("lm_predictions.lm_head", "bias", 1, c.size("vocab_size"), True)
    else:
        yield from one_layer(task, hidden, c.labels())


def mpnet(c: Config, task: str) -> Iterator[Module]:
    """Yield the modules of MPNet: BERT's, with one embedding of relative positions for all blocks."""
    c = c.with_defaults(**BERT_SIZES | {"vocab_size": 30527})
    hidden, heads = c.size("hidden_size"), c.size("num_attention_heads")
    c.divided(hidden, heads)
    at = "" if task == "body" else "mpnet."
    yield from _embeddings(c, at, hidden)
    for i in range(c.size("num_hidden_layers")):
        block = f"{at}encoder.layer.{i}."
        for name in ("q", "k", "v", "o"):
            yield linear(f"{block}attention.attn.{name}", hidden, hidden, True, layer=i)
        yield layer_norm(block + "attention.LayerNorm", hidden, layer=i)
        yield from _feed_forward(block, hidden, c.size("intermediate_size"), i)
    buckets = c.size("relative_attention_num_buckets", default=32)
    yield Module(at + "encoder.relative_attention_bias", "embedding", buckets, heads)
    if task in ("body", "multiple choice"):
        yield linear(at + "pooler.dense", hidden, hidden, True)
    if task == "classifier":
        yield from two_layers("classifier", hidden, c.labels())
    elif task == "masked":
        yield linear("lm_head.dense", hidden, hidden, True)
        yield layer_norm("lm_head.layer_norm", hidden)
        yield from guessed_words(c, "lm_head.decoder", hidden, shared_bias="lm_head")
    else:
        yield from one_layer(task, hidden, c.labels())


def modernbert(c: Config, task: str) -> Iterator[Module]:
    """Yield the modules of ModernBERT: rotary positions, fused projections, no norm before the first attention."""
    c = c.with_defaults(**BERT_SIZES | {"vocab_size": 50368, "num_hidden_layers": 22, "intermediate_size": 1152})
    hidden, inner = c.size("hidden_size"), c.size("intermediate_size")
    c.divided(hidden, c.size("num_attention_heads"))
    mlp, attention, norm = c.flag("mlp_bias"), c.flag("attention_bias"), layer_norm if c.flag("norm_bias") else rms
    at = "" if task == "body" else "model."
    yield Module(at + "embeddings.tok_embeddings", "embedding", c.size("vocab_size"), hidden)
    yield norm(at + "embeddings.norm", hidden)
    for i in range(c.size("num_hidden_layers")):
        block = f"{at}layers.{i}."
        if i:
            yield norm(block + "attn_norm", hidden, layer=i)
        yield linear(block + "attn.Wqkv", hidden, 3 * hidden, attention, layer=i)
        yield linear(block + "attn.Wo", hidden, hidden, attention, layer=i)
        yield norm(block + "mlp_norm", hidden, layer=i)
        yield linear(block + "mlp.Wi", hidden, 2 * inner, mlp, layer=i)
        yield linear(block + "mlp.Wo", inner, hidden, mlp, layer=i)
    yield norm(at + "final_norm", hidden)
    if task == "body":
        return
    yield linear("head.dense", hidden, hidden, c.flag("classifier_bias"))
    yield norm("head.norm", hidden)
    if task == "masked":
        yield from guessed_words(c, "decoder", hidden, bias=c.flag("decoder_bias", True))
    elif task == "question answering":  # peft knows heads for answers by another name, so this one is as any layer
        yield linear("classifier", hidden, c.labels(), True)
    else:
        yield classifier(hidden, 1 if task == "multiple choice" else c.labels())


def _embeddings(c: Config, at: str, width: int, types: int | None = None, frozen: bool = False) -> Iterator[Module]:
    """Yield the embeddings of words, positions and, in some, segments, and the norm of their sum."""
    at, positions = at + "embeddings.", c.size("max_position_embeddings")
    yield Module(at + "word_embeddings", "embedding", c.size("vocab_size"), width)
    yield Module(at + "position_embeddings", "embedding", positions, width, frozen=frozen)
    if types is not None:
        yield Module(at + "token_type_embeddings", "embedding", types, width)
    yield layer_norm(at + "LayerNorm", width)


def _blocks(c: Config, at: str, hidden: int) -> Iterator[Module]:
    """Yield the blocks of BERT."""
    for i in range(c.size("num_hidden_layers")):
        block = f"{at}{i}."
        for name in ("query", "key", "value"):
            yield linear(f"{block}attention.self.{name}", hidden, hidden, True, layer=i)
        yield from _after_attention(block, hidden, c.size("intermediate_size"), i)


def _after_attention(block: str, hidden: int, inner: int, i: int) -> Iterator[Module]:
    yield linear(block + "attention.output.dense", hidden, hidden, True, layer=i)
    yield layer_norm(block + "attention.output.LayerNorm", hidden, layer=i)
    yield from _feed_forward(block, hidden, inner, i)


def _feed_forward(block: str, hidden: int, inner: int, i: int) -> Iterator[Module]:
    yield linear(block + "intermediate.dense", hidden, inner, True, layer=i)
    yield linear(block + "output.dense", inner, hidden, True, layer=i)
    yield layer_norm(block + "output.LayerNorm", hidden, layer=i)
