"""What transformers and peft really allocate, tensor by tensor: every storage of a step, from its birth to its end.

Runs on the meta device, so real shapes cost nothing; autocast exists on real devices only, so there on the CPU. Two
things are put in the place of what a CPU has not: a fused attention that allocates what the CUDA kernels do, and
dropout as one kernel with a mask of bytes.
"""

import functools
import weakref
from contextlib import nullcontext

import peft
import torch
import transformers.masking_utils as masks
from on_meta import on_meta
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.integrations.sdpa_attention import create_position_bias_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import peftlab as pl
from peftlab.core.checkpointing import switch_checkpointing
from peftlab.core.interface import Config

BLOCK = 512
AUTO = {
    "decoder": AutoModelForCausalLM,
    "encoder": AutoModelForSequenceClassification,
    "encoder-decoder": AutoModelForSeq2SeqLM,
    "token classifier": AutoModelForTokenClassification,
}


SHAPED = {}  # what an operation gave for tensors of these shapes: torch takes up to 2 ms to find it on the meta device


@functools.cache
def gives_new(function):
    """Whether what it returns is new, and is no view of an argument nor an argument itself."""
    return all(result.alias_info is None for result in function._schema.returns)


def form(value):
    """What decides the size of a result: all of a number, but only the outside of a tensor. None for other values."""
    if isinstance(value, torch.Tensor):
        return (value.shape, value.stride(), value.dtype) if value.is_meta else None
    if isinstance(value, (list, tuple)):
        forms = tuple(map(form, value))
        return None if None in forms else forms
    return type(value), value


def shaped(function, args, kwargs):
    """Call an operation on the meta device, or make new tensors like those that it gave for such arguments before.

    A result that lies in the storage of an argument, or in a larger one, is made by torch each time.
    """
    if not gives_new(function):
        return function(*args, **kwargs)
    key = (function, form(args), form(tuple(kwargs.items())))
    if None in key:
        return function(*args, **kwargs)
    if (known := SHAPED.get(key)) is not None:
        made = [torch.empty_strided(shape, stride, dtype=dtype, device="meta") for shape, stride, dtype in known[1]]
        return made[0] if known[0] is torch.Tensor else known[0](made)
    output = function(*args, **kwargs)
    leaves = [output] if isinstance(output, torch.Tensor) else output
    if type(output) in (torch.Tensor, tuple) and all(isinstance(x, torch.Tensor) and x.is_meta for x in leaves):
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        like = [(x.shape, x.stride(), x.dtype) for x in leaves]
        sizes = [torch.empty_strided(*outside, dtype=dtype, device="meta").nbytes for *outside, dtype in like]
        own = {x.untyped_storage()._cdata for x in leaves} - given
        if len(own) == len(leaves) and sizes == [x.untyped_storage().nbytes() for x in leaves]:
            SHAPED[key] = (type(output), like)
    return output


class Tracker(TorchDispatchMode):
    """Bytes of all storages that are alive, and the most there ever were."""

    def __init__(self):
        super().__init__()
        self.alive, self.now, self.peak = set(), 0, 0

    def see(self, tensor):
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.alive:
            return
        size = -(-storage.nbytes() // BLOCK) * BLOCK
        self.alive.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.gone, key, size)

    def gone(self, key, size):
        self.alive.discard(key)
        self.now -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._safe_softmax.default:  # the softmax and the mask inside it are not seen here
            hidden = [args[0].new_empty(args[0].shape, dtype=dtype) for dtype in (args[0].dtype, torch.bool)]
            for one in hidden:
                self.see(one)
        if function is torch.ops.aten.index_put.default:  # without a dispatch mode the sum is in place
            function = torch.ops.aten.index_put_.default
        output = shaped(function, args, kwargs or {})
        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor):
                self.see(leaf)
        return output


class Fused(torch.autograd.Function):
    """Attention in one kernel: keeps q, k, v, the output, and a number in float32 for each row."""

    @staticmethod
    def forward(ctx, q, k, v, mask):
        batch, heads, length, width = q.shape
        output = torch.empty_like(q) if mask is None else q.new_empty(batch, length, heads, width).transpose(1, 2)
        ctx.save_for_backward(q, k, v, mask, output, q.new_empty(batch, heads, length, dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx, gradient):
        kept = ctx.saved_tensors  # the output, too, is alive while the gradients are computed
        return tuple(torch.empty_like(x) if n else None for x, n in zip(kept[:4], ctx.needs_input_grad, strict=True))


def fused(module, q, k, v, mask, position_bias=None, dropout=0.0, **options):
    """As torch chooses on a GPU: in float32 no fused kernel takes grouped heads."""
    if q.device.type != "meta" and torch.is_autocast_enabled(q.device.type):
        q, k, v = (x.to(torch.bfloat16) for x in (q, k, v))
    if position_bias is not None:
        mask = create_position_bias_mask(position_bias, mask, module.is_causal, q, k)
    elif mask is None and q.dtype == torch.float32 and k.shape[1] != q.shape[1]:
        return math(q, k, v, mask, dropout)
    return Fused.apply(q, k, v, mask).transpose(1, 2).contiguous(), None


def strided_bias(module, q, k, v, mask, position_bias=None, dropout=0.0, **options):
    """T5 before transformers 5.20: no fused kernel takes its bias as it lies, but for the zeros of cross-attention."""
    if module.is_decoder and not module.is_causal:
        return fused(module, q, k, v, mask, position_bias)
    if module.is_causal:
        places = torch.arange(q.shape[2], device=q.device)
        allowed = (places[:, None] >= places)[None, None]
        position_bias = torch.where(allowed, position_bias, torch.finfo(q.dtype).min)
    return math(q, k, v, position_bias, dropout)


def math(q, k, v, mask, dropout):
    """scaled_dot_product_attention in single operations: torch's own code, seen operation by operation."""
    output = torch.ops.aten._scaled_dot_product_attention_math(
        q, k, v, mask, dropout, mask is None, enable_gqa=k.shape[1] != q.shape[1]
    )[0]
    return output.transpose(1, 2).contiguous(), None


def plain_sdpa(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, **options):
    """`scaled_dot_product_attention` as Falcon calls it: with a mask, and one head of keys for all."""
    bias = attn_mask
    if bias.dtype == torch.bool:
        bias = torch.zeros(bias.shape, dtype=q.dtype, device=q.device).masked_fill_(attn_mask.logical_not(), -1.0)
    if k.shape[1] != q.shape[1]:  # no fused kernel takes this
        return torch.ops.aten._scaled_dot_product_attention_math(q, k, v, bias, dropout_p, False)[0]
    return Fused.apply(q, k, v, bias)


for name, stand_in in (("fused_stand_in", fused), ("strided_bias", strided_bias)):
    ALL_ATTENTION_FUNCTIONS.register(name, stand_in)
    masks.ALL_MASK_ATTENTION_FUNCTIONS.register(name, lambda *args, **options: None)


def dropout(x, p=0.5, training=True, inplace=False):
    return torch.native_dropout(x, p, True)[0] if p and training else x


def autocast_anywhere(device_type, *args, real=torch.autocast, **options):
    """The meta device has no autocast, which peft switches off around the weights of experts."""
    return nullcontext() if device_type == "meta" else real(device_type, *args, **options)


def measure(
    config,
    kind,
    adapter=None,
    *,
    batch,
    sequence,
    dtype,
    checkpointing=False,
    autocast=False,
    attention="fused_stand_in",
    prepare=None,
    monkeypatch,
):
    """Bytes above the parameters, at the most, of forward and of backward, in the second of two steps.

    `adapter` is a config of Hugging Face peft, or one of ours: then our own layers run. `prepare(model)` comes before.
    """
    monkeypatch.setattr(masks, "find_packed_sequence_indices", lambda *args, **options: None)
    monkeypatch.setattr(torch.nn.functional, "dropout", dropout)
    monkeypatch.setattr(torch, "autocast", autocast_anywhere)
    if config["model_type"] == "falcon":  # it does not ask for an attention by name
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", plain_sdpa)
        attention = "sdpa"
    config = AutoConfig.for_model(**{**config, "use_cache": False})
    config.decoder_start_token_id = 0  # asked for by T5
    config._attn_implementation = attention
    device = "cpu" if autocast else "meta"
    with torch.device("cpu") if autocast else on_meta():
        model = AUTO[kind].from_config(config, dtype=dtype)
    if prepare is not None:
        model = prepare(model)
    if checkpointing:
        switch_checkpointing(model, "enable", {"use_reentrant": False})
    if isinstance(adapter, Config):
        pl.attach(model, adapter)
    elif adapter is not None:
        model = peft.get_peft_model(model, adapter)
    model.train()
    ids = torch.zeros(batch, sequence, dtype=torch.long, device=device)
    labels = ids[:, 0].clone() if kind == "encoder" else ids
    tracker, peaks = Tracker(), []
    with tracker:
        for tensor in [*model.parameters(), *model.buffers(), ids, labels]:
            tracker.see(tensor.detach())
        start, loss = tracker.now, None
        for _ in range(2):
            tracker.peak = tracker.now
            with torch.autocast(device if autocast else "cpu", torch.bfloat16, enabled=autocast):
                loss = model(input_ids=ids, labels=labels).loss
            forward, tracker.peak = tracker.peak - start, tracker.now
            loss.backward()
            peaks = [forward, tracker.peak - start]
            model.zero_grad(set_to_none=True)
    return peaks
