"""Modules whose weight a model reads without calling them: found by one pass of a copy, refused or left alone."""

import functools
import gc
import time
import types
import warnings
import weakref

import pytest
import torch
import transformers as tf
from nets import snapshot
from releases import skip_before
from torch import nn
from torch.nn import functional

import peftlab as pl
from peftlab.core import calls as calls_module
from peftlab.core.calls import observed, passed_weights
from peftlab.core.structure import structure_of
from peftlab.errors import PeftLabError
from peftlab.quantization.linear import Linear4bit

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
}  # fmt: skip
SPEECH = {
    "conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip
MOBILE = {
    "vocab_size": 64, "hidden_size": 32, "embedding_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4,
    "intermediate_size": 32, "intra_bottleneck_size": 16, "num_feedforward_networks": 1,
}  # fmt: skip


def make(kind: type, **settings) -> nn.Module:
    torch.manual_seed(0)
    return kind(kind.config_class(**settings)).eval()


REACHED = {
    "bert": lambda: make(tf.BertForMaskedLM, **SIZES),
    "tied llama": lambda: make(tf.LlamaForCausalLM, **SIZES, tie_word_embeddings=True),
    "mixtral": lambda: make(tf.MixtralForCausalLM, **SIZES, num_key_value_heads=2, num_local_experts=4),
    "t5": lambda: make(tf.T5ForConditionalGeneration, vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_heads=4),
    "vit": lambda: make(tf.ViTModel, **SIZES, image_size=32, patch_size=8),
    "hubert": lambda: make(tf.HubertModel, **SIZES, **SPEECH),
    "layers left out": lambda: make(tf.Wav2Vec2Model, **SIZES, **SPEECH, layerdrop=1.0).train(),
}
WAVLM = lambda: make(tf.WavLMModel, **SIZES, **SPEECH)  # noqa: E731
FALCON = lambda: make(tf.FalconMambaForCausalLM, vocab_size=64, hidden_size=32, num_hidden_layers=3)  # noqa: E731


class Odd(tf.PreTrainedModel):
    """A model of one's own: each layer of it is used in another way."""

    config_class = tf.BertConfig
    main_input_name = "input_ids"

    def __init__(self, config: tf.BertConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.called, self.read, self.turned, self.hidden, self.both, self.unused, self.asked = (
            nn.Linear(config.hidden_size, config.hidden_size) for _ in range(7)
        )
        self.block = nn.Sequential(nn.Linear(config.hidden_size, config.hidden_size), nn.ReLU())
        self.post_init()

    def forward(self, input_ids, **_):
        x = self.called(self.embed(input_ids))
        x = functional.linear(x, self.read.weight, self.read.bias)
        x = x @ self.turned.weight.T
        x = x @ self.hidden.weight.data
        x = self.both(x) + x @ self.both.weight
        x = self.asked(x.to(self.asked.weight.dtype))
        for layer in self.block:
            x = layer(x)
        return x @ self.embed.weight.T


def odd() -> Odd:
    torch.manual_seed(0)
    return Odd(tf.BertConfig(**SIZES)).eval()


@pytest.mark.parametrize("name", REACHED)
def test_no_alarm_where_every_layer_is_called(name):
    model = REACHED[name]()
    calls = observed(model)
    assert calls is not None
    assert not calls.past and calls.unreached <= {"shared"}  # T5 calls the embeddings that share its weight
    assert not passed_weights(model)


def test_each_way_of_reading_a_weight_is_seen():
    calls = observed(odd())
    assert calls.past == {"read", "turned", "hidden", "both", "embed"}
    assert calls.unreached == {"read", "turned", "hidden", "block"}
    assert passed_weights(odd()) == {"read"}


@pytest.mark.parametrize("name", ["read", "turned", "hidden"])
def test_a_layer_that_is_not_called_is_refused(name):
    model = odd()
    before = snapshot(model)
    with pytest.raises(PeftLabError, match=f"reads the weights of {name} without calling"):
        pl.attach(model, pl.LoRAConfig(target_modules=[name]))
    with pytest.raises(PeftLabError, match=name):
        pl.attach(model, pl.LoRAConfig(target_modules=["called"], modules_to_save=[name]))
    assert snapshot(model)["keys"] == before["keys"]


@pytest.mark.parametrize("name", ["called", "asked", "unused", "embed", "both"])
def test_a_layer_that_is_called_or_unused_is_taken(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pl.attach(odd(), pl.LoRAConfig(target_modules=[name]))


@pytest.mark.parametrize("name", ["embed", "both"])
def test_merging_is_refused_where_the_weight_is_also_read_elsewhere(name):
    model = pl.attach(odd(), pl.LoRAConfig(target_modules=[name]))
    with pytest.raises(PeftLabError, match=f"also reads the weight of {name} without"):
        pl.merge(model)


@pytest.mark.parametrize(
    ("build", "targets"),
    [
        (WAVLM, None),
        (WAVLM, ["out_proj"]),
        (FALCON, ["dt_proj"]),
        (FALCON, ["in_proj", "dt_proj"]),
        (lambda: make(tf.MobileBertForPreTraining, **MOBILE), ["decoder"]),
    ],
)
def test_architectures_that_read_past_their_layers(build, targets):
    with pytest.raises(PeftLabError, match="without calling"):
        pl.attach(build(), pl.LoRAConfig(target_modules=targets))


@pytest.mark.parametrize(
    ("build", "inputs"),
    [
        (WAVLM, {"input_values": torch.randn(2, 400)}),
        (FALCON, {"input_ids": torch.arange(1, 10)[None]}),
        (lambda: make(tf.MobileBertForMaskedLM, **MOBILE), {"input_ids": torch.arange(1, 10)[None]}),
        (odd, {"input_ids": torch.arange(1, 10)[None]}),
    ],
)
def test_all_linear_leaves_them_out_and_merging_agrees(build, inputs):
    model = build()
    with pytest.warns(UserWarning, match="without calling these modules"):
        exclude = ["both"] if isinstance(model, Odd) else None
        config = pl.LoRAConfig(target_modules="all-linear", exclude_modules=exclude, init="random", r=2)
        pl.attach(model, config)
    with torch.no_grad():
        adapted = model(**inputs)
        adapted = adapted if isinstance(adapted, torch.Tensor) else adapted[0]
        pl.merge(model)
        merged = model(**inputs)
    torch.testing.assert_close(merged if isinstance(merged, torch.Tensor) else merged[0], adapted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("build", [WAVLM, FALCON, odd])
def test_quantised_models_still_run(build):
    model = build()
    calls = observed(model)
    pl.quantize_model(model, skip=["asked"] if isinstance(model, Odd) else ())  # that one's dtype is asked for
    quantised = {path for path, module in model.named_modules() if isinstance(module, Linear4bit)}
    assert quantised and not quantised & calls.past
    name = model.main_input_name
    model(**{name: torch.randn(2, 400) if name == "input_values" else torch.arange(1, 10)[None]})
    assert observed(model).past == calls.past  # four bits hide nothing


def test_kernels_that_take_the_weight_in_training_are_named():
    skip_before("transformers", "5.17", "its Mamba does not hand this weight on")
    model = make(tf.Mamba2ForCausalLM, vocab_size=64, hidden_size=32, num_hidden_layers=2, num_heads=4, head_dim=16)
    with pytest.warns(UserWarning, match=r"fused kernels .*layers\.0\.mixer\.out_proj"):
        pl.attach(model, pl.LoRAConfig(target_modules=["out_proj"]))


def test_looking_changes_nothing_and_is_quick():
    model = make(tf.LlamaForCausalLM, **(SIZES | {"num_hidden_layers": 30}))
    seen = []
    model.register_forward_hook(lambda *_: seen.append(1))
    before, state = snapshot(model), torch.get_rng_state()
    started = time.process_time()
    assert observed(model) is not None
    assert time.process_time() - started < 0.5
    assert not seen and torch.equal(state, torch.get_rng_state())
    assert snapshot(model)["attributes"] == before["attributes"]


# -- one pass for models of one structure --------------------------------------------------------------------------


@pytest.fixture
def passes(monkeypatch):
    """The models of which a copy was run; nothing is known from earlier tests."""
    seen, watch = [], calls_module.watch
    monkeypatch.setattr(calls_module, "SHOWN", {})
    monkeypatch.setattr(calls_module, "watch", lambda *given: seen.append(given[0]) or watch(*given))
    return seen


def tied(**settings):
    return make(tf.LlamaForCausalLM, **SIZES | {"tie_word_embeddings": True} | settings)


def test_a_second_model_of_one_structure_is_not_run_again(passes):
    first = observed(tied())
    assert observed(tied()) == first and len(passes) == 1
    for _ in range(2):  # attached, a model saves in its own way, and has the adapter's keys among its attributes
        model = pl.attach(tied(), pl.LoRAConfig())
        assert observed(model) == first and len(passes) == 2
    odd_ones = [observed(odd()) for _ in range(2)]
    assert odd_ones[0] == odd_ones[1] and odd_ones[0].past and len(passes) == 3


def untied(model):
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())


def closure(model):
    model.model.norm.eps_of = lambda: model


CHANGES = {
    "a class": lambda model: setattr(model.model.layers[1], "mlp", nn.Linear(32, 32)),
    "a setting of the config": lambda model: setattr(model.config, "use_cache", False),
    "a list in the config": lambda model: setattr(model.config, "architectures", ["Other"]),
    "an attribute": lambda model: setattr(model.model.layers[0].self_attn, "scaling", 2.0),
    "an object's attribute": lambda model: setattr(model.generation_config, "top_k", 3),
    "a dtype": lambda model: model.model.layers[0].double(),
    "a buffer": lambda model: model.model.layers[0].register_buffer("more", torch.ones(1)),
    "a tie": untied,
    "a bias": lambda model: setattr(model.model.layers[0].mlp.up_proj, "bias", nn.Parameter(torch.ones(64))),
    "a forward of its own": lambda model: setattr(model.lm_head, "forward", functional.linear),
    "what is not understood": closure,
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_may_change_a_pass_is_told_apart(change, passes):
    plain, changed = tied(), tied()
    observed(plain)
    CHANGES[change](changed)
    observed(changed)
    assert len(passes) >= 2


@pytest.fixture
def copies(monkeypatch):
    """The models that were copied; nothing is known from earlier tests."""
    seen, copy = [], calls_module.meta_copy
    monkeypatch.setattr(calls_module, "SHOWN", {})
    monkeypatch.setattr(calls_module, "meta_copy", lambda root: seen.append(root) or copy(root))
    return seen


def test_a_model_whose_structure_is_known_is_not_copied(copies):
    first = observed(tied())
    hooked = tied()
    hooked.model.register_forward_hook(lambda *_: hooked)  # a copy has no hooks
    assert observed(tied()) == observed(hooked) == first and len(copies) == 1
    pl.attach(hooked, pl.LoRAConfig())
    observed(hooked)  # and no adapters, but here only the copy tells
    assert len(copies) == 2


ASIDE = {
    **CHANGES,
    "another device": lambda model: model.to("meta"),
    "training": lambda model: model.train(),
    "a class of one's own": lambda model: setattr(model.lm_head, "__class__", type("Other", (nn.Linear,), {})),
    "a parameter of another kind": lambda model: setattr(model.lm_head, "weight", Strange(torch.ones(64, 32))),
    "a module twice": lambda model: setattr(model.model.layers[0], "again", model.lm_head),
    "codes": lambda model: setattr(model.lm_head.weight, "quant_state", None),
    "offloaded": lambda model: setattr(model.lm_head, "_hf_hook", None),
    "compiled": lambda model: setattr(model.lm_head, "_orig_mod", nn.Linear(1, 1)),
    "adapters": lambda model: pl.attach(model, pl.LoRAConfig()),
    "four bits": pl.quantize_model,
}


class Strange(nn.Parameter):
    """A parameter that may hold anything."""


@pytest.mark.parametrize("change", ASIDE)
def test_a_model_that_may_give_another_copy_is_copied(change, copies):
    plain, changed = tied(), tied()
    observed(plain)
    ASIDE[change](changed)
    before = len(copies)
    observed(changed)
    assert len(copies) > before


def test_two_models_that_differ_in_how_they_run_are_not_taken_for_one(copies):
    class Other(Odd):
        def forward(self, input_ids, **_):
            return self.called(self.embed(input_ids)) @ self.unused.weight

    torch.manual_seed(0)
    others = [Other(tf.BertConfig(**SIZES)).eval() for _ in range(2)]
    assert observed(odd()).past == observed(odd()).past == {"read", "turned", "hidden", "both", "embed"}
    assert observed(others[0]).past == observed(others[1]).past == {"unused"}
    assert len(copies) == 2


def test_a_forward_put_on_the_class_is_told_apart(passes, monkeypatch):
    found = observed(odd())
    own = Odd.forward
    monkeypatch.setattr(Odd, "forward", lambda self, input_ids, **_: own(self, input_ids) + self.unused.weight[0, 0])
    assert observed(odd()).past == found.past | {"unused"} and len(passes) == 2


def test_what_is_known_of_structures_holds_no_model(passes):
    model = tied()
    observed(model)
    here = [weakref.ref(module) for module in (model, passes.pop(), *model.modules())]
    del model
    gc.collect()
    assert not any(one() for one in here)
    for width in range(8, 8 + 2 * calls_module.KEPT, 2):
        calls_module.watched_once(nn.Embedding(width, 2).to("meta"), {"input": torch.ones(3, dtype=torch.long)}, 3)
    assert len(calls_module.SHOWN) == calls_module.KEPT


@pytest.mark.parametrize("value", [
    functools.partial(max, 1), iter([]), (n for n in ()), torch.Generator(), (lambda x: lambda: x)(1),
    [nn.Linear(1, 1)], nn.Linear(1, 1).forward, [].append,
])  # fmt: skip
def test_what_is_not_understood_has_no_structure(value):
    layer, other = nn.Linear(2, 2), nn.Linear(2, 2)
    layer.known = other.known = {"a": (1, {2.0}), "f": make, "s": slice, "o": types.SimpleNamespace}
    assert structure_of(layer) == structure_of(other) is not None
    layer.more = {"here": value}
    assert structure_of(layer) is None
    layer.more = layer.__dict__  # a circle
    assert structure_of(layer) is None


def xlnet() -> nn.Module:
    return make(tf.XLNetLMHeadModel, vocab_size=64, d_model=32, n_layer=2, n_head=4, d_inner=64)


@pytest.mark.parametrize("targets", [["ff.layer_1"], ["layer_2", "lm_loss"]])
def test_an_adapter_for_each_row_is_refused_where_the_batch_is_not_first(targets):
    model = pl.attach(xlnet(), pl.LoRAConfig(target_modules=targets), "a")
    pl.attach(model, pl.LoRAConfig(target_modules=["lm_loss"]), "b")
    with pytest.raises(PeftLabError, match=r"layer_\d .*batch as its first dimension"):
        pl.activate(model, ["a", None, "b"])
    pl.activate(model, ["b", None, "b"])  # the head has it first
    pl.activate(model, {"a": 0.5, "b": 0.5})


@pytest.mark.parametrize("name", ["bert", "tied llama", "t5", "hubert"])
def test_an_adapter_for_each_row_is_taken_where_the_batch_is_first(name):
    model = pl.attach(REACHED[name](), pl.LoRAConfig(), "a")
    pl.activate(model, ["a", None])


EXPERTS = {
    "mixtral": lambda: make(
        tf.MixtralForCausalLM, **(SIZES | {"hidden_size": 64}), num_key_value_heads=2, num_local_experts=4
    ),
    "gpt-oss": lambda: make(
        tf.GptOssForCausalLM, **(SIZES | {"hidden_size": 64}), num_key_value_heads=2, num_local_experts=4, head_dim=16
    ),
    "olmoe": lambda: make(tf.OlmoeForCausalLM, **(SIZES | {"hidden_size": 64}), num_experts=8),
}


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_that_are_left_alone_are_named_with_their_share(name):
    model = EXPERTS[name]()
    held = [p.numel() for key, p in model.named_parameters() if "experts" in key and p.dim() == 3]
    share = f"{sum(held) / sum(p.numel() for p in model.parameters()):.0%}"
    told = f"all-linear' does not adapt the experts .* hold {share} of its weights.*target_parameters=.'gate_up_proj'"
    with pytest.warns(UserWarning, match=told):
        pl.attach(model, pl.IA3Config(target_modules="all-linear"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        pl.quantize_model(EXPERTS[name]())
        if name != "gpt-oss":  # for which peft converts nothing
            pl.attach(EXPERTS[name](), pl.LoRAConfig(target_modules="all-linear"))
            return
    with pytest.warns(UserWarning, match=told):
        pl.attach(EXPERTS[name](), pl.LoRAConfig(target_modules="all-linear"))


def test_models_without_fused_experts_get_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for build in (REACHED["bert"], REACHED["hubert"]):
            pl.attach(build(), pl.LoRAConfig(target_modules="all-linear"))
            pl.quantize_model(build())
