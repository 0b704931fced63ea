"""How long a training step takes, before it is started: products at their best rate, all other work by its bytes.

    seconds = F / rate + B / bandwidth                    but not less than what the host needs to launch the kernels

F are the operations of the matrix products, and `rate` what the same products reach alone, one after the other. B are
the bytes that the kernels between the products read and write. It depends on how the step is made:

    eager       each operation writes a tensor of its own, and another one reads it: B = 2 (bytes of all tensors made)
    compiled    neighbouring operations are one kernel, which reads its inputs and writes its outputs once
    by hand     LoRA is part of the frozen product, so its own passes over the outputs are gone as well

The kernels' own time is what is predicted. Nothing here measures: `peftlab bench speed` does.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from peftlab.memory.counting.shapes import Shape, load_shape
from peftlab.memory.estimate import estimate

BF16, FLOAT32 = 2, 4
WAYS = ("eager", "compiled", "by hand")


class Times(NamedTuple):
    """The seconds of a step's parts on the GPU, when each part runs at its best."""

    products: float
    between: float
    optimizer: float
    dequantise: float

    @property
    def seconds(self) -> float:
        """The parts' sum: how long the kernels are busy."""
        return sum(self)


class Sizes(NamedTuple):
    """The widths of a Llama-like decoder, in numbers per token."""

    layers: int
    d: int  # hidden size
    q: int  # width of all query heads
    kv: int  # width of all key heads
    m: int  # width inside the MLP
    vocabulary: int

    @property
    def linears(self) -> tuple[tuple[int, int], ...]:
        """(in, out) of the seven matrices of a block: q, k, v, o, gate, up, down."""
        d, q, kv, m = self.d, self.q, self.kv, self.m
        return (d, q), (d, kv), (d, kv), (q, d), (d, m), (d, m), (m, d)

    @property
    def weights(self) -> int:
        """The weights of all blocks' matrices."""
        return self.layers * sum(i * o for i, o in self.linears)


def sizes_of(shape: Any) -> Sizes:
    """Return a shape's widths.

    >>> from peftlab.memory.speed import sizes_of
    >>> sizes_of("llama-2-7b")
    Sizes(layers=32, d=4096, q=4096, kv=4096, m=11008, vocabulary=32000)
    """
    known = shape if isinstance(shape, Shape) else load_shape(shape)
    config = known.config
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    return Sizes(
        config["num_hidden_layers"], config["hidden_size"], heads * width,
        (config.get("num_key_value_heads") or heads) * width, config["intermediate_size"], config["vocab_size"],
    )  # fmt: skip


def product_flops(shape: Any, tokens: int, checkpointing: bool) -> int:
    """Return the operations of the frozen matrices' products in one step.

    2 tokens (in x out) each time that a matrix is used: forward, again when its block is recomputed, and backward for
    the gradient of its input. The head is never recomputed. LoRA's own products and attention are not counted.

    >>> from peftlab.memory.speed import product_flops
    >>> print(f"{product_flops('llama-2-7b', 4 * 512, checkpointing=True) / 1e12:.0f} TFLOP")
    81 TFLOP
    """
    of = sizes_of(shape)
    return 2 * tokens * (of.weights * (3 if checkpointing else 2) + 2 * of.vocabulary * of.d)


def bytes_between(shape: Any, tokens: int, checkpointing: bool, by_hand: bool = False) -> int:
    """Return the bytes that fused kernels move between the products of one step, in bf16.

    Every kernel reads its inputs and writes its outputs once. Numbers per token and block, forward:

        norm                    2 d          rotary positions        2 (q + k)
        attention               2 q + k + v  residual and norm       4 d
        silu(gate) up           3 m          residual                3 d
        LoRA                    in for x A^T, 2 out for y + u B^T, for each of the seven matrices

    The backward pass reads and writes each of these twice, once for the value and once for its gradient.
    """
    of = sizes_of(shape)
    pointwise = 2 * of.d + 2 * (of.q + of.kv) + 2 * of.q + 2 * of.kv + 4 * of.d + 3 * of.m + 3 * of.d
    low_rank = sum(i + (0 if by_hand else 2 * o) for i, o in of.linears)
    low_rank_back = sum(i + 2 * o + (0 if by_hand else 2 * i) for i, o in of.linears)  # dA, dB and du; dx + du A
    forward = pointwise + low_rank
    passes = forward * (2 if checkpointing else 1) + 2 * pointwise + low_rank_back
    logits = 3 * of.vocabulary  # read for the loss, read and written to become their gradient
    return BF16 * tokens * (of.layers * passes + logits)


def predict(
    shape: Any,
    method: str = "lora",
    *,
    batch: int,
    sequence: int,
    checkpointing: bool,
    rate: float,
    bandwidth: float,
    r: int = 16,
    way: str = "eager",
    library: str = "peftlab",
    adapter_precision: str = "fp32",
) -> Times:
    """Predict how long the kernels of a step are busy: LoRA or QLoRA on all seven matrices of a Llama-like decoder.

    Args:
        shape, method, batch, sequence, checkpointing, r, library, adapter_precision: as for `estimate`.
        rate: operations per second of dense products.
        bandwidth: bytes per second, read and written together.
        way: `"eager"`, `"compiled"` or `"by hand"`.

    >>> from peftlab.memory.speed import predict
    >>> run = {"batch": 4, "sequence": 512, "checkpointing": True, "rate": 690e12, "bandwidth": 3e12}
    >>> for way in ("eager", "compiled", "by hand"):
    ...     print(f"{way:9} {1000 * predict('llama-2-7b', 'lora', way=way, **run).seconds:.0f} ms")
    eager     20... ms
    compiled  1... ms
    by hand   1... ms
    """
    of, tokens = sizes_of(shape), batch * sequence
    trained = of.layers * sum(r * (i + o) for i, o in of.linears)
    update = FLOAT32 * 7 * trained  # p, g, m and v are read; p, m and v are written
    # a 4-bit weight is made in 16 bits at each use; by hand, the recomputed block leaves it there for the way back
    uses = (3 if checkpointing and way != "by hand" else 2) if method == "qlora" else 0
    if way == "eager":
        found = estimate(
            shape, method, r=r, targets="all-linear", batch=batch, sequence=sequence, checkpointing=checkpointing,
            autocast=adapter_precision == "fp32", adapter_precision=adapter_precision, library=library,
            optimizer="adamw-fused",
        )  # fmt: skip
        between = 2 * (found.written - uses * of.weights * BF16)
    else:
        between = bytes_between(shape, tokens, checkpointing, by_hand=way == "by hand")
    return Times(
        products=product_flops(shape, tokens, checkpointing) / rate,
        between=between / bandwidth,
        optimizer=update / bandwidth,
        dequantise=uses * of.weights * (BF16 + 0.5) / bandwidth,
    )
