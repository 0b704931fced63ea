"""Hold the experts of a mixture in four bits: a parameter of three dimensions, each expert quantised by itself.

    W: (experts, out, in)    codes: (experts, ceil(out in / 2)),  scales: (experts, ceil(out in / 64))

The blocks of an expert run along the last dimension, as those of a linear layer's weight do, and each expert has blocks
and scales of its own. So its codes equal, bit for bit, those of the same matrix quantised alone. While the module runs,
its parameter is the dequantised one (`core.parameters`), and no copy of it is kept for the backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftlab.core.hooks import run_host
from peftlab.core.parameters import Coded, coded, stand_in
from peftlab.errors import PeftLabError
from peftlab.quantization.backends import AUTO, choose
from peftlab.quantization.blockwise import SCALE_BLOCK, Quantized, QuantState
from peftlab.quantization.codebooks import dynamic_book
from peftlab.quantization.serialised import experts_from_tensors, experts_to_tensors

LARGEST = 2**31  # so many weights bitsandbytes' kernels can count


@dataclass(frozen=True)
class StackState(QuantState):
    """Say what the codes of several experts stand for. All tensors have one more dimension in front, the experts.

    Attributes:
        shape: (experts, out, in).
        absmax: (experts, blocks). nested_absmax: (experts, ceil(blocks / 256)). offset: (experts,).
    """

    def one(self, index: int) -> QuantState:
        """Return what the codes of one expert stand for, as if it had been quantised alone."""
        own = {name: tensor[index] for name, tensor in self.tensors().items()}
        return QuantState(
            own["absmax"], torch.Size(self.shape[1:]), self.dtype, self.block_size, self.format,
            nested_absmax=own.get("nested_absmax"), offset=own.get("offset"),
        )  # fmt: skip

    def scales(self) -> Tensor:
        """Return the blocks' scales as numbers, (experts, blocks) float32."""
        if self.nested_absmax is None or self.offset is None:
            return self.absmax
        # c = d[code] c2 + mean(c), as for one expert alone
        values = dynamic_book(self.absmax.device)[self.absmax.int()]
        nested = self.nested_absmax.repeat_interleave(SCALE_BLOCK, dim=1)[:, : values.shape[1]]
        return values.mul_(nested).add_(self.offset[:, None])

    def together(self) -> QuantState:
        """Return the state of all experts as one weight, where each fills whole blocks."""
        return QuantState(self.scales().reshape(-1), self.shape, self.dtype, self.block_size, self.format)

    def on(self, device: torch.device) -> StackState:
        """Return the same state on a device."""
        if self.absmax.device == device:
            return self
        return self.with_tensors({name: tensor.to(device) for name, tensor in self.tensors().items()})


class ExpertCodes(Coded):
    """A frozen parameter of codes, (experts, ceil(out in / 2)) uint8, that knows what they stand for.

    Its scales follow it to another device at their next use. A cast of the model does not touch them.

    Attributes:
        quant_state: the `StackState`.
        backend: `"auto"`, `"triton"`, `"bitsandbytes"` or `"reference"`.
    """

    quant_state: StackState
    backend: str

    def __new__(cls, packed: Tensor, state: StackState, backend: str = AUTO) -> ExpertCodes:
        made = torch.Tensor._make_subclass(cls, packed.detach(), False)
        made.quant_state, made.backend = state, backend
        return made

    def __init__(self, packed: Tensor, state: StackState, backend: str = AUTO) -> None:
        pass  # a tensor is made in __new__

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Return the weights that the codes stand for, (experts, out, in)."""
        self.quant_state = state = self.quant_state.on(self.device)
        worker, packed = choose(self.backend, state.format, state.block_size, self.device), self.detach()
        if math.prod(state.shape[1:]) % state.block_size == 0 and math.prod(state.shape) < LARGEST:
            return worker.dequantize(packed.reshape(-1, 1), state.together(), dtype)
        each = (worker.dequantize(packed[e].view(-1, 1), state.one(e), dtype) for e in range(state.shape[0]))
        return torch.stack(list(each))

    def __deepcopy__(self, memo: dict[int, Any]) -> ExpertCodes:
        if id(self) not in memo:
            state = self.quant_state
            own = state.with_tensors({name: tensor.clone() for name, tensor in state.tensors().items()})
            memo[id(self)] = ExpertCodes(self.detach().clone(), own, self.backend)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return ExpertCodes, (self.detach(), self.quant_state, self.backend)


def quantize_experts(
    weight: Tensor, quantize: Callable[[Tensor, str], Quantized], name: str
) -> tuple[Tensor, StackState]:
    """Quantise each expert of a weight, (experts, out, in), by itself.

    Args:
        quantize: returns the codes of one expert; it is given a name for errors.

    Returns:
        (the codes, (experts, bytes) uint8; what they stand for).
    """
    each = [quantize(weight[e], f"{name}[{e}]") for e in range(weight.shape[0])]
    stacked = {key: torch.stack([one.state.tensors()[key] for one in each]) for key in each[0].state.tensors()}
    first = each[0].state
    state = StackState(
        stacked["absmax"], weight.shape, weight.dtype, first.block_size, first.format,
        nested_absmax=stacked.get("nested_absmax"), offset=stacked.get("offset"),
    )  # fmt: skip
    return torch.stack([one.packed.view(-1) for one in each]), state


def hold(host: nn.Module, name: str, codes: ExpertCodes) -> None:
    """Put codes in the place of a module's parameter, and let the module read them when it runs."""
    host._parameters[name] = codes
    stand_in(host, run_host)
    if _save not in host._state_dict_hooks.values():
        host._register_state_dict_hook(_save)
        host.register_load_state_dict_pre_hook(_load)


def let_go(host: nn.Module, name: str, weight: Tensor) -> None:
    """Put a weight in the place of codes: the reverse of `hold`, but for the forward, which then finds no codes."""
    host._parameters[name] = nn.Parameter(weight, requires_grad=False)
    if not coded(host):
        for table in (host._state_dict_hooks, host._load_state_dict_pre_hooks):
            for key in [key for key, hook in table.items() if getattr(hook, "hook", hook) in (_save, _load)]:
                del table[key]


def _save(host: nn.Module, destination: dict[str, Any], prefix: str, _: Any) -> None:
    """Put what the codes stand for beside them into a state dict."""
    for name in coded(host):
        codes = host._parameters[name]
        assert isinstance(codes, ExpertCodes)
        destination |= {
            f"{prefix}{name}.{key}": tensor for key, tensor in experts_to_tensors(codes.quant_state).items()
        }


def _load(host: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Take what the codes stand for out of a state dict."""
    for name in coded(host):
        codes, start = host._parameters[name], f"{prefix}{name}."
        assert isinstance(codes, ExpertCodes)
        mine = {key.removeprefix(start): state_dict.pop(key) for key in list(state_dict) if key.startswith(start)}
        if mine:
            codes.quant_state = read_state(mine, codes.quant_state.shape, f"{prefix}{name}").on(codes.device)


def read_state(tensors: Mapping[str, Tensor], shape: torch.Size | tuple[int, ...], name: str) -> StackState:
    """Return the state of stored tensors, and require a parameter's shape."""
    each = experts_from_tensors(tensors, name)
    if (len(each), *each[0].shape) != tuple(shape):
        raise PeftLabError(
            f"{name} is stored as {(len(each), *each[0].shape)}, and the model has {tuple(shape)}. Load it into the "
            "model that it was saved from."
        )
    stacked = {key: torch.stack([one.tensors()[key] for one in each]) for key in each[0].tensors()}
    first = each[0]
    return StackState(
        stacked["absmax"], torch.Size(shape), first.dtype, first.block_size, first.format,
        nested_absmax=stacked.get("nested_absmax"), offset=stacked.get("offset"),
    )  # fmt: skip
