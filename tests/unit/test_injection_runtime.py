"""What runs a model in another way: torch.compile and DistributedDataParallel."""

import copy

import pytest
import torch
import torch._dynamo.testing
from children import one_worker, together
from groups import one_process
from nets import Net, tokens
from tiny import llama
from torch import nn

import peftlab as pl
from peftlab.adapters.key_table import redundant
from peftlab.core.records import unwrap

CONFIG = dict(r=3, alpha=5, target_modules=["up", "down", "head", "embed"], init="random")


def attach(model, name="default", seed=1, **settings):
    torch.manual_seed(seed)
    return pl.attach(model, pl.LoRAConfig(**{**CONFIG, **settings}), name=name)


@pytest.fixture
def compiler(request, monkeypatch):
    """A backend that counts the graphs it is given, with compilation switched on whatever the environment says."""
    torch._dynamo.reset()
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    with torch._dynamo.config.patch(disable=False):
        yield torch._dynamo.testing.CompileCounterWithBackend(getattr(request, "param", "aot_eager"))
    torch._dynamo.reset()


ROWS = ["a", None, "b", "a"]


def shallow():
    """Net with one block: the compiler takes a second for each graph of two."""
    model = Net()
    model.blocks = model.blocks[:1]
    return model


@pytest.mark.parametrize("build, inputs, targets, choices, compiler", [
    (shallow, tokens(), CONFIG["target_modules"], ("a", "b", {"a": 0.7, "b": 0.3}, ROWS), "aot_eager"),
    # the graphs that are traced are the same for any backend, and this one traces their gradients no second time
    pytest.param(
        lambda: llama(layers=1).double(), tokens() + 1, ["q_proj", "down_proj", "embed_tokens"], ("a", ROWS), "eager",
        marks=pytest.mark.slow,
    ),
], indirect=["compiler"])  # fmt: skip
def test_compiled_it_gives_the_same_also_after_switching(build, inputs, targets, choices, compiler):
    model = build()
    out = lambda one: getattr(one(inputs), "logits", None) if not isinstance(model, Net) else one(inputs)  # noqa: E731
    attach(model, "a", seed=1, target_modules=targets)
    attach(model, "b", seed=2, target_modules=targets[:2], dropout=0.0)
    compiled = torch.compile(model, backend=compiler)
    for which in choices:
        pl.activate(compiled, which)
        results = []
        for one in (model, compiled):
            model.zero_grad()
            y = out(one)
            y.square().sum().backward()
            grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            results.append((y.detach(), grads))
        (expected, wanted), (found, grads) = results
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
        assert grads.keys() == wanted.keys()
        for name in grads:
            torch.testing.assert_close(grads[name], wanted[name], rtol=1e-8, atol=1e-10)
    with pl.disabled(compiled):
        torch.testing.assert_close(out(compiled), out(model), rtol=1e-10, atol=1e-10)
    pl.activate(model, "a")
    expected = out(model)
    pl.merge(compiled)
    torch.testing.assert_close(out(compiled), expected, rtol=1e-9, atol=1e-9)
    pl.unmerge(compiled)
    pl.detach(compiled, "b"), pl.detach(compiled, "a")
    torch.testing.assert_close(out(compiled), out(model), rtol=1e-10, atol=1e-10)
    assert compiler.frame_count >= 4


def test_one_adapter_compiles_into_one_graph(compiler):
    model = attach(llama(layers=1).double(), target_modules=["q_proj", "v_proj"])
    compiled = torch.compile(model, backend=compiler, fullgraph=True)
    torch.testing.assert_close(compiled(tokens() + 1).logits, model(tokens() + 1).logits)
    compiled(tokens() + 1)
    assert compiler.frame_count == 1


def test_folders_through_compiled_layers(tmp_path, compiler):
    """A layer compiled on its own has another path; the adapter's keys must not have it."""
    settings = dict(target_modules=["q_proj", "layers.1.mlp.up_proj"], rank_pattern={"q_proj": 2}, init="kaiming")
    plain = attach(llama().eval(), **settings)
    pl.save_adapter(plain, tmp_path / "plain")
    model = llama().eval()
    for i, layer in enumerate(model.model.layers):
        model.model.layers[i] = torch.compile(layer, backend=compiler)
    assert any("_orig_mod" in name for name, _ in model.named_modules())
    pl.load_adapter(model, tmp_path / "plain")
    pl.save_adapter(model, tmp_path / "compiled")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        same = (tmp_path / "plain" / name).read_bytes() == (tmp_path / "compiled" / name).read_bytes()
        assert same, name  # bytes themselves in an assert take pytest minutes to compare


def test_distributed_data_parallel_in_one_process():
    with one_process():
        model = attach(Net(), modules_to_save=["head"], target_modules=["up"])
        expected = model(tokens())
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        assert pl.count_parameters(wrapped) == pl.count_parameters(model)
        for _ in range(2):  # the second step would complain of parameters that the first left out
            wrapped(tokens()).square().sum().backward()
        assert torch.equal(wrapped(tokens()), expected)
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        with pl.disabled(wrapped):
            assert not torch.equal(wrapped(tokens()), expected)


def ddp_step(rank, world, folder):
    """Two backwards under DistributedDataParallel; rank 0 writes its gradients."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    model = attach(Net(), modules_to_save=["blocks.0.norm"])
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    assert pl.count_parameters(wrapped) == pl.count_parameters(model)
    rows = tokens(4).chunk(world)[rank]
    for _ in range(2):  # the second step would complain about parameters that the first left out
        model.zero_grad()
        wrapped(rows).square().mean().backward()
    if rank == 0:
        pl.save_adapter(wrapped, folder)
        torch.save({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, folder / "grads.pt")


@one_worker
@pytest.mark.slow
def test_distributed_data_parallel_on_two_processes(tmp_path, world=2):
    together(*((ddp_step, rank, world, tmp_path) for rank in range(world)))
    alone = attach(Net(), modules_to_save=["blocks.0.norm"])
    alone(tokens(4)).square().mean().backward()
    expected = {name: p.grad for name, p in alone.named_parameters() if p.grad is not None}
    found = torch.load(tmp_path / "grads.pt", weights_only=True)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)
    loaded = pl.load_adapter(Net(), tmp_path)
    assert torch.equal(loaded(tokens()), alone(tokens()))


def test_a_wrapped_model_is_the_model():
    model = attach(Net())
    expected = model(tokens())
    wrapped = torch.nn.DataParallel(copy.deepcopy(model))
    assert list(pl.attached(wrapped)) == ["default"]
    pl.merge(wrapped)
    torch.testing.assert_close(wrapped.module(tokens()), expected)
    pl.unmerge(wrapped), pl.detach(wrapped)
    assert pl.attached(wrapped.module) == {}


def test_a_layer_compiled_after_attaching(tmp_path, compiler):
    """Its parameters then have other names: flags, samples of the base and redundant keys go by the plain ones."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].requires_grad_(False)
    pl.attach(model, pl.LoRAConfig(r=2, target_modules=["0"]))
    pl.save_adapter(model, tmp_path)
    model[0] = torch.compile(model[0], backend=compiler)
    pl.detach(model)
    assert [parameter.requires_grad for parameter in model.parameters()] == [True, True, False, False]

    key = "base_model.model.0.base_layer.weight"
    assert redundant(model, key, {key: model[0].weight.detach().clone()})
    with torch.no_grad():
        model[0].weight.add_(1)
    with pytest.raises(pl.PeftLabError, match="another base"):
        pl.load_adapter(model, tmp_path)


def test_a_model_compiled_inside_after_attaching_detaches(compiler):
    model = llama(layers=1)
    before = {name: repr(value) for name, value in vars(model.model).items() if name.startswith("_keys")}
    pl.attach(model, pl.LoRAConfig(r=2, target_modules=["q_proj"]))
    model.model = torch.compile(model.model, backend=compiler)
    pl.detach(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    inner = vars(unwrap(model.model))
    assert {name: repr(value) for name, value in inner.items() if name.startswith("_keys")} == before
    assert "_keys_to_ignore_on_save" not in vars(model.model)
