"""Training along random directions."""

import tiny
import torch

from peftlab.training import subspace


def moved(dimension, seed=0):
    """A tiny model and z; the weights of its linear layers as one vector for a given z."""
    model = tiny.llama().double()
    z = subspace.move_along(model, dimension, seed)
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and hasattr(m, "parametrizations")]

    def weights(value):
        with torch.no_grad():
            z.copy_(value)
            return torch.cat([layer.weight.flatten() for layer in layers])

    return model, z, layers, weights


def test_the_weights_start_where_they_were_and_only_z_trains():
    before = {name: p.detach().clone() for name, p in tiny.llama().double().named_parameters()}
    model, z, layers, _ = moved(10)
    assert len(layers) == 15 and [p.shape for p in model.parameters() if p.requires_grad] == [z.shape]
    for name, module in model.named_modules():
        if module in layers:
            assert torch.equal(module.weight, before[f"{name}.weight"])


def test_columns_are_orthogonal_and_every_entry_moves():
    _, z, _, weights = moved(7)
    start = weights(torch.zeros(7))
    columns = torch.stack([weights(direction) - start for direction in torch.eye(7, dtype=torch.float64)])
    assert torch.allclose(columns @ columns.T, torch.diag(columns.square().sum(1)), atol=1e-12)
    assert torch.allclose(columns.abs().sum(0), torch.ones(len(start), dtype=torch.float64))  # one coordinate an entry
    both = weights(torch.arange(7.0)) - start
    assert torch.allclose(both, torch.arange(7.0, dtype=torch.float64) @ columns, atol=1e-12)


def test_more_coordinates_than_a_weight_has_entries():
    _, _, layers, weights = moved(5000)
    start = weights(torch.zeros(5000))
    step = weights(torch.ones(5000)) - start
    assert torch.allclose(step.abs(), torch.ones(len(step), dtype=torch.float64))


def test_the_seed_decides():
    one, same, other = (moved(10, seed)[3](torch.ones(10)) for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_gradients_reach_z():
    model, z, _, _ = moved(10)
    model(input_ids=torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
    assert z.grad.norm() > 0 and all(p.grad is None for p in model.parameters() if p is not z)
