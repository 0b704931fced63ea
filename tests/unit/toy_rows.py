"""What the toy method has outside its file: two functions without torch, its option and its row.

CONTRIBUTING.md says where each is copied to: `toy_tensors` to peftlab/memory/counting/methods.py, `toy_replay` to
peftlab/memory/replay/layers.py, the option and the row to peftlab/catalogue.py.
"""

from __future__ import annotations

from dataclasses import replace

from peftlab.catalogue import TARGETS, Method, Option
from peftlab.memory.counting.methods import linear_targets
from peftlab.memory.counting.options import Added, Options, Trained
from peftlab.memory.counting.shapes import Shape
from peftlab.memory.replay import ops
from peftlab.memory.replay.nets import Net
from peftlab.memory.replay.tape import Parameter, Tensor


def toy_tensors(shape: Shape, options: Options) -> Trained:
    """List a scale for each output of a module."""
    adapted = linear_targets(shape, options.targets, "toy", default=("o_proj",))
    return Trained(tuple(Added(m.path, "scale", (m.outputs,)) for m in adapted), adapted=adapted)


def toy_replay(net: Net, path: str, own: dict[str, Parameter]) -> None:
    """Replay s * (W x). The product is in the dtype of s, then cast back."""

    def call(x: Tensor) -> Tensor:
        result = net.plain(path, x)  # the frozen layer itself
        return ops.cast(ops.mul(result, own["scale"]), result.bytes)

    net.layers[path] = call


TOY_START = Option(
    name="toy_start", fills="start", kind=float, default=1.0, metavar="S", help="where the scale of toy starts"
)
TOY = Method(
    config="toy_method:ToyConfig",
    options=(replace(TARGETS, chosen="the output projections of attention"), TOY_START),
    learning_rate=0.25,
    tensors="toy_rows:toy_tensors",
    replay="toy_rows:toy_replay",
)
