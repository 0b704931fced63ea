"""Experts on a CUDA device: codes against bitsandbytes, implementations, what is kept for the backward pass."""

import copy
import warnings

import pytest
import torch
import transformers as tf

import peftlab as pl
from peftlab.optional import available, require
from peftlab.quantization.weights import dense

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(available("bitsandbytes") is None, reason="needs bitsandbytes"),
]
SIZES = dict(
    vocab_size=64, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=64,
)  # fmt: skip
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
X = (
    torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(0)).cuda()
    if torch.cuda.is_available()
    else None
)


def mixtral(place="cuda"):
    torch.manual_seed(0)
    return tf.MixtralForCausalLM._from_config(tf.MixtralConfig(**SIZES), dtype=torch.bfloat16).to(place)


def gradients(model):
    model(X, labels=X).loss.backward()
    found = {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def close(found, expected):
    return all((value - expected[name]).norm() <= 0.02 * expected[name].norm() for name, value in found.items())


def test_codes_are_those_of_each_expert_alone_and_move_between_devices():
    functional = require("bitsandbytes").functional
    whole, model = dict(mixtral().named_parameters()), pl.quantize_model(mixtral())
    for name, codes in model.named_parameters():
        for e, expert in enumerate(whole[name].detach() if "experts" in name else ()):
            packed, state = functional.quantize_4bit(expert, compress_statistics=True, quant_type="nf4")
            assert torch.equal(codes[e], packed.flatten())
            assert torch.equal(dense(codes)[e], functional.dequantize_4bit(packed, state))
    expected = model(X).logits
    assert torch.isfinite(expected).all() and torch.equal(model.cpu().cuda()(X).logits, expected)


@pytest.mark.parametrize("four_bit", [False, True])
def test_implementations_and_checkpointing_agree(four_bit):
    model = pl.quantize_model(mixtral()) if four_bit else mixtral()
    pl.attach(model, pl.LoRAConfig(r=4, init="random", target_parameters=EXPERTS)).train()
    model.set_experts_implementation("eager")
    expected = gradients(model)
    assert len(expected) == 8
    for implementation in ("batched_mm", "grouped_mm"):
        model.set_experts_implementation(implementation)
        assert close(gradients(model), expected)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert close(gradients(model), expected)


def test_a_step_needs_less_memory_than_in_peft():
    peft = require("peft")
    peaks = []
    for library in ("peft", "peftlab"):
        model = copy.deepcopy(mixtral())
        if library == "peft":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=[], target_parameters=EXPERTS))
        else:
            pl.attach(model, pl.LoRAConfig(r=4, target_parameters=EXPERTS))
        torch.cuda.reset_peak_memory_stats()
        model(input_ids=X, labels=X).loss.backward()
        peaks.append(torch.cuda.max_memory_allocated() - sum(p.nbytes for p in model.parameters()))
        del model
    assert peaks[1] < peaks[0]
