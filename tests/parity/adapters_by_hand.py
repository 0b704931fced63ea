"""Bottleneck adapters once more, independently: the blocks of transformers' models written out with the adapters in
them, in plain PyTorch. Nothing of peftlab is used."""

import types

import torch
from torch import nn

ACTIVATIONS = {"relu": torch.relu, "gelu": nn.functional.gelu, "silu": nn.functional.silu, "tanh": torch.tanh}


class Adapter(nn.Module):
    def __init__(self, d, m, activation, scaling):
        super().__init__()
        self.down, self.up = nn.Linear(d, m), nn.Linear(m, d)
        self.activation, self.scaling = ACTIVATIONS[activation], scaling

    def forward(self, x):
        return self.scaling * self.up(self.activation(self.down(x)))


def llama_block(self, hidden_states, **rest):
    residual = hidden_states
    h, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **rest)
    if self.placement == "houlsby":
        h = h + self.first(h)
    x = residual + h
    normed = self.post_attention_layernorm(x)
    h = self.mlp(normed)
    if self.placement == "houlsby":
        h = h + self.second(h)
    if self.placement == "parallel":
        h = h + self.second(normed)
    y = x + h
    return y + self.second(y) if self.placement == "pfeiffer" else y


def gpt2_block(self, hidden_states, cache=None, attention_mask=None, *unused, **rest):
    # by position: the argument for the cache has another name since transformers 5.24
    h, _ = self.attn(self.ln_1(hidden_states), cache, attention_mask=attention_mask, use_cache=rest.get("use_cache"))
    if self.placement == "houlsby":
        h = h + self.first(h)
    x = hidden_states + h
    normed = self.ln_2(x)
    h = self.mlp(normed)
    if self.placement == "houlsby":
        h = h + self.second(h)
    if self.placement == "parallel":
        h = h + self.second(normed)
    y = x + h
    return y + self.second(y) if self.placement == "pfeiffer" else y


def bert_attention_output(self, hidden_states, input_tensor):
    h = self.dense(hidden_states)
    if self.placement == "houlsby":
        h = h + self.first(h)
    return self.LayerNorm(h + input_tensor)


def bert_output(self, hidden_states, input_tensor):
    h = self.dense(hidden_states)
    if self.placement == "houlsby":
        h = h + self.second(h)
    if self.placement == "parallel":
        h = h + self.second(input_tensor)
    if self.placement == "pfeiffer":
        h = h + self.second(self.LayerNorm(h + input_tensor))
    return self.LayerNorm(h + input_tensor)


def t5_attention(self, hidden_states, attention_mask=None, **rest):
    h, *others = self.SelfAttention(self.layer_norm(hidden_states), mask=attention_mask, **rest)
    if self.placement == "houlsby":
        h = h + self.first(h)
    return (hidden_states + h, *others)


def t5_feed_forward(self, hidden_states):
    normed = self.layer_norm(hidden_states)
    h = self.DenseReluDense(normed)
    if self.placement == "houlsby":
        h = h + self.second(h)
    if self.placement == "parallel":
        h = h + self.second(normed)
    y = hidden_states + h
    return y + self.second(y) if self.placement == "pfeiffer" else y


def put_in(model, placement, m, activation="relu", scaling=1.0):
    """Gives each block its adapters; returns {path of the projection they follow: adapter}."""
    model.requires_grad_(False)
    kind = model.config.model_type
    adapters = {}

    def place(path, attribute, projection, forward):
        module = model.get_submodule(path)
        module.placement = placement
        module.forward = types.MethodType(forward, module)
        if attribute == "second" or placement == "houlsby":
            d = model.get_input_embeddings().embedding_dim
            setattr(module, attribute, Adapter(d, m, activation, scaling).to(model.dtype))
            adapters[projection] = getattr(module, attribute)

    for path, _ in list(model.named_modules()):
        block = path.rpartition(".")
        if kind == "llama" and block[2].isdigit():
            place(path, "first", f"{path}.self_attn.o_proj", llama_block)
            place(path, "second", f"{path}.mlp.down_proj", llama_block)
        elif kind == "gpt2" and block[2].isdigit():
            place(path, "first", f"{path}.attn.c_proj", gpt2_block)
            place(path, "second", f"{path}.mlp.c_proj", gpt2_block)
        elif kind in ("bert", "roberta") and path.endswith("attention.output"):
            place(path, "first", f"{path}.dense", bert_attention_output)
        elif kind in ("bert", "roberta") and path.endswith("output"):
            place(path, "second", f"{path}.dense", bert_output)
        elif kind == "t5" and path.endswith("SelfAttention"):
            place(block[0], "first", f"{path}.o", t5_attention)
        elif kind == "t5" and path.endswith("DenseReluDense"):
            place(block[0], "second", f"{path}.wo", t5_feed_forward)
    return adapters
