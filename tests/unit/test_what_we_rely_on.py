"""What we rely on in other libraries, one test for each row of the table in peftlab/DESIGN.md.

A release that renames an argument or a field can make a model write wrong text and raise nothing. These tests look at
the libraries themselves, so that such a release fails here, in words: what changed, and which of our files must follow.
"""

import copy
import dataclasses
import importlib
import inspect
import json
import re
import struct
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
import transformers
from groups import one_process
from torch import nn

import peftlab as pl

ROOT = Path(__file__).resolve().parents[2]
DESIGN = ROOT / "peftlab" / "DESIGN.md"
CACHE_NAMES = ("past_key_values", "cache")  # transformers before 5.24, and since
CAUSAL = (
    "FalconForCausalLM", "GPT2LMHeadModel", "GPTNeoXForCausalLM", "Gemma2ForCausalLM", "GemmaForCausalLM",
    "LlamaForCausalLM", "MistralForCausalLM", "MixtralForCausalLM", "OPTForCausalLM", "Olmo2ForCausalLM",
    "Phi3ForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "SmolLM3ForCausalLM",
)  # fmt: skip


def rows() -> dict[str, dict[str, str]]:
    """The table of DESIGN.md: {test: {"what", "of", "where"}}; `where` as paths from the root of the checkout."""
    section = DESIGN.read_text(encoding="utf-8").partition("\n## What we rely on\n")[2].partition("\n## ")[0]
    found = {}
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if line.startswith("|") and len(cells) == 4 and cells[3].startswith("`"):
            test = cells[3].strip("`")
            assert test not in found, f"DESIGN.md names {test} in two rows"
            paths = [(DESIGN.parent / path).resolve() for path in re.findall("`(.+?)`", cells[2])]
            where = ", ".join(str(path.relative_to(ROOT)) for path in paths)
            found[test] = {"what": cells[0], "of": cells[1], "where": where}
    return found


@pytest.fixture
def ours(request) -> str:
    """The end of a failure's message: the files of ours in the test's row, which must follow.

    Any other failure of the test, such as a name that is gone, is shown with the row as well.
    """
    row = rows()[request.function.__name__]
    follow = row["where"] + " must follow"
    request.node.add_report_section("call", "row", f"{row['what']} ({row['of']}): {follow}\n")
    return follow


def lacks(owner: object, *names: str) -> list[str]:
    """The names among these that an object does not have."""
    return [name for name in names if not hasattr(owner, name)]


def takes_not(function: object, *names: str) -> list[str]:
    """The names among these that are no argument of a function."""
    return [name for name in names if name not in inspect.signature(function).parameters]


def cache_names(function: object) -> list[str]:
    """How a forward calls its argument for the cache."""
    return [name for name in CACHE_NAMES if name in inspect.signature(function).parameters]


def made(config: str, model: str | None = None, device: str = "meta", **settings: object) -> nn.Module:
    """A tiny model of a transformers class, on the meta device unless numbers are needed."""
    torch.manual_seed(0)
    config_class = getattr(transformers, f"{config}Config")
    with torch.device(device):
        return getattr(transformers, model or f"{config}ForCausalLM")(config_class(**settings)).eval()


SMALL = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GPT2 = {"vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32}
T5 = {"vocab_size": 32, "d_model": 16, "d_ff": 32, "d_kv": 4, "num_layers": 2, "num_heads": 4}
BERT = {**SMALL, "max_position_embeddings": 32}


def gpt2(device: str = "cpu") -> nn.Module:
    return made("GPT2", "GPT2LMHeadModel", device, bos_token_id=0, eos_token_id=0, **GPT2)


def t5(device: str = "cpu") -> nn.Module:
    return made("T5", "T5ForConditionalGeneration", device, decoder_start_token_id=0, **T5)


def bert(device: str = "cpu") -> nn.Module:
    return made("Bert", "BertForSequenceClassification", device, **BERT)


# ------------------------------------------------------------------------------------------------------- the table


def test_the_table_and_the_tests_agree():
    here = {name for name, value in globals().items() if name.startswith("test_") and inspect.isfunction(value)}
    here.discard("test_the_table_and_the_tests_agree")
    listed, elsewhere = set(), []
    for name in rows():
        file, _, test = name.rpartition("::")
        if not file:
            listed.add(name)
        elif not (ROOT / file).is_file() or f"\ndef {test}(" not in (ROOT / file).read_text(encoding="utf-8"):
            elsewhere.append(name)
    assert not listed - here, f"DESIGN.md names tests that do not exist: {sorted(listed - here)}"
    assert not elsewhere, f"DESIGN.md names tests that do not exist: {elsewhere}"
    assert not here - listed, f"DESIGN.md has no row for these tests: {sorted(here - listed)}"
    for name, row in rows().items():
        assert row["what"] and row["of"] and row["where"], f"DESIGN.md: the row of {name} has an empty cell"
        gone = [path for path in row["where"].split(", ") if not (ROOT / path).exists()]
        assert not gone, f"DESIGN.md: the row of {name} names files that do not exist: {gone}"


# ------------------------------------------------------------------------------------------------- torch: modules


def test_tables_of_a_module(ours):
    host, child, hook = nn.Linear(2, 2), nn.Identity(), lambda *_: None
    host.add_module("child", child)
    host.register_buffer("kept", torch.zeros(1))
    host.register_buffer("not_kept", torch.zeros(1), persistent=False)
    before = host.register_forward_pre_hook(hook, with_kwargs=True)
    after = host.register_forward_hook(hook, with_kwargs=True)
    assert host._modules == {"child": child}, f"nn.Module._modules no longer holds the children by name: {ours}"
    assert list(host._buffers) == ["kept", "not_kept"], f"nn.Module._buffers no longer holds buffers by name: {ours}"
    assert host._non_persistent_buffers_set == {"not_kept"}, f"_non_persistent_buffers_set changed its meaning: {ours}"
    for table, flags, handle in (
        (host._forward_pre_hooks, host._forward_pre_hooks_with_kwargs, before),
        (host._forward_hooks, host._forward_hooks_with_kwargs, after),
    ):
        assert dict(table) == {handle.id: hook} and dict(flags) == {handle.id: True}, (
            "nn.Module no longer holds its hooks as {number: function} beside {number: whether it takes keyword "
            f"arguments}}: {ours}"
        )


def test_methods_that_a_layer_overrides(ours):
    seen = []

    class Layer(nn.Linear):
        def _apply(self, fn, recurse=True):
            seen.append("_apply")
            return super()._apply(fn, recurse)

        def __setstate__(self, state):
            seen.append("__setstate__")
            super().__setstate__(state)

        def _save_to_state_dict(self, destination, prefix, keep_vars):
            seen.append("_save_to_state_dict")
            super()._save_to_state_dict(destination, prefix, keep_vars)
            destination[f"{prefix}weight.more"] = torch.ones(1)

        def _load_from_state_dict(self, state_dict, prefix, *rest):
            seen.append("_load_from_state_dict")
            state_dict.pop(f"{prefix}weight.more")
            super()._load_from_state_dict(state_dict, prefix, *rest)

    model = nn.Sequential(Layer(2, 2))
    for name, act in (
        ("_apply", lambda: model.to(torch.float64)),
        ("__setstate__", lambda: copy.deepcopy(model)),
        ("_save_to_state_dict", model.state_dict),
        ("_load_from_state_dict", lambda: model.load_state_dict(model.state_dict())),
    ):
        seen.clear()
        act()
        assert name in seen, f"nn.Module no longer calls {name} of its children: {ours}"
    assert "0.weight.more" in model.state_dict(), f"_save_to_state_dict can no longer add keys: {ours}"


def test_trees_of_tensors(ours):
    from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

    output = tiny.llama()(torch.ones(1, 3, dtype=torch.long), use_cache=True)
    leaves, spec = tree_flatten(output)
    assert any(leaf is output.logits for leaf in leaves), f"torch's trees no longer open a model's output: {ours}"
    cache = next(getattr(output, name) for name in CACHE_NAMES if name in output.keys())
    assert any(leaf is cache for leaf in leaves), f"torch's trees no longer leave a cache whole: {ours}"
    again = tree_unflatten(leaves, spec)
    assert type(again) is type(output) and torch.equal(again.logits, output.logits), f"tree_unflatten changed: {ours}"
    assert tree_map(lambda value: value + 1, ((1, 2), {"x": 3})) == ((2, 3), {"x": 4}), (
        f"torch's tree_map changed: {ours}"
    )


def test_wrappers_around_a_model(ours, monkeypatch):
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)  # which the parity tests set for the whole process
    inner = nn.Linear(2, 2)
    compiled = torch.compile(inner, backend="eager")
    assert getattr(compiled, "_orig_mod", None) is inner, f"torch.compile's wrapper has no _orig_mod: {ours}"
    paths = [path for path, _ in nn.Sequential(nn.Sequential(compiled)).named_parameters()]
    assert paths == ["0.0._orig_mod.weight", "0.0._orig_mod.bias"], f"torch.compile names parameters {paths}: {ours}"
    with one_process():
        for wrap, name in ((nn.parallel.DistributedDataParallel, "DistributedDataParallel"), (nn.DataParallel, None)):
            wrapped = wrap(inner)
            assert type(wrapped).__name__ == (name or "DataParallel"), f"torch renamed {name}: {ours}"
            assert wrapped.module is inner, f"{type(wrapped).__name__} has no `module`: {ours}"
        assert not lacks(nn.parallel.DistributedDataParallel, "no_sync"), (
            f"DistributedDataParallel has no no_sync: {ours}"
        )


def test_counter_of_writes_to_a_tensor(ours):
    parameter = nn.Parameter(torch.zeros(2), requires_grad=False)
    alias, before = parameter.detach(), parameter._version
    parameter.add_(1)
    assert parameter._version == alias._version == before + 1, f"Tensor._version no longer counts writes: {ours}"
    with torch.inference_mode():
        assert torch.zeros(1).is_inference(), f"Tensor.is_inference changed its meaning: {ours}"


def test_what_hides_a_parameter_and_what_is_kept(ours):
    class Sevens(dict):
        def __getitem__(self, name):
            return torch.full((2, 2), 7.0) if name == "weight" else super().__getitem__(name)

    layer = nn.Linear(2, 2, bias=False)
    layer.__dict__["_parameters"], own = Sevens(layer._parameters), layer._parameters
    assert layer(torch.ones(2))[0] == 14 and dict(layer.named_parameters())["weight"] is own["weight"], ours
    layer.__dict__["_parameters"] = own
    layer.__dict__["weight"] = torch.full((2, 2), 7.0)
    assert layer.weight[0, 0] == 7 and dict(layer.named_parameters())["weight"] is layer._parameters["weight"], ours
    top = torch._C._autograd._top_saved_tensors_default_hooks
    assert top(False) is None, ours
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        assert top(False) is not None, ours
    seen = []

    def block(x):
        seen.append(top(False) is not None)
        return x.exp()

    x = torch.ones(1, requires_grad=True)
    torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False).backward()
    assert seen == [True, True], f"checkpointing sets no hooks any more; {ours}"


def test_what_adds_a_bias(ours):
    norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.InstanceNorm2d)
    base = getattr(nn.modules.batchnorm, "_NormBase", None)
    assert base and all(issubclass(norm, base) for norm in norms), f"batch norms have no base _NormBase: {ours}"
    assert nn.Conv2d(1, 1, 3).kernel_size == (3, 3), f"a convolution's kernel_size changed its form: {ours}"


def test_attention_that_calls_no_layer(ours):
    attention, called = nn.MultiheadAttention(4, 2), []
    attention.out_proj.register_forward_hook(lambda *_: called.append(True))
    x = torch.ones(3, 1, 4)
    attention(x, x, x)
    assert not called, f"nn.MultiheadAttention calls out_proj now, so an adapter there would run: {ours}"


def test_autocast_of_a_device(ours):
    assert torch.is_autocast_enabled("cpu") is False, f"torch.is_autocast_enabled takes no device: {ours}"
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.is_autocast_enabled("cpu"), f"torch.is_autocast_enabled no longer sees autocast: {ours}"
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16, f"torch.get_autocast_dtype changed: {ours}"
    missing = takes_not(torch.cuda.is_bf16_supported, "including_emulation")
    assert not missing, f"torch.cuda.is_bf16_supported takes no including_emulation: {ours}"
    assert issubclass(torch.OutOfMemoryError, RuntimeError), f"torch.OutOfMemoryError changed: {ours}"


def test_state_of_an_optimizer(ours):
    parameters = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    groups = [{"params": parameters[1:], "weight_decay": 0.1}, {"params": parameters[:1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    for parameter in parameters:
        parameter.grad = torch.ones(2)
    optimizer.step()
    state = optimizer.state_dict()
    assert sorted(state) == ["param_groups", "state"] and sorted(state["state"]) == [0, 1], (
        f"an optimiser's state dict is no longer {{state: {{number: ...}}, param_groups}}: {ours}"
    )
    again = torch.optim.AdamW(groups, lr=0.1)
    again.load_state_dict(state)
    assert torch.equal(again.state[parameters[1]]["exp_avg"], optimizer.state[parameters[1]]["exp_avg"]), (
        f"an optimiser's states are no longer numbered in the order of its groups: {ours}"
    )


def test_tools_of_the_benches(ours):
    memory = torch.cuda.memory
    missing = lacks(memory, "_record_memory_history", "_snapshot", "_set_allocator_settings")
    assert not missing, f"torch.cuda.memory no longer has {missing}: {ours}"
    assert not takes_not(torch.profiler.profile, "activities", "acc_events"), (
        f"torch.profiler.profile no longer takes activities and acc_events: {ours}"
    )
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as recorded:
        torch.ones(1)
    missing = lacks(recorded.events()[0], "name", "device_type", "time_range", "is_user_annotation")
    assert not missing, f"an event of torch's profiler no longer has {missing}: {ours}"
    assert not lacks(recorded.events()[0].time_range, "start", "end"), (
        f"an event of torch's profiler no longer says when it started and ended: {ours}"
    )
    assert not lacks(importlib.import_module("torch.distributed.fsdp"), "fully_shard"), (
        f"torch.distributed.fsdp has no fully_shard: {ours}"
    )
    assert not lacks(nn.utils.parametrize, "register_parametrization"), (
        f"torch.nn.utils.parametrize has no register_parametrization: {ours}"
    )


# ---------------------------------------------------------------------------------------- transformers: the cache


@pytest.mark.parametrize("name", CAUSAL)
def test_name_of_the_cache_argument(name, ours):
    found = cache_names(getattr(transformers, name).forward)
    assert len(found) == 1, (
        f"transformers: {name}.forward calls its cache neither {' nor '.join(CACHE_NAMES)}, or both; its "
        f"arguments are {', '.join(inspect.signature(getattr(transformers, name).forward).parameters)}. Prompts and "
        f"prefixes that miss the cache write wrong text: {ours}"
    )


@pytest.mark.parametrize("model", [tiny.llama, gpt2, t5])
def test_what_generate_passes(model, ours):
    model, calls = model().eval(), []
    (name,) = cache_names(type(model).forward)

    def note(module, args, kwargs):
        cache = kwargs.get(name)
        calls.append((args, kwargs, cache is not None and hasattr(cache, "get_seq_length") and cache.get_seq_length()))

    model.register_forward_pre_hook(note, with_kwargs=True)
    text = {"input_ids": torch.tensor([[1, 2, 3], [4, 5, 6]]), "attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]])}
    model.generate(**text, max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0)
    kinds = {type(kwargs.get(name)).__name__ for _, kwargs, _ in calls}
    assert all(held is not False for *_, held in calls), (
        f"generate no longer passes a cache with get_seq_length as {name!r} (it passes {kinds}, and the arguments "
        f"{sorted(calls[0][1])}): {ours}"
    )
    lengths = [held for *_, held in calls]
    assert lengths[0] == 0 and all(lengths[1:]), f"generate's cache holds {lengths} tokens before each call: {ours}"
    flagged = [kwargs[name] for _, kwargs, _ in calls if getattr(kwargs[name], "is_compileable", False)]
    assert not flagged, f"generate's own cache is of fixed length now: {ours}"
    assert not any(args for args, *_ in calls), f"generate passes arguments by position: {ours}"
    masks = [kwargs[key] for _, kwargs, _ in calls for key in kwargs if key.endswith("attention_mask")]
    shapes = {tuple(mask.shape) for mask in masks if mask is not None}
    assert shapes and all(len(shape) == 2 for shape in shapes), f"generate passes masks of the shapes {shapes}: {ours}"


def test_parts_of_a_cache(ours):
    from transformers.cache_utils import DynamicCache, EncoderDecoderCache, StaticCache

    cache, pair = DynamicCache(), torch.ones(1, 2, 3, 4)
    assert cache.get_seq_length() == 0, f"an empty DynamicCache is not 0 tokens long: {ours}"
    for layer in range(2):
        cache.update(pair, pair, layer)
    assert [cache.get_seq_length(), cache.get_seq_length(1)] == [3, 3], f"DynamicCache.get_seq_length changed: {ours}"
    missing = [name for layer in cache.layers for name in lacks(layer, "keys", "values")]
    assert not missing, f"transformers' DynamicLayer no longer has {' and '.join(missing)}: {ours}"
    shapes = {tuple(tensor.shape) for layer in cache.layers for tensor in (layer.keys, layer.values)}
    assert shapes == {(1, 2, 3, 4)}, f"a cache holds keys and values as {shapes}, not (b, heads, n, width): {ours}"
    cache.crop(-1)
    assert cache.get_seq_length() == 2, f"DynamicCache.crop(-1) no longer takes one token off: {ours}"
    both = EncoderDecoderCache(DynamicCache(), DynamicCache())
    assert not lacks(both, "self_attention_cache"), f"EncoderDecoderCache has no self_attention_cache: {ours}"
    config = transformers.MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=8)
    layers = DynamicCache(config=config).layers
    seen = [(getattr(layer, "is_sliding", None), getattr(layer, "sliding_window", None)) for layer in layers]
    assert seen == [(True, 8)] * 2, f"layers of a sliding cache tell is_sliding and sliding_window as {seen}: {ours}"
    fixed = StaticCache(config=transformers.LlamaConfig(**SMALL), max_cache_len=8)
    assert fixed.is_compileable, f"a StaticCache no longer says is_compileable: {ours}"


@pytest.mark.parametrize("model", [tiny.llama, gpt2])
def test_what_attention_asks_of_a_cache(model, ours):
    model, asked = model().eval(), []

    class Held:
        def get_seq_length(self, layer_idx=0):
            return 0

        def update(self, keys, values, *rest, **named):
            asked.append(tuple(keys.shape))
            return keys, values

    for module in [m for m in model.modules() if isinstance(getattr(m, "layer_idx", None), int)]:
        if names := cache_names(type(module).forward):
            give = lambda module, args, kwargs, name=names[0]: (args, {**kwargs, name: Held()})  # noqa: E731
            if not any(cache_names(type(child).forward) for child in module.children()):
                module.register_forward_pre_hook(give, with_kwargs=True)
    try:
        model(torch.ones(1, 3, dtype=torch.long), use_cache=False)
    except AttributeError as error:
        pytest.fail(f"attention asks a cache for more than get_seq_length and update ({error}): {ours}")
    assert len(asked) == 2, f"{len(asked)} of 2 attention layers called `update` of the cache they got: {ours}"
    assert all(len(shape) == 4 and shape[0] == 1 and shape[2] == 3 for shape in asked), (
        f"attention gives `update` keys of the shapes {asked}, not (b, heads, n, width): {ours}"
    )


@pytest.mark.parametrize("model", [tiny.llama, gpt2, t5])
def test_attention_modules(model, ours):
    model = model("meta") if model is not tiny.llama else model()
    body = model.get_decoder() if model.config.is_encoder_decoder else model
    found = {}
    for module in body.modules():
        if isinstance(getattr(module, "layer_idx", None), int) and cache_names(type(module).forward):
            if not any(cache_names(type(child).forward) for child in module.children()):
                found.setdefault(module.layer_idx, module)
    assert sorted(found) == [0, 1], (
        f"{type(model).__name__}: the attention modules with a number `layer_idx` and an argument for the cache are of "
        f"the layers {sorted(found)}, not 0 and 1: {ours}"
    )
    for module in found.values():
        first = list(inspect.signature(type(module).forward).parameters)[1]
        assert first == "hidden_states", f"{type(module).__name__}.forward calls its states {first!r}: {ours}"


@pytest.mark.parametrize(("model", "stack"), [
    (tiny.llama, "model.layers"), (gpt2, "transformer.h"), (bert, "bert.encoder.layer"), (t5, "encoder.block"),
])  # fmt: skip
def test_how_blocks_are_called(model, stack, ours):
    model, seen = model().eval(), []
    layers = model.get_submodule(stack)
    assert isinstance(layers, nn.ModuleList) and len(layers) == model.config.num_hidden_layers, (
        f"{type(model).__name__}.{stack} is no ModuleList of num_hidden_layers blocks: {ours}"
    )

    def note(block, args, kwargs, output):
        seen.append((args, output))

    for block in layers:
        block.register_forward_hook(note, with_kwargs=True)
    ids = torch.ones(2, 3, dtype=torch.long)
    model(input_ids=ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}))
    for args, output in seen:
        assert args and args[0].shape == (2, 3, 16), (
            f"{type(layers[0]).__name__} is no longer called with its states first: {ours}"
        )
        first = output[0] if isinstance(output, tuple) else output
        assert isinstance(first, torch.Tensor) and first.shape == (2, 3, 16), (
            f"{type(layers[0]).__name__} returns {type(output).__name__}, neither states nor a tuple that starts with "
            f"them: {ours}"
        )


# --------------------------------------------------------------------------- transformers: gradient checkpointing


def test_switch_for_checkpointing(ours):
    model = tiny.llama()
    for verb, on in (("enable", True), ("disable", False)):
        there = [f"{kind}_checkpointing_{verb}" for kind in ("activation", "gradient")]
        switch = next((getattr(model, name) for name in there if hasattr(model, name)), None)
        assert switch, f"transformers' models have neither {' nor '.join(there)}: {ours}"
        switch({"use_reentrant": False}) if on else switch()
        flags = {block.gradient_checkpointing for block in model.model.layers}
        assert flags == {on}, f"after {verb}, the blocks say gradient_checkpointing={flags}: {ours}"

    class Without(transformers.LlamaForCausalLM):
        supports_gradient_checkpointing = False

    model = Without(model.config)
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    with pytest.raises(ValueError):  # which we turn into our own error
        enable({"use_reentrant": False})


def test_checkpointing_takes_the_cache_away(ours):
    model, got = tiny.llama().train(), []
    pl.prepare_for_training(model, checkpointing=True)
    model.config.use_cache = True
    (name,) = cache_names(type(model.model.layers[0].self_attn).forward)

    def note(attention, args, kwargs):
        got.append(kwargs.get(name))

    for block in model.model.layers:
        block.self_attn.register_forward_pre_hook(note, with_kwargs=True)
    cache = transformers.cache_utils.DynamicCache()
    model(torch.ones(1, 3, dtype=torch.long), **{name: cache})
    assert got and all(each is None for each in got), f"a checkpointed layer in training keeps its cache now: {ours}"


def test_inputs_that_require_gradients(ours):
    model = tiny.llama().requires_grad_(False)
    missing = lacks(model, "enable_input_require_grads", "disable_input_require_grads")
    assert not missing, f"transformers' models no longer have {missing}: {ours}"

    def marks():
        return [name for name in ("_require_grads_hooks", "_require_grads_hook") if getattr(model, name, None)]

    embed, ids = model.get_input_embeddings(), torch.ones(1, 2, dtype=torch.long)
    assert not marks() and not embed(ids).requires_grad
    model.enable_input_require_grads()
    assert embed(ids).requires_grad, f"enable_input_require_grads no longer makes the embedding's output learn: {ours}"
    assert marks(), f"after enable_input_require_grads, neither _require_grads_hooks nor _require_grads_hook: {ours}"
    model.disable_input_require_grads()
    assert not marks() and not embed(ids).requires_grad, f"disable_input_require_grads leaves a mark: {ours}"


# --------------------------------------------------------------------------------- transformers: models and configs


def test_methods_of_a_model(ours):
    llama, encoder = tiny.llama(), bert("meta")
    missing = lacks(
        llama, "get_input_embeddings", "get_output_embeddings", "tie_weights", "save_pretrained", "generate", "config",
        "generation_config", "prepare_inputs_for_generation", "base_model", "base_model_prefix", "name_or_path",
        "can_generate",
    )  # fmt: skip
    assert not missing, f"transformers' models no longer have {missing}: {ours}"
    assert llama.get_input_embeddings() is llama.model.embed_tokens, f"get_input_embeddings gives another layer: {ours}"
    assert llama.get_output_embeddings() is llama.lm_head, f"get_output_embeddings gives another layer: {ours}"
    assert encoder.get_output_embeddings() is None, f"a classifier's get_output_embeddings is not None: {ours}"
    assert lacks(encoder, "prepare_inputs_for_generation"), (
        f"a classifier has prepare_inputs_for_generation now: {ours}"
    )
    assert llama.base_model_prefix == "model" and llama.base_model is llama.model, (
        f"base_model_prefix no longer names the model under the head: {ours}"
    )
    both = t5("meta")
    assert both.get_encoder() is both.encoder and both.get_decoder() is both.decoder, (
        f"T5's get_encoder and get_decoder give other modules: {ours}"
    )


@pytest.mark.parametrize(("path", "names"), [
    ("GPT2LMHeadModel", "input_ids inputs_embeds attention_mask position_ids token_type_ids labels use_cache"),
    ("LlamaForCausalLM", "input_ids inputs_embeds attention_mask position_ids labels use_cache"),
    ("BertForSequenceClassification", "input_ids inputs_embeds attention_mask position_ids token_type_ids labels"),
    ("T5ForConditionalGeneration",
     "input_ids attention_mask decoder_input_ids decoder_inputs_embeds decoder_attention_mask labels use_cache"),
    ("models.t5.modeling_t5.T5Stack",
     "input_ids inputs_embeds attention_mask encoder_hidden_states encoder_attention_mask"),
    ("models.bert.modeling_bert.BertOutput", "hidden_states input_tensor"),
    ("models.roberta.modeling_roberta.RobertaOutput", "hidden_states input_tensor"),
])  # fmt: skip
def test_names_of_arguments(path, names, ours):
    module, _, name = f"transformers.{path}".rpartition(".")
    missing = takes_not(getattr(importlib.import_module(module), name).forward, *names.split())
    assert not missing, f"transformers: {name}.forward no longer takes {missing}: {ours}"


@pytest.mark.parametrize("name", CAUSAL)
def test_logits_that_are_left_out(name, ours):
    missing = takes_not(getattr(transformers, name).forward, "logits_to_keep")
    assert not missing, f"{name}.forward takes no logits_to_keep: {ours}"
    if name == "LlamaForCausalLM":
        model, ids = tiny.llama().eval(), torch.tensor([[1, 2, 3, 4]])
        kept = model(ids, logits_to_keep=2).logits
        assert kept.shape[1] == 2 and torch.allclose(kept, model(ids).logits[:, -2:]), (
            f"logits_to_keep no longer counts from the end: {ours}"
        )


def test_fields_of_an_output(ours):
    ids = torch.ones(1, 3, dtype=torch.long)
    output = tiny.llama()(ids, labels=ids, use_cache=True, output_hidden_states=True)
    missing = [name for name in ("loss", "logits", "hidden_states") if name not in output.keys()]
    assert not missing, f"a model's output no longer has {missing}: {ours}"
    assert isinstance(output, dict) and output.logits.shape == (1, 3, 32), (
        f"an output is no dict with logits (b, t, words): {ours}"
    )
    found = [name for name in CACHE_NAMES if name in output.keys()]
    argument = cache_names(transformers.LlamaForCausalLM.forward)
    assert found == argument, f"an output calls its cache {found}, the forward's argument is {argument}: {ours}"


@pytest.mark.parametrize(("config", "fields"), [
    (transformers.LlamaConfig(**SMALL),
     "num_hidden_layers num_attention_heads num_key_value_heads hidden_size head_dim max_position_embeddings "
     "vocab_size use_cache is_encoder_decoder pad_token_id model_type architectures dtype tie_word_embeddings"),
    (transformers.MistralConfig(**SMALL), "sliding_window"),
    (transformers.GPT2Config(**GPT2),
     "num_hidden_layers n_layer num_attention_heads hidden_size max_position_embeddings"),
    (transformers.BertConfig(**BERT), "num_hidden_layers num_attention_heads hidden_size max_position_embeddings"),
    (transformers.T5Config(**T5), "num_layers num_hidden_layers num_decoder_layers num_heads d_kv d_model"),
    (transformers.BartConfig(), "decoder_layers decoder_attention_heads d_model num_hidden_layers"),
    (transformers.FalconConfig(), "multi_query new_decoder_architecture num_hidden_layers num_attention_heads"),
], ids=lambda value: getattr(value, "model_type", ""))  # fmt: skip
def test_fields_of_a_config(config, fields, ours):
    missing = lacks(config, *fields.split())
    assert not missing, f"transformers' {type(config).__name__} no longer has {missing}: {ours}"
    assert config.get_text_config() is config, f"get_text_config of a text model is not its own config: {ours}"
    told = config.is_encoder_decoder
    assert told is (config.model_type in ("t5", "bart")), (
        f"{type(config).__name__} says is_encoder_decoder={told}: {ours}"
    )


def test_configs_with_layers_of_different_sizes(ours):
    written = transformers.Gemma4TextConfig().to_dict()
    found = [name for name in ("per_layer_config", "global_head_dim") if written.get(name)]
    assert found, f"Gemma 4's config has neither per_layer_config nor global_head_dim: {ours}"


def test_a_model_made_from_its_config(ours):
    config = tiny.llama(tie_word_embeddings=True).config
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16, f"_from_config no longer takes a dtype: {ours}"
    assert "lm_head.weight" in set(model._tied_weights_keys), (
        f"_tied_weights_keys no longer names the tied weights that a file leaves out: {ours}"
    )
    model.to_empty(device="cpu").tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight, f"tie_weights no longer ties: {ours}"
    again = transformers.AutoConfig.for_model(**json.loads(json.dumps(config.to_dict(), default=str)))
    assert type(again) is type(config), f"AutoConfig.for_model makes another class of what to_dict wrote: {ours}"
    again._attn_implementation = "eager"
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(again, dtype=torch.bfloat16)
    chosen = model.model.layers[0].self_attn.config._attn_implementation
    assert chosen == "eager" and model.dtype == torch.bfloat16, f"_attn_implementation no longer chooses: {ours}"


def test_what_is_saved_and_loaded(ours, tmp_path):
    from safetensors.torch import load_file

    model = tiny.llama()
    model._keys_to_ignore_on_save = {"model.norm.weight"}
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert "model.norm.weight" not in saved and "lm_head.weight" in saved, (
        f"save_pretrained no longer leaves out _keys_to_ignore_on_save: {ours}"
    )
    again, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, trust_remote_code=False, use_safetensors=True, output_loading_info=True, dtype=torch.bfloat16
    )
    assert set(report["missing_keys"]) == {"model.norm.weight"}, f"from_pretrained's report changed: {ours}"
    assert again.dtype == torch.bfloat16, f"from_pretrained no longer takes dtype: {ours}"
    assert again.config._name_or_path == str(tmp_path) == again.name_or_path, (
        f"a loaded model's config no longer keeps its origin as _name_or_path: {ours}"
    )
    architectures = json.loads((tmp_path / "config.json").read_text())["architectures"]
    assert architectures == ["LlamaForCausalLM"], f"config.json no longer names its class in architectures: {ours}"


def test_names_of_classes(ours):
    conv = transformers.pytorch_utils.Conv1D(5, 3)
    assert type(conv).__name__ == "Conv1D" and conv.nf == 5 and conv.weight.shape == (3, 5), (
        f"transformers' Conv1D changed its name, `nf` or the order (in, out) of its weight: {ours}"
    )
    for model in (tiny.llama(), t5("meta"), bert("meta")):
        norms = [m for m in model.modules() if [name for name, _ in m.named_parameters(recurse=False)][:1] == ["weight"]
                 and m.weight.dim() == 1 and not isinstance(m, nn.Linear)]  # fmt: skip
        other = {type(norm).__name__ for norm in norms if "norm" not in type(norm).__name__.lower()}
        assert norms and not other, f"norms of {type(model).__name__} are called {other}: {ours}"
    for model, name in ((gpt2("meta"), "wpe"), (bert("meta"), "position_embeddings"),
                        (made("OPT", **SMALL, ffn_dim=32, word_embed_proj_dim=16), "embed_positions")):  # fmt: skip
        last = {path.rpartition(".")[2] for path, m in model.named_modules() if isinstance(m, nn.Embedding)}
        assert name in last, f"{type(model).__name__} calls its learned positions none of {sorted(last)}: {ours}"


@pytest.mark.parametrize(("model", "head"), [
    ("BertForSequenceClassification", "classifier"), ("LlamaForSequenceClassification", "score"),
    ("BertForTokenClassification", "classifier"), ("LlamaForTokenClassification", "score"),
    ("BertForQuestionAnswering", "qa_outputs"), ("LlamaForQuestionAnswering", "qa_outputs"),
])  # fmt: skip
def test_heads_of_tasks(model, head, ours):
    made_model = made(model.partition("For")[0], model, **BERT)
    assert not lacks(made_model, head), f"{model} no longer calls its head {head!r}: {ours}"


def test_the_token_that_a_decoder_classifies_by(ours):
    settings = {**SMALL, "num_key_value_heads": 2, "pad_token_id": 0, "num_labels": 3}
    model = made("Llama", "LlamaForSequenceClassification", "cpu", **settings)
    ids, mask = torch.tensor([[5, 6, 0]]), torch.tensor([[1, 1, 0]])
    last = model.score(model.model(input_ids=ids, attention_mask=mask).last_hidden_state)[0]
    with torch.no_grad():
        by_ids = model(input_ids=ids, attention_mask=mask).logits[0]
        embedded = model.get_input_embeddings()(ids)
        by_embeddings = model(inputs_embeds=embedded, attention_mask=mask).logits[0]
    assert torch.allclose(by_ids, last[1]), f"a decoder no longer classifies by the last token before padding: {ours}"
    assert torch.allclose(by_embeddings, last[2]), (
        f"among embeddings a decoder no longer classifies by the last column: {ours}"
    )


def test_scaled_embeddings(ours):
    settings = {**SMALL, "num_key_value_heads": 2, "head_dim": 4}
    embed, ids = made("Gemma3Text", "Gemma3ForCausalLM", "cpu", **settings).get_input_embeddings(), torch.tensor([1, 2])
    plain = nn.functional.embedding(ids, embed.weight, embed.padding_idx)
    assert torch.allclose(embed(ids), plain * getattr(embed, "embed_scale", 1)), (
        f"Gemma's embedding no longer scales by its `embed_scale`: {ours}"
    )


ARCHITECTURES = {
    "Llama": ("LlamaForCausalLM", SMALL, "q_proj v_proj", "self_attn.o_proj mlp.down_proj"),
    "Mistral": ("MistralForCausalLM", {**SMALL, "num_key_value_heads": 2}, "q_proj v_proj", "mlp.down_proj"),
    "GPT2": ("GPT2LMHeadModel", GPT2, "c_attn", "attn.c_proj mlp.c_proj"),
    "Bert": ("BertForSequenceClassification", BERT, "query value", "attention.output.dense output.dense"),
    "Roberta": ("RobertaForSequenceClassification", BERT, "query value", "attention.output.dense output.dense"),
    "T5": ("T5ForConditionalGeneration", T5, "q v", "SelfAttention.o DenseReluDense.wo"),
    "MT5": ("MT5ForConditionalGeneration", T5, "q v", "SelfAttention.o DenseReluDense.wo DenseReluDense.wi_1"),
    "GPTNeoX": ("GPTNeoXForCausalLM", SMALL, "query_key_value", ""),
    "Phi3": ("Phi3ForCausalLM", {**SMALL, "pad_token_id": 0}, "qkv_proj", ""),
    "DistilBert": ("DistilBertForSequenceClassification", {"dim": 16, "n_layers": 1, "n_heads": 4}, "q_lin v_lin", ""),
    "DebertaV2": ("DebertaV2ForSequenceClassification", BERT, "query_proj value_proj", ""),
    "ModernBert": ("ModernBertForSequenceClassification", {**SMALL, "pad_token_id": 0}, "Wqkv", ""),
}


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_names_of_modules(family, ours):
    from peftlab import default_targets as usual
    from peftlab.core.targets import default_targets
    from peftlab.methods import adapter, ia3

    name, settings, targets, places = ARCHITECTURES[family]
    modules = dict(made(family, name, **settings).named_modules())
    endings = sorted({path.rpartition(".")[2] for path, m in modules.items() if not list(m.children())})
    found = default_targets({path: module for path, module in modules.items() if path})
    assert found == tuple(targets.split()), f"{name}: queries and values are called {found} ({endings}): {ours}"
    missing = [place for place in places.split() if not any(path.endswith("." + place) for path in modules)]
    assert not missing, f"{name} no longer has modules called {missing} (its layers are {endings}): {ours}"
    if places:
        for placement in adapter.PLACEMENTS:
            assert usual.places(modules, placement, lambda _: None, name, "target_modules", endings), (
                f"{name} has no place for a {placement} adapter: {ours}"
            )
        model = SimpleNamespace(config=SimpleNamespace(model_type=family.lower()))
        assert ia3.architecture(model, modules), f"{name}: keys, values and feed-forward are called otherwise: {ours}"


def test_how_generation_is_set(ours):
    fields = ("do_sample", "use_cache", "max_new_tokens", "eos_token_id", "pad_token_id", "bos_token_id")
    missing = lacks(transformers.GenerationConfig(), *fields, "decoder_start_token_id")
    assert not missing, f"transformers' GenerationConfig no longer has {missing}: {ours}"
    model = tiny.llama().eval()
    settings = {"do_sample": False, "max_new_tokens": 3, "eos_token_id": [31], "pad_token_id": 0}
    model.generation_config = transformers.GenerationConfig(**settings)
    length = model.generate(input_ids=torch.tensor([[1, 2]])).shape[1]
    assert length == 5, f"generate no longer follows model.generation_config (it wrote {length - 2} tokens): {ours}"


def test_what_a_tokenizer_offers(ours):
    tokenizer = tiny.tokenizer(chat=True)
    missing = lacks(
        tokenizer, "chat_template", "apply_chat_template", "all_special_ids", "eos_token_id", "pad_token_id",
        "name_or_path", "decode", "get_chat_template", "added_tokens_decoder", "is_fast",
    )  # fmt: skip
    assert not missing, f"a transformers tokenizer no longer has {missing}: {ours}"
    messages = [{"role": "user", "content": "yes"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert isinstance(text, str) and text.endswith("<|start|>assistant "), f"apply_chat_template gives {text!r}: {ours}"
    assert isinstance(tokenizer("yes", add_special_tokens=False)["input_ids"], list), f"input_ids are no list: {ours}"
    assert tokenizer.decode([0], skip_special_tokens=True) == "", f"decode keeps special tokens: {ours}"
    tokenizer.chat_template = (
        "{% for m in messages %}<|start|>{{ m.role }} {% generation %}{{ m.content }}{% endgeneration %}"
        "<|end|>{% endfor %}"
    )
    encoded = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True,
        tokenizer_kwargs={"return_offsets_mapping": True},
    )  # fmt: skip
    marks, places = encoded["assistant_masks"], list(map(tuple, encoded["offset_mapping"]))
    assert marks == [0, 0, 1, 0], f"the mask of generations is {marks}: {ours}"
    assert places == [(0, 9), (9, 13), (14, 17), (17, 24)], f"a text's tokens stand at {places}: {ours}"


def test_borders_told_by_positions(ours):
    from transformers import masking_utils
    from transformers.modeling_flash_attention_utils import _is_packed_sequence

    model = tiny.llama().eval()
    ids = torch.tensor([[1, 2, 3, 4, 5, 6], [9, 8, 7, 4, 5, 6]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]] * 2)
    with torch.no_grad():
        packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, 3:]
        mixed = model(input_ids=ids, use_cache=False).logits[:, 3:]
    assert torch.equal(packed[0], packed[1]), f"examples of a packed row are no longer kept apart: {ours}"
    assert not torch.allclose(mixed[0], mixed[1]), f"the trial of packed rows shows nothing: {ours}"
    like = torch.empty(2, 6, 1)
    mask = masking_utils.create_masks_for_generate(tiny.llama().config, like, None, None, position_ids=positions)
    mask = mask["full_attention"] if isinstance(mask, dict) else mask
    assert mask.shape == (2, 1, 6, 6) and not mask[0, 0, 3, 2] and mask[0, 0, 4, 3], f"no masks of blocks: {ours}"
    assert _is_packed_sequence(positions[:1], 1), f"flash attention takes no packed row: {ours}"
    assert not _is_packed_sequence(positions, 2), f"flash attention takes several packed rows now: {ours}"


# -------------------------------------------------------------------------------- transformers: Trainer and marks


def test_what_trainer_refuses(ours, tmp_path):
    pytest.importorskip("accelerate")
    model = tiny.llama()
    settings = transformers.TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    model.is_quantized = True
    model.hf_quantizer = SimpleNamespace(is_trainable=True, is_qat_trainable=False)
    with pytest.raises(ValueError) as error:
        transformers.Trainer(model=model, args=settings)
    assert "purely quantized" in str(error.value), f"Trainer refuses a quantised base otherwise ({error.value}): {ours}"
    model.is_quantized = False
    try:
        transformers.Trainer(model=model, args=settings)
    except ValueError as error:
        pytest.fail(f"Trainer no longer takes is_quantized=False for a model that trains ({error}): {ours}")


def test_what_trainer_tells_a_callback(ours):
    callback, events = transformers.TrainerCallback, ("on_save", "on_train_begin", "on_train_end")
    missing = [name for event in events for name in takes_not(getattr(callback, event), "args", "state", "control")]
    assert not missing, f"the events of transformers' TrainerCallback no longer take {missing}: {ours}"
    fields = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
    missing = {"output_dir", "load_best_model_at_end"} - fields
    missing |= set(lacks(transformers.TrainingArguments, "should_save"))
    missing |= set(lacks(transformers.TrainerState(), "global_step", "best_model_checkpoint"))
    assert not missing, f"Trainer's arguments and state no longer have {sorted(missing)}: {ours}"
    prefix = transformers.trainer_utils.PREFIX_CHECKPOINT_DIR
    assert prefix == "checkpoint", f"Trainer calls its folders {prefix}-N, not checkpoint-N: {ours}"


def test_marks_of_a_quantised_model(ours, tmp_path):
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    from peftlab.quantization.model import MARKS, quantization_config

    plain = tiny.llama()
    mine = quantization_config(plain, "nf4", True)
    theirs = transformers.BitsAndBytesConfig(load_in_4bit=True).to_dict()
    strange = sorted(set(mine) - {key.removeprefix("_") for key in theirs})
    assert not strange, f"transformers' BitsAndBytesConfig has no {strange}: {ours}"
    plain.save_pretrained(tmp_path)
    options = transformers.BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["lm_head"])
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=options)
    added = {name for name in vars(loaded) if "quant" in name or "4bit" in name or "8bit" in name} - set(vars(plain))
    new = sorted(added - set(MARKS))
    assert not new, f"transformers marks a 4-bit model by {new} too: {ours}"
    assert {"is_quantized", "hf_quantizer"} <= added, f"a 4-bit model has only the marks {sorted(added)}: {ours}"
    assert not lacks(loaded.config, "quantization_config"), f"its config has no quantization_config: {ours}"


LOGGING = {
    "transformers.utils.logging": "get_verbosity set_verbosity set_verbosity_error is_progress_bar_enabled "
    "enable_progress_bar disable_progress_bar",
    "huggingface_hub": "HfApi try_to_load_from_cache",
    "huggingface_hub.utils": "are_progress_bars_disabled disable_progress_bars enable_progress_bars",
    "datasets": "Dataset DatasetDict Features Value ClassLabel load_dataset load_from_disk enable_progress_bars "
    "disable_progress_bars are_progress_bars_disabled",
    "datasets.logging": "get_verbosity set_verbosity set_verbosity_error",
    "datasets.exceptions": "DatasetsError",
}


@pytest.mark.parametrize("module", LOGGING)
def test_switches_and_loaders(module, ours):
    try:
        found = importlib.import_module(module)
    except ImportError:  # datasets.logging is an attribute, not a module
        parent, _, name = module.rpartition(".")
        found = getattr(importlib.import_module(parent), name)
    missing = lacks(found, *LOGGING[module].split())
    assert not missing, f"{module} no longer has {missing}: {ours}"
    if module == "huggingface_hub":
        assert not takes_not(found.HfApi.model_info, "timeout"), f"HfApi.model_info takes no timeout: {ours}"


VARIABLES = {
    "transformers.utils.logging": "TRANSFORMERS_VERBOSITY TRANSFORMERS_NO_ADVISORY_WARNINGS",
    "huggingface_hub.constants": "HF_HUB_DISABLE_PROGRESS_BARS",
    "datasets.config": "HF_DATASETS_DISABLE_PROGRESS_BARS",
}


@pytest.mark.parametrize("module", VARIABLES)
def test_variables_of_the_environment(module, ours):
    source = inspect.getsource(importlib.import_module(module))
    unread = [name for name in VARIABLES[module].split() if f'"{name}"' not in source]
    assert not unread, f"{module} no longer reads {unread} from the environment: {ours}"


# ------------------------------------------------------------------------------------------------------------ peft

PEFT = {
    "LoraConfig": pl.LoRAConfig, "IA3Config": pl.IA3Config, "PromptTuningConfig": pl.PromptTuningConfig,
    "PromptEncoderConfig": pl.PTuningConfig, "PrefixTuningConfig": pl.PrefixTuningConfig,
    "AdaLoraConfig": pl.AdaLoRAConfig, "VeraConfig": pl.VeRAConfig, "LoHaConfig": pl.LoHaConfig,
    "LoKrConfig": pl.LoKrConfig, "OFTConfig": pl.OFTConfig,
}  # fmt: skip


@pytest.mark.parametrize("name", PEFT)
def test_fields_of_pefts_configs(name, ours):
    peft = pytest.importorskip("peft")
    from peftlab.adapters.config_fields import TARGET_FIELDS, to_fields
    from peftlab.adapters.judging import IDLE
    from peftlab.adapters.key_table import placed

    model = tiny.llama()
    pl.attach(model, PEFT[name]())
    config = model.__dict__["_peftlab"].configs["default"]
    written = set(to_fields(model, config, placed(model, "default")))
    theirs = {field.name for field in dataclasses.fields(getattr(peft, name))}
    strange = written - theirs - {"deep"}
    assert not strange, f"peft's {name} no longer has {sorted(strange)}: {ours}"
    idle = {*IDLE[""], *IDLE.get(PEFT[name].peft_type, ())}
    # written only where an adapter has some
    used = {"target_parameters", "trainable_token_indices"} if "Lora" in name else set()
    known = written | used | set(PEFT[name].unsupported) | idle | set(TARGET_FIELDS)
    new = theirs - known
    assert not new, (
        f"peft's {name} has new fields, {sorted(new)}. An adapter that uses one is to be refused (`unsupported`) or "
        f"read, or the field may be ignored (IDLE in adapters/judging.py): {ours}"
    )
    needed = {"num_virtual_tokens": 4} if "num_virtual_tokens" in theirs else {}
    fields = getattr(peft, name)(**{**needed, **({"total_step": 10} if name == "AdaLoraConfig" else {})})
    assert PEFT[name].peft_type == fields.peft_type.value, f"peft calls {name} {fields.peft_type.value!r}: {ours}"


def test_words_of_peft(ours):
    pytest.importorskip("peft")
    from peft import TaskType
    from peft.utils import constants

    from peftlab.core.targets import TASK_HEADS

    words = {task.value for task in TaskType}
    assert words == set(TASK_HEADS), f"peft's tasks are {sorted(words)}, ours {sorted(TASK_HEADS)}: {ours}"
    assert set(constants.EMBEDDING_LAYER_NAMES) == {"embed_tokens", "lm_head"}, (
        f"peft saves the base's weights beside {constants.EMBEDDING_LAYER_NAMES}: {ours}"
    )
    assert set(constants.SEQ_CLS_HEAD_NAMES) == set(TASK_HEADS["SEQ_CLS"]), (
        f"peft names other heads of classifiers: {ours}"
    )


def test_keys_of_pefts_files(ours):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    wrapped = peft.get_peft_model(tiny.llama(layers=1), config)
    expected = {f"base_model.model.model.layers.0.self_attn.q_proj.lora_{x}.weight" for x in "AB"}
    keys = set(peft.get_peft_model_state_dict(wrapped))
    assert keys == expected | {"base_model.model.lm_head.weight"}, f"peft stores a LoRA as {sorted(keys)}: {ours}"
    inside = {name for name, _ in wrapped.named_parameters()}
    for part in ("q_proj.base_layer", "lm_head.original_module", "lm_head.modules_to_save.default"):
        found = any(name.endswith(f".{part}.weight") for name in inside)
        assert found, f"peft's wrappers no longer hold ...{part}.weight: {ours}"


def test_what_the_benches_call_of_peft(ours):
    peft = pytest.importorskip("peft")
    missing = lacks(
        peft, "get_peft_model", "LoraConfig", "AdaLoraConfig", "VeraConfig", "IA3Config", "PromptTuningConfig",
        "PromptEncoderConfig", "PrefixTuningConfig", "LoHaConfig", "LoKrConfig", "OFTConfig",
        "prepare_model_for_kbit_training",
    )  # fmt: skip
    assert not missing, f"peft no longer has {missing}: {ours}"
    arguments = list(inspect.signature(peft.prepare_model_for_kbit_training).parameters)
    assert arguments[1:3] == ["use_gradient_checkpointing", "gradient_checkpointing_kwargs"], (
        f"peft.prepare_model_for_kbit_training takes {arguments}: {ours}"
    )
    wrapped = peft.get_peft_model(tiny.llama(layers=1), peft.LoraConfig(r=1, target_modules=["q_proj"]))
    assert not lacks(wrapped, "unload"), f"a model of peft cannot unload its adapters: {ours}"


# ---------------------------------------------------------------------------------------------------- bitsandbytes


@pytest.fixture
def bnb():
    from peftlab.optional import available

    return available("bitsandbytes") or pytest.skip("bitsandbytes is not installed")


def test_a_quantised_weight_of_bitsandbytes(bnb, ours):
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    packed, state = bnb.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    missing = lacks(state, "absmax", "shape", "dtype", "blocksize", "quant_type", "nested", "state2", "offset", "code")
    assert not missing, f"bitsandbytes' QuantState no longer has {missing}: {ours}"
    arguments = ("absmax", "shape", "code", "blocksize", "quant_type", "dtype", "offset", "state2")
    missing = takes_not(type(state).__init__, *arguments)
    assert not missing, f"bitsandbytes' QuantState no longer takes {missing}: {ours}"
    assert packed.dtype == torch.uint8 and packed.shape == (256, 1), f"codes lie as {tuple(packed.shape)}: {ours}"
    keys = set(state.as_dict(packed=True))
    from peftlab.quantization.backends import from_bitsandbytes
    from peftlab.quantization.serialised import to_tensors

    mine = set(to_tensors(from_bitsandbytes(state)))
    assert keys == mine, f"bitsandbytes stores a 4-bit weight under {sorted(keys)}, we under {sorted(mine)}: {ours}"


def test_operations_of_bitsandbytes(bnb, ours):
    expected = {
        "dequantize_4bit": "A absmax blocksize quant_type shape dtype",
        "dequantize_blockwise": "A absmax code blocksize dtype",
        "quantize_4bit": "A blocksize quant_type quant_storage",
        "gemm_4bit": "A B shapeB absmax blocksize quant_type bias absmax_8bit absmax_code absmax_offset",
    }
    for name, arguments in expected.items():
        if name == "gemm_4bit" and lacks(torch.ops.bitsandbytes, name):
            continue  # releases before it dequantise
        assert not lacks(torch.ops.bitsandbytes, name), f"torch.ops.bitsandbytes has no {name}: {ours}"
        schema = [argument.name for argument in getattr(torch.ops.bitsandbytes, name).default._schema.arguments]
        assert schema == arguments.split(), f"bitsandbytes' {name} takes {schema}, we give {arguments}: {ours}"


def test_repacked_weights_of_bitsandbytes(bnb, ours):
    from peftlab.quantization.weights import REPACKS

    missing = lacks(bnb.nn.Linear4bit(64, 64, device="meta"), REPACKS)
    assert not missing, f"bitsandbytes' Linear4bit has no {missing}: {ours}"
    source = inspect.getsource(bnb.functional)
    names = ("packing_format_for_cpu", "original_dtype", "original_qshape", "original_nested", "original_storage_type")
    missing = [name for name in names if f"quant_state.{name}" not in source]
    assert not missing, f"bitsandbytes' repacking no longer notes {missing}: {ours}"


def test_layers_and_optimizers_of_bitsandbytes(bnb, ours):
    layer = "input_features output_features bias compute_dtype compress_statistics quant_type device"
    weight = "requires_grad quant_state blocksize compress_statistics quant_type module bnb_quantized"
    missing = takes_not(bnb.nn.Linear4bit.__init__, *layer.split())
    missing += takes_not(bnb.nn.Params4bit.__new__, *weight.split())
    assert not missing, f"bitsandbytes' Linear4bit and Params4bit no longer take {missing}: {ours}"
    missing = lacks(bnb.nn.Linear4bit(64, 64, device="meta").weight, "quant_state")
    assert not missing, f"a 4-bit weight of bitsandbytes has no quant_state: {ours}"
    for name in ("AdamW8bit", "PagedAdamW8bit"):
        missing = takes_not(getattr(bnb.optim, name).__init__, "params", "lr", "betas", "eps")
        assert not missing, f"bitsandbytes' {name} no longer takes {missing}: {ours}"
    manager = bnb.functional.GlobalPageManager.get_instance()
    assert isinstance(manager.paged_tensors, list), f"GlobalPageManager.paged_tensors is no list: {ours}"
    module = importlib.import_module("bitsandbytes.backends.cpu.ops")
    assert "getLogger(__name__)" in inspect.getsource(module), f"{module.__name__} logs elsewhere: {ours}"


# ------------------------------------------------------------------------------------------------------ the others


def test_the_form_of_a_safetensors_file(ours):
    from safetensors.torch import save

    raw = save({"b": torch.ones(2), "a": torch.zeros(1)}, {"k": "v"})
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    assert header.pop("__metadata__") == {"k": "v"}, f"safetensors keeps its metadata elsewhere: {ours}"
    spans = sorted(entry["data_offsets"] for entry in header.values())
    assert spans[0][0] == 0 and len(raw) == 8 + length + spans[-1][1] == 8 + length + 12 and length % 8 == 0, (
        f"a safetensors file is no longer eight bytes of length, a JSON header and the data: {ours}"
    )


def test_what_is_read_of_a_gguf_file(ours, tmp_path):
    gguf = pytest.importorskip("gguf")
    import numpy

    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_block_count(2)
    writer.add_tensor("blk.0.attn_q.weight", numpy.ones((2, 32), numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    reader = gguf.GGUFReader(tmp_path / "tiny.gguf")
    told = {name: field.contents() for name, field in reader.fields.items()}
    assert told["llama.block_count"] == 2, f"gguf's fields no longer give their contents(): {ours}"
    (tensor,) = reader.tensors
    missing = lacks(tensor, "name", "data", "tensor_type")
    assert not missing, f"gguf's tensors no longer have {missing}: {ours}"
    values = gguf.dequantize(tensor.data, tensor.tensor_type)
    assert values.shape == (2, 32), f"gguf.dequantize gives {values.shape}, not (out, in): {ours}"


def test_whether_a_person_watches_a_notebook(ours):
    kernel = pytest.importorskip("ipykernel.ipkernel").IPythonKernel
    shell = importlib.import_module("ipykernel.zmqshell").ZMQInteractiveShell
    assert not lacks(kernel, "_allow_stdin"), f"ipykernel keeps no _allow_stdin: {ours}"
    assert not lacks(shell, "kernel"), f"the shell of a notebook has no `kernel`: {ours}"


def test_what_the_book_changes_in_sphinx(ours):
    pytest.importorskip("sphinx")
    from sphinx.domains.std import make_glossary_term
    from sphinx.environment import BuildEnvironment
    from sphinx.environment.collectors.toctree import TocTreeCollector

    arguments = list(inspect.signature(TocTreeCollector.assign_figure_numbers).parameters)
    assert arguments == ["self", "env"], f"Sphinx' assign_figure_numbers takes {arguments}: {ours}"
    source = inspect.getsource(BuildEnvironment)
    missing = [name for name in ("toc_secnumbers", "tocs", "titles") if f"self.{name}" not in source]
    assert not missing, f"Sphinx' environment no longer has {missing}: {ours}"
    named = ("env", "textnodes", "index_key", "source", "lineno", "node_id", "document")
    missing = takes_not(make_glossary_term, *named)
    assert not missing, f"Sphinx' make_glossary_term no longer takes {missing}: {ours}"
