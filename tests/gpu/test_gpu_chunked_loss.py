"""The loss in chunks on a GPU, by its kernel and without: the logits become their own gradient."""

import pytest
import torch
from torch.nn import functional as F

from peftlab.training import chunked
from peftlab.training.chunked import Form, chunked_cross_entropy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["kernel", "plain"])
def way(request, monkeypatch):
    """Either way to the gradient."""
    if request.param == "plain":
        monkeypatch.setattr(chunked, "kernel_on", lambda device: None)
    elif chunked.kernel_on(torch.device("cuda", 0)) is None:
        pytest.skip("needs Triton")
    return request.param


def inputs(dtype, certain=False, labels=96, width=64, vocabulary=1000):
    """(hidden, weight, bias, labels). `certain` gives the labels almost the whole probability."""
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(labels, width, generator=draw)
    weight = torch.randn(vocabulary, width, generator=draw) * 0.2
    targets = torch.randint(vocabulary, (labels,), generator=draw)
    if certain:
        weight[targets] = hidden * 0.15  # z at the label is about 10, elsewhere around 0
    bias = torch.randn(vocabulary, generator=draw) * 0.1
    hidden, weight, bias = (one.to("cuda", dtype).requires_grad_() for one in (hidden, weight, bias))
    return hidden, weight, bias, targets.cuda()


def errors(loss, given, labels, form):
    """Relative errors of the loss and of each gradient, against float64 on the same inputs."""
    exact = [one.detach().double().requires_grad_() for one in given]
    truth = F.cross_entropy(form.of(F.linear(*exact)), labels, reduction="sum")
    value = loss(*given)
    pairs = zip(
        (value, *torch.autograd.grad(value, given)), (truth, *torch.autograd.grad(truth, exact)), strict=True
    )  # fmt: skip
    return [((mine.double() - right).norm() / right.norm()).item() for mine, right in pairs]


@pytest.mark.parametrize("certain", [False, True])
@pytest.mark.parametrize("form", [Form(), Form(0.5), Form(1.0, 30.0)])
@pytest.mark.parametrize("vocabulary", [1000, 20_001])
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_as_near_to_float64_as_whole_logits(dtype, vocabulary, form, certain, way):
    *given, labels = inputs(dtype, certain, vocabulary=vocabulary)

    def whole(hidden, weight, bias):
        return F.cross_entropy(form.of(F.linear(hidden, weight, bias).float()), labels, reduction="sum")

    def in_chunks(hidden, weight, bias):
        return chunked_cross_entropy(hidden, weight, labels, bias=bias, form=form, rows=40)

    for mine, theirs in zip(errors(in_chunks, given, labels, form), errors(whole, given, labels, form), strict=True):
        assert mine < 1.1 * theirs + (1e-3 if dtype == torch.bfloat16 else 2e-4)
        assert mine < {torch.float32: 1e-5, torch.bfloat16: 0.03, torch.float16: 0.01}[dtype]


def test_it_runs_under_deterministic_algorithms_and_gives_the_same_bits(way, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    results = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            *given, labels = inputs(torch.bfloat16)
            loss = chunked_cross_entropy(*given[:2], labels, bias=given[2], rows=40)
            results.append([loss, *torch.autograd.grad(loss, given)])
    finally:
        torch.use_deterministic_algorithms(False)
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("vocabulary", [3, 4096, 5000])
def test_logits_that_are_extreme(vocabulary):
    """A row of equal logits; one with minus infinity; one that is certain; one with a NaN, one with plus infinity."""
    kernel = chunked.kernel_on(torch.device("cuda", 0))
    if kernel is None:
        pytest.skip("needs Triton")
    z = torch.zeros(5, vocabulary, device="cuda")
    z[1, 1:], z[2, 2], z[3, 1], z[4, 1] = -torch.inf, 3e4, torch.nan, torch.inf
    labels, log_p = torch.tensor([0, 0, 2, 0, 0], device="cuda"), torch.empty(5, 1, device="cuda")
    expected = F.log_softmax(z[:3].double(), 1)
    gradient = kernel(z, labels, log_p)[:3]
    wanted = expected.exp() - F.one_hot(labels[:3], vocabulary)
    torch.testing.assert_close(log_p[:3], expected.gather(1, labels[:3, None]).float())
    torch.testing.assert_close(gradient, wanted.float(), rtol=1e-5, atol=1e-7)
    assert log_p[3:].isnan().all()


@pytest.mark.parametrize(("dtype", "plain", "kernel"), [(torch.bfloat16, 6, 2), (torch.float32, 4, 4)])
def test_the_bytes_of_a_chunk(dtype, plain, kernel, way):
    hidden, weight, _, labels = inputs(dtype, labels=2048, vocabulary=60_000)
    weight.requires_grad_(False)
    chunked_cross_entropy(hidden, weight, labels, rows=1024)  # what is compiled or set up once
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    chunked_cross_entropy(hidden, weight, labels, rows=1024)
    peak = torch.cuda.max_memory_allocated() - before
    bytes = {"plain": plain, "kernel": kernel}[way]
    # beside a chunk of logits lie the gradient of `hidden`, and what belongs to the labels
    assert peak == pytest.approx(bytes * 1024 * 60_000 + hidden.nbytes, rel=0.02)
