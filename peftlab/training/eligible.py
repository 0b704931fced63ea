"""Say whether the fast path computes what a model computes, and if not, the one reason.

It takes models by what they are made of: the classes of `FAMILIES` as transformers has them, with nothing put around,
on or in place of their modules but LoRA on the seven projections. Whatever it does not know to be the same is refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from peftlab.core.forward import Forward
from peftlab.core.hooks import is_adapter_name
from peftlab.fast import GROUPS, BlockParts, Decoder, Refused, Sizes, loras_of
from peftlab.quantization.weights import is_quantized, is_repacked
from peftlab.training.chunked import HOOKS

FAMILIES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3")  # different ways to the same numbers
# Whose hooks may stay: ours, and those that transformers leaves in a model which was once asked for `hidden_states` or
# `attentions`. The latter do something only within a call that asks for these again.
HARMLESS = ("peftlab.", "transformers.utils.output_capturing")


def decoder_of(model: nn.Module) -> Decoder:
    """Return the parts of a model whose step the fast path can compute.

    Raises:
        Refused: with the reason why it cannot.
    """
    core: Any = model
    name = type(model).__name__
    if name not in FAMILIES or not type(model).__module__.startswith("transformers.models."):
        raise Refused(f"{name} is none of {', '.join(FAMILIES)}")
    config = core.config
    if config.hidden_act != "silu":
        raise Refused(f"its activation is {config.hidden_act}, not silu")
    if config.attention_dropout:
        raise Refused(f"its attention has dropout, {config.attention_dropout}")
    if config._attn_implementation not in ATTENTION:
        raise Refused(f"its attention is {config._attn_implementation}, not one of {', '.join(ATTENTION)}")
    _check_untouched(model)
    decoder = _parts_of(core, loras_of(model))
    linears = [linear for block in decoder.blocks for group in block.groups.values() for linear, _ in group]
    if len({linear.weight.data_ptr() for linear in linears}) < len(linears):
        raise Refused("some of its layers share a weight")
    if type(decoder.embedding) is not nn.Embedding or decoder.embedding.max_norm is not None:
        raise Refused("its word embeddings are no plain nn.Embedding")
    if type(decoder.head) is not nn.Linear or decoder.head.bias is not None:
        raise Refused("its output head is no plain nn.Linear without a bias")
    _check_tensors(model)
    return decoder


def _check_untouched(model: nn.Module) -> None:
    """Refuse a model with code of others in it, which would not run."""
    if any(getattr(nn.modules.module, f"_global{table}", None) for table in HOOKS):
        raise Refused("a hook is registered for all modules")
    for path, module in model.named_modules():
        where = path or type(model).__name__
        forward = vars(module).get("forward")
        if forward is not None and not (isinstance(forward, Forward) and forward.own is None):
            raise Refused(f"{where} has a forward of its own in place of its class's")
        for table in HOOKS:
            for hook in (getattr(module, table, None) or {}).values():
                if not str(getattr(hook, "__module__", "")).startswith(HARMLESS):
                    raise Refused(f"{where} has a hook, {getattr(hook, '__qualname__', hook)}")
        if getattr(module, "parametrizations", None):
            raise Refused(f"{where} has a parametrization")


def _parts_of(core: Any, loras: dict[str, Any]) -> Decoder:
    """Return the parts of a model, each of the class and with the numbers that its family gives it."""
    config, home, epsilons = core.config, type(core).__module__, set()

    def part(path: str, norm: bool = False) -> Any:
        module = core.get_submodule(path)
        kind: Any = type(module)
        if kind.__module__ != home:
            raise Refused(f"{path} is a {kind.__name__} of {kind.__module__}, not of {home}")
        if not kind.forward.__module__.startswith(("transformers.", "torch.")):
            raise Refused(f"the forward of {kind.__name__} was replaced by one of {kind.forward.__module__}")
        if norm:
            if not (kind.__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon")):
                raise Refused(f"{path} is a norm of the kind {kind.__name__}, no RMSNorm with an epsilon")
            epsilons.add(module.variance_epsilon)
        return module

    layers = part("model").layers
    if len(layers) > config.num_hidden_layers:
        raise Refused(f"it has {len(layers)} blocks, of which its config lets {config.num_hidden_layers} run")
    norm, rotary = part("model.norm", norm=True), part("model.rotary_emb")
    blocks = []
    for index in range(len(layers)):
        path = f"model.layers.{index}"
        block, attention, mlp = part(path), part(f"{path}.self_attn"), part(f"{path}.mlp")
        places = {"input": "input_layernorm", "post": "post_attention_layernorm"}
        norms = {name: part(f"{path}.{place}", norm=True) for name, place in places.items()}
        for name in ("q", "k"):
            own = f"{name}_norm"
            norms[name] = part(f"{path}.self_attn.{own}", norm=True) if hasattr(attention, own) else None
        if not type(mlp.act_fn).__name__.startswith("SiLU"):
            raise Refused(f"{path}.mlp.act_fn is a {type(mlp.act_fn).__name__}, not SiLU")
        if attention.scaling != attention.head_dim**-0.5:
            raise Refused(f"{path}.self_attn scales by {attention.scaling}, not by 1 / sqrt({attention.head_dim})")
        groups = {group: _group(block, index, *place, loras) for group, place in GROUPS.items()}
        types = getattr(config, "layer_types", None)
        slides = types[index] == "sliding_attention" if types else config.model_type == "mistral"
        blocks.append(BlockParts(groups, norms, getattr(config, "sliding_window", None) if slides else None))
    if len(epsilons) > 1:
        raise Refused(f"its norms have several epsilons: {', '.join(map(str, sorted(epsilons)))}")
    heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, layers[0].self_attn.head_dim
    sizes = Sizes(heads, kv_heads, head_dim, *epsilons)
    return Decoder(core.model.embed_tokens, blocks, norm, rotary, core.lm_head, sizes)


def _group(block: Any, index: int, parent: str, names: tuple[str, ...], loras: dict[str, Any]) -> list[Any]:
    """Return linear layers of one kind that read the same input, each with its LoRA or None."""
    linears = [getattr(getattr(block, parent), name) for name in names]
    for name, linear in zip(names, linears, strict=True):
        if type(linear) is not nn.Linear and not (isinstance(linear, nn.Linear) and is_quantized(linear.weight)):
            raise Refused(f"{name} of block {index} is a {type(linear).__name__}")
        if is_repacked(linear.weight):
            raise Refused(f"bitsandbytes has repacked the weight of {name} of block {index} for inference")
    if len({is_quantized(linear.weight) for linear in linears}) > 1:
        raise Refused(f"{', '.join(names)} of block {index} are in part in 4 bits")
    if len({linear.bias is None for linear in linears}) > 1:
        raise Refused(f"of {', '.join(names)} of block {index} only some have a bias")
    found = (loras.get(f"model.layers.{index}.{parent}.{name}") for name in names)
    return list(zip(linears, found, strict=True))


def _check_tensors(model: nn.Module) -> None:
    """Refuse weights on several devices, and of dtypes that are not computed with."""
    tensors = {name: parameter for name, parameter in model.named_parameters() if not is_quantized(parameter)}
    devices = {tensor.device for tensor in tensors.values()}
    if len(devices) > 1 or next(iter(devices)).type not in ("cpu", "cuda"):
        raise Refused(f"its weights are on {', '.join(sorted(map(str, devices)))}, not on one CPU or one CUDA GPU")
    if any(tensor.device.type == "cpu" and tensor.is_shared() for tensor in tensors.values()):
        raise Refused("its weights are in memory that processes share, and would leave it")
    kinds = {tensor.dtype for name, tensor in tensors.items() if not is_adapter_name(name)}
    if len(kinds) > 1 or not kinds <= {torch.float32, torch.bfloat16, torch.float64}:
        raise Refused(f"its weights are {', '.join(sorted(map(str, kinds)))}, and one of float32, bfloat16 is computed")
