"""Quantise what a start has left of the weights, and attach that start: LoftQ and QPiSSA on a base in four bits."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from peftlab.adapters.injection import attach, check_new, prepare
from peftlab.checks import checked, whole
from peftlab.core.records import own_tensor, record_of, unwrap
from peftlab.core.targets import by_pattern, find
from peftlab.errors import PeftLabError
from peftlab.methods.lora import LoRAConfig
from peftlab.methods.lora_loftq import alternate, as_stored
from peftlab.methods.lora_starts import check_linear, from_weight, weight_of
from peftlab.quantization.backends import AUTO
from peftlab.quantization.blockwise import quantize
from peftlab.quantization.model import candidates, names_in, quantize_model, read_past

MOST_ROUNDS = 100


@checked("rounds", "skip", "block_size")
@torch.no_grad()
def quantize_and_attach(
    model: nn.Module,
    config: LoRAConfig,
    name: str = "default",
    *,
    rounds: int | None = None,
    backend: str = AUTO,
    skip: Iterable[str] = (),
    format: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    adapter_dtype: torch.dtype | str | None = None,
) -> nn.Module:
    """Quantise a model so that it and a LoRA's start together are near the weights: LoftQ or QPiSSA. In place.

    A layer's four bits hold W - s B A, and the adapter starts at A and B, so that Q + s B A is near W. Adapter and base
    belong together: without the adapter the base computes something else than the model did. Save the base with
    `save_quantized` and the adapter with `save_adapter`; it is a plain LoRA of rank r, and `load_adapter` refuses
    another base. To keep a base that is quantised already, use `attach(model, LoRAConfig(init="loftq"), data=whole)`.

    Args:
        model: the model in full precision.
        config: a LoRA whose `init` is `"loftq"`, or a start from the weight: `"pissa"` (QPiSSA), `"olora"`.
        rounds: how often a weight is quantised and A and B fitted to what was lost. By default 1 for LoftQ, as in
            Hugging Face peft, and for the others 0: A and B stay as they start.
        backend, skip, format, block_size, double_quant: as for `quantize_model`.
        adapter_dtype: as for `attach`.

    Returns:
        The same model.

    Raises:
        PeftLabError: the config starts from something else, a target stays in full precision, or a value is out of
            range, as for `quantize_model` and `attach`. The model is then as it was.

    >>> weight = model.model.layers[0].self_attn.q_proj.weight.clone()
    >>> config = pl.LoRAConfig(r=4, init="loftq", target_modules=["q_proj"])
    >>> layer = pl.quantize_and_attach(model, config, rounds=5).model.layers[0].self_attn.q_proj
    >>> found = layer(torch.eye(16)).T  # Q + s B A
    >>> lost = (weight - pl.quantize_nf4(weight).dequantize()).norm()
    >>> (found - weight).norm() < 0.8 * lost
    tensor(True)
    """
    root = unwrap(model)
    if type(config) is not LoRAConfig or not (from_weight(config.init) or config.init == "loftq"):
        raise PeftLabError(
            f"The config is {config!r}; give LoRAConfig(init='loftq'), or one that starts from the weight, such as "
            "init='pissa'."
        )
    check_new(root, name)
    if record_of(root) is not None:
        raise PeftLabError("Adapters are attached to this model; quantise it first, then attach.")
    rounds = (
        (1 if config.init == "loftq" else 0) if rounds is None else whole("rounds", rounds, least=0, most=MOST_ROUNDS)
    )
    plain: Any = replace(config, init="kaiming")
    prepare(root, name, plain, adapter_dtype)  # refuses what cannot be attached
    targets = find(root, config)
    held = set(candidates(root, names_in(skip), read_past(root)))
    starts: dict[str, tuple[Tensor, Tensor]] = {}
    rests: dict[str, Tensor] = {}
    for path, host in targets.items():
        if path not in held:
            raise PeftLabError(
                f"{path} stays in full precision, so init={config.init!r} has nothing to quantise there. Leave it out "
                "of target_modules."
            )
        r, dtype = by_pattern(config.rank_pattern, path, config.r), own_tensor(host, "weight").dtype
        check_linear(host, r, config.init)
        weight = as_stored(host, weight_of(host, config.init))

        def quantised(rest: Tensor, dtype: torch.dtype = dtype, path: str = path) -> Tensor:
            codes = quantize(rest.to(dtype), format, block_size=block_size, double_quant=double_quant, name=path)
            return codes.dequantize().to(rest)

        a, b, rest = alternate(weight, r, config.scaling(path), config.init, rounds, quantised)
        starts[path], rests[path] = (a, b), as_stored(host, rest)
    before = {path: own_tensor(targets[path], "weight").clone() for path in rests}
    try:
        for path, rest in rests.items():
            own_tensor(targets[path], "weight").copy_(rest)
        quantize_model(root, backend, skip, format=format, block_size=block_size, double_quant=double_quant)
    except BaseException:
        for path, weight in before.items():
            own_tensor(targets[path], "weight").copy_(weight)
        raise
    attach(model, plain, name, adapter_dtype=adapter_dtype)
    for path, factors in starts.items():
        part: Any = root.get_submodule(path).get_submodule(f"peftlab.{name}.lora")
        part.on_rest = True
        for own, value in zip(("lora_A", "lora_B"), factors, strict=True):
            part.get_parameter(own).copy_(value)
    return model
