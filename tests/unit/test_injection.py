"""Attach, detach, activate, disable, count: nothing is left behind, and nothing is silently untrained."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from nets import Net, assert_same, snapshot, tokens
from tiny import llama

import peftlab as pl

CONFIG = dict(r=3, alpha=5, target_modules=["up", "down", "head", "embed"], init="random")


def attach(model, name="default", seed=1, **settings):
    torch.manual_seed(seed)
    return pl.attach(model, pl.LoRAConfig(**{**CONFIG, **settings}), name=name)


def outputs(model, *names):
    found = []
    for name in names:
        pl.activate(model, name)
        found.append(model(tokens()))
    return found


# ------------------------------------------------------------------------------------------------ what is left behind


@pytest.mark.parametrize("settings", [
    {}, dict(bias="all"), dict(bias="lora_only", lora_bias=True, target_modules=["up"]), dict(modules_to_save=["head"]),
])  # fmt: skip
def test_detach_gives_the_model_back_bit_for_bit(settings):
    model = Net()
    model.blocks[0].requires_grad_(False)
    model.blocks[1].eval()
    model.head.register_forward_hook(lambda module, args, output: None)
    model.head.register_forward_pre_hook(lambda module, args, kwargs: None, with_kwargs=True)
    before = snapshot(model)
    attach(model, **settings)
    attach(model, "other", target_modules=["up"])
    pl.activate(model, {"default": 0.5, "other": 2.0})
    model(tokens()).sum().backward()
    pl.detach(model, "other")
    pl.detach(model)
    model.zero_grad()
    assert_same(before, snapshot(model))


def test_detach_of_a_transformers_model():
    model = llama()
    before = snapshot(model)
    attach(model, target_modules="all-linear", modules_to_save=["lm_head"])
    attach(model, "b", target_modules=["q_proj"])
    assert type(model).__name__ == "LlamaForCausalLM"
    pl.detach(model)
    assert pl.attached(model).keys() == {"b"}
    pl.detach(model, "b")
    assert_same(before, snapshot(model))


def test_detach_while_merged_gives_the_base_back():
    model = Net()
    before = snapshot(model)
    attach(model)
    pl.merge(model)
    pl.detach(model)
    assert_same(before, snapshot(model))


def test_base_parameters_keep_names_and_are_the_same_objects():
    model = Net()
    before = dict(model.named_parameters())
    attach(model)
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    assert not any(parameter.requires_grad for parameter in before.values())
    trained = {name for name, parameter in after.items() if parameter.requires_grad}
    assert trained == after.keys() - before.keys()
    assert "blocks.0.up.peftlab.default.lora.lora_A" in trained


def test_training_moves_only_the_adapter():
    model = Net()
    attach(model)
    base = {name: p.detach().clone() for name, p in model.named_parameters() if "peftlab" not in name}
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5)
    for _ in range(3):
        model(tokens()).square().sum().backward()
        optimiser.step()
        optimiser.zero_grad()
    now = dict(model.named_parameters())
    assert all(torch.equal(value, now[name]) for name, value in base.items())


def test_nothing_keeps_a_dropped_model_alive():
    model = attach(Net())
    alive = weakref.ref(model.head)
    del model
    gc.collect()
    assert alive() is None


# ------------------------------------------------------------------------------------------------------ failing calls


def failing_calls():
    lora = pl.LoRAConfig(**CONFIG)
    return {
        "name in use": (lambda m: pl.attach(m, lora), "attached already"),
        "name with a dot": (lambda m: pl.attach(m, lora, name="a.b"), "cannot name an adapter"),
        "empty name": (lambda m: pl.attach(m, lora, name=""), "cannot name"),
        "name of a method": (lambda m: pl.attach(m, lora, name="keys"), "cannot name"),
        "name no string": (lambda m: pl.attach(m, lora, name=3), "cannot name"),
        "no config": (lambda m: pl.attach(m, {"r": 8}, name="b"), "make one of LoRAConfig"),
        "class, not config": (lambda m: pl.attach(m, pl.LoRAConfig, name="b"), "make one of LoRAConfig"),
        "dtype": (lambda m: pl.attach(m, lora, name="b", adapter_dtype=torch.int8), "floating dtype"),
        "dtype as a word": (lambda m: pl.attach(m, lora, name="b", adapter_dtype="int4"), "one of 'fp32', 'bf16'"),
        "target": (lambda m: pl.attach(m, pl.LoRAConfig(target_modules=["upp"]), name="b"), "Did you mean 'up'"),
        "detach": (lambda m: pl.detach(m, "defalt"), "Did you mean 'default'"),
        "activate": (lambda m: pl.activate(m, "other"), "There is no adapter 'other'"),
        "activate a part": (lambda m: pl.activate(m, {"default": 1.0, "nil": 1.0}), "'nil'"),
        "weight": (lambda m: pl.activate(m, {"default": float("nan")}), "finite number"),
        "weight as text": (lambda m: pl.activate(m, {"default": "1"}), "finite number"),
        "rows": (lambda m: pl.activate(m, ["default", "nil"]), "'nil'"),
        "no rows": (lambda m: pl.activate(m, []), "give a name"),
        "nothing": (lambda m: pl.activate(m, None), "give a name"),
        "number": (lambda m: pl.activate(m, 3), "give a name"),
        "unmerge": (pl.unmerge, "not merged"),
        "submodule": (lambda m: pl.attach(m.blocks[0], pl.LoRAConfig(target_modules=["up"])), "through another module"),
        "part of it": (lambda m: pl.detach(m.blocks[0]), "No adapter is attached"),
    }


@pytest.mark.parametrize("case", failing_calls())
def test_a_failing_call_changes_nothing(case):
    call, said = failing_calls()[case]
    model = attach(Net())
    before, expected = snapshot(model), model(tokens())
    with pytest.raises(pl.PeftLabError, match=said):
        call(model)
    assert_same(before, snapshot(model))
    assert torch.equal(model(tokens()), expected)
    assert list(pl.attached(model)) == ["default"]


def test_calls_on_a_plain_model():
    model = Net()
    for call in (
        pl.merge,
        pl.unmerge,
        pl.detach,
        lambda m: pl.activate(m, "default"),
        lambda m: pl.activate(m, [None]),
    ):
        with pytest.raises(pl.PeftLabError):
            call(model)
    with pl.disabled(model):
        assert model(tokens()).shape == (4, 5)
    assert pl.attached(model) == {}
    with pytest.raises(pl.PeftLabError, match="must be a torch.nn.Module"):
        pl.attach("model", pl.LoRAConfig())


def test_attaching_through_the_outer_module_after_the_inner_is_refused():
    model = Net()
    pl.attach(model.blocks[0], pl.LoRAConfig(target_modules=["up"]))
    with pytest.raises(pl.PeftLabError, match="through another module"):
        attach(model)


# ------------------------------------------------------------------------------------------- several, mixed, by rows


def test_switch_mix_and_disable():
    model = Net()
    base = model(tokens())
    attach(model, "a", seed=1)
    attach(model, "b", seed=2, target_modules=["head", "up"], r=2)
    alone = attach(Net(), seed=1)(tokens())
    a, b = outputs(model, "a", "b")
    assert torch.equal(a, alone) and not torch.allclose(a, b)
    with pl.disabled(model):
        assert torch.equal(model(tokens()), base)
        with pl.disabled(model):
            pass
        assert torch.equal(model(tokens()), base)  # the inner block must not switch adapters on
    with pytest.raises(RuntimeError), pl.disabled(model):
        raise RuntimeError
    assert torch.equal(model(tokens()), b)
    pl.activate(model, {"a": 0.0})
    torch.testing.assert_close(model(tokens()), base)


def test_a_mixture_is_the_weighted_sum_of_the_updates():
    model = Net()
    attach(model, "a", seed=1, target_modules=["up", "head"])
    attach(model, "b", seed=2, target_modules=["up"], r=2, alpha=7)
    exact = copy.deepcopy(model)
    pl.activate(model, {"a": 0.7, "b": -0.3})
    found = model(tokens())
    for path in ("blocks.0.up", "blocks.1.up", "head"):
        host = exact.get_submodule(path)
        delta = 0.7 * host.peftlab["a"]["lora"].delta()
        if "up" in path:
            delta = delta - 0.3 * host.peftlab["b"]["lora"].delta()
        with torch.no_grad():
            host.weight.add_(delta)
    with pl.disabled(exact):
        torch.testing.assert_close(found, exact(tokens()), rtol=1e-12, atol=1e-12)


def test_a_mixture_trains_every_adapter_in_it():
    model = Net()
    attach(model, "a"), attach(model, "b"), attach(model, "c")
    pl.activate(model, {"a": 0.5, "b": 0.5})
    model(tokens()).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (".peftlab.a." in name or ".peftlab.b." in name), name


def test_a_name_for_each_row():
    model = Net()
    base = model(tokens())
    attach(model, "a", seed=1, modules_to_save=["blocks.0.norm"]), attach(model, "b", seed=2, bias="all")
    a, b = outputs(model, "a", "b")
    pl.activate(model, ["b", None, "a", "b"])
    torch.testing.assert_close(model(tokens()), torch.stack([b[0], base[1], a[2], b[3]]), rtol=1e-12, atol=1e-12)
    pl.activate(model, ["a", None])  # each row twice in place, as beams lie
    torch.testing.assert_close(model(tokens()), torch.cat([a[:2], base[2:]]), rtol=1e-12, atol=1e-12)
    pl.activate(model, [None, None])
    assert torch.equal(model(tokens()), base)
    pl.activate(model, ["a", "b", None])
    with pytest.raises(pl.PeftLabError, match="3 names.*4 rows"):
        model(tokens())
    model(tokens(3)).sum().backward()
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all(model.get_parameter(name).grad is not None for name in trained)
    pl.detach(model, "a")
    assert model(tokens()).shape == (4, 5)


def test_a_copied_module_carries_no_other_adapter():
    """The copy is of the base's module: the adapter that stands on that module already must not be copied along."""
    model = Net()
    attach(model, "a", target_modules=["head"])
    count = pl.count_parameters(model).total
    with pl.disabled(model):
        base = model(tokens())
    attach(model, "b", target_modules=["up"], init="kaiming", modules_to_save=["head"])
    assert torch.equal(model(tokens()), base)
    assert pl.count_parameters(model).total == count + 2 * 3 * (6 + 11) + 6 * 5 + 5
    model(tokens()).sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_trainable_follows_attach_load_and_activate(tmp_path):
    model = attach(Net())
    pl.save_adapter(model, tmp_path)
    count = pl.count_parameters(model).trainable
    pl.load_adapter(model, tmp_path, name="frozen")
    assert pl.count_parameters(model).trainable == 0
    pl.activate(model, "default")
    assert pl.count_parameters(model).trainable == count
    pl.activate(model, "frozen", trainable=True)
    assert pl.count_parameters(model).trainable == count
    pl.activate(model, "frozen", trainable=False)
    assert pl.count_parameters(model).trainable == 0
    pl.load_adapter(model, tmp_path, name="again", trainable=True)
    assert pl.count_parameters(model).trainable == count


def test_detach_of_the_active_one_leaves_the_base_running():
    model = Net()
    base = model(tokens())
    attach(model, "a"), attach(model, "b")
    pl.detach(model, "b")
    assert torch.equal(model(tokens()), base)
    assert not torch.equal(outputs(model, "a")[0], base)


# ------------------------------------------------------------------------------------- copies, dtypes, autocast, counts


def test_deep_copies_are_independent():
    model = attach(Net())
    expected = model(tokens())
    twin = copy.deepcopy(model)
    assert torch.equal(twin(tokens()), expected)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(model(tokens()), expected)
    pl.merge(twin)
    with pl.disabled(model):
        pass
    assert torch.equal(model(tokens()), expected)
    pl.detach(twin)
    assert list(pl.attached(model)) == ["default"] and torch.equal(model(tokens()), expected)
    pl.detach(model)
    assert not any("peftlab" in name for name, _ in model.named_modules())


def test_a_copy_made_while_merged_can_be_unmerged():
    model = attach(Net())
    before = snapshot(model)
    pl.merge(model)
    twin = copy.deepcopy(model)
    pl.unmerge(twin)
    for key, value in before["state"].items():
        assert torch.equal(twin.state_dict()[key], value)
    pl.unmerge(model)
    assert_same(before, snapshot(model))


def test_a_pickled_model_runs():
    model = attach(Net())
    assert torch.equal(pickle.loads(pickle.dumps(model))(tokens()), model(tokens()))


def test_deep_copy_of_a_transformers_model_detaches():
    model = llama()
    before = snapshot(model)
    attach(model, target_modules=["q_proj"])
    twin = copy.deepcopy(model)
    pl.detach(twin), pl.detach(model)
    assert_same(before, snapshot(model))
    before, after = before, snapshot(twin)
    assert all(torch.equal(value, after["state"][key]) for key, value in before["state"].items())
    for part in ("trainable", "modules", "hooks", "keys"):
        assert before[part] == after[part]


@pytest.mark.parametrize("dtype, expected", [
    (torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
])  # fmt: skip
def test_dtypes(dtype, expected):
    model = attach(Net(dtype=dtype), bias="all", modules_to_save=["head"])
    assert {p.dtype for name, p in model.named_parameters() if "peftlab" in name} == {expected}
    assert model(tokens()).dtype == dtype
    model(tokens()).float().sum().backward()
    model = pl.attach(Net(dtype=dtype), pl.LoRAConfig(**CONFIG), adapter_dtype=torch.bfloat16)
    assert {p.dtype for name, p in model.named_parameters() if "peftlab" in name} == {torch.bfloat16}
    assert model(tokens()).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_agrees_with_the_merged_model(dtype):
    model = attach(Net(dtype=dtype))
    with torch.autocast("cpu", torch.bfloat16):
        found = model(tokens())
    found.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    wide = attach(Net(dtype=dtype)).double()
    assert (found.double() - wide(tokens())).norm() / wide(tokens()).norm() < 0.05


def test_inference_mode_and_no_grad():
    model = attach(Net())
    expected = model(tokens())
    with torch.inference_mode():
        assert torch.equal(model(tokens()), expected)


def test_a_bias_trained_instead_of_the_bases_is_one_parameter():
    model = Net()
    base = sum(parameter.numel() for parameter in model.parameters())
    biases = 2 * (6 + 11 + 6) + 5
    assert pl.count_parameters(pl.attach(model, pl.BitFitConfig()))[:2] == (biases, base)


def test_a_changed_base_is_not_counted():
    model = attach(Net())
    model.head = torch.nn.Linear(6, 5)
    with pytest.raises(pl.PeftLabError, match="head was replaced"):
        pl.count_parameters(model)


def test_a_copied_module_may_answer_with_several_tensors():
    model = torch.nn.ModuleDict({"fc": torch.nn.Linear(4, 4), "rnn": torch.nn.LSTM(4, 3, batch_first=True)})
    x = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    base, (state, cell) = model["rnn"](model["fc"](x))
    pl.attach(model, pl.LoRAConfig(r=2, target_modules=["fc"], modules_to_save=["rnn"]))
    found, (state_now, cell_now) = model["rnn"](model["fc"](x))
    assert torch.equal(found, base) and torch.equal(state_now, state) and torch.equal(cell_now, cell)
    with torch.no_grad():
        for parameter in model["rnn"].peftlab["default"].parameters():
            parameter.zero_()
    found, (state_now, cell_now) = model["rnn"](model["fc"](x))
    assert not found.any() and not state_now.any() and not cell_now.any()


def test_tied_weights_are_counted_once():
    model = llama(tie_word_embeddings=True)
    base = sum(parameter.numel() for parameter in model.parameters())
    attach(model, target_modules=["lm_head"])
    assert pl.count_parameters(model).total - pl.count_parameters(model).trainable == base


def test_meta_devices_take_adapters_too():
    with torch.device("meta"):
        model = llama()
    pl.attach(model, pl.LoRAConfig(r=4))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_a_layer_used_twice_adapts_both_calls():
    model = Net()
    model.blocks[1] = model.blocks[0]
    attach(model, target_modules=["up"])
    expected = model(tokens())
    pl.merge(model)
    torch.testing.assert_close(model(tokens()), expected)
    pl.unmerge(model)
    pl.detach(model)


def test_detach_of_one_named_in_rows_leaves_none_training():
    model = attach(attach(Net()), "b", seed=2)
    pl.activate(model, ["default", "b"])
    pl.detach(model, "default")
    assert torch.equal(model(tokens()), Net()(tokens()))  # the base alone runs
    assert not any(parameter.requires_grad for parameter in model.parameters())
    pl.activate(model, {})
    assert torch.equal(model(tokens()), Net()(tokens()))
