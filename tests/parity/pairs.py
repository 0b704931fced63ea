"""The same small model twice: one carries our adapter, the other Hugging Face peft's, with equal numbers."""

import functools
import re
import warnings

import peft
import torch
from peft.utils import get_peft_model_state_dict
from tiny import twin_of
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import peftlab as pl
from peftlab.adapters.key_table import key_table, placed
from peftlab.core.records import unwrap

TOLERANCE = 1e-9

# Shapes without a common factor: a transposed matrix or a swapped pair of sizes then cannot pass unseen.
LLAMA = dict(
    vocab_size=53, hidden_size=20, intermediate_size=37, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=6, max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
GPT2 = dict(
    vocab_size=51, n_embd=22, n_head=2, n_inner=35, n_layer=3, n_positions=32, resid_pdrop=0.0, embd_pdrop=0.0,
    attn_pdrop=0.0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
BERT = dict(
    vocab_size=41, hidden_size=18, intermediate_size=31, num_hidden_layers=3, num_attention_heads=3,
    max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=3,
    type_vocab_size=2, pad_token_id=0,
)  # fmt: skip
ROBERTA = BERT | dict(max_position_embeddings=40, type_vocab_size=1)

KINDS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=False)),
    "llama-tied": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=True)),
    "llama-classifier": lambda: LlamaForSequenceClassification(LlamaConfig(**LLAMA, num_labels=3)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2)),
    "bert": lambda: BertForSequenceClassification(BertConfig(**BERT)),
    "bert-mlm": lambda: BertForMaskedLM(BertConfig(**BERT)),
    "roberta": lambda: RobertaForSequenceClassification(RobertaConfig(**ROBERTA)),
}
CLASSIFIERS = ("bert", "llama-classifier", "roberta")
WRAPPER = re.compile(r"\.(original_module|modules_to_save)\.")
RENAMED = {"alpha": "lora_alpha", "dropout": "lora_dropout", "trainable_tokens": "trainable_token_indices"}


def base(kind, dtype=torch.float64, seed=0):
    """A model with weights of ordinary size, biases among them (transformers starts those at zero)."""
    model, drawn = _base(kind, dtype, seed)
    torch.set_rng_state(drawn)
    return twin_of(model)


@functools.cache
def _base(kind, dtype, seed):
    """The model that `base` copies, and where the random numbers stand after it was made."""
    torch.manual_seed(seed)
    model = KINDS[kind]()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
            elif parameter.dim() == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    return model.to(dtype).eval(), torch.get_rng_state()


def batch(kind, seed=1, rows=2, length=7):
    """Token ids, a mask with padding, and labels."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 40, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    ids[0, -2:], mask[0, -2:] = 0, 0
    labels = torch.randint(0, 3, (rows,), generator=generator) if kind in CLASSIFIERS else ids.clone()
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def peft_config(**settings):
    """Our settings as a `peft.LoraConfig`."""
    settings = {RENAMED.get(name, name): value for name, value in settings.items() if name != "init"}
    settings = {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
    return peft.LoraConfig(**{"lora_alpha": 16, "init_lora_weights": False, **settings})


def peft_model(model, **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, peft_config(**settings))


def our_state(model, name="default"):
    """{key in Hugging Face's file: our parameter}."""
    return key_table(placed(unwrap(model), name))


def peft_state(model, name="default"):
    """What peft would save, without the copies of embeddings that it adds to a file.

    With bias="all" beside modules_to_save, peft 0.21 also lists the insides of its own wrapper, whose bias is saved
    under its real key as well.
    """
    state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    return {key: value for key, value in state.items() if not WRAPPER.search(key)}


def pair(kind, dtype=torch.float64, seed=0, adapter_dtype=None, **settings):
    """(ours, theirs): equal bases and equal adapters; the key sets and shapes are compared on the way."""
    model = base(kind, dtype, seed)
    twin = twin_of(model)
    pl.attach(model, pl.LoRAConfig(init="random", **settings), adapter_dtype=adapter_dtype)
    theirs = peft_model(twin, **settings)
    give(theirs, model)
    return model, theirs


def give(theirs, ours, name="default", theirs_name="default", scramble=True):
    """Copies peft's adapter into ours, key by key, after moving every parameter off its starting value."""
    generator = torch.Generator().manual_seed(5)
    source, target = peft_state(theirs, theirs_name), our_state(ours, name)
    assert set(source) == set(target)
    with torch.no_grad():
        for key in sorted(source):
            assert source[key].shape == target[key].shape, key
            if scramble:
                noise = torch.randn(source[key].shape, generator=generator) * 0.1
                source[key].add_(noise.to(source[key]))  # a view of the live parameter
            target[key].copy_(source[key])


def relative(found, expected):
    """|found - expected| / |expected|, as one number for a whole tensor."""
    found, expected = found.detach().double(), expected.detach().double()
    return ((found - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def same(found, expected, tolerance=TOLERANCE):
    """Requires equal keys and tensors equal within a relative tolerance."""
    assert set(found) == set(expected)
    for key in found:
        assert found[key].shape == expected[key].shape, key
        error = relative(found[key], expected[key])
        zero = expected[key].detach().abs().max() < 1e-12 and found[key].detach().abs().max() < 1e-12
        assert zero or error < tolerance, f"{key}: {error:.2g}"


def optimiser(model):
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # The bias of attention's keys has no gradient but rounding, which a smaller eps would blow up to full steps.
    return torch.optim.AdamW(parameters, lr=0.02, weight_decay=0.1, eps=1e-6)


def live(theirs):
    """peft's trained parameters by their keys, found by storage, with their gradients."""
    by_storage = {parameter.data_ptr(): parameter for parameter in theirs.parameters()}
    return {key: by_storage[value.data_ptr()] for key, value in peft_state(theirs).items()}


def gradients(parameters):
    missing = [key for key, parameter in parameters.items() if parameter.grad is None]
    assert not missing, missing
    return {key: parameter.grad for key, parameter in parameters.items()}


def three_steps(ours, theirs, inputs, states):
    """Both train for three AdamW steps: equal outputs and gradients in each, and parameters after it.

    `states()` gives the trained parameters of both, by the same keys: the live ones, so that it is asked once.
    """
    both = states()
    ours.train(), theirs.train()
    mine, other = optimiser(ours), optimiser(theirs)
    for _ in range(3):
        found, expected = ours(**inputs), theirs(**inputs)
        assert relative(found.logits, expected.logits) < 1e-9
        found.loss.backward()
        expected.loss.backward()
        same(*map(gradients, both))
        for one in (mine, other):
            one.step()
            one.zero_grad()
        same(*both)
