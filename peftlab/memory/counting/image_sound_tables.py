"""The tables of models that read images or sound: ViT, CLIP and wav2vec 2. See `encoder_tables` for what they yield."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from peftlab.errors import PeftLabError
from peftlab.memory.counting.config import Config
from peftlab.memory.counting.encoder_heads import classifier
from peftlab.memory.counting.modules import Module, layer_norm, linear, vector

CONV_LAYERS = 7  # of wav2vec 2, whose kernels and widths are lists


def vit(c: Config, task: str) -> Iterator[Module]:
    """Yield the modules of ViT. Patches are read by a convolution; the class token and the positions are learned."""
    c = c.with_defaults(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072)
    hidden, inner, channels = c.size("hidden_size"), c.size("intermediate_size"), c.size("num_channels", default=3)
    heads, patch, bias = c.size("num_attention_heads"), c.pair("patch_size", 16), c.flag("qkv_bias", True)
    attention = heads * c.per_head(hidden, heads)
    at = "" if task == "body" else "vit."
    yield vector(at + "embeddings.cls_token", hidden)
    if task == "masked image":
        yield vector(at + "embeddings.mask_token", hidden)
    yield vector(at + "embeddings.position_embeddings", hidden * (1 + _patches(c, patch, 224)))
    path = at + "embeddings.patch_embeddings.projection"
    yield Module(path, "convolution", channels * prod(patch), hidden, True)
    for i in range(c.size("num_hidden_layers")):
        block = f"{at}layers.{i}."
        for name in ("q_proj", "k_proj", "v_proj"):
            yield linear(f"{block}attention.{name}", hidden, attention, bias, layer=i)
        yield linear(block + "attention.o_proj", attention, hidden, True, layer=i)
        yield layer_norm(block + "layernorm_before", hidden, layer=i)
        yield layer_norm(block + "layernorm_after", hidden, layer=i)
        yield linear(block + "mlp.fc1", hidden, inner, True, layer=i)
        yield linear(block + "mlp.fc2", inner, hidden, True, layer=i)
    yield layer_norm(at + "layernorm", hidden)
    if task == "body":
        yield linear("pooler.dense", hidden, c.size("pooler_output_size", default=hidden), True)
    elif task == "image classifier":
        yield classifier(hidden, c.labels())
    else:
        outputs = channels * c.size("encoder_stride", default=16) ** 2
        yield Module("decoder.0", "convolution", hidden, outputs, True)


def clip(c: Config, task: str) -> Iterator[Module]:
    """Yield the modules of CLIP: a tower for texts, one for images, a projection of each, and the scale of the logits.

    Each tower is also a model of its own, with its projection or without it.
    """
    if c.values["model_type"] == "clip":
        old = {name: f"{name}_dict" for name in ("text_config", "vision_config")}  # these names go first
        texts, images = (c.part(new if c.values.get(name) is None else name, "clip") for new, name in old.items())
    else:
        texts = images = c
    wide = {"text": texts.size("hidden_size", default=512), "visual": images.size("hidden_size", default=768)}
    if task == "body":
        yield vector("logit_scale", 1)
    if task in ("body", "text tower", "projected text tower"):
        yield from _text_tower(texts, "" if task == "text tower" else "text_model.")
    if task not in ("text tower", "projected text tower"):
        yield from _image_tower(images, "" if task == "image tower" else "vision_model.")
    named = {"body": ("visual", "text"), "projected text tower": ("text",), "projected image tower": ("visual",)}
    whole = task == "body"
    for name in named.get(task, ()):
        width = (c if whole else texts if name == "text" else images).size("projection_dim", default=512)
        yield linear(f"{name}_projection", wide[name], width)
    if task == "image classifier":
        yield classifier(wide["visual"], c.labels())


def _text_tower(c: Config, at: str) -> Iterator[Module]:
    c = c.with_defaults(vocab_size=49408, hidden_size=512, intermediate_size=2048, max_position_embeddings=77)
    hidden = c.size("hidden_size")
    yield Module(at + "embeddings.token_embedding", "embedding", c.size("vocab_size"), hidden)
    positions = c.size("max_position_embeddings")
    yield Module(at + "embeddings.position_embedding", "embedding", positions, hidden)
    yield from _tower(c.with_defaults(num_attention_heads=8), at, hidden)
    yield layer_norm(at + "final_layer_norm", hidden)


def _image_tower(c: Config, at: str) -> Iterator[Module]:
    c = c.with_defaults(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
    hidden, patch = c.size("hidden_size"), c.pair("patch_size", 32)
    yield vector(at + "embeddings.class_embedding", hidden)
    inputs = c.size("num_channels", default=3) * prod(patch)
    yield Module(at + "embeddings.patch_embedding", "convolution", inputs, hidden)
    yield Module(at + "embeddings.position_embedding", "embedding", 1 + _patches(c, patch, 224), hidden)
    yield layer_norm(at + "pre_layrnorm", hidden)  # so spelt in transformers
    yield from _tower(c, at, hidden)
    yield layer_norm(at + "post_layernorm", hidden)


def _tower(c: Config, at: str, hidden: int) -> Iterator[Module]:
    inner = c.size("intermediate_size")
    c.divided(hidden, c.size("num_attention_heads"))
    for i in range(c.size("num_hidden_layers", default=12)):
        block = f"{at}encoder.layers.{i}."
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            yield linear(f"{block}self_attn.{name}", hidden, hidden, True, layer=i)
        yield layer_norm(block + "layer_norm1", hidden, layer=i)
        yield linear(block + "mlp.fc1", hidden, inner, True, layer=i)
        yield linear(block + "mlp.fc2", inner, hidden, True, layer=i)
        yield layer_norm(block + "layer_norm2", hidden, layer=i)


def _patches(c: Config, patch: tuple[int, int], default: int) -> int:
    """Return how many patches an image has; what is left over at an edge is not read."""
    height, width = c.pair("image_size", default)
    return (height // patch[0]) * (width // patch[1])


def wav2vec2(c: Config, task: str) -> Iterator[Module]:
    """Yield the modules of wav2vec 2: convolutions over the samples, a convolution for positions, and the blocks.

    The kernel of the positions' convolution is held as a direction and a length (weight normalisation).
    """
    c = c.with_defaults(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072)
    hidden, inner, layers = c.size("hidden_size"), c.size("intermediate_size"), c.size("num_hidden_layers")
    c.divided(hidden, c.size("num_attention_heads"))
    at = "" if task == "body" else "wav2vec2."
    if c.share("mask_time_prob", 0.05, most=1) > 0 or c.share("mask_feature_prob", 0.0, most=1) > 0:
        yield vector(at + "masked_spec_embed", hidden)
    widths = c.numbers("conv_dim") or [512] * CONV_LAYERS
    yield from _samples(c, at + "feature_extractor.conv_layers.", widths)
    yield layer_norm(at + "feature_projection.layer_norm", widths[-1])
    yield linear(at + "feature_projection.projection", widths[-1], hidden, True)
    kernel, groups = c.size("num_conv_pos_embeddings", default=128), c.size("num_conv_pos_embedding_groups", default=16)
    path = at + "encoder.pos_conv_embed.conv"
    yield Module(path, "convolution", hidden * kernel, hidden, True, groups=groups)
    yield vector(path + ".parametrizations.weight.original0", kernel)
    yield layer_norm(at + "encoder.layer_norm", hidden)
    narrow = c.size("adapter_attn_dim", default=0) if c.flag("do_stable_layer_norm") else 0
    for i in range(layers):
        block = f"{at}encoder.layers.{i}."
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            yield linear(f"{block}attention.{name}", hidden, hidden, True, layer=i)
        yield layer_norm(block + "layer_norm", hidden, layer=i)
        yield linear(block + "feed_forward.intermediate_dense", hidden, inner, True, layer=i)
        yield linear(block + "feed_forward.output_dense", inner, hidden, True, layer=i)
        yield layer_norm(block + "final_layer_norm", hidden, layer=i)
        if narrow:  # an adapter for each language, as in MMS
            yield layer_norm(block + "adapter_layer.norm", hidden, layer=i)
            yield linear(block + "adapter_layer.linear_1", hidden, narrow, True, layer=i)
            yield linear(block + "adapter_layer.linear_2", narrow, hidden, True, layer=i)
    width = hidden
    if c.flag("add_adapter"):
        width = c.size("output_hidden_size", default=hidden)
        yield from _length_adapter(c, at + "adapter.", hidden, width)
    yield from _sound_head(c, task, hidden, width, widths[-1])


def _samples(c: Config, at: str, widths: list[int]) -> Iterator[Module]:
    """Yield the convolutions over the samples. The first has a norm, or all have."""
    kernels, norm = c.numbers("conv_kernel") or [10, 3, 3, 3, 3, 2, 2], c.text("feat_extract_norm", "group")
    if len(kernels) != len(widths):
        raise PeftLabError(
            f"{c.source}: conv_kernel has {len(kernels)} entries, but conv_dim has {len(widths)}. Both must list one "
            "number for each convolution."
        )
    if norm not in ("group", "layer"):
        raise PeftLabError(f"{c.source}: feat_extract_norm must be 'group' or 'layer', not {norm!r}.")
    for i, (inputs, width, kernel) in enumerate(zip([1, *widths], widths, kernels, strict=False)):
        yield Module(f"{at}{i}.conv", "convolution", inputs * kernel, width, c.flag("conv_bias"))
        if norm == "layer" or i == 0:
            yield layer_norm(f"{at}{i}.layer_norm", width)


def _length_adapter(c: Config, at: str, hidden: int, width: int) -> Iterator[Module]:
    """Yield the convolutions that shorten the output. Each has two halves, one of which gates the other."""
    if width != hidden:
        yield linear(at + "proj", hidden, width, True)
        yield layer_norm(at + "proj_layer_norm", width)
    for i in range(c.size("num_adapter_layers", default=3)):
        inputs = width * c.size("adapter_kernel_size", default=3)
        yield Module(f"{at}layers.{i}.conv", "convolution", inputs, 2 * width, True)


def _sound_head(c: Config, task: str, hidden: int, width: int, features: int) -> Iterator[Module]:
    narrow = c.size("classifier_proj_size", default=256)
    if task in ("classifier", "token classifier", "speaker vectors") and c.flag("use_weighted_layer_sum"):
        yield vector("layer_weights", c.size("num_hidden_layers") + 1)
    if task == "characters":  # peft does not see that this is the output, so it is as any layer
        yield linear("lm_head", width, c.size("vocab_size", default=32), True)
    elif task == "classifier":
        yield linear("projector", hidden, narrow, True)
        yield classifier(narrow, c.labels())
    elif task == "token classifier":
        yield classifier(hidden, c.labels())
    elif task == "pretraining":
        groups, each = c.size("num_codevector_groups", default=2), c.size("num_codevectors_per_group", default=320)
        inner, outputs = c.size("codevector_dim", default=256), c.size("proj_codevector_dim", default=256)
        yield vector("quantizer.codevectors", groups * each * (inner // groups))
        yield linear("quantizer.weight_proj", features, groups * each, True)
        yield linear("project_hid", hidden, outputs, True)
        yield linear("project_q", inner, outputs, True)
    elif task == "speaker vectors":
        widths, kernels = (
            c.numbers("tdnn_dim") or [512, 512, 512, 512, 1500],
            c.numbers("tdnn_kernel") or [5, 3, 3, 1, 1],
        )
        outputs = c.size("xvector_output_dim", default=512)
        yield linear("projector", hidden, widths[0], True)
        for i, kernel in enumerate(kernels):
            yield linear(f"tdnn.{i}.kernel", widths[max(i - 1, 0)] * kernel, widths[i], True, uncalled=True)
        yield linear("feature_extractor", widths[-1] * 2, outputs, True)
        yield linear("classifier", outputs, outputs, True, role="head")
        yield vector("objective.weight", outputs * c.labels())
