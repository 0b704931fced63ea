"""Rotary positions, in the forms that transformers has."""

from __future__ import annotations

from peftlab.memory.counting.decoders import Decoder
from peftlab.memory.replay import ops, views
from peftlab.memory.replay.tape import Tensor


class Rotary:
    """Turn queries or keys: x cos + rotated(x) sin. The tables are made once for all blocks.

    A family may turn only the first elements of each head; then the rest is joined to them again. Cohere computes in
    float32.
    """

    def __init__(self, d: Decoder, x: Tensor):
        self.d, self.turned = d, d.rotated or d.width
        length = x.shape[1]
        tables = 2 if d.two_tables else 1
        half = 2 if d.rotary == "chunks" else 1
        self.tables = [x.new((1, 1, length, self.turned // half)) for _ in range(2 * tables)]
        self.cos, self.sin = self.tables[:2]

    def __call__(self, x: Tensor) -> Tensor:
        """Return x turned by its positions."""
        if self.d.rotary == "chunks":
            return self.chunks(x)
        if self.d.wide_rotary:
            narrow = x.bytes
            return ops.cast(self.turn(ops.cast(x, ops.FLOAT32)), narrow)
        if self.turned == x.shape[-1]:
            return self.turn(x)
        first = views.part(x, (*x.shape[:-1], self.turned))
        rest = views.part(x, (*x.shape[:-1], x.shape[-1] - self.turned))
        first = self.turn(first)
        return views.cat(first, rest, 3)

    def turn(self, x: Tensor) -> Tensor:
        """Return x cos + rotated(x) sin."""
        straight = ops.mul_constant(x, self.cos)
        return ops.add(straight, ops.mul_constant(views.split_halves_rotated(x), self.sin))

    def chunks(self, x: Tensor) -> Tensor:
        """Return the two halves turned one by one, as gpt-oss does it."""
        first, second = views.halves(x)
        one = ops.add(ops.mul_constant(first, self.cos), ops.scale(ops.mul_constant(second, self.sin)))
        other = ops.add(ops.mul_constant(second, self.cos), ops.mul_constant(first, self.sin))
        return views.cat(one, other, 3)
