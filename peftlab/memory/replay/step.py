"""The replay of a training run: the model, the method's tensors, and steps of forward, loss, backward, optimiser."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from peftlab.catalogue import METHODS, resolve
from peftlab.errors import PeftLabError
from peftlab.memory.counting.options import Trained
from peftlab.memory.counting.shapes import Shape
from peftlab.memory.replay import ops
from peftlab.memory.replay.chunked import chunked_loss
from peftlab.memory.replay.decoders import decoder, gpt2
from peftlab.memory.replay.encoders import bert, t5
from peftlab.memory.replay.nets import Net, Recipe, unchanged
from peftlab.memory.replay.repeats import Repeats
from peftlab.memory.replay.sharding import Sharding
from peftlab.memory.replay.tape import Memory, Parameter, Tensor, backward
from peftlab.memory.replay.text_encoders import distilbert, electra, modernbert, mpnet

# Decoders whose forward pass follows from their description. Those of DeepSeek-V3 and Llama 4 are not known.
DESCRIBED = (
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "olmo2", "smollm3", "granite",
    "cohere", "starcoder2", "glm4", "phi", "stablelm", "gpt_neox", "gptj", "opt", "bloom", "falcon", "mixtral",
    "qwen2_moe", "qwen3_moe", "gpt_oss",
)  # fmt: skip

# The forward pass of each architecture
FORWARD: dict[str, Callable[[Net, Tensor], Tensor]] = {
    **dict.fromkeys(DESCRIBED, decoder),
    "gpt2": gpt2,
    "bert": bert,
    "electra": electra,
    "distilbert": distilbert,
    "mpnet": mpnet,
    "modernbert": modernbert,
    "t5": t5,
    "mt5": t5,
    **dict.fromkeys(("roberta", "xlm-roberta", "camembert"), lambda net, ids: bert(net, ids, "roberta")),
}

TORCH_ADAMW = ("adamw", "adamw-foreach", "adamw-fused")  # foreach=False, foreach=True, fused=True

# bitsandbytes' 8-bit AdamW. Tensors with fewer than SMALL_8BIT elements have float32 states. Larger ones have 8-bit
# states with one scale per BLOCK_8BIT elements. A paged optimiser pages the states of tensors with at least PAGED
# elements.
SMALL_8BIT, BLOCK_8BIT, PAGED = 4096, 256, 100_000


class SecondStep(NamedTuple):
    """What the second step of a run allocates. The peak is the highest of both steps."""

    peak: int
    at_peak: dict[str, int]
    moment: str
    history: list[tuple[str, int]]
    flops: int
    written: int


class Run:
    """A model under a method. `step` replays one step of its training."""

    def __init__(self, shape: Shape, method: str, trained: Trained, recipe: Recipe):
        self.memory, self.shape, self.method, self.recipe = Memory(), shape, method, recipe
        heads = {module.path for module in shape.head}
        own = {(module.path, kind) for module, kind in trained.own}
        self.net = net = Net(
            self.memory, shape, recipe,
            lambda path, kind: (path, kind) in own or (not trained.whole and path in heads),
            [m.path for m, _ in trained.own] if recipe.library == "peftlab" and not trained.whole else (),
        )  # fmt: skip
        self.sharding = Sharding(net, recipe.gpus) if recipe.shards > 1 else None
        if self.sharding:
            net.around_block = self.sharding.around
        self.states: list[tuple[Tensor, ...]] | None = None
        self.loss: Tensor | None = None
        self.held: list[Tensor] = []  # tensors that live as long as the run
        if not trained.whole:  # peft trains a copy of the classification head and keeps the original too
            for module in shape.head:
                self.held.append(Tensor(self.memory, (module.parameters,), recipe.weight_bytes, "weights"))
        net.named = trained.named
        grouped: dict[str, dict[str, Tensor]] = {}
        for added in trained.added:
            if added.buffer:
                if added.path and recipe.library != "peftlab":  # peft has taken the start out of the weight itself
                    continue
                self.held.append(Tensor(self.memory, added.size, recipe.adapter_bytes, "adapter"))
                if added.path:
                    grouped.setdefault(added.path, {})[added.name] = self.held[-1]
                continue
            trains = added.trains or recipe.library != "peftlab"  # AdaLoRA's rank numbers get a gradient in peft
            tensor = Parameter(self.memory, added.size, recipe.adapter_bytes, "adapter", trains, recipe.shards)
            net.added.append((added.path, tensor))
            grouped.setdefault(added.path, {})[added.name] = tensor
        replay = METHODS[method].replay
        if grouped and replay is None:
            raise PeftLabError(
                f"The activations of {method} are not known yet. Its parameters are: peftlab count {shape.name} "
                f"--method {method}."
            )
        for path, tensors in grouped.items():
            assert replay is not None
            resolve(replay)(net, path, tensors)
        if recipe.gpus > 1 and not recipe.sharded:  # DDP's buckets are as large as all gradients
            size = sum(one.elements * one.bytes for one in net.parameters)
            self.held.append(Tensor(self.memory, (size,), 1, "gradients"))
        net.leaves = bool(recipe.checkpointing) and not trained.whole
        self.ids = Tensor(self.memory, (recipe.batch, recipe.sequence), ops.INT64)

    def step(self) -> None:
        """Replay one step: forward, loss, backward, optimiser. Then free the gradients."""
        for _ in self.stretches():
            pass

    def second_step(self) -> SecondStep:
        """Replay the first step of a run, and return what the second one allocates.

        The second step does the same on top of what the first one leaves: the optimiser's states, and up to the
        backward pass what the graph of the first loss still holds.
        """
        memory, start = self.memory, self.memory.now.copy()
        layout = self.shape.layout
        if layout is not None and self.net.extend is unchanged:  # not with a prefix, a tensor that all blocks share
            self.net.repeated = Repeats(self.net, layout).around
        flops, written = memory.flops, memory.written
        memory.cut()
        first = [memory.cut() for _ in self.stretches()]
        self.net.renewed.clear()
        left = memory.more_than(start)
        self.loss = None
        states = memory.more_than(start)
        forward, back, _, update = first
        second = [forward.on_top_of(left), back.on_top_of(states), update]
        top = max(first + second, key=lambda stretch: stretch.peak)
        return SecondStep(
            top.peak, top.at_peak, top.moment, [point for stretch in second for point in stretch.history],
            memory.flops - flops, memory.written - written - sum(states.values()),
        )  # fmt: skip

    def stretches(self) -> Iterator[None]:
        """Replay one step, and stop after the loss, the backward pass, the optimiser's new states, and its update."""
        self.memory.moment = "forward"
        if self.sharding:
            self.sharding.start()
        with self.net.under_autocast():
            loss = self.forward()
        yield
        self.memory.moment = "backward"
        self.loss = loss  # the loss of the last step, with what its graph still holds, is freed only now
        if loss.node is not None:  # otherwise nothing that trains was used
            backward(loss.node, [loss.new()])
        self.check_reached()
        if self.sharding:
            self.sharding.finish()
        yield
        self.memory.moment = "optimiser"
        self.make_states()
        yield
        self.optimize()
        yield
        for parameter in self.net.parameters:
            parameter.grad = None

    def close(self) -> None:
        """Break the reference cycles between the model and its layers' calls, so that everything is freed at once."""
        self.net.layers.clear()
        self.net.around_feed_forward.clear()
        del self.net.front, self.net.extend, self.net.around_block, self.net.repeated

    def forward(self) -> Tensor:
        """Return the loss as transformers computes it. Logits of each token of a decoder are cast to float32 first."""
        logits = FORWARD[self.shape.family](self.net, self.ids)
        self.memory.moment = "loss"
        with self.memory.kind("logits"):
            if self.recipe.chunked_loss:
                loss = chunked_loss(self.net, logits)
                self.net.held.clear()
                return loss
            widened = self.shape.kind == "decoder" and self.shape.task != "classifier"
            wide = ops.cast(logits, ops.FLOAT32) if widened or self.recipe.autocast else logits
            loss = ops.cross_entropy(wide)
        self.net.held.clear()
        return loss

    def check_reached(self) -> None:
        """Require that everything that trains got a gradient.

        Raises:
            PeftLabError: the forward pass does not use a module whose tensors train, as T5's `shared`.
        """
        without = (path for path, one in self.net.everything() if one.needs_grad and one.grad is None)
        lost = list(dict.fromkeys(without))
        if lost:
            more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
            raise PeftLabError(
                f"A training step of {self.shape.name} does not call {lost[0]}{more}, so what {self.method} trains "
                "there would get no gradient. Name other targets (--targets)."
            )

    def moved(self) -> list[Parameter]:
        """Return the parameters that an update moves: those that got a gradient."""
        return [one for one in self.net.parameters if one.grad is not None]

    def make_states(self) -> None:
        """Allocate the optimiser's states, unless they are there."""
        if self.states is None:
            with self.memory.kind("optimizer"):
                self.states = [self.state(parameter) for parameter in self.moved()]

    def optimize(self) -> None:
        """Replay an update: torch.optim.AdamW's in one of its three forms, or one of SGD or bitsandbytes' AdamW."""
        parameters = self.moved()
        # the masters' gradients, in float32, live as long as the update
        gradients = [one.new((one.held,), ops.FLOAT32) for one in parameters if self.has_master(one)]
        if self.recipe.optimizer == "adamw":
            denominator = None
            for parameter in parameters:
                # denom = (v.sqrt() / c).add_(eps): two tensors of v's size live at once. With them lives the last
                # parameter's denom, because its name is bound anew only afterwards.
                root = parameter.new((parameter.held,), self.state_bytes(parameter))
                quotient = parameter.new((parameter.held,), self.state_bytes(parameter))
                del root
                denominator = quotient
                del quotient
            del denominator
        elif self.recipe.optimizer == "adamw-foreach":  # torch._foreach_sqrt: the roots of all parameters at once
            roots = [parameter.new((parameter.held,), self.state_bytes(parameter)) for parameter in parameters]
            del roots
        del gradients

    def has_master(self, parameter: Parameter) -> bool:
        """Say whether the optimiser keeps a float32 copy of a parameter, which it moves in its place."""
        return self.recipe.masters and parameter.bytes < ops.FLOAT32 and parameter.storage.kind == "adapter"

    def state_bytes(self, parameter: Parameter) -> int:
        """Return the bytes of one number of torch's states, which have the dtype of what they move."""
        return ops.FLOAT32 if self.has_master(parameter) else parameter.bytes

    def state(self, parameter: Parameter) -> tuple[Tensor, ...]:
        """Allocate the optimiser's states for one parameter."""
        optimizer, count = self.recipe.optimizer, parameter.held
        master = [parameter.new((count,), ops.FLOAT32)] if self.has_master(parameter) else []
        if optimizer == "sgd":
            return (*master,)
        if optimizer in TORCH_ADAMW:  # two moments in the dtype of what they move
            bytes = self.state_bytes(parameter)
            return (*master, parameter.new((count,), bytes), parameter.new((count,), bytes))
        if optimizer == "adamw32bit":  # in float32, whatever the parameter's dtype
            return (*master, parameter.new((count,), ops.FLOAT32), parameter.new((count,), ops.FLOAT32))
        # two moments in 8 bits, with a float32 scale per block of 256; float32 moments for small tensors
        bytes = ops.FLOAT32 if count < SMALL_8BIT else 1
        paged = optimizer.startswith("paged") and count >= PAGED  # in unified memory, which torch does not count
        moments = () if paged else (parameter.new((count,), bytes), parameter.new((count,), bytes))
        blocks = -(-count // BLOCK_8BIT)
        scales = [parameter.new((blocks,), ops.FLOAT32) for _ in range(2 if bytes == 1 else 0)]
        return (*master, *moments, *scales)
