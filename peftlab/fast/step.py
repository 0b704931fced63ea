"""Compute the gradient of a batch: embedding, blocks, the loss at the labelled positions, and the way back.

    L = sum over labelled i of nll(x_{i+1} | x_1 .. x_i)        logits = W_head norm(x_n),  x_n from the last block

The logits of a whole batch are the largest tensor of a plain step. Here they are made for some hundred labelled tokens
at a time (as many as `LOGITS` numbers hold), turned into their own gradient in place, and dropped.

Padding needs no mask: it stands on the right, so no real token attends to it, and it has no label. Packed rows and
sliding windows get the mask that transformers would make.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from peftlab.fast import GROUPS, Decoder, Refused
from peftlab.fast.groups import Flat, share
from peftlab.fast.layer import Block, Kept, Rows
from peftlab.fast.pieces import pieces_for

IGNORE = -100
COLUMNS = {"input_ids", "labels", "attention_mask", "position_ids", "use_cache"}
LOGITS = 2**26  # numbers in a chunk of logits
MOST_GRAPHS = 16  # each holds little of its own, for all take their memory from one pool


class Batch(NamedTuple):
    """A batch as the step reads it. On a GPU, its sizes are rounded up, so that few different shapes occur.

    Attributes:
        ids: (b, s).
        places: (l,), where a label is predicted, as a place among the b s tokens.
        back: (b s,), each token's place in `places`; l where it predicts no label.
        labels: (l,), the labels there, -100 for those that fill up.
        learned: (), how many labels there are.
        length: tokens in a row, before sizes were rounded up.
        positions: (b or 1, s); None if the batch gives none. They are then 0, 1, 2, ... in all rows.
        blocks: (b, s), the number of each token's example in its row; None without packing.
    """

    ids: Tensor
    places: Tensor
    back: Tensor
    labels: Tensor
    learned: Tensor
    length: int
    positions: Tensor | None
    blocks: Tensor | None

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device."""
        moved: Any = (one.to(device, non_blocking=True) if isinstance(one, Tensor) else one for one in self)
        return Batch(*moved)


def read_batch(batch: Mapping[str, Any], rounded: bool = False) -> Batch:
    """Return a batch of the plain path, still on the CPU, as the step reads it.

    Args:
        rounded: whether its sizes are rounded up.

    Raises:
        Refused: it holds something else than tokens, labels, positions and padding on the right.
    """
    if strange := sorted(set(batch) - COLUMNS):
        raise Refused(f"a batch has the column {strange[0]!r}")
    ids, labels, mask, positions = (batch.get(key) for key in ("input_ids", "labels", "attention_mask", "position_ids"))
    if not isinstance(ids, Tensor) or ids.ndim != 2 or not isinstance(labels, Tensor) or labels.shape != ids.shape:
        raise Refused("a batch has no input_ids and labels (rows, tokens)")
    # the label of a token is predicted one token before
    following = F.pad(labels[:, 1:], (0, 1), value=IGNORE)
    blocks = None
    if isinstance(mask, Tensor):
        real = mask.bool() if mask.shape == ids.shape else mask
        if mask.shape != ids.shape or (real[:, 1:] & ~real[:, :-1]).any() or not real[:, 0].all():
            raise Refused("a batch has an attention mask that hides more than padding on the right")
        if ((following != IGNORE) & ~real).any():
            raise Refused("a batch has a label that is predicted from padding")
    elif positions is not None:
        # without a mask, transformers begins an example wherever a position is not one more than the last
        found = (positions.diff(dim=1, prepend=positions[:, :1] - 1) != 1).cumsum(1)
        blocks = found.expand(ids.shape).contiguous() if found[:, -1].any() else None
    b, s = ids.shape
    more = round_up(s) - s if rounded else 0
    if more:
        ids, following = F.pad(ids, (0, more)), F.pad(following, (0, more), value=IGNORE)
        if positions is not None:
            positions = torch.cat([positions, positions[:, -1:].expand(-1, more)], 1)
        blocks = None if blocks is None else F.pad(blocks, (0, more), value=-1)
    places = (following.reshape(-1) != IGNORE).nonzero()[:, 0]
    count = len(places)
    fill = (round_up(count) if rounded else max(1, count)) - count
    back = torch.full((ids.numel(),), count + fill)
    back[places] = torch.arange(count)
    wanted = F.pad(following.reshape(-1)[places].long(), (0, fill), value=IGNORE)
    return Batch(ids, F.pad(places, (0, fill)), back, wanted, torch.tensor(count), s, positions, blocks)


def round_up(n: int) -> int:
    """Return n or a little more: one of eight sizes between two powers of two, and a multiple of 64."""
    step = max(64, 2 ** (max(1, n).bit_length() - 4))  # an eighth of the power of two below
    return -(-max(1, n) // step) * step


class Step:
    """The forward and the backward pass of a decoder, with its weights borrowed from the model.

    Args:
        decoder: the parts of the model.
        dtype: of the products. The stream between the blocks has the dtype of the embeddings.
        recompute: how many blocks are computed again in the backward pass, the first ones. Only their inputs are kept.
        pinned: whether these inputs wait in pinned main memory.
    """

    def __init__(self, decoder: Decoder, dtype: torch.dtype, recompute: int, pinned: bool = False) -> None:
        self.decoder, self.recomputed = decoder, recompute
        self.side = torch.cuda.Stream() if pinned else None
        self.pinned: dict[torch.Size, list[Tensor]] = {}
        self.usual: dict[torch.Size, Rows] = {}
        # these turn a head by other angles in a longer text
        self.grows = getattr(decoder.rotary, "rope_type", "default") in ("dynamic", "longrope")
        device = decoder.embedding.weight.device
        self.like = torch.empty(0, dtype=dtype, device=device)
        self.pieces, self.told = pieces_for(device, dtype)
        self.head = decoder.head.weight.detach().to(dtype)
        self.blocks = [Block(parts, decoder.sizes, self.pieces, self.like) for parts in decoder.blocks]
        self.first = next(index for index, block in enumerate(self.blocks) if block.trains)
        self.groups = [group for block in self.blocks for group in block.groups.values()]
        try:
            for group in self.groups:
                group.borrow()
            for name in GROUPS:
                share([block.groups[name] for block in self.blocks])
            self.flat = Flat(parameter for group in self.groups for parameter in group.parameters())
        except BaseException:  # the memory may not suffice
            for group in self.groups:
                group.give_back()
            raise
        at = 0
        for group in self.groups:
            at = group.place(self.flat, at)

    def give_back(self) -> None:
        """Give the model its weights and parameters back."""
        for group in self.groups:
            group.give_back()
        self.flat.give_back()

    # -- one batch -----------------------------------------------------------------------------------------------

    def rows(self, batch: Batch) -> Rows:
        """Return the positions and masks of a batch, on the device. Those of usual batches are kept."""
        if batch.positions is not None or self.grows:
            return self._rows(batch)
        shape = batch.ids.shape
        if shape not in self.usual:
            self.usual[shape] = self._rows(batch)
        return self.usual[shape]

    def _rows(self, batch: Batch) -> Rows:
        (b, s), device, positions = batch.ids.shape, self.like.device, batch.positions
        if positions is None:
            places = torch.arange(s)[None]
            positions = places.clamp(max=batch.length - 1) if self.grows else places
        rotary: Any = self.decoder.rotary
        cos, sin = rotary(self.decoder.embedding.weight.new_empty(b, s, 1), positions.to(device))
        # both halves of a head's numbers are turned by the same angles
        cos, sin = (table[..., : self.decoder.sizes.head_dim // 2].unsqueeze(2).contiguous() for table in (cos, sin))
        blocks = None if batch.blocks is None else batch.blocks.to(device)
        windows = {block.window for block in self.blocks}
        return Rows(b, s, cos, sin, -sin, {window: _mask(s, blocks, window, device) for window in windows})

    @torch.no_grad()
    def gradients(self, batch: Batch, rows: Rows, scale: Tensor) -> Tensor:
        """Add the gradient of the batch's summed loss times `scale` to the flat gradient. Return the sum."""
        for group in self.groups:
            group.read_adapters()
        x = F.embedding(batch.ids.reshape(-1), self.decoder.embedding.weight)
        inputs: Any = [] if self.side is None else PinnedShelf(self.pinned.setdefault(x.shape, []), self.side)
        kept: list[Kept | None] = []
        for index, block in enumerate(self.blocks):
            if index >= self.first:
                inputs.append(x)
            x, saved = block.forward(x, rows, keep=index >= max(self.first, self.recomputed))
            kept.append(saved)
            del saved
        loss, dy, dydu = self._loss(x, batch, scale)
        del x
        for index in range(len(self.blocks) - 1, self.first - 1, -1):
            beneath = self.blocks[index - 1].down if index > self.first else None
            made = self.blocks[index].backward(inputs.pop(), dy, dydu, rows, kept.pop(), beneath)
            if made is not None:
                dy, dydu = made
        return loss

    def _loss(self, x: Tensor, batch: Batch, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the summed loss, and the gradient of the last block's output x (M, H) as `Block.backward` takes it."""
        weight, eps, pieces = self.decoder.norm.weight, self.decoder.sizes.eps, self.pieces
        chosen = x[batch.places]
        n = chosen.new_empty(chosen.shape, dtype=self.like.dtype)
        pieces.norm_into(n, chosen, weight, eps)
        total = torch.zeros((), device=x.device, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
        chunk = max(128, LOGITS // len(self.head) // 128 * 128)
        for at in range(0, len(n), chunk):
            logits = n[at : at + chunk] @ self.head.t()
            total += pieces.cross_entropy_(logits, batch.labels[at : at + chunk], scale)
            n[at : at + chunk] = logits @ self.head  # dn in the place of n, which is not needed any more
        back = chosen.new_zeros(len(chosen) + 1, chosen.shape[1])  # the last row is for tokens without a label
        pieces.norm_back_into(back[:-1], None, None, chosen, weight, n, eps)
        dy, dydu, copy = self.blocks[-1].room(x, self.blocks[-1].down)
        torch.index_select(back, 0, batch.back, out=dy) if copy is not None else dy.copy_(back[batch.back])
        if copy is not None:
            copy.copy_(dy)
        return total, dy, dydu


def _mask(s: int, blocks: Tensor | None, window: int | None, device: torch.device) -> Tensor | None:
    """Which tokens attend to which, (b or 1, 1, s, s): to earlier ones of their example and window. None: to all."""
    if blocks is None and (window is None or window >= s):
        return None
    place = torch.arange(s, device=device)
    behind = place[:, None] - place[None]
    seen = behind >= 0 if window is None else (behind >= 0) & (behind < window)
    return seen[None, None] if blocks is None else (seen & (blocks[:, :, None] == blocks[:, None]))[:, None]


class PinnedShelf:
    """Keep the blocks' inputs in the computer's main memory, from the forward pass to the backward pass.

    With checkpointing they are all that is kept of a block: 16 bits times tokens times hidden size. A copy to pinned
    memory runs beside the products, on a stream of its own. One input is copied while the next block computes, and it
    comes back while the block above it is run backward. From outside it is a list of which only the end is used.

    Args:
        pinned: the memory, from step to step.
    """

    def __init__(self, pinned: list[Tensor], side: torch.cuda.Stream) -> None:
        self.pinned, self.side = pinned, side
        self.copied: list[torch.cuda.Event] = []
        self.leaving: Tensor | None = None
        self.coming: tuple[Tensor, torch.cuda.Event] | None = None

    def append(self, x: Tensor) -> None:
        """Begin to copy an input, and let go of the one before, whose copy is done by now."""
        main, at = torch.cuda.current_stream(), len(self.copied)
        if at == len(self.pinned):
            self.pinned.append(torch.empty(x.shape, dtype=x.dtype, pin_memory=True))
        self.side.wait_stream(main)
        with torch.cuda.stream(self.side):
            self.pinned[at].copy_(x, non_blocking=True)
        if self.copied:
            main.wait_event(self.copied[-1])
        self.copied.append(self.side.record_event())
        self.leaving = x

    def pop(self) -> Tensor:
        """Return the last input, and begin to fetch the one below it."""
        main = torch.cuda.current_stream()
        self.copied.pop()
        if self.leaving is not None:  # the topmost block's input is still here
            x, self.leaving = self.leaving, None
            main.wait_stream(self.side)
        else:
            assert self.coming is not None
            x, arrived = self.coming
            main.wait_event(arrived)
        self.coming = self._fetch(len(self.copied) - 1, like=x) if self.copied else None
        return x

    def _fetch(self, at: int, like: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        x = torch.empty_like(like)
        self.side.wait_stream(torch.cuda.current_stream())  # what had this memory before is done with it
        with torch.cuda.stream(self.side):
            x.copy_(self.pinned[at], non_blocking=True)
        return x, self.side.record_event()


@dataclass
class Recorded:
    """A graph, the tensors that it reads, what was last copied there, and the tensor that it writes."""

    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    copied: list[Tensor]
    loss: Tensor


class Graphs:
    """Replay a whole step as one CUDA graph, one for each shape of a batch.

    A step launches some three thousand kernels. Launched one by one from Python they take longer than they run, on a
    small model or a slow host. A graph is recorded once and then launched as a whole. It fixes the addresses of all
    tensors, so there is one for each shape, and its inputs are copied to where they were when it was recorded.
    """

    def __init__(self, step: Step) -> None:
        self.step = step
        self.recorded: dict[tuple, Recorded] = {}
        self.seen: set[tuple] = set()
        self.pool = torch.cuda.graph_pool_handle()

    def gradients(self, batch: Batch, rows: Rows, scale: Tensor) -> Tensor:
        """Do what `Step.gradients` does. The first batch of a shape runs as usual, and its second records the graph.

        Args:
            batch: may still be on the CPU.
            scale: always the same tensor, which is written to.
        """
        given = [*batch[:4], rows.cos, rows.sin, rows.sin_back, *(m for m in rows.masks.values() if m is not None)]
        shape = tuple(tensor.shape for tensor in given)
        recorded = self.recorded.get(shape)
        if recorded is None:
            if shape not in self.seen or len(self.recorded) >= MOST_GRAPHS:
                self.seen.add(shape)
                return self.step.gradients(batch.to(scale.device), rows, scale)
            recorded = self.recorded[shape] = self._record(batch, rows, scale, given)
        for index, (held, tensor) in enumerate(zip(recorded.inputs, given, strict=True)):
            if recorded.copied[index] is not tensor:
                held.copy_(tensor, non_blocking=True)
        recorded.copied = given
        recorded.graph.replay()
        return recorded.loss.clone()

    def _record(self, batch: Batch, rows: Rows, scale: Tensor, given: list[Tensor]) -> Recorded:
        inputs = [tensor.to(scale.device, copy=True) for tensor in given]
        ids, places, back, labels, cos, sin, sin_back, *others = inputs
        masks = iter(others)
        held = Batch(ids, places, back, labels, batch.learned, batch.length, None, None)
        own = {window: None if mask is None else next(masks) for window, mask in rows.masks.items()}
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            loss = self.step.gradients(held, Rows(rows.b, rows.s, cos, sin, sin_back, own), scale)
        return Recorded(graph, inputs, given, loss)
