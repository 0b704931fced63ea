"""A model's own call: prompts act where `model.forward` is called too, and a first pass shows hosts that are read past.

The base's changes after `attach` are in test_base_changes.py.
"""

import copy
import functools
import inspect
import pickle
import threading

import pytest
import tiny
import torch
import transformers as tf
from nets import Net, assert_same, snapshot, tokens
from torch import nn
from torch.nn import functional

import peftlab as pl
from peftlab.core.forward import Forward
from peftlab.errors import PeftLabError

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
}  # fmt: skip
IDS = torch.arange(1, 7)[None]


def make(kind: type, **settings) -> nn.Module:
    torch.manual_seed(0)
    return kind(kind.config_class(**settings)).eval()


MODELS = {
    "llama": lambda: make(tf.LlamaForCausalLM, **SIZES, num_key_value_heads=2),
    "llama's body": lambda: make(tf.LlamaModel, **SIZES),
    "gpt2": lambda: make(tf.GPT2LMHeadModel, vocab_size=64, n_embd=32, n_layer=2, n_head=4),
    "bert": lambda: make(tf.BertModel, **SIZES),
    "bert with a head": lambda: make(tf.BertForSequenceClassification, **SIZES),
    "t5": lambda: make(
        tf.T5ForConditionalGeneration, vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_heads=4, num_layers=2
    ),
}
METHODS = {
    "prompt": pl.PromptTuningConfig(num_virtual_tokens=4, init="random"),
    "deep prompt": pl.PromptTuningConfig(num_virtual_tokens=4, init="random", deep=True),
    "p-tuning": pl.PTuningConfig(num_virtual_tokens=4),
    "prefix": pl.PrefixTuningConfig(num_virtual_tokens=4, init="random"),
    "lora": pl.LoRAConfig(init="random"),
}


def inputs(model: nn.Module) -> dict:
    return {"input_ids": IDS} | ({"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {})


def first(output) -> torch.Tensor:
    return output.logits if hasattr(output, "logits") else output[0]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_direct_forward_is_a_call(name, method):
    model = MODELS[name]()
    given = inputs(model)
    before, base, signature = snapshot(model), first(model(**given)), inspect.signature(model.forward)
    pl.attach(model, METHODS[method])
    expected = first(model(**given))
    assert expected.shape != base.shape or not torch.equal(expected, base)
    assert torch.equal(first(model.forward(**given)), expected)
    assert torch.equal(first(functools.partial(model.forward)(**given)), expected)
    assert inspect.signature(model.forward) == signature
    with pl.disabled(model):
        assert torch.equal(first(model.forward(**given)), base)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(first(other.forward(**given)), expected)
        pl.detach(other)
        assert torch.equal(first(other.forward(**given)), base)
        assert "forward" not in vars(other)
    kept = model.forward
    pl.detach(model)
    assert_same(before, snapshot(model))
    assert torch.equal(first(kept(**given)), base)


@pytest.mark.parametrize("method", ["prompt", "deep prompt", "p-tuning", "prefix"])
@pytest.mark.parametrize("name", ["llama", "llama's body", "gpt2", "bert", "bert with a head"])
def test_passing_a_prompt_by_is_an_error(name, method):
    model = MODELS[name]()
    early, body = model.forward, model.base_model
    base = first(early(**inputs(model)))
    pl.attach(model, METHODS[method])
    for way in (early, functools.partial(type(model).forward, model), *([] if body is model else [body])):
        with pytest.raises(PeftLabError, match="was called, but not the model that holds it and has a pr"):
            way(input_ids=IDS)
    with pl.disabled(model):
        assert torch.equal(first(early(IDS)), base)
    pl.activate(model, {})
    assert torch.equal(first(early(IDS)), base)
    pl.activate(model, "default")
    with pytest.raises(PeftLabError, match="not the model"):
        early(input_ids=IDS)
    model(IDS)
    pl.detach(model)
    assert torch.equal(first(early(IDS)), base)


class Sentences(nn.Module):
    """What sentence-transformers' module does: it calls the forward of the model that it holds, and pools."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.auto_model = model

    def forward(self, features: dict) -> torch.Tensor:
        takes = inspect.signature(self.auto_model.forward).parameters
        states = self.auto_model.forward(**{name: value for name, value in features.items() if name in takes})[0]
        return states.mean(1)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("method", ["prompt", "deep prompt", "p-tuning", "prefix"])
def test_a_wrapper_that_calls_forward_trains_the_prompt(method, when):
    model = MODELS["bert"]()
    if when == "before":
        pl.attach(model, METHODS[method])
    sentences = Sentences(model).train()
    if when == "after":
        pl.attach(model, METHODS[method])
    features = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "text": "unused"}
    trained = [parameter for parameter in sentences.parameters() if parameter.requires_grad]
    sentences(features).square().sum().backward()
    assert trained and all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)
    assert not [key for key in sentences.state_dict() if "forward" in key]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", ["prompt", "deep prompt", "prefix"])
@pytest.mark.parametrize("name", ["llama", "llama's body"])
def test_a_block_that_runs_again_in_the_backward_pass_is_no_error(name, method, reentrant):
    model = pl.attach(MODELS[name](), METHODS[method]).train()
    model.config.use_cache = False
    expected = first(model.forward(IDS)).sum()
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    loss = first(model.forward(IDS)).sum()
    torch.testing.assert_close(loss, expected)
    loss.backward()


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("method", ["prompt", "prefix", "deep prompt"])
def test_generating_goes_on(name, method):
    model = pl.attach(MODELS[name](), METHODS[method])
    settings = {"do_sample": False, "max_new_tokens": 5, "eos_token_id": None, "pad_token_id": 0}
    if name == "t5":
        settings["decoder_start_token_id"] = 0
    cached, plain = (model.generate(IDS, use_cache=cache, **settings) for cache in (True, False))
    assert torch.equal(cached, plain)


def test_threads_do_not_take_each_others_calls():
    model = pl.attach(MODELS["llama"](), METHODS["prompt"])
    with torch.no_grad():
        expected = first(model(IDS))
    wrong = []

    def work(call) -> None:
        for _ in range(20):
            with torch.no_grad():
                try:
                    if not torch.allclose(first(call(IDS)), expected, atol=1e-5):
                        wrong.append("another result")
                except Exception as error:
                    wrong.append(repr(error))

    threads = [threading.Thread(target=work, args=(call,)) for call in (model, model.forward, model, model.forward)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert not model.forward.activity.inside


def test_after_an_exception_the_check_still_holds():
    model = MODELS["llama"]()
    early = model.forward
    pl.attach(model, METHODS["prompt"])
    with pytest.raises(IndexError):
        model(IDS + 1000)
    with pytest.raises(PeftLabError, match="not the model"):
        early(IDS)


@pytest.fixture
def compiling():
    torch._dynamo.reset()  # it does not tell two models of one class apart that differ only in their hooks
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("method", ["prompt", "deep prompt", "lora"])
def test_compiled_models(method, compiling):
    model = pl.attach(MODELS["llama"](), METHODS[method])
    with torch.no_grad():
        expected = first(model(IDS, use_cache=False))
        compiled = torch.compile(model, backend="eager")
        torch.testing.assert_close(first(compiled(IDS, use_cache=False)), expected)
        torch.testing.assert_close(first(compiled.forward(IDS, use_cache=False)), expected)
        torch.testing.assert_close(first(model.forward(IDS, use_cache=False)), expected)
        model.compile(backend="eager")
        torch.testing.assert_close(first(model(IDS, use_cache=False)), expected)
        torch.testing.assert_close(first(model.forward(IDS, use_cache=False)), expected)
    pl.detach(model)


def test_a_graph_that_breaks_is_no_alarm(compiling):
    model = MODELS["llama"]()
    model.model.norm.register_forward_pre_hook(lambda *_: torch._dynamo.graph_break())
    model.model.layers[0].register_forward_pre_hook(lambda *_: torch._dynamo.graph_break())
    pl.attach(model, METHODS["deep prompt"])
    with torch.no_grad():
        expected = first(model(IDS, use_cache=False))
        compiled = torch.compile(model, backend="eager")
        torch.testing.assert_close(first(compiled(IDS, use_cache=False)), expected)


@pytest.mark.parametrize("method", ["prompt", "prefix", "lora"])
def test_accelerates_mixed_precision_around_it(method):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    try:
        model = MODELS["llama"]()
        base = first(model(IDS))
        pl.attach(model, METHODS[method])
        expected = first(model(IDS))
        prepared = accelerator.prepare(model)
        called = first(prepared(IDS))
        assert torch.equal(first(prepared.forward(IDS)), called)
        assert called.shape == expected.shape
        torch.testing.assert_close(called, expected, rtol=0.1, atol=0.05)
        same = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
        assert torch.equal(first(same(IDS)), expected)
        assert torch.equal(first(same.forward(IDS)), expected)
        pl.detach(same)
        assert torch.equal(first(same.forward(IDS)), base)
        assert torch.equal(first(same(IDS)), base)
    finally:
        AcceleratorState._reset_state(True)


@pytest.mark.parametrize("first_hooked", [False, True])
def test_accelerates_hooks_around_it(first_hooked):
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    model = MODELS["llama"]()
    base = first(model(IDS))
    if first_hooked:
        add_hook_to_module(model, ModelHook())
    pl.attach(model, METHODS["prompt"])
    if not first_hooked:
        add_hook_to_module(model, ModelHook())
    assert first(model(IDS)).shape[1] == 10
    assert torch.equal(first(model.forward(IDS)), first(model(IDS)))
    pl.detach(model)
    assert torch.equal(first(model(IDS)), base)
    assert torch.equal(first(model.forward(IDS)), base)
    remove_hook_from_module(model)
    assert torch.equal(first(model.forward(IDS)), base)


def test_a_forward_that_others_put_in_its_place_gets_only_what_it_takes():
    model = pl.attach(MODELS["llama"](), METHODS["prompt"])
    expected = first(model(IDS))

    def fused(self, input_ids=None, attention_mask=None, inputs_embeds=None):  # as the Liger kernels put in
        return type(self).forward(self, input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds)

    model.forward = fused.__get__(model)
    assert torch.equal(first(model(IDS)), expected)


def test_a_replica_runs_its_own_forward():
    class Which(Net):
        def forward(self, tokens):
            self.__dict__["ran"] = True
            return super().forward(tokens)

    model = pl.attach(Which(), pl.LoRAConfig(r=2, target_modules=["up"]))
    model(tokens())
    del model.__dict__["ran"]
    replica = model._replicate_for_data_parallel()
    replica._modules = model._modules
    replica(tokens())
    assert "ran" in vars(replica) and "ran" not in vars(model)


# --- the first pass


class Bare(nn.Module):
    """A module without a config. `way` says how a layer `it` is used."""

    def __init__(self, way: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.way = way
        self.one, self.it, self.last = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        it, x = self.it, self.one(x)
        w, b = it.weight, it.bias
        match self.way:
            case "called":
                x = self.it(x)
            case "function":
                x = functional.linear(x, w, b)
            case "product":
                x = x @ w.T + b
            case "einsum":
                x = torch.einsum("bi,oi->bo", x, w) + b
            case "data":
                x = x @ w.data.t()
            case "cast":
                x = (x.double() @ w.double().t()).float()
            case "forward":
                x = self.it.forward(x)
            case "checkpoint":
                x = torch.utils.checkpoint.checkpoint(self.it.forward, x, use_reentrant=False)
            case "both":
                x = self.it(x) + x @ w
            case "dtype":
                x = x.to(w.dtype)
            case "condition":
                x = self.it(x) if x.shape[0] > 5 else x
            case "fails":
                raise RuntimeError("no such input")
        return self.last(x)


PAST = ["function", "product", "einsum", "data", "cast", "forward", "checkpoint"]
X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
EVERY = pl.LoRAConfig(r=2, target_modules=["one", "it", "last"], init="random")


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("way", PAST)
def test_the_first_pass_refuses_a_host_that_is_read_past_its_call(way, training, direct):
    model = Bare(way).train(training)
    before, base = snapshot(model), model(X)
    pl.attach(model, EVERY)
    for _ in range(2):
        with pytest.raises(PeftLabError, match="Bare reads the weights of it without calling"):
            (model.forward if direct else model)(X)
    pl.detach(model)
    assert_same(before, snapshot(model))
    assert torch.equal(model(X), base)
    pl.attach(model, pl.LoRAConfig(r=2, target_modules=["one", "last"]))
    model(X).sum().backward()


@pytest.mark.parametrize("way", ["called", "both", "dtype", "condition"])
def test_the_first_pass_has_no_false_alarm(way):
    model = pl.attach(Bare(way), EVERY)
    tables = [dict(module._forward_hooks) for module in model.modules()]
    model(X)
    assert [dict(module._forward_hooks) for module in model.modules()] == tables
    assert not model.__dict__["_peftlab"].unseen


def test_a_pass_that_fails_decides_nothing():
    model = pl.attach(Bare("fails"), EVERY)
    with pytest.raises(RuntimeError, match="no such input"):
        model(X)
    model.way = "product"
    with pytest.raises(PeftLabError, match="weights of it without"):
        model(X)


class Dropping(nn.Module):
    """Leaves layers out, as LayerDrop does, and routes rows to experts, of which some get none."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3))
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.decoder = nn.Linear(4, 4)

    def forward(self, x, skip=(), expert=0, decode=False):
        for index, layer in enumerate(self.layers):
            x = x if index in skip else layer(x)
        x = self.experts[expert](x)
        return self.decoder(x) if decode else x


@pytest.mark.parametrize("method", ["lora", "adapter"])
@pytest.mark.parametrize("skip", [(), (0,), (0, 1, 2)])
def test_layers_that_are_left_out_are_no_alarm(skip, method):
    config = pl.LoRAConfig(r=2, target_modules="all-linear")
    if method == "adapter":
        config = pl.AdapterConfig(target_modules=[f"layers.{i}" for i in range(3)], reduction_factor=2)
    model = pl.attach(Dropping().train(), config)
    model(X, skip=skip)
    model(X, expert=2, decode=True)


def test_a_block_whose_forward_is_called_is_refused_where_a_bottleneck_stands_on_it():
    class Direct(Dropping):
        def forward(self, x):
            for layer in self.layers:
                x = layer.forward(x)
            return x

    model = pl.attach(Direct(), pl.AdapterConfig(target_modules=["layers.0"], reduction_factor=2))
    with pytest.raises(PeftLabError, match=r"weights of layers\.0 without calling"):
        model(X)


class OwnForwards(tf.PreTrainedModel):
    """A model of one's own with a config, which calls a layer's forward."""

    config_class = tf.BertConfig
    main_input_name = "input_ids"

    def __init__(self, config) -> None:
        super().__init__(config)
        self.embed, self.linear = nn.Embedding(64, 32), nn.Linear(32, 32)
        self.post_init()

    def forward(self, input_ids, **_):
        return self.linear.forward(self.embed(input_ids))


def test_a_layer_whose_forward_the_model_calls_is_refused_at_attach():
    with pytest.raises(PeftLabError, match="weights of linear without calling"):
        pl.attach(make(OwnForwards, **SIZES), pl.LoRAConfig(target_modules=["linear"]))


def test_watching_changes_no_bit():
    runs = []
    for watched in (True, False):
        model = pl.attach(Net(), pl.LoRAConfig(r=2, target_modules="all-linear", init="random", dropout=0.5)).train()
        if not watched:
            model.__dict__["_peftlab"].unseen = frozenset()
        torch.manual_seed(0)
        output = model(tokens())
        output.square().sum().backward()
        runs.append([output, *(p.grad for p in model.parameters() if p.requires_grad)])
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


def test_merging_is_refused_where_the_first_pass_read_a_weight_elsewhere_too():
    model = pl.attach(Bare("both"), EVERY)
    model(X)
    with pytest.raises(PeftLabError, match="also reads the weight of it without"):
        pl.merge(model)
    model = pl.attach(Bare("called"), EVERY)
    expected = model(X)
    pl.merge(model)
    torch.testing.assert_close(model(X), expected)


@pytest.mark.parametrize(
    "act",
    [
        lambda model: torch.compile(model, backend="eager"),
        lambda model: torch.autocast("cpu", torch.bfloat16)(model),
        lambda model: torch.inference_mode()(model),
        lambda model: functools.partial(torch.func.functional_call, model, dict(model.named_parameters())),
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
    ],
)
def test_a_first_pass_in_other_circumstances(act):
    run = act(pl.attach(Net(dtype=torch.float32), pl.LoRAConfig(r=2, target_modules="all-linear")))
    for _ in range(2):
        assert (run(tokens()) if not isinstance(run, functools.partial) else run((tokens(),))).shape == (4, 5)


def test_offloaded_before_attaching():
    from accelerate import cpu_offload

    model = tiny.llama().eval()
    expected = model(IDS).logits
    cpu_offload(model, execution_device="cpu")
    pl.attach(model, pl.LoRAConfig(r=2, target_modules=["q_proj"]))
    for _ in range(2):  # parts without numbers gave another result at each call
        torch.testing.assert_close(model(IDS).logits, expected)


def test_transformers_models_need_no_first_pass():
    model = pl.attach(MODELS["llama"](), pl.LoRAConfig())
    assert not model.__dict__["_peftlab"].unseen
    assert isinstance(model.forward, Forward)
