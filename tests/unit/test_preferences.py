"""DPO's loss against its formula in float64, and log-probabilities of answers against plain sums."""

import math

import pytest
import tiny
import torch

import peftlab as pl
from peftlab.errors import PeftLabError
from peftlab.training.preferences import answer_log_probability, dpo_loss

ROWS = tiny.examples(5)


def model():
    return tiny.llama(dtype=torch.float64).eval()


def by_hand(net, row):
    """log p of the labelled tokens of one example, one token at a time."""
    total, ids = 0.0, row["input_ids"]
    for place in range(1, len(ids)):
        if row["labels"][place] != -100:
            logits = net(input_ids=torch.tensor([ids[:place]])).logits[0, -1]
            total += (logits[ids[place]] - logits.logsumexp(0)).item()
    return total


@pytest.mark.parametrize("side", ["left", "right"])
def test_an_answers_log_probability_is_the_sum_over_its_tokens(side):
    net = model()
    batch = pl.Collator(tiny.tokenizer(), side=side)(ROWS)
    found = answer_log_probability(net, batch)
    assert found.dtype == torch.float64
    # transformers counts positions from the mask only in generate: padding on the left moves rotary positions alike
    assert found.tolist() == pytest.approx([by_hand(net, row) for row in ROWS], rel=1e-9)


def test_virtual_tokens_in_front_do_not_shift_the_answer():
    net = model()
    pl.attach(net, pl.PromptTuningConfig(num_virtual_tokens=3))
    batch = pl.Collator(tiny.tokenizer())(ROWS)
    with pl.disabled(net):
        before = answer_log_probability(net, batch)
    total, count = pl.training.losses.causal_lm_loss(net, batch)
    assert answer_log_probability(net, batch).sum().item() == pytest.approx(-total.item(), rel=1e-9)
    assert not torch.allclose(before, answer_log_probability(net, batch))


def test_its_sum_is_the_training_loss():
    net, batch = model(), pl.Collator(tiny.tokenizer())(ROWS)
    total, _ = pl.training.losses.causal_lm_loss(net, batch)
    assert answer_log_probability(net, batch).sum().item() == pytest.approx(-total.item(), rel=1e-12)


@pytest.mark.parametrize("beta", [0.01, 0.1, 0.7])
def test_the_loss_is_the_formula(beta):
    draw = torch.Generator().manual_seed(3)
    given = -20 * torch.rand(4, 6, dtype=torch.float64, generator=draw)
    losses, margins = dpo_loss(*given, beta=beta)
    for pair, loss, margin in zip(given.T.tolist(), losses.tolist(), margins.tolist(), strict=True):
        chosen, rejected, chosen_before, rejected_before = pair
        gain = beta * ((chosen - chosen_before) - (rejected - rejected_before))
        assert margin == pytest.approx(gain, rel=1e-12)
        assert loss == pytest.approx(-math.log(1 / (1 + math.exp(-gain))), rel=1e-12)


def test_where_model_and_reference_agree_it_is_log_two():
    same = torch.tensor([-3.0, -80.0], dtype=torch.float64)
    losses, margins = dpo_loss(same, 2 * same, same, 2 * same)
    assert losses.tolist() == pytest.approx([math.log(2)] * 2) and margins.tolist() == [0, 0]


def test_the_gradient_weighs_a_pair_by_how_wrong_it_is():
    """dL / d log p(chosen) = - beta sigmoid(-margin), and the opposite for the rejected answer."""
    chosen, rejected = (torch.tensor([-5.0, -9.0], dtype=torch.float64, requires_grad=True) for _ in range(2))
    losses, margins = dpo_loss(chosen, rejected, torch.tensor([-8.0, -2.0]), torch.tensor([-4.0, -7.0]), beta=0.3)
    losses.sum().backward()
    expected = (-0.3 * torch.sigmoid(-margins)).tolist()
    assert chosen.grad.tolist() == pytest.approx(expected)
    assert rejected.grad.tolist() == pytest.approx([-value for value in expected])


def test_the_base_is_its_own_reference_and_training_widens_the_margin():
    net = tiny.llama()
    pl.attach(net, pl.LoRAConfig(r=4, target_modules=["q_proj", "v_proj"]))
    pair = [{"input_ids": [5, 6, 7, end], "labels": [-100, -100, 7, end]} for end in (8, 9)]
    better, worse = (pl.Collator(tiny.tokenizer())([row]) for row in pair)

    def both():
        return answer_log_probability(net, better), answer_log_probability(net, worse)

    with torch.no_grad(), pl.disabled(net):
        reference = both()
    assert dpo_loss(*both(), *reference)[1].abs().item() < 1e-6
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.05)
    for _ in range(8):
        losses, margins = dpo_loss(*both(), *reference, beta=0.5)
        losses.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert margins.item() > 0.2


@pytest.mark.parametrize("batch", [{}, {"input_ids": torch.ones(2, 3)}, {"labels": torch.ones(2, 3)},
                                   {"input_ids": torch.ones(2, 3), "labels": torch.ones(2, 4)}])  # fmt: skip
def test_a_batch_without_an_answer_is_refused(batch):
    with pytest.raises(PeftLabError, match="input_ids and labels of one shape"):
        answer_log_probability(model(), batch)


def test_wrong_arguments_of_the_loss_are_refused():
    one, two = torch.zeros(1), torch.zeros(2)
    with pytest.raises(PeftLabError, match="give four of one shape"):
        dpo_loss(one, two, one, one)
    with pytest.raises(PeftLabError, match="beta"):
        dpo_loss(one, one, one, one, beta=0)
