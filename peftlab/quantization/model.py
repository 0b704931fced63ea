"""Quantise the linear layers of a whole model to four bits, and back: in place, one layer at a time."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from peftlab import checks
from peftlab.checks import checked
from peftlab.core.calls import observed, passed_weights
from peftlab.core.experts import Target, expert_parameters, shape_of
from peftlab.core.hooks import CHILD, move
from peftlab.core.parameters import Coded, step_aside
from peftlab.core.records import as_transformer, own_tensor, record_of, tensor_at, unwrap
from peftlab.core.sharding import refuse_sharded
from peftlab.core.targets import TASK_HEADS, is_conv1d, names_match
from peftlab.errors import PeftLabError, did_you_mean, warn
from peftlab.quantization.backends import AUTO, check_backend, choose
from peftlab.quantization.blockwise import Quantized, check_block_size, quantize
from peftlab.quantization.codebooks import check_format
from peftlab.quantization.linear import Linear4bit
from peftlab.quantization.marks import guard_saving, restore_transformers_attributes, set_transformers_attributes
from peftlab.quantization.stacks import ExpertCodes, hold, let_go, quantize_experts
from peftlab.quantization.weights import dense, is_quantized, is_repacked, quantized

# The attributes that transformers sets on a model that it loaded in four bits (5.15 sets all, 5.23 all but the last)
MARKS = ("hf_quantizer", "quantization_method", "is_loaded_in_4bit", "is_quantized", "is_4bit_serializable")


@checked("skip", "block_size")
def quantize_model(
    model: nn.Module,
    backend: str = AUTO,
    skip: Iterable[str] = (),
    *,
    format: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    device: torch.device | str | None = None,
) -> nn.Module:
    """Hold a model's linear layers and experts in four bits, frozen, in place. Then `attach` works as on any model.

    These stay as they are: the output head, the heads of tasks (`classifier`, `score`, ...), tied weights, embeddings,
    norms, the router of a mixture, and each layer whose weight the model reads without calling it, if only to see its
    dtype (`nn.MultiheadAttention`, WavLM's attention, some layers of Mamba, `wo` of T5). Each layer's old weight is
    freed before the next is touched, so the peak is the model so far plus one layer. GPT-2's Conv1D becomes a linear
    layer of the transposed weight. The fused experts of a mixture stay one parameter of their module, and each is
    quantised by itself.

    Args:
        backend: `"triton"`, `"bitsandbytes"` or `"reference"`; `"auto"` takes the first of these that can be used.
        skip: names, or endings of paths, of further modules to leave alone.
        format, block_size, double_quant: as for `quantize`.
        device: where to quantise. Each weight is moved there by itself, so for a model in main memory the GPU needs
            room for the 4-bit form and one layer. What is not quantised is moved at the end.

    Returns:
        The same model. A transformers model's config also says how it is quantised, so that bitsandbytes can load what
            its `save_pretrained` writes. With 4-bit experts, which bitsandbytes has no form for, `save_pretrained` is
            refused, and `save_quantized` writes the model.

    Raises:
        PeftLabError: adapters are attached; a name in `skip` or a setting does not exist; a weight (named) holds NaN or
            infinity; there is nothing to quantise. The model is then as it was.

    >>> model = pl.quantize_model(model)
    >>> model = pl.attach(model, pl.LoRAConfig(r=4, target_modules=["q_proj"]))
    >>> print(pl.count_parameters(model))
    256 of 5,968 parameters train (4.2895%)
    """
    root = unwrap(model)
    device = None if device is None else checks.device(device, torch)
    if record_of(root) is not None:
        raise PeftLabError("Adapters are attached to this model; quantise it first, then attach.")
    refuse_sharded(root, "a piece of a weight cannot be quantised", "Quantise first, then attach and shard.")
    check_format(format)
    block_size = check_block_size(block_size)
    skip, past = names_in(skip), read_past(root)
    paths = list(candidates(root, skip, past))
    experts = {
        path: target for path, target in expert_parameters(root).items() if holds(root, skip, past, path, target)
    }
    for path in (*(f"{path}.weight" for path in paths), *experts):
        weight = own_tensor(root, path)
        check_backend(backend, format, block_size, device or weight.device)
        if not torch.isfinite(weight).all():
            quantize(weight, name=path)  # raises an error that says how many are wrong
    if not paths and not experts:
        raise PeftLabError(
            f"{type(root).__name__} has no linear layer left to quantise: the output head, task heads, tied weights "
            "and what `skip` names stay as they are."
        )
    quantize_layers(root, paths, backend, format, block_size, double_quant, device)
    for path, target in experts.items():
        quantize_parameter(target, path, backend, format, block_size, double_quant, device)
    if device is not None:
        root.to(device)
    mark(root, format, double_quant)
    guard_saving(root)
    return model


def quantize_layers(
    root: nn.Module,
    paths: list[str],
    backend: str,
    format: str,
    block_size: int,
    double_quant: bool,
    device: torch.device | str | None,
) -> None:
    """Replace the layers at these paths, one after the other."""
    for path in paths:
        layer = root.get_submodule(path)
        weight, bias = own_tensor(layer, "weight").detach(), tensor_at(layer, "bias")
        assert bias is None or isinstance(bias, nn.Parameter)
        weight = weight.T if is_conv1d(layer) else weight
        weight = weight.to(device) if device is not None else weight
        worker = choose(backend, format, block_size, weight.device)
        held = worker.quantize(weight, format, block_size, double_quant, f"{path}.weight")
        new = Linear4bit(held, bias, backend)
        replace(root, path, new.train(layer.training))
        del layer, weight, bias, held, new  # free them before the next layer is made


def quantize_parameter(
    target: Target,
    path: str,
    backend: str,
    format: str,
    block_size: int,
    double_quant: bool,
    device: torch.device | str | None,
) -> None:
    """Replace a parameter that holds experts by its codes."""
    weight = own_tensor(target.host, target.name).detach()

    def quantize_one(expert: torch.Tensor, name: str) -> Quantized:
        expert = expert.to(device) if device is not None else expert
        return choose(backend, format, block_size, expert.device).quantize(
            expert, format, block_size, double_quant, name
        )

    packed, state = quantize_experts(weight, quantize_one, path)
    hold(target.host, target.name, ExpertCodes(packed, state, backend))


def read_past(root: nn.Module) -> set[str]:
    """Return the paths of modules whose weights the model reads, or may read, without calling them.

    T5 asks for the dtype of a weight and casts to it what the layer reads. Codes have another dtype.
    """
    calls = observed(root)
    if calls is None:
        return passed_weights(root)
    return passed_weights(root) | calls.past | calls.unreached | {path.rpartition(".")[0] for path in calls.asked}


def skipped(skip: Iterable[str], path: str) -> bool:
    """Say whether a path, or that of a module around it, has one of these names."""
    return any(names_match(tuple(skip), ".".join(path.split(".")[:n])) for n in range(1, path.count(".") + 2))


def holds(root: nn.Module, skip: Iterable[str], past: Iterable[str], path: str, target: Target) -> bool:
    """Say whether a parameter of experts can be held as codes, and is not to be skipped."""
    parameter = own_tensor(target.host, target.name)
    if is_quantized(parameter) or not parameter.is_floating_point() or skipped(skip, path):
        return False
    shared = sum(one is parameter for module in root.modules() for one in module._parameters.values()) > 1
    if shared or target.host_path in past:
        warn(f"{path} is read by more than its own module, so these experts are not quantised.")
        return False
    return True


def routers(root: nn.Module) -> set[str]:
    """Return the paths of linear layers that choose among experts: those beside experts, with one output for each."""
    found = set()
    for path, target in expert_parameters(root).items():
        block = path.rpartition(".")[0].rpartition(".")[0]
        count = shape_of(own_tensor(target.host, target.name))[0]
        for inner, module in root.get_submodule(block).named_modules():
            if isinstance(module, nn.Linear) and module.out_features == count and re.search("gate|router", inner):
                found.add(f"{block}.{inner}".lstrip("."))
    return found


def names_in(skip: Iterable[str]) -> tuple[str, ...]:
    """Return the names in `skip`, which must be names."""
    if isinstance(skip, (str, bytes)) or not isinstance(skip, Iterable):
        raise PeftLabError(f"skip is {skip!r}; give a list of module names, such as ['lm_head'].")
    skip = tuple(skip)
    if wrong := [name for name in skip if not isinstance(name, str)]:
        raise PeftLabError(f"skip holds {checks.shown(wrong[0])}; its entries are module names, as strings.")
    return skip


def candidates(root: nn.Module, skip: tuple[str, ...], past: set[str]) -> Iterator[str]:
    """Yield the paths of the layers to quantise, in the model's order."""
    modules, experts = dict(root.named_modules()), expert_parameters(root)
    for name in skip:
        if not any(names_match((name,), path) for path in (*modules, *experts)):
            raise PeftLabError(
                f"skip names {name!r}, which matches no module.{did_you_mean(name, (*modules, *experts))}"
            )
    skip += tuple(name for names in TASK_HEADS.values() for name in names)
    head = as_transformer(root).get_output_embeddings() if hasattr(root, "get_output_embeddings") else None
    past = past | routers(root)
    uses = Counter(id(p) for module in modules.values() for p in module.parameters(recurse=False))
    for path, module in modules.items():
        if type(module) is not nn.Linear and not is_conv1d(module):
            continue  # a subclass may use its weight in another way
        parent = modules[path.rpartition(".")[0]]
        within = skipped(skip, path)
        shared = uses[id(module.weight)] > 1
        if module is head or within or shared or path in past or isinstance(parent, nn.MultiheadAttention):
            continue
        yield path


@checked()
@torch.no_grad()
def dequantize_model(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Turn 4-bit layers, this package's or bitsandbytes', into plain `nn.Linear`, in place, and 4-bit experts too.

    Adapters stay attached.

    What quantisation lost does not come back: the weights are what the codes stand for. To ship a QLoRA adapter merged
    into its base, dequantise, then `merge`.

    Args:
        dtype: the dtype of the new weights; by default that of the weight before it was quantised.

    Raises:
        PeftLabError: no layer is quantised; the model is merged; bitsandbytes has repacked a weight for inference. The
            model is then as it was.

    >>> model = pl.attach(pl.quantize_model(model), pl.LoRAConfig(r=4))
    >>> model = pl.dequantize_model(model)
    >>> pl.merge(model, unload=True).modules
    4
    """
    root = unwrap(model)
    record = record_of(root)
    if record is not None and record.activity.merged:
        raise PeftLabError("The model is merged; call unmerge(model) first, dequantise, and merge again.")
    paths = [path for path, module in root.named_modules() if is_quantized(getattr(module, "weight", None))]
    experts = [
        (module, name) for module in root.modules() for name, p in module._parameters.items() if isinstance(p, Coded)
    ]
    if not paths and not experts:
        raise PeftLabError(f"No layer of this {type(root).__name__} is held in four bits; there is nothing to undo.")
    for path in paths:
        weight = own_tensor(root.get_submodule(path), "weight")
        if is_repacked(weight):
            dense(weight)  # raises an error that says what to do
    for path in paths:
        layer = root.get_submodule(path)
        assert isinstance(layer, nn.Linear)  # ours and bitsandbytes' both are
        new = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        new.weight = nn.Parameter(dense(layer.weight, dtype), requires_grad=False)
        new.bias = layer.bias
        new.train(layer.training)
        move(layer, new)
        replace(root, path, new)
        del layer, new
    for host, name in experts:
        let_go(host, name, dense(own_tensor(host, name), dtype))
        if CHILD not in host._modules:
            step_aside(host)
    unmark(root)
    return model


def replace(root: nn.Module, path: str, new: nn.Module) -> None:
    """Put a module in another's place."""
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, new)


def mark(root: nn.Module, format: str, double_quant: bool) -> None:
    """Write into a transformers config how the model is quantised, in transformers' words; only for fp4 and nf4."""
    config = getattr(root, "config", None)
    if config is not None and hasattr(config, "to_dict") and format in ("nf4", "fp4"):
        config.quantization_config = quantization_config(root, format, double_quant)


def quantization_config(root: nn.Module, format: str, double_quant: bool) -> dict[str, object]:
    """Return what transformers' `BitsAndBytesConfig` would write, with the linear layers that are not quantised."""
    whole = [path for path, module in root.named_modules() if type(module) is nn.Linear]
    dtype = next((p.dtype for p in root.parameters() if p.is_floating_point()), torch.float32)
    return {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": format,
        "bnb_4bit_use_double_quant": double_quant, "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8", "llm_int8_skip_modules": whole or None,
    }  # fmt: skip


def unmark(root: nn.Module) -> None:
    """Take every mark of quantisation off a transformers model."""
    record = record_of(root)
    if record is not None:
        restore_transformers_attributes(root, record)
    if hasattr(getattr(root, "config", None), "quantization_config"):
        del as_transformer(root).config.quantization_config
    for name in MARKS:
        if name in root.__dict__:
            delattr(root, name)
    if record is not None:
        set_transformers_attributes(root, record)


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's parameters and buffers; 4-bit scales are included, and tied ones count once."""
    root = unwrap(model)
    tensors = {id(t): t for t in (*root.parameters(), *root.buffers())}
    total = sum(tensor.nbytes for tensor in tensors.values())
    for tensor in tensors.values():
        if is_quantized(tensor) and not is_repacked(tensor):
            total += sum(t.nbytes for t in quantized(tensor).state.tensors().values())
    return total
