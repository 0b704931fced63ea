"""torch.compile: a 4-bit layer is one operation of the graph, with the values and gradients of the uncompiled layer."""

import pytest
import tiny
import torch
from torch import nn

import peftlab as pl
from peftlab.quantization import Linear4bit, compiled

BACKENDS = ["reference", "bitsandbytes"]
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def layer(backend: str, double_quant: bool = True, **kind) -> Linear4bit:
    torch.manual_seed(0)
    bias = nn.Parameter(torch.randn(24))
    return Linear4bit(pl.quantize_nf4(torch.randn(24, 16), double_quant=double_quant, **kind), bias, backend)


def passes(model, ids) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The logits, and the gradients of all that trains."""
    output = model(input_ids=ids).logits
    output.float().square().mean().backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    model.zero_grad(set_to_none=True)
    return output.detach(), gradients


def test_a_quantised_model_with_lora_is_one_graph():
    model = tiny.llama(layers=1)
    model.config.use_cache = False
    pl.quantize_model(model)
    pl.attach(model, pl.LoRAConfig(r=2, target_modules=["q_proj", "down_proj"], init="random"))
    ids = torch.randint(0, 32, (2, 6))
    expected, gradients = passes(model, ids)
    found, others = passes(torch.compile(model, fullgraph=True, backend="aot_eager"), ids)
    assert torch.equal(found, expected)
    assert len(gradients) == 4
    assert all(torch.equal(one, other) for one, other in zip(gradients, others, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("double_quant", [True, False])
def test_the_operation_is_what_torch_asks_of_one(backend, double_quant):
    """torch's own checks: it changes no input, its fake result has the real one's shape, its gradients are found."""
    module = layer(backend, double_quant)
    x = torch.randn(3, 5, 16, requires_grad=True)
    state, bias = module.quant_state, module.bias
    rest = (state.block_size, state.format, backend)
    pieces = (list(state.shape), module.weight, state.absmax, state.nested_absmax, state.offset)
    torch.library.opcheck(compiled._linear, (x, bias, *pieces, *rest), test_utils=CHECKS)
    torch.library.opcheck(compiled._backward, (torch.randn(3, 5, 24), *pieces, *rest), test_utils=CHECKS)


@pytest.mark.parametrize("backend", BACKENDS)
def test_values_and_gradients_as_in_the_uncompiled_layer(backend):
    module = layer(backend)
    x = torch.randn(3, 16, requires_grad=True)
    results = []
    for call in (module, torch.compile(module, fullgraph=True, backend="aot_eager")):
        with torch.autocast("cpu", torch.bfloat16):
            y = call(x)
        y.float().square().sum().backward()
        results.append((y.detach(), x.grad, module.bias.grad))
        x.grad = module.bias.grad = None
    assert results[0][0].dtype == torch.bfloat16
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_codes_written_to_between_the_passes_are_noticed():
    module = layer("reference")
    y = torch.compile(module, fullgraph=True, backend="aot_eager")(torch.randn(3, 16, requires_grad=True))
    with torch.no_grad():
        module.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
