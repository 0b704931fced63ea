"""Property tests: one layer of any shape, rank, scaling, dtype and seed gives peft's numbers."""

import copy

import peft
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs import give, peft_model, relative
from torch import nn
from transformers.pytorch_utils import Conv1D

import peftlab as pl

sizes = st.integers(1, 17)
dtypes = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])
PRECISION = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


class Net(nn.Module):
    """One layer between a fixed input and the loss."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def net(kind, inside, outside, bias, dtype):
    layers = {
        "linear": lambda: nn.Linear(inside, outside, bias=bias),
        "conv1d": lambda: Conv1D(outside, inside),
        "embedding": lambda: nn.Embedding(inside, outside),
    }
    model = Net(layers[kind]()).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(["linear", "conv1d", "embedding"]),
    inside=sizes,
    outside=sizes,
    r=st.integers(1, 9),
    alpha=st.floats(0.5, 40),
    rslora=st.booleans(),
    bias=st.booleans(),
    dtype=dtypes,
    seed=st.integers(0, 2**20),
    leading=st.sampled_from([(3,), (2, 4), (2, 1, 3), (1, 0, 2)]),
)
def test_any_shape_rank_and_dtype(kind, inside, outside, r, alpha, rslora, bias, dtype, seed, leading):
    torch.manual_seed(seed)
    ours = net(kind, inside, outside, bias, dtype)
    theirs = peft_model(copy.deepcopy(ours), r=r, alpha=alpha, use_rslora=rslora, target_modules=["layer"])
    pl.attach(ours, pl.LoRAConfig(r=r, alpha=alpha, use_rslora=rslora, target_modules=["layer"]))
    give(theirs, ours)
    x = torch.randint(0, inside, leading) if kind == "embedding" else torch.randn(*leading, inside).to(dtype)

    found, expected = ours(x), theirs(x)
    assert found.dtype == expected.dtype == dtype and found.shape == expected.shape
    assert pl.count_parameters(ours)[:2] == theirs.get_nb_trainable_parameters()
    if not found.numel():
        return
    assert relative(found, expected) < PRECISION[dtype]
    found.double().square().sum().backward()
    expected.double().square().sum().backward()
    mine = [parameter.grad for parameter in ours.parameters() if parameter.requires_grad]
    other = [parameter.grad for parameter in theirs.parameters() if parameter.requires_grad]
    assert len(mine) == len(other) == 2
    for a, b in zip(mine, other, strict=True):
        assert relative(a, b) < PRECISION[dtype]

    # merged, the layer alone gives the same (to the rounding of its dtype), and unmerging leaves no trace
    weight = ours.layer.weight.detach().clone()
    report = pl.merge(ours)
    delta = theirs.base_model.model.layer.get_delta_weight("default")
    exact = weight.double() + delta.double()
    assert (ours.layer.weight.double() - exact).norm() <= PRECISION[dtype] * exact.norm()
    lost = (ours.layer.weight.double() - exact).norm() / delta.double().norm()
    assert abs(report.relative_error - lost) <= 0.1 * lost + 1e-5
    pl.unmerge(ours)
    assert torch.equal(ours.layer.weight, weight)
    pl.detach(ours)
    assert set(ours.state_dict()) == {"layer." + name for name, _ in ours.layer.named_parameters()}


@settings(max_examples=30, deadline=None, derandomize=True)
@given(r=st.integers(1, 20), alpha=st.floats(0.1, 100), rslora=st.booleans(), inside=sizes, outside=sizes)
def test_the_start_is_pefts(r, alpha, rslora, inside, outside):
    """B is zero and A lies within 1/sqrt(in), so the model starts as it was; the scaling is peft's."""
    model = Net(nn.Linear(inside, outside))
    x = torch.randn(5, inside)
    before = model(x)
    pl.attach(model, pl.LoRAConfig(r=r, alpha=alpha, use_rslora=rslora, target_modules=["layer"]))
    assert torch.equal(model(x), before)
    part = model.layer.peftlab["default"]["lora"]
    assert part.lora_A.shape == (r, inside) and part.lora_B.shape == (outside, r)
    assert part.lora_A.abs().max() <= inside**-0.5 and not part.lora_B.any()
    layer = peft.tuners.lora.Linear(nn.Linear(inside, outside), "x", peft.LoraConfig(), r=r, lora_alpha=alpha)
    expected = alpha / r**0.5 if rslora else layer.scaling["x"]
    assert part.scaling == expected
