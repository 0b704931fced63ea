"""The same small model twice with virtual tokens: ours and Hugging Face peft's, with equal numbers, T5 among them."""

import functools
import inspect
import warnings

import peft
import torch
from pairs import base, batch, twin_of
from transformers import T5Config, T5ForConditionalGeneration

import peftlab as pl

T5 = dict(
    vocab_size=43, d_model=24, d_kv=8, d_ff=37, num_layers=2, num_decoder_layers=2, num_heads=3, dropout_rate=0.0,
    pad_token_id=0, eos_token_id=1, decoder_start_token_id=0, relative_attention_num_buckets=8,
)  # fmt: skip
TASKS = {"bert": "SEQ_CLS", "roberta": "SEQ_CLS", "llama-classifier": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}
# ours -> theirs; n and the inner widths share no factor with the models' widths
METHODS = {
    "prompt": (pl.PromptTuningConfig, peft.PromptTuningConfig, {}, {}),
    "p-tuning": (pl.PTuningConfig, peft.PromptEncoderConfig, {"encoder_hidden": 7}, {"encoder_hidden_size": 7}),
    "p-tuning lstm": (
        pl.PTuningConfig, peft.PromptEncoderConfig, {"encoder": "lstm", "encoder_hidden": 7, "encoder_layers": 2},
        {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 7, "encoder_num_layers": 2},
    ),
    "prefix": (pl.PrefixTuningConfig, peft.PrefixTuningConfig, {}, {}),
    "prefix projected": (
        pl.PrefixTuningConfig, peft.PrefixTuningConfig, {"projection": True, "encoder_hidden": 11},
        {"prefix_projection": True, "encoder_hidden_size": 11},
    ),
}  # fmt: skip
# our parameter's last names -> peft's
NAMES = {"rows": "embedding.weight", "embedding": "embedding.weight", "inner": "transform.0", "outer": "transform.2"}


def model_of(kind, seed=0, dtype=torch.float64):
    return twin_of(t5(seed, dtype)) if kind == "t5" else base(kind, dtype, seed)


@functools.cache
def t5(seed, dtype):
    torch.manual_seed(seed)
    model = T5ForConditionalGeneration(T5Config(**T5)).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    return model


def inputs_of(kind, **more):
    if kind != "t5":
        return batch(kind, **more)
    inputs = batch("llama", **more)
    labels = torch.randint(3, 40, (len(inputs["input_ids"]), 5), generator=torch.Generator().manual_seed(9))
    labels[0, -1] = -100
    return {**inputs, "labels": labels}


def configs(kind, method, n=5, **more):
    ours, theirs, mine, other = METHODS[method]
    task = {"task_type": TASKS.get(kind, "CAUSAL_LM"), "num_virtual_tokens": n}
    return ours(**task, **mine, **more), theirs(**task, **other)


def pair(kind, method, n=5, seed=0, dtype=torch.float64):
    """(ours, theirs): equal bases and equal adapters."""
    model = model_of(kind, seed, dtype)
    twin = as_peft_expects(twin_of(model))
    mine, other = configs(kind, method, n)
    torch.manual_seed(3)
    pl.attach(model, mine)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(twin, other)
    theirs.to(dtype).eval()  # peft's prompts are float32 on any base
    state, generator = live(theirs), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in trained(model).items():
            assert parameter.shape == state[name].shape, name
            state[name].add_(torch.randn(state[name].shape, generator=generator).to(dtype) * 0.1)
            parameter.copy_(state[name])
        assert len(trained(model)) == len(state)
    return model, theirs


def as_peft_expects(model):
    """A model whose cache has the name that peft looks for.

    transformers 5.24 calls it `cache`. Up to 0.21.2, peft knows only `past_key_values`: there it refuses prefixes and
    generates wrong text under prompts. Under the old name it computes what it did before.
    """
    for module in {model, model.base_model}:
        if "cache" in inspect.signature(type(module).forward).parameters:
            module.__class__ = renamed(type(module))
    return model


def renamed(kind):
    """A model class whose `cache` is called `past_key_values`."""

    def forward(self, *args, past_key_values=None, **kwargs):
        return kind.forward(self, *args, **kwargs, **({} if past_key_values is None else {"cache": past_key_values}))

    def prepare_inputs_for_generation(self, *args, **kwargs):
        inputs = kind.prepare_inputs_for_generation(self, *args, **kwargs)
        return {"past_key_values" if name == "cache" else name: value for name, value in inputs.items()}

    signature = inspect.signature(kind.forward)
    names = {"cache": "past_key_values"}
    parameters = [p.replace(name=names.get(p.name, p.name)) for p in signature.parameters.values()]
    forward.__signature__ = signature.replace(parameters=parameters)
    methods = {"forward": forward, "prepare_inputs_for_generation": prepare_inputs_for_generation}
    if not hasattr(kind, "prepare_inputs_for_generation"):
        methods.popitem()
    return type(kind.__name__, (kind,), methods)


def trained(ours):
    """Our trained parameters by peft's names for them."""
    found = {}
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            head, _, last = name.rpartition(".source.")
            if head:
                first, _, rest = last.partition(".")
                name = NAMES.get(first, first) + ("." + rest if rest else "")
            else:
                name = name.replace("peftlab.default.copy.module.", "")
            found[name] = parameter
    return found


def live(theirs):
    """peft's trained parameters by short names."""
    found = {}
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            for old in ("prompt_encoder.default.", "base_model.", "modules_to_save.default."):
                name = name.replace(old, "")
            found[name] = parameter
    return found
