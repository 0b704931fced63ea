"""LoRA+: the groups of Hugging Face peft's optimiser, three steps with it, and whole runs of our own."""

import copy
import warnings

import peft
import pytest
import torch
from pairs import base, batch, give, gradients, live, our_state, peft_config, relative, same
from peft.optimizers import create_loraplus_optimizer
from releases import skip_before

import peftlab as pl
from peftlab.settings import Settings
from peftlab.training.loraplus import loraplus_groups
from peftlab.training.optimizers import make_optimizer

RATES = dict(learning_rate=0.01, loraplus_lr_ratio=7, weight_decay=0.3)
CASES = {
    "llama": ("llama", pl.LoRAConfig, dict(target_modules="all-linear")),
    "llama, embeddings, head in full": ("llama", pl.LoRAConfig, dict(
        target_modules=["embed_tokens", "q_proj"], modules_to_save=["lm_head", "model.norm"])),
    "llama, tokens, B's bias": ("llama", pl.LoRAConfig, dict(
        target_modules=["q_proj"], lora_bias=True, trainable_tokens=[4, 9])),
    "llama, DoRA": ("llama", pl.DoRAConfig, dict(target_modules=["embed_tokens", "down_proj"])),
    "gpt2, all biases": ("gpt2", pl.LoRAConfig, dict(target_modules=["c_attn", "wte"], bias="all")),
    "bert, layer norms and heads in full": ("bert", pl.LoRAConfig, dict(
        target_modules=["query"], modules_to_save=["output.LayerNorm", "classifier"])),
}  # fmt: skip
EMBEDDINGS = {"embed_tokens", "wte"}


def pair(case):
    kind, config, settings = CASES[case]
    model = base(kind)
    twin = copy.deepcopy(model)
    pl.attach(model, config(r=4, alpha=6, init="random", **settings))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(twin, peft_config(r=4, alpha=6, use_dora=config is pl.DoRAConfig, **settings))
    give(theirs, model)
    return kind, model, theirs


def ours_of(model, **settings):
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    settings = Settings(**{**RATES, **settings})
    groups = loraplus_groups(model, trained, settings)
    return make_optimizer("adamw", trained, settings.learning_rate, 0.3, torch.device("cpu"), groups)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("slow", [None, 0.002])
def test_three_steps_are_those_of_pefts_optimizer(case, slow):
    if EMBEDDINGS & set(CASES[case][2]["target_modules"]):
        skip_before("peft", "0.21", "create_loraplus_optimizer takes an embedding's A and B for a linear layer's")
    kind, ours, theirs = pair(case)
    more = {} if slow is None else {"loraplus_lr_embedding": slow}
    mine = ours_of(ours, **more)
    other = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=0.01, loraplus_lr_ratio=7, loraplus_weight_decay=0.3, **more
    )

    def told(optimizer, state):
        """{key: (learning rate, weight decay)}"""
        groups = {
            p.data_ptr(): (group["lr"], group["weight_decay"])
            for group in optimizer.param_groups
            for p in group["params"]
        }
        return {key: groups[parameter.data_ptr()] for key, parameter in state.items()}

    assert told(mine, our_state(ours)) == told(other, live(theirs))
    inputs = batch(kind)
    for _ in range(3):
        found, expected = ours(**inputs), theirs(**inputs)
        assert relative(found.logits, expected.logits) < 1e-9
        found.loss.backward(), expected.loss.backward()
        same(gradients(our_state(ours)), gradients(live(theirs)))
        for optimizer in (mine, other):
            optimizer.step()
            optimizer.zero_grad()
        same(our_state(ours), live(theirs))
