"""The measurements beyond text generation, on random images and without the real models."""

import math

import pytest
import torch

from peftlab.bench import beyond


@pytest.fixture
def small(monkeypatch):
    """Random images in place of digits, and a reader that has learned nothing."""
    torch.manual_seed(0)
    made = torch.randn(12, 1, 28, 28), torch.arange(12) % 5
    start = {name: value for name, value in beyond.vit().state_dict().items() if not name.startswith("classifier")}
    monkeypatch.setattr(beyond, "images", lambda split, first: made)
    monkeypatch.setattr(beyond, "reader", lambda: start)
    return start


@pytest.mark.parametrize("method", ["head", "lora", "full"])
def test_each_method_trains_what_it_says_and_leaves_the_rest(method, small):
    point = {**beyond.IMAGES, "method": method, "steps": 2, "batch": 4}
    row = beyond.run_images(point, 1e-2, seed=1)
    head = 64 * 5 + 5
    # LoRA of rank 4 on the six matrices of each of two blocks; the patches are embedded by a convolution
    lora = 4 * (4 * (64 + 64) + (64 + 128) + (128 + 64)) * 2
    whole = sum(p.numel() for p in beyond.vit().parameters())
    assert row["trainable"] == {"head": head, "lora": lora + head, "full": whole}[method]
    assert len(row["right"]) == 12 and row["test"] == row["right"].count("1") / 12
    model = beyond.prepared(method, seed=1)
    for name, value in model.state_dict().items():
        if name in small:
            assert torch.equal(value, small[name]), name


def test_the_rate_is_chosen_on_validation_and_the_other_seeds_run_at_it(monkeypatch):
    def run(point, rate, seed):
        return {**point, "learning_rate": rate, "seed": seed, "validation": -abs(rate - 1e-2), "test": rate}

    monkeypatch.setattr(beyond, "run_images", run)
    rows = beyond.measure({**beyond.IMAGES, "method": "lora", "rates": (1e-3, 1e-2, 1e-1)})
    assert [(row["learning_rate"], row["seed"], row["chosen"]) for row in rows] == [
        (1e-3, 0, False), (1e-2, 0, True), (1e-1, 0, False), (1e-2, 1, True), (1e-2, 2, True)]  # fmt: skip
    methods = [("embeddings", "base"), *((section, method) for section, of in beyond.RATES.items() for method in of)]
    assert [(point["section"], point["method"]) for point in beyond.points()] == methods


def test_the_contrastive_loss_by_hand():
    torch.manual_seed(0)
    z, labels = torch.nn.functional.normalize(torch.randn(5, 3), dim=1), torch.tensor([0, 1, 0, 0, 2])
    losses = []
    for i in range(5):
        others = [j for j in range(5) if j != i]
        total = sum(math.exp(float(z[i] @ z[j]) / beyond.TEMPERATURE) for j in others)
        alike = [j for j in others if labels[j] == labels[i]]
        each = [-math.log(math.exp(float(z[i] @ z[j]) / beyond.TEMPERATURE) / total) for j in alike]
        losses.append(sum(each) / len(each) if each else 0.0)
    assert beyond.contrastive(z, labels).item() == pytest.approx(sum(losses) / 5, rel=1e-5)


def test_the_nearest_other_headline(monkeypatch):
    """A headline is not its own neighbour."""
    z = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]]), dim=1)
    monkeypatch.setattr(beyond, "headlines", lambda part: (["a", "b", "c", "d"], torch.tensor([0, 0, 1, 0])))
    assert beyond.neighbours(lambda texts, tokens: z, "test", 16).tolist() == [True, True, False, False]
