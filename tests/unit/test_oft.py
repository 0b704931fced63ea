"""OFT's own mathematics: rotations by hand, how far they are from orthogonal, the constraint, and what is refused."""

import pytest
import torch
from torch import nn

import peftlab as pl


def layer(inside=6, outside=4, **settings):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inside, outside)).double()
    pl.attach(model, pl.OFTConfig(target_modules=["0"], init_weights=False, **settings))
    return model, model[0].peftlab["default"]["oft"].rotation


def skew(numbers, size):
    q = torch.zeros(size, size).double()
    k = 0
    for i in range(size):
        for j in range(i + 1, size):
            q[i, j], q[j, i] = numbers[k], -numbers[k]
            k += 1
    return q


def test_the_series_by_hand():
    model, rotation = layer(oft_block_size=3)
    assert rotation.weight.shape == (2, 3)
    blocks = []
    for numbers in rotation.weight.detach():
        q = skew(numbers, 3)
        blocks.append(torch.eye(3) + 2 * q + 2 * q @ q + 2 * q @ q @ q + q @ q @ q @ q)
    x = torch.randn(5, 6).double()
    torch.testing.assert_close(model(x), x @ torch.block_diag(*blocks) @ model[0].weight.T + model[0].bias)


def test_the_exact_form_is_orthogonal_and_the_series_nearly():
    """The series up to the n-th power is the exact transform times I - Q^n. So 3 terms come nearer than 5, and 7 do."""
    _, rotation = layer(oft_block_size=3, use_cayley_neumann=False)
    exact, eye = rotation.matrices(rotation.weight), torch.eye(3).double()
    torch.testing.assert_close(exact @ exact.mT, eye.expand(2, 3, 3))
    q = torch.stack([skew(numbers, 3) for numbers in rotation.weight.detach()])
    off = {}
    for terms, power in ((3, 3), (4, 3), (5, 4), (6, 5), (7, 6)):
        _, series = layer(oft_block_size=3, num_cayley_neumann_terms=terms)
        r = series.matrices(rotation.weight)
        torch.testing.assert_close(r, exact.mT @ (eye - torch.linalg.matrix_power(q, power)))
        off[terms] = (r @ r.mT - eye).abs().max()
    assert off[3] < off[5] and off[6] < off[7] < off[5]


def test_a_shared_block_turns_every_piece_alike():
    _, rotation = layer(oft_block_size=2, block_share=True)
    x = torch.randn(2).double()
    pieces = rotation(x.repeat(3)).view(3, 2)
    assert torch.equal(pieces[0], pieces[1]) and torch.equal(pieces[0], pieces[2])


def test_the_exact_form_and_the_series_turn_opposite_ways():
    """As in Hugging Face peft: an adapter of one form is none of the other."""
    _, exact = layer(oft_block_size=3, use_cayley_neumann=False)
    _, series = layer(oft_block_size=3, num_cayley_neumann_terms=40)
    torch.testing.assert_close(series.matrices(exact.weight), exact.matrices(exact.weight).mT)


def test_the_constraint_shortens_q_in_training_alone():
    model, rotation = layer(oft_block_size=3, coft=True, eps=0.02)
    before = rotation.weight.clone()
    x = torch.randn(5, 6).double()
    expected = model.eval()(x)
    assert torch.equal(rotation.weight, before)  # evaluation computes with the shorter one, and keeps the weight
    torch.testing.assert_close(model.train()(x), expected)
    lengths = torch.stack([skew(numbers, 3).norm() for numbers in rotation.weight.detach()])
    torch.testing.assert_close(lengths, torch.full((2,), 0.02 / 2**0.5).double(), rtol=1e-6, atol=0)


def test_blocks_of_one_number_turn_nothing():
    """As in peft: a prime width has no other small block. The part has no elements, and the model answers as before."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(37, 4))
    x = torch.randn(2, 37)
    before = model(x)
    pl.attach(model, pl.OFTConfig(oft_block_size=4, target_modules=["0"], init_weights=False))
    assert pl.count_parameters(model).trainable == 0
    torch.testing.assert_close(model(x), before)


@pytest.mark.parametrize("kind", [nn.Conv1d(4, 4, 1), nn.Conv3d(4, 4, 1), nn.Conv2d(4, 4, 2)], ids=str)
def test_layers_without_a_form(kind):
    with pytest.raises(pl.PeftLabError, match="OFT"):
        pl.attach(nn.Sequential(kind), pl.OFTConfig(target_modules=["0"]))


@pytest.mark.parametrize("settings, message", [
    (dict(r=2, oft_block_size=4), "give one of them"), (dict(r=0, oft_block_size=0), "give one of them"),
    (dict(num_cayley_neumann_terms=1), "num_cayley_neumann_terms"), (dict(eps=-1), "eps"), (dict(coft="no"), "coft"),
    (dict(bias="lora_only"), "bias"), (dict(module_dropout=2), "module_dropout"), (dict(r=-1), "r must be"),
])  # fmt: skip
def test_a_value_out_of_range(settings, message):
    with pytest.raises(pl.PeftLabError, match=message):
        pl.OFTConfig(**settings)
