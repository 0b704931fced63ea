"""A model for the replay: its parameters, and how its layers, norms and attention are called.

The architectures themselves, in `decoders` and `encoders`, follow the model files of transformers line by line where a
line allocates; local variables live as long here as there. What a method adds to a layer is in `layers`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from peftlab.errors import PeftLabError, did_you_mean
from peftlab.memory.counting.config import Config
from peftlab.memory.counting.shapes import Shape
from peftlab.memory.replay import attention, ops
from peftlab.memory.replay.attention import Style
from peftlab.memory.replay.tape import Memory, Parameter, Tensor, checkpoint, leaf

# One kernel each way: what it keeps is its input or its result.
ACTIVATIONS = {
    "silu": ops.from_input, "swish": ops.from_input, "gelu": ops.from_input, "gelu_pytorch_tanh": ops.from_input,
    "relu": ops.from_result, "tanh": ops.from_result, "sigmoid": ops.from_result,
}  # fmt: skip
BLOCK = re.compile(r"\.\d+\.")  # ends the path of a block: "model.layers.3."


@dataclass(frozen=True)
class Recipe:
    """What a run is like, apart from its model and its method."""

    batch: int
    sequence: int
    weight_bytes: int  # of the weights, their gradients and states
    adapter_bytes: int
    autocast: bool
    checkpointing: bool
    optimizer: str
    four_bit: bool
    fused_attention: bool
    contiguous_bias: bool = True  # T5's, which a fused kernel takes only so
    library: str = "peft"  # whose LoRA layer
    gpus: int = 1
    sharded: bool = False  # over the GPUs, as FSDP does; else each holds everything, as under DDP

    @property
    def shards(self) -> int:
        """Into how many parts parameters, gradients and states are cut."""
        return self.gpus if self.sharded else 1


class Net:
    """A model's parameters, and the way its layers are called.

    What a method changes stands in `layers` (the call of a linear layer by its path), `front` (what the word embeddings
    go through before the first block) and `extend` (what a block's keys and values go through). What sharding does
    around a block stands in `around_block`.
    """

    def __init__(self, memory: Memory, shape: Shape, recipe: Recipe, trains: Callable[[str, str], bool]):
        self.memory, self.shape, self.recipe, self.config = memory, shape, recipe, Config(shape.config, shape.name)
        self.autocast, self.leaves = False, False  # leaves: peft's enable_input_require_grads
        self.layers: dict[str, Callable[[Tensor], Tensor]] = {}
        self.front: Callable[[Tensor], Tensor] = lambda x: x
        self.extend: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]] = unchanged
        self.beside: dict[str, Callable[[Tensor, Callable], Tensor]] = {}
        self.around_block: Callable[[str, Callable[..., Tensor], tuple[Tensor, ...]], Tensor] = alone
        self.weights: dict[str, Parameter] = {}
        self.biases: dict[str, Parameter] = {}
        self.added: list[tuple[str, Parameter]] = []
        self.quantised: dict[str, tuple[Tensor, ...]] = {}
        self.modules = {module.path: module for module in shape.modules}
        self.casts: dict[Parameter, Tensor] = {}
        self.held: list[Tensor] = []  # what the variables of a model's forward hold until it has the loss
        self.trained_blocks: set[str] | None = None
        for module in shape.modules:
            size = (module.outputs,) if module.kind == "norm" else (module.outputs, module.inputs)
            if module.kind == "embedding":
                size = (module.inputs, module.outputs)
            if recipe.four_bit and module.kind in ("linear", "conv1d") and module.role == "body":
                self.quantised[module.path] = packed(memory, module.inputs * module.outputs, recipe.shards)
            elif module.tied:  # to the word embedding, the first of every table
                self.weights[module.path] = self.weights[shape.modules[0].path]
            else:
                train = trains(module.path, "weight")
                self.weights[module.path] = self.parameter(size, train)
            if module.bias:
                train = trains(module.path, "bias")
                self.biases[module.path] = self.parameter((module.outputs,), train)

    def parameter(self, size: tuple[int, ...], trains: bool) -> Parameter:
        """One of the model's own."""
        return Parameter(self.memory, size, self.recipe.weight_bytes, trains=trains, shards=self.recipe.shards)

    @property
    def parameters(self) -> list[Parameter]:
        """The trained ones, in the order of the model."""
        return [one for _, one in self.everything() if one.needs_grad]

    @contextmanager
    def under_autocast(self) -> Iterator[None]:
        """As torch.autocast; the copies of weights go when the outermost is left. Nothing where the run has none."""
        before, self.autocast = self.autocast, self.recipe.autocast
        try:
            yield
        finally:
            self.autocast = before
            if not before:
                self.casts.clear()

    def weight_size(self, path: str) -> tuple[int, int]:
        """(outputs, inputs) of the layer at a path."""
        return self.modules[path].outputs, self.modules[path].inputs

    def linear(self, path: str, x: Tensor) -> Tensor:
        """The layer at a path, with what the method adds to it."""
        if path in self.layers:
            return self.layers[path](x)
        return self.plain(path, x)

    def plain(self, path: str, x: Tensor) -> Tensor:
        """The layer at a path, without what a method adds."""
        if path in self.quantised:
            compute = 2 if self.recipe.autocast else self.recipe.weight_bytes
            return ops.quantised_linear(x, *self.weight_size(path), compute)
        return self.product(x, self.weights[path], self.biases.get(path))

    def around(self, path: str, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """A feed-forward, with what a parallel adapter at its last layer adds."""
        return self.beside[path](x, function) if path in self.beside else function(x)

    def frozen_product(self, x: Tensor, outputs: int) -> Tensor:
        """x times a matrix that is no parameter, of which autocast makes a copy that is kept."""
        if self.autocast:
            x = self.half(x)
            return ops.linear(x, x.new((outputs, x.shape[-1]), 2))
        return ops.frozen_linear(x, outputs)

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x W^T + b, under autocast in 16 bits."""
        if self.autocast:
            x, weight = self.half(x), self.half(weight)
            bias = None if bias is None else self.half(bias)
        return ops.linear(x, weight, bias)

    def half(self, x: Tensor) -> Tensor:
        """Autocast to 16 bits. It casts a trained leaf once and keeps the copy until it is left."""
        if x.bytes != ops.FLOAT32:
            return x
        if isinstance(x, Parameter) and x.needs_grad:
            if x not in self.casts:
                with self.memory.graph(True):  # whoever asks first, the others have its gradient, too
                    self.casts[x] = ops.cast(x, 2)
            return self.casts[x]
        return ops.cast(x, 2)

    def trains(self, prefix: str) -> bool:
        """Whether any parameter of a block is trained."""
        if self.trained_blocks is None:
            self.trained_blocks = {self.block_of(path) for path, one in self.everything() if one.needs_grad}
        return prefix in self.trained_blocks

    @staticmethod
    def block_of(path: str) -> str:
        """The block that a path lies in, "model.layers.3."; "" for none."""
        number = BLOCK.search(path)
        return path[: number.end()] if number else ""

    def everything(self) -> Iterator[tuple[str, Parameter]]:
        """(path, parameter) of the model, a tied one once, and of what a method added."""
        seen: set[int] = set()
        for path, one in (*self.weights.items(), *self.biases.items(), *self.added):
            if id(one) not in seen:
                seen.add(id(one))
                yield path, one

    def output(self, path: str, x: Tensor) -> Tensor:
        """The language-model head."""
        self.held.append(x)
        return self.linear(path, x)

    def table(self, path: str, ids: Tensor) -> Tensor:
        """Rows of the embedding at a path, with what the method adds to them."""
        return self.layers[path](ids) if path in self.layers else ops.embedding(ids, self.weights[path])

    def words(
        self, path: str, ids: Tensor, then: Callable[[Tensor], Tensor] | None = None, front: bool = True
    ) -> Tensor:
        """The word embeddings, with what the model does to them first and what a method puts in front of them."""
        x = self.table(path, ids)
        if then is not None:
            x = then(x)
        if self.leaves:
            x = leaf(x)
        return self.front(x) if front else x

    def places(self, count: int) -> Tensor:
        """The numbers of `count` places, which choose the rows of a table."""
        return Tensor(self.memory, (1, count), ops.INT64)

    def virtual(self, x: Tensor, count: int, table: Parameter) -> Tensor:
        """The first `count` rows of a table, for each example of x."""
        return ops.embedding(self.places(count).view(x.shape[0], count), table)

    def block(self, prefix: str, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """One block, sharded or not, with or without gradient checkpointing."""

        def run(*inputs: Tensor) -> Tensor:
            return self.checkpointed(prefix, function, *inputs)

        return self.around_block(prefix, run, inputs)

    def checkpointed(self, prefix: str, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """One block; what checkpointing runs again runs under autocast again."""
        if not self.recipe.checkpointing:
            return function(*inputs)

        def again(*inputs: Tensor) -> Tensor:
            with self.under_autocast():
                return function(*inputs)

        return checkpoint(again, inputs, self.trains(prefix))

    def activation(self, name: str) -> Callable[[Tensor], Tensor]:
        """An activation function by the name that a configuration gives it."""
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
        """w * (x / sqrt(mean x^2 + eps)), computed in float32."""
        return ops.mul_vector(ops.cast(ops.over_its_size(ops.cast(x, ops.FLOAT32)), x.bytes), self.weights[path])

    def gemma_norm(self, path: str, x: Tensor) -> Tensor:
        """(1 + w) * (x / sqrt(mean x^2 + eps)), all of it in float32."""
        wide = ops.over_its_size(ops.cast(x, ops.FLOAT32))
        weight = ops.shift(ops.cast(self.weights[path], ops.FLOAT32))
        return ops.cast(ops.mul_vector(wide, weight), x.bytes)

    def t5_norm(self, path: str, x: Tensor) -> Tensor:
        """RMS norm of T5: the float32 copy serves the mean alone; x times float32 is float32, then cast."""
        root = ops.from_result(ops.mean_last(ops.square(ops.cast(x, ops.FLOAT32))))
        wide = ops.mul_broadcast(x, root)
        del root
        weight = self.weights[path]
        return ops.mul_vector(ops.cast(wide, min(weight.bytes, wide.bytes)), weight)

    def layer_norm(self, path: str, x: Tensor) -> Tensor:
        """LayerNorm; autocast computes it in float32."""
        if self.autocast:
            x = ops.cast(x, ops.FLOAT32)
        return ops.layer_norm(x, self.weights[path], self.biases[path])

    def attend(self, q: Tensor, k: Tensor, v: Tensor, style: Style, bias: Tensor | None = None) -> Tensor:
        """Attention of (b, heads, s, d), under autocast in 16 bits; returns (b, s, heads d).

        A causal model with a prefix or a sliding window needs a mask, and T5 adds a bias: then the kernel is given
        it, and every head its own keys and values.
        """
        if self.autocast:
            q, k, v = self.half(q), self.half(k), self.half(v)
        batch, heads, length, width = q.shape
        if bias is None and style.causal and (k.shape[2] != length or self.windowed(length)):
            bias = q.new((batch, 1, length, k.shape[2]))
        if not self.recipe.fused_attention:
            if self.autocast:
                style = replace(style, wide_softmax=True)
            mixed = attention.eager_attention(q, k, v, bias, style)
        elif not style.fusible or (bias is None and q.bytes == ops.FLOAT32 and k.shape[1] != heads):
            # in float32 the one fused kernel that there is wants as many heads of keys as of queries
            mixed = attention.math_attention(q, k, v, bias, style)
        elif bias is None:
            mixed = attention.flash_attention(q, k, v)
        else:
            mixed = attention.flash_attention(q, attention.spread(k, heads), attention.spread(v, heads), bias)
        return mixed.view(batch, length, heads * width)

    def windowed(self, length: int) -> bool:
        """Whether a sequence reaches the sliding window of its architecture."""
        values, family = self.config.values, self.shape.family
        window = values.get("sliding_window", 4096 if family == "mistral" else None)
        if family != "mistral" and not values.get("use_sliding_window"):
            return False
        return window is not None and length >= window

    def attend_packed(self, i: int, qkv: Tensor, heads: int, style: Style) -> Tensor:
        """Attention of queries, keys and values that are views of one tensor (b, s, 3 h)."""
        batch, length, three = qkv.shape
        if self.recipe.fused_attention and self.extend is unchanged:
            return attention.packed_attention(self.half(qkv) if self.autocast else qkv, heads)
        q, k, v = attention.split(qkv, (batch, heads, length, three // 3 // heads))
        return self.attend(q, *self.extend(i, k, v), style)


def unchanged(i: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """A block's keys and values as they are."""
    return k, v


def alone(prefix: str, run: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Tensor:
    """A block with nothing around it."""
    return run(*inputs)


def packed(memory: Memory, elements: int, shards: int = 1) -> tuple[Tensor, ...]:
    """An NF4 weight with double quantisation: two codes a byte, a byte of scale a block of 64, float32 a 256 of those.

    Each weight also holds its two tables of codes, 16 and 256 float32, and the mean of its scales. Shards divide the
    codes alone: the rest belongs to no parameter.
    """
    blocks = -(-elements // 64)
    codes = Tensor(memory, (-(-elements // 2),), 1, "weights", shards)
    sizes = ((blocks, 1), (-(-blocks // 256), 4), (16, 4), (256, 4), (1, 4))
    return codes, *(Tensor(memory, (count,), bytes, "weights") for count, bytes in sizes)
