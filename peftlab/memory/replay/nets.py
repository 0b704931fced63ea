"""A model for the replay: its parameters, and how its layers, norms and attention are called.

The architectures are in `decoders` and `encoders`. They follow transformers' model files line by line wherever a line
allocates, and local variables live as long as they do there. What a method adds to a layer is in `layers`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

from peftlab.errors import PeftLabError, did_you_mean
from peftlab.memory.counting.config import Config
from peftlab.memory.counting.shapes import Shape
from peftlab.memory.replay import attention, ops, products
from peftlab.memory.replay.attention import Style
from peftlab.memory.replay.tape import Memory, Parameter, Tensor, checkpoint, leaf

# Activations with one kernel for each pass, by what they keep for the backward pass: the input or the result.
ACTIVATIONS = {
    "bloom": ops.bloom_gelu,
    "silu": ops.from_input, "swish": ops.from_input, "gelu": ops.from_input, "gelu_pytorch_tanh": ops.from_input,
    "relu": ops.from_result, "tanh": ops.from_result, "sigmoid": ops.from_result,
}  # fmt: skip
BLOCK = re.compile(r"\.\d+\.")  # the end of a block's path, such as "model.layers.3."
Around = Callable[[str, Callable[..., Tensor], tuple[Tensor, ...]], Tensor]  # (block's path, its call, its inputs)


@dataclass(frozen=True)
class Recipe:
    """The settings of a run, apart from its model and its method."""

    batch: int
    sequence: int
    weight_bytes: int  # per element of the weights, their gradients and their states
    adapter_bytes: int
    autocast: bool
    checkpointing: bool | int  # True: every block is computed again; a number: so many, the first ones
    optimizer: str
    four_bit: bool
    fused_attention: bool
    contiguous_bias: bool = True  # of T5's position bias; a fused kernel needs it
    library: str = "peft"  # the library whose LoRA layer is replayed
    gpus: int = 1
    masters: bool = False  # of 16-bit adapters, float32 copies in the optimiser, whose states then are float32 too
    chunked_loss: bool = False  # the loss is computed in chunks, without whole logits
    sharded: bool = False  # True: divided among the GPUs, as in FSDP; False: each GPU holds everything, as in DDP

    @property
    def shards(self) -> int:
        """The number of parts into which parameters, gradients and states are divided."""
        return self.gpus if self.sharded else 1

    def recomputes(self, block: str) -> bool:
        """Say whether a block, such as "model.layers.3.", is computed again in the backward pass."""
        if isinstance(self.checkpointing, bool):
            return self.checkpointing
        return int(block.rstrip(".").rpartition(".")[2]) < self.checkpointing


class Net:
    """A model's parameters, and how its layers are called.

    A method changes a model through five attributes:

    - `layers`: {path: a function that replaces the call of this layer};
    - `around_feed_forward`: {path of its last layer, or its own path if it has experts: a function around it};
    - `front`: a function of the word embeddings, before the first block;
    - `extend`: a function of a block's number, keys and values;
    - `parameters_with_more`: {path of a parameter of experts: a function of its value that returns what is used}.

    Two functions stand around the call of each block. Sharding sets the outer one, `around_block`. `Repeats` sets the
    inner one, `repeated`, which copies blocks that are like others.
    """

    def __init__(
        self, memory: Memory, shape: Shape, recipe: Recipe, trains: Callable[[str, str], bool],
        copied: Iterable[str] = (),
    ):  # fmt: skip
        self.memory, self.shape, self.recipe, self.config = memory, shape, recipe, Config(shape.config, shape.name)
        self.autocast, self.leaves = False, False  # leaves: peft's enable_input_require_grads
        self.copied = frozenset(copied)  # paths of layers of whose bias a copy trains
        self.named = False  # whether the user named the modules on which the method stands
        self.layers: dict[str, Callable[[Tensor], Tensor]] = {}
        self.front: Callable[[Tensor], Tensor] = lambda x: x
        self.extend: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]] = unchanged
        self.around_feed_forward: dict[str, Callable[[Tensor, Callable], Tensor]] = {}
        self.around_block: Around = alone
        self.repeated: Around = alone
        self.parameters_with_more: dict[str, Callable[[Tensor], Tensor]] = {}
        self.weights: dict[str, Parameter] = {}
        self.biases: dict[str, Parameter] = {}
        self.base_biases: dict[str, Parameter] = {}  # those beside which a copy trains
        self.added: list[tuple[str, Parameter]] = []
        self.quantised: dict[str, tuple[Tensor, ...]] = {}
        self.modules = {module.path: module for module in shape.modules}
        self.casts: dict[Parameter | str, Tensor] = {}  # those of a copied block have its name
        self.held: list[Tensor] = []  # tensors that variables of the model's forward hold until the loss is computed
        self.renewed: list[Tensor] = []  # tensors of the method that stay until the next forward pass makes them anew
        for module in shape.modules:
            size: tuple[int, ...] = (module.outputs, module.inputs)
            if module.kind in ("norm", "vector"):
                size = (module.outputs,)
            elif module.kind == "embedding":
                size = (module.inputs, module.outputs)
            elif module.kind == "experts":
                size = (module.experts, module.outputs, module.inputs)
            layer = module.kind in ("linear", "conv1d") and module.role == "body" and not module.asked
            if recipe.four_bit and layer:
                self.quantised[module.path] = packed(memory, module.inputs * module.outputs, recipe.shards)
            elif recipe.four_bit and module.kind == "experts" and recipe.library == "peftlab":
                elements = module.inputs * module.outputs  # bitsandbytes, as peft uses it, leaves experts whole
                self.quantised[module.path] = packed_experts(memory, module.experts, elements, recipe.shards)
            elif module.tied:  # to the word embedding, the first row of every table
                self.weights[module.path] = self.weights[shape.modules[0].path]
            else:
                train = trains(module.path, "weight")
                self.weights[module.path] = self.parameter(size, train)
            if module.bias:
                size, train = (module.outputs,), trains(module.path, "bias")
                self.biases[module.path] = self.parameter(size, train, module.path in self.copied)
                if module.path in self.copied:
                    self.base_biases[module.path] = self.parameter(size, False)

    def parameter(self, size: tuple[int, ...], trains: bool, copied: bool = False) -> Parameter:
        """Allocate one of the model's own parameters, or a trained copy of one, which belongs to the adapter."""
        bytes, kind = (self.recipe.adapter_bytes, "adapter") if copied else (self.recipe.weight_bytes, "weights")
        return Parameter(self.memory, size, bytes, kind, trains, self.recipe.shards)

    @cached_property
    def parameters(self) -> list[Parameter]:
        """The trained parameters, in the order of the model. Asked for when the method's are there."""
        return [one for _, one in self.everything() if one.needs_grad]

    @contextmanager
    def under_autocast(self) -> Iterator[None]:
        """Use autocast inside the block, if the run has it. Leaving the outermost block frees the cast weights."""
        before, self.autocast = self.autocast, self.recipe.autocast
        try:
            yield
        finally:
            self.autocast = before
            if not before:
                self.casts.clear()

    def weight_size(self, path: str) -> tuple[int, int]:
        """Return (outputs, inputs) of the layer at a path."""
        return self.modules[path].outputs, self.modules[path].inputs

    def linear(self, path: str, x: Tensor) -> Tensor:
        """Call the layer at a path, with what the method adds to it."""
        result = self.layers[path](x) if path in self.layers else self.plain(path, x)
        return ops.add_bias(result, self.biases[path]) if path in self.copied else result

    def plain(self, path: str, x: Tensor) -> Tensor:
        """Call the layer at a path, without what the method adds to it."""
        if path in self.quantised:
            compute, ours = 2 if self.recipe.autocast else self.recipe.weight_bytes, self.recipe.library == "peftlab"
            return products.quantised_linear(x, *self.weight_size(path), compute, self.own_bias(path), ours)
        return self.product(x, self.weights[path], self.own_bias(path))

    def own_bias(self, path: str) -> Parameter | None:
        """Return the bias that a layer itself adds.

        Where a bias trains, peftlab trains a copy b of it beside the layer's own, b0: y + (b - b0). Full fine-tuning
        and peft train the layer's own.
        """
        return self.base_biases.get(path, self.biases.get(path))

    def around(self, path: str, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Call a feed-forward, with what an adapter around it adds. See `around_feed_forward`."""
        return self.around_feed_forward[path](x, function) if path in self.around_feed_forward else function(x)

    def frozen_product(self, x: Tensor, outputs: int) -> Tensor:
        """Multiply x by a matrix that is not a parameter. Autocast makes a copy of the matrix, which is kept."""
        if self.autocast:
            x = self.half(x)
            return products.linear(x, x.new((outputs, x.shape[-1]), 2))
        return products.frozen_linear(x, outputs)

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return x W^T + b, in 16 bits under autocast."""
        if self.autocast:
            x, weight = self.half(x), self.half(weight)
            bias = None if bias is None else self.half(bias)
        return products.linear(x, weight, bias)

    def outer(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the product of two trained matrices, (n, r) and (r, m), in 16 bits under autocast."""
        if self.autocast:
            a, b = self.half(a), self.half(b)
        return products.outer(a, b, (a.shape[0], b.shape[1]))

    def half(self, x: Tensor) -> Tensor:
        """Cast to 16 bits as autocast does. A trained leaf is cast once; the copy is kept until autocast is left."""
        if x.bytes != ops.FLOAT32:
            return x
        if isinstance(x, Parameter) and x.needs_grad:
            if x not in self.casts:
                # Record the cast even if the first caller runs without gradients, because later callers share it.
                with self.memory.graph(True):
                    self.casts[x] = ops.cast(x, 2)
            return self.casts[x]
        return ops.cast(x, 2)

    def trains(self, prefix: str) -> bool:
        """Say whether any parameter of a block is trained."""
        return any(one.needs_grad for _, one in self.groups.get(prefix, []))

    @staticmethod
    def block_of(path: str) -> str:
        """Return the block that a path lies in, such as "model.layers.3.", or "" for none."""
        number = BLOCK.search(path)
        return path[: number.end()] if number else ""

    def everything(self) -> Iterator[tuple[str, Parameter]]:
        """Yield (path, parameter) of the model, tied ones once, and of what the method added."""
        seen: set[int] = set()
        for path, one in (*self.weights.items(), *self.biases.items(), *self.added):
            if id(one) not in seen:
                seen.add(id(one))
                yield path, one

    @cached_property
    def groups(self) -> dict[str, list[tuple[str, Parameter]]]:
        """The parameters of each block, with their paths in it; under "" those outside the blocks.

        Asked for when the method's are there.
        """
        found: dict[str, list[tuple[str, Parameter]]] = {}
        for path, one in self.everything():
            prefix = self.block_of(path)
            found.setdefault(prefix, []).append((path[len(prefix) :], one))
        return found

    def output(self, path: str, x: Tensor) -> Tensor:
        """Call the language-model head. If the loss is computed in chunks, it is called there instead."""
        self.held.append(x)
        return x if self.recipe.chunked_loss else self.linear(path, x)

    def table(self, path: str, ids: Tensor) -> Tensor:
        """Look up rows of the embedding at a path, with what the method adds to them."""
        return self.layers[path](ids) if path in self.layers else products.embedding(ids, self.weights[path])

    def words(
        self, path: str, ids: Tensor, then: Callable[[Tensor], Tensor] | None = None, front: bool = True
    ) -> Tensor:
        """Return the word embeddings.

        Args:
            then: what the model does to them first, such as a scaling.
            front: whether the method may put its prompt in front.
        """
        x = self.table(path, ids)
        if then is not None:
            x = then(x)
        if self.leaves:
            x = leaf(x)
        return self.front(x) if front else x

    def places(self, count: int) -> Tensor:
        """Allocate the numbers of `count` positions, which select rows of a table."""
        return Tensor(self.memory, (1, count), ops.INT64)

    def virtual(self, x: Tensor, count: int, table: Parameter) -> Tensor:
        """Return the first `count` rows of a table, for each example of x."""
        return products.embedding(self.places(count).view(x.shape[0], count), table)

    def block(self, prefix: str, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """Run one block, sharded or not, with or without gradient checkpointing."""

        def run(*inputs: Tensor) -> Tensor:
            return self.checkpointed(prefix, function, *inputs)

        def replayed(*inputs: Tensor) -> Tensor:
            return self.repeated(prefix, run, inputs)

        return self.around_block(prefix, replayed, inputs)

    def checkpointed(self, prefix: str, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """Run one block, with checkpointing if the run has it. The second run then uses autocast again."""
        if not self.recipe.recomputes(prefix):
            return function(*inputs)

        def again(*inputs: Tensor) -> Tensor:
            with self.under_autocast():
                return function(*inputs)

        return checkpoint(again, inputs, self.trains(prefix))

    def activation(self, name: str) -> Callable[[Tensor], Tensor]:
        """Return an activation function by the name that configurations use."""
        if name == "gelu_new":
            return lambda x: ops.gelu_new(x, self.autocast)
        if name not in ACTIVATIONS:
            known = (*ACTIVATIONS, "gelu_new")
            raise PeftLabError(
                f"{self.shape.name}: what the activation {name!r} keeps is not known.{did_you_mean(name, known)} "
                f"Known: {', '.join(known)}."
            )
        return ACTIVATIONS[name]

    def rms_norm(self, path: str, x: Tensor) -> Tensor:
        """Compute w * (x / sqrt(mean x^2 + eps)) in float32."""
        return ops.mul(ops.cast(ops.over_its_size(ops.cast(x, ops.FLOAT32)), x.bytes), self.weights[path])

    def gemma_norm(self, path: str, x: Tensor) -> Tensor:
        """Compute (1 + w) * (x / sqrt(mean x^2 + eps)), all of it in float32."""
        wide = ops.over_its_size(ops.cast(x, ops.FLOAT32))
        weight = ops.shift(ops.cast(self.weights[path], ops.FLOAT32))
        return ops.cast(ops.mul(wide, weight), x.bytes)

    def t5_norm(self, path: str, x: Tensor) -> Tensor:
        """Compute T5's RMS norm: only the mean uses a float32 copy; x times the float32 root is float32, then cast."""
        root = ops.from_result(ops.mean_last(ops.square(ops.cast(x, ops.FLOAT32))))
        wide = ops.mul(x, root)
        del root
        weight = self.weights[path]
        return ops.mul(ops.cast(wide, min(weight.bytes, wide.bytes)), weight)

    def layer_norm(self, path: str, x: Tensor) -> Tensor:
        """Compute a LayerNorm, in float32 under autocast. It may lack weights, or a bias."""
        if self.autocast:
            x = ops.cast(x, ops.FLOAT32)
        result = ops.layer_norm(x, self.weights.get(path), self.own_bias(path))
        return ops.add_bias(result, self.biases[path]) if path in self.copied else result

    def wide_norm(self, path: str, x: Tensor) -> Tensor:
        """Compute w * (x / sqrt(mean x^2 + eps)) in float32, and cast the product."""
        return ops.cast(ops.mul(ops.over_its_size(ops.cast(x, ops.FLOAT32)), self.weights[path]), x.bytes)

    def centred_norm(self, path: str, x: Tensor) -> Tensor:
        """Compute w * ((x - mean) / sqrt(variance + eps)) in float32, in separate operations, and cast the product."""
        wide = ops.cast(x, ops.FLOAT32)
        mean = ops.mean_last(wide)
        root = ops.from_result(ops.mean_last(ops.square(ops.minus_column(wide, mean))))
        wide = ops.mul(ops.minus_column(wide, mean), root)
        return ops.cast(ops.mul(wide, ops.cast(self.weights[path], ops.FLOAT32)), x.bytes)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, style: Style, bias: Tensor | None = None, masked: bool = False,
        sinks: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Compute attention of (b, heads, s, d), in 16 bits under autocast, and return (b, s, heads d).

        A causal model needs a mask if it has a prefix, or if `masked` says so (a sliding window), and T5 has a bias.
        With a mask or a bias, the fused kernel also needs keys and values for every head.
        """
        if self.autocast:
            q, k, v = self.half(q), self.half(k), self.half(v)
        batch, heads, length, width = q.shape
        if bias is None and style.causal and self.fused() and (k.shape[2] != length or masked):
            bias = q.new((batch, 1, length, k.shape[2]))
        if not self.fused():
            if self.autocast:
                style = replace(style, wide_softmax=True)
            mixed = attention.eager_attention(q, k, v, bias, style, sinks)
        elif not style.fusible or (bias is None and q.bytes == ops.FLOAT32 and k.shape[1] != heads):
            # the only fused kernel for float32 needs as many heads of keys as of queries
            mixed = attention.math_attention(q, k, v, bias, style)
        elif bias is None:
            mixed = attention.flash_attention(q, k, v)
            mixed = ops.copy(mixed) if style.by_head else mixed
        else:
            mixed = attention.flash_attention(q, attention.spread(k, heads), attention.spread(v, heads), bias)
        return mixed.view(batch, length, heads * width)

    def fused(self) -> bool:
        """Say whether attention is fused. transformers has no fused one for some families."""
        layout = self.shape.layout
        return self.recipe.fused_attention and (layout is None or layout.sdpa)

    def attend_packed(self, i: int, qkv: Tensor, heads: int, style: Style) -> Tensor:
        """Compute attention of queries, keys and values that are views of one tensor (b, s, 3 h)."""
        batch, length, three = qkv.shape
        if self.recipe.fused_attention and self.extend is unchanged:
            return attention.packed_attention(self.half(qkv) if self.autocast else qkv, heads)
        q, k, v = attention.split(qkv, (batch, heads, length, three // 3 // heads))
        return self.attend(q, *self.extend(i, k, v), style)


def unchanged(i: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return a block's keys and values unchanged."""
    return k, v


def alone(prefix: str, run: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Tensor:
    """Run a block with nothing around it."""
    return run(*inputs)


def packed(memory: Memory, elements: int, shards: int = 1) -> tuple[Tensor, ...]:
    """Allocate an NF4 weight with double quantisation.

    It has two codes per byte, a scale of one byte per block of 64 weights, and a float32 scale per 256 of those. Each
    weight also has two code books (16 and 256 float32 values) and the mean of its scales. Only the codes are divided
    into shards, because the rest is not a parameter.
    """
    blocks = -(-elements // 64)
    codes = Tensor(memory, (-(-elements // 2),), 1, "weights", shards)
    sizes = ((blocks, 1), (-(-blocks // 256), 4), (16, 4), (256, 4), (1, 4))
    return codes, *(Tensor(memory, (count,), bytes, "weights") for count, bytes in sizes)


def packed_experts(memory: Memory, experts: int, elements: int, shards: int = 1) -> tuple[Tensor, ...]:
    """Allocate the experts of a parameter in NF4, as peftlab holds them: codes and scales of each expert apart.

    elements: of one expert.
    """
    blocks = -(-elements // 64)
    codes = Tensor(memory, (experts * -(-elements // 2),), 1, "weights", shards)
    sizes = ((experts * blocks, 1), (experts * -(-blocks // 256), 4), (experts, 4))
    return codes, *(Tensor(memory, (count,), bytes, "weights") for count, bytes in sizes)
