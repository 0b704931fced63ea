"""Say whether the fast path computes what this run computes, and if not, the one reason.

It takes models by what they are made of: the classes of `FAMILIES` as transformers has them, with nothing put around,
on or in place of their modules but LoRA on the seven projections. Whatever it does not know to be the same is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftlab.core.forward import Forward
from peftlab.core.hooks import adapters_on, hosts
from peftlab.core.records import record_of
from peftlab.methods.lora import LoRALinear
from peftlab.quantization.weights import is_quantized, is_repacked

FAMILIES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3")  # different ways to the same numbers
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Whose hooks may stay: ours, and those that transformers leaves in a model which was once asked for `hidden_states` or
# `attentions`. The latter do something only within a call that asks for these again.
HARMLESS = ("peftlab.", "transformers.utils.output_capturing")
GROUPS = {
    "qkv": ("self_attn", ("q_proj", "k_proj", "v_proj")),
    "o": ("self_attn", ("o_proj",)),
    "gate_up": ("mlp", ("gate_proj", "up_proj")),
    "down": ("mlp", ("down_proj",)),
}


class Refused(Exception):
    """The reason why the fast path cannot take a run."""


@dataclass(frozen=True)
class Decoder:
    """The parts of a model that the fast path computes with."""

    embedding: nn.Embedding
    blocks: list[BlockParts]
    norm: nn.Module
    rotary: nn.Module
    head: nn.Linear
    heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class BlockParts:
    """One block: {group: [(linear, its LoRA or None)]}, {norm: module or None}, and the attention's window."""

    groups: dict[str, list[tuple[nn.Linear, LoRALinear | None]]]
    norms: dict[str, nn.Module | None]
    window: int | None


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
    loras = _active_loras(model)
    _check_trained(model, loras)
    _check_parts(core)
    blocks = [_block(block, loras, config, index) for index, block in enumerate(core.model.layers)]
    linears = [linear for block in blocks for group in block.groups.values() for linear, _ in group]
    if len({linear.weight.data_ptr() for linear in linears}) < len(linears):
        raise Refused("some of its layers share a weight")
    attention = core.model.layers[0].self_attn
    decoder = Decoder(
        core.model.embed_tokens, blocks, core.model.norm, core.model.rotary_emb, core.lm_head,
        config.num_attention_heads, config.num_key_value_heads, attention.head_dim,
    )  # fmt: skip
    if type(decoder.embedding) is not nn.Embedding or decoder.embedding.max_norm is not None:
        raise Refused("its word embeddings are no plain nn.Embedding")
    if type(decoder.head) is not nn.Linear or decoder.head.bias is not None:
        raise Refused("its output head is no plain nn.Linear without a bias")
    _check_tensors(model, linears)
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
            for hook in getattr(module, table, None) or {}:
                function: Any = getattr(module, table)[hook]
                if not str(getattr(function, "__module__", "")).startswith(HARMLESS):
                    raise Refused(f"{where} has a hook, {getattr(function, '__qualname__', function)}")
        if getattr(module, "parametrizations", None):
            raise Refused(f"{where} has a parametrization")


def _check_parts(core: Any) -> None:
    """Refuse a model with a part of another class or with another number than its class gives it."""
    home, count, epsilons = type(core).__module__, core.config.num_hidden_layers, set()

    def check(path: str, norm: bool = False) -> Any:
        part = core.get_submodule(path)
        kind: Any = type(part)
        if kind.__module__ != home:
            raise Refused(f"{path} is a {kind.__name__} of {kind.__module__}, not of {home}")
        if not kind.forward.__module__.startswith(("transformers.", "torch.")):
            raise Refused(f"the forward of {kind.__name__} was replaced by one of {kind.forward.__module__}")
        if norm:
            epsilons.add(part.variance_epsilon)
        return part

    layers = check("model").layers
    if len(layers) > count:
        raise Refused(f"it has {len(layers)} blocks, of which its config lets {count} run")
    check("model.norm", norm=True)
    check("model.rotary_emb")
    for index in range(len(layers)):
        path = f"model.layers.{index}"
        check(path)
        attention, mlp = check(f"{path}.self_attn"), check(f"{path}.mlp")
        norms = [f"self_attn.{name}" for name in ("q_norm", "k_norm") if hasattr(attention, name)]
        for name in ("input_layernorm", "post_attention_layernorm", *norms):
            check(f"{path}.{name}", norm=True)
        if not type(mlp.act_fn).__name__.startswith("SiLU"):
            raise Refused(f"{path}.mlp.act_fn is a {type(mlp.act_fn).__name__}, not SiLU")
        if attention.scaling != attention.head_dim**-0.5:
            raise Refused(f"{path}.self_attn scales by {attention.scaling}, not by 1 / sqrt({attention.head_dim})")
    if len(epsilons) > 1:
        raise Refused(f"its norms have several epsilons: {', '.join(map(str, sorted(epsilons)))}")


def _active_loras(model: nn.Module) -> dict[int, LoRALinear]:
    """Return {id of a linear layer: its LoRA} of the one adapter that runs."""
    record = record_of(model)
    if record is None:
        raise Refused("no adapter is attached")
    activity = record.activity
    if not activity.running:
        raise Refused("its adapters are merged or disabled")
    if activity.rows is not None or list(activity.weights.values()) != [1.0]:
        raise Refused("not one adapter of weight 1 is active but a mixture, several or none")
    (name,) = activity.weights
    found: dict[int, LoRALinear] = {}
    for path, host in hosts(model):
        if name not in adapters_on(host):
            continue
        for part in adapters_on(host).parts_of(name).values():
            if type(part) is not LoRALinear:
                where = path or "the model"
                raise Refused(f"{name!r} has a {type(part).__name__} on {where}, and LoRA on linear layers is computed")
            if not path.endswith(tuple(one for _, names in GROUPS.values() for one in names)):
                raise Refused(f"{name!r} adapts {path}, which is none of the seven projections of a block")
            if part.dropout:
                raise Refused(f"{name!r} has dropout, {part.dropout}")
            if part.lora_B_bias is not None:
                raise Refused(f"{name!r} has lora_bias")
            found[id(host)] = part
    return found


def _check_trained(model: nn.Module, loras: dict[int, LoRALinear]) -> None:
    """Refuse a run that trains less or more than the LoRA that runs."""
    mine = {id(p) for lora in loras.values() for p in (lora.lora_A, lora.lora_B)}
    trained = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    more = [name for key, name in trained.items() if key not in mine]
    if more:
        raise Refused(f"{len(more)} parameters train that are no LoRA on the seven projections; the first is {more[0]}")
    if mine - set(trained):
        raise Refused(f"{len(mine - set(trained))} matrices of its LoRA are frozen")
    kinds = {p.dtype for lora in loras.values() for p in (lora.lora_A, lora.lora_B)}
    if len(kinds) > 1:
        raise Refused(f"its LoRA has matrices of several dtypes: {', '.join(sorted(map(str, kinds)))}")
    if kinds & {torch.bfloat16, torch.float16}:
        raise Refused(f"its LoRA is in {next(iter(kinds))}; in float32 this path keeps a 16-bit copy by itself")


def _block(block: Any, loras: dict[int, LoRALinear], config: Any, index: int) -> BlockParts:
    groups = {}
    for group, (parent, names) in GROUPS.items():
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
        groups[group] = [(linear, loras.get(id(linear))) for linear in linears]
    attention = block.self_attn
    norms = {
        "input": block.input_layernorm, "post": block.post_attention_layernorm,
        "q": getattr(attention, "q_norm", None), "k": getattr(attention, "k_norm", None),
    }  # fmt: skip
    for norm in norms.values():
        if norm is not None and not (type(norm).__name__.endswith("RMSNorm") and hasattr(norm, "variance_epsilon")):
            raise Refused(f"block {index} has a norm of the kind {type(norm).__name__}")
    layer_types = getattr(config, "layer_types", None)
    slides = layer_types[index] == "sliding_attention" if layer_types else config.model_type == "mistral"
    return BlockParts(groups, norms, getattr(config, "sliding_window", None) if slides else None)


def _check_tensors(model: nn.Module, linears: list[nn.Linear]) -> None:
    """Refuse weights on several devices, and of dtypes that are not computed with."""
    tensors = dict(_plain_tensors(model))
    devices = {tensor.device for tensor in tensors.values()}
    if len(devices) > 1 or next(iter(devices)).type not in ("cpu", "cuda"):
        raise Refused(f"its weights are on {', '.join(sorted(map(str, devices)))}, not on one CPU or one CUDA GPU")
    if any(tensor.device.type == "cpu" and tensor.is_shared() for tensor in tensors.values()):
        raise Refused("its weights are in memory that processes share, and would leave it")
    kinds = {tensor.dtype for name, tensor in tensors.items() if "peftlab" not in name.split(".")}
    if len(kinds) > 1 or not kinds <= {torch.float32, torch.bfloat16, torch.float64}:
        raise Refused(f"its weights are {', '.join(sorted(map(str, kinds)))}, and one of float32, bfloat16 is computed")


def _plain_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        if not is_quantized(parameter):
            yield name, parameter
