"""Merging: exact where it can be, honest about rounding where it cannot, never twice, undone bit for bit."""

import copy

import pytest
import torch
from nets import Net, assert_same, snapshot, tokens
from tiny import llama
from torch import nn

import peftlab as pl

CONFIG = dict(r=3, alpha=5, target_modules=["up", "down", "head", "embed"], init="random")


def attach(model, name="default", seed=1, **settings):
    torch.manual_seed(seed)
    return pl.attach(model, pl.LoRAConfig(**{**CONFIG, **settings}), name=name)


def move(model):
    """Every adapter parameter off its starting value."""
    torch.manual_seed(9)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "peftlab" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.mark.parametrize("settings", [
    {}, dict(use_rslora=True), dict(bias="all"), dict(bias="lora_only", lora_bias=True, target_modules=["up", "down"]),
    dict(modules_to_save=["head", "blocks.1"]), dict(rank_pattern={"up": 1}, alpha_pattern={"embed": 3}),
])  # fmt: skip
def test_merged_is_what_ran_and_unmerging_is_exact(settings):
    model = move(attach(Net(), **settings))
    before, expected = snapshot(model), model(tokens())
    report = pl.merge(model)
    assert report.relative_error < 1e-12 and set(report.by_module) == {
        path for path, module in model.named_modules() if "peftlab" in module._modules
    }
    torch.testing.assert_close(model(tokens()), expected, rtol=1e-12, atol=1e-12)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    pl.unmerge(model)
    assert_same(before, snapshot(model))
    assert torch.equal(model(tokens()), expected)


def test_a_copied_module_with_buffers_and_depth():
    model = nn.ModuleDict({"fc": nn.Linear(4, 4), "tail": nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2))}).double()
    pl.attach(model, pl.LoRAConfig(target_modules=["fc"], modules_to_save=["tail"], init="random"))
    x = torch.randn(8, 4).double()
    run = lambda: model["tail"](model["fc"](x))  # noqa: E731
    run()  # in train mode the copy's running averages move
    model.eval()
    expected, before = run(), copy.deepcopy(model["tail"][0].running_mean)
    pl.merge(model)
    torch.testing.assert_close(run(), expected)
    pl.unmerge(model)
    assert torch.equal(model["tail"][0].running_mean, before)


@pytest.mark.parametrize("dtype, most", [(torch.float32, 1e-5), (torch.bfloat16, 1.0), (torch.float16, 1.0)])
def test_the_reported_error_is_the_rounding(dtype, most):
    model = attach(Net(dtype=dtype))
    weights = {path: model.get_submodule(path).weight.detach().double() for path in ("blocks.0.up", "head", "embed")}
    parts = {path: model.get_submodule(path).peftlab["default"]["lora"] for path in weights}
    deltas = {path: part.scaling * (part.lora_B.double() @ part.lora_A.double()) for path, part in parts.items()}
    deltas["embed"] = deltas["embed"].T
    report = pl.merge(model)
    for path, weight in weights.items():
        stored = model.get_submodule(path).weight.double()
        exact = weight + deltas[path]
        lost = ((stored - exact).norm() / deltas[path].norm()).item()
        assert report.by_module[path] == pytest.approx(lost, rel=0.05, abs=1e-7)
        assert torch.equal(stored, exact.to(dtype).double())  # rounded once, from the exact sum
    assert 0 < report.relative_error < most
    assert len(report.by_module) == 6 and report.relative_error == max(report.by_module.values())


def test_factors_in_16_bits_are_multiplied_in_wide_numbers():
    torch.manual_seed(0)
    config = pl.LoRAConfig(r=3, alpha=5, target_modules=["0"], lora_bias=True, init="random")
    model = pl.attach(nn.Sequential(nn.Linear(8, 8)), config, adapter_dtype=torch.bfloat16)
    host, part = model[0], model[0].peftlab["default"]["lora"]
    nn.init.normal_(part.lora_B_bias)
    weight = host.weight.double() + part.scaling * (part.lora_B.double() @ part.lora_A.double())
    bias = host.bias.double() + part.scaling * part.lora_B_bias.double()
    report = pl.merge(model)
    assert torch.equal(host.weight, weight.float()) and torch.equal(host.bias, bias.float())
    assert report.relative_error < 1e-6
    assert report.relative_error == max(report.by_module.values())
    assert f"{report.modules} modules" in str(report)


def test_a_small_update_is_lost_in_bfloat16_and_the_report_says_so():
    model = attach(Net(dtype=torch.bfloat16), target_modules=["up"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(1e-5)
    before = model.blocks[0].up.weight.clone()
    assert pl.merge(model).relative_error > 0.9
    assert (model.blocks[0].up.weight == before).float().mean() > 0.9


def test_mixtures_merge_by_the_formula():
    model = Net()
    attach(model, "a", seed=1, bias="all", modules_to_save=["head"], target_modules=["up", "embed"])
    attach(model, "b", seed=2, r=2, target_modules=["up", "down", "head"])
    move(model)
    pl.activate(model, {"a": 0.7, "b": 0.3})
    weight = model.blocks[0].up.weight.detach().clone()
    parts = model.blocks[0].up.peftlab
    expected = model(tokens())
    pl.merge(model)
    exact = weight + 0.7 * parts["a"]["lora"].delta() + 0.3 * parts["b"]["lora"].delta()
    torch.testing.assert_close(model.blocks[0].up.weight.detach(), exact, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model(tokens()), expected, rtol=1e-9, atol=1e-9)


def test_unload_leaves_a_plain_model():
    model, plain = attach(Net()), snapshot(Net())
    attach(model, "idle", seed=3)
    pl.activate(model, "default")
    expected = model(tokens())
    pl.merge(model, unload=True)
    torch.testing.assert_close(model(tokens()), expected)
    after = snapshot(model)
    assert list(after["state"]) == list(plain["state"])
    for part in ("order", "trainable", "modules", "hooks", "keys"):
        assert after[part] == plain[part]


def refusals():
    def twice(model):
        pl.merge(model)
        expected = model(tokens())
        return expected

    return {
        "twice": (twice, pl.merge, "merged already"),
        "attach": (twice, lambda m: attach(m, "b"), "call unmerge"),
        "activate": (twice, lambda m: pl.activate(m, "default"), "call unmerge"),
        "disabled": (twice, lambda m: pl.disabled(m).__enter__(), "call unmerge"),
        "rows": (lambda m: pl.activate(m, ["default", None]), pl.merge, "Each row"),
        "none active": (lambda m: pl.activate(m, {}), pl.merge, "No adapter is active"),
    }


@pytest.mark.parametrize("case", refusals())
def test_refusals_change_nothing(case):
    prepare, call, said = refusals()[case]
    model = attach(Net())
    prepare(model)
    before, expected = snapshot(model), model(tokens())
    with pytest.raises(pl.PeftLabError, match=said):
        call(model)
    assert_same(before, snapshot(model))
    assert torch.equal(model(tokens()), expected)


@pytest.mark.parametrize("settings, said", [
    (dict(target_modules=["q_proj", "lm_head"]), "tied"), (dict(target_modules=["q_proj", "embed_tokens"]), "tied"),
    (dict(target_modules=["q_proj"], lora_bias=True), "without a bias"),
    (dict(target_modules=["q_proj"], modules_to_save=["lm_head"]), "tied"),
])  # fmt: skip
def test_what_cannot_be_merged_is_refused_whole(settings, said):
    """The layers before the offending one were merged already: they must be given back."""
    model = attach(llama(tie_word_embeddings=True), **settings)
    before = snapshot(model)
    with pytest.raises(pl.PeftLabError, match=said):
        pl.merge(model)
    assert_same(before, snapshot(model))


def test_merging_within_disabled_is_refused():
    model = attach(Net())
    before = snapshot(model)
    with pl.disabled(model), pytest.raises(pl.PeftLabError, match="outside the block"):
        pl.merge(model)
    assert_same(before, snapshot(model))


def test_an_overflow_is_refused_whole():
    model = attach(Net(dtype=torch.float16), target_modules=["up", "head"])
    with torch.no_grad():
        model.head.peftlab["default"]["lora"].lora_B.fill_(1e6)
    before = snapshot(model)
    with pytest.raises(pl.PeftLabError, match="infinite or not a number in torch.float16"):
        pl.merge(model)
    assert_same(before, snapshot(model))


def test_an_interrupt_half_way_leaves_the_model_whole(monkeypatch):
    model = attach(Net())
    before, expected = snapshot(model), model(tokens())
    from peftlab.adapters import merging

    calls, real = [], merging.rounding_error

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(merging, "rounding_error", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pl.merge(model)
    assert_same(before, snapshot(model))
    assert torch.equal(model(tokens()), expected)


def test_a_saved_adapter_is_the_same_while_merged(tmp_path):
    model = attach(Net())
    pl.save_adapter(model, tmp_path / "before")
    expected = model(tokens())
    pl.merge(model)
    pl.save_adapter(model, tmp_path / "merged")
    name = "adapter_model.safetensors"
    same = (tmp_path / "before" / name).read_bytes() == (tmp_path / "merged" / name).read_bytes()
    assert same
    assert torch.equal(pl.load_adapter(Net(), tmp_path / "merged")(tokens()), expected)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_nothing_is_merged_into_eight_bits(dtype):
    model = nn.Sequential(nn.Linear(4, 4))
    pl.attach(model, pl.LoRAConfig(r=2, target_modules=["0"], init="random"))
    model[0].weight.data = model[0].weight.data.to(dtype)
    before = model[0].weight.data.view(torch.uint8).clone()
    with pytest.raises(pl.PeftLabError, match="quantised to torch.float8.*Load the base in 16 or 32 bits"):
        pl.merge(model)
    assert torch.equal(model[0].weight.data.view(torch.uint8), before)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_nor_where_they_lie_within_a_module_trained_in_full(dtype):
    model = nn.ModuleDict({"fc": nn.Linear(4, 4), "tail": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))})
    model["tail"][0].weight = nn.Parameter(model["tail"][0].weight.data.to(dtype))
    pl.attach(model, pl.LoRAConfig(r=2, target_modules=["fc"], modules_to_save=["tail"], init="random"))
    before = model["fc"].weight.data.clone()
    with pytest.raises(pl.PeftLabError, match="^tail.0.weight is quantised to torch.float8.*Load the base in 16 or"):
        pl.merge(model)
    assert torch.equal(model["fc"].weight.data, before)


def test_a_changed_base_is_not_merged_into():
    model = attach(Net())
    model.head.weight = model.embed.weight
    with pytest.raises(pl.PeftLabError, match="the weight of embed was tied to that of head"):
        pl.merge(model)


UP = dict(target_modules=["up_proj"])


@pytest.mark.parametrize("first, second", [
    (pl.OFTConfig(oft_block_size=4, init_weights=False, **UP), pl.LoRAConfig(init="random", **UP)),
    (pl.DoRAConfig(init="random", **UP), pl.OFTConfig(oft_block_size=4, init_weights=False, **UP)),
    (pl.IA3Config(init="random", feedforward_modules=["up_proj"], **UP), pl.LoHaConfig(init_weights=False, **UP)),
], ids=["oft-lora", "dora-oft", "ia3-loha"])  # fmt: skip
def test_a_mixture_in_which_one_reads_what_another_changed_is_not_merged(first, second):
    """One adapter alone is, and so is a mixture on different layers."""
    model = llama().eval()
    pl.attach(model, first, name="one")
    pl.attach(model, second, name="two")
    pl.activate(model, {"one": 0.5, "two": 0.25})
    with pytest.raises(pl.PeftLabError, match="works on the changed input"):
        pl.merge(model)
    ids = torch.tensor([[3, 4, 5]])
    for name in ("one", "two"):
        pl.activate(model, name)
        expected = model(ids).logits
        pl.merge(model)
        torch.testing.assert_close(model(ids).logits, expected)
        pl.unmerge(model)
    pl.attach(model, pl.LoRAConfig(init="random", target_modules=["q_proj"]), name="elsewhere")
    pl.activate(model, {"one": 0.5, "elsewhere": 0.25})
    expected = model(ids).logits
    pl.merge(model)
    torch.testing.assert_close(model(ids).logits, expected)


def test_saving_a_merged_model_does_not_warn_that_its_adapter_is_left_out(tmp_path, recwarn):
    model = pl.attach(llama(), pl.LoRAConfig(r=2))
    pl.merge(model)
    model.save_pretrained(tmp_path / "merged")
    assert not [one for one in recwarn if "without its adapters" in str(one.message)]
    pl.unmerge(model)
    with pytest.warns(UserWarning, match="without its adapters"):
        model.save_pretrained(tmp_path / "base")
