"""The policy gradient: its formula, what it samples, that a reward is learned; and the sloppy writer of the book."""

import doctest

import pytest
import tiny
import torch

import peftlab as pl
from peftlab.assets import sloppy
from peftlab.errors import PeftLabError
from peftlab.training import policy, preferences
from peftlab.training.policy import policy_gradient, policy_loss, sample_answers
from peftlab.training.preferences import answer_log_probability


def test_the_baseline_is_the_mean_of_the_other_rewards():
    scores = torch.tensor([-1.0, -2.0, -4.0], dtype=torch.float64, requires_grad=True)
    rewards = torch.tensor([1.0, 0.0, 0.5])
    policy_loss(scores, rewards).backward()
    baselines = [0.25, 0.75, 0.5]
    expected = [-(r - b) / 3 for r, b in zip(rewards.tolist(), baselines, strict=True)]
    assert scores.grad.tolist() == pytest.approx(expected)


def test_equal_rewards_teach_nothing():
    scores = torch.randn(5, requires_grad=True)
    policy_loss(scores, torch.ones(5)).backward()
    assert scores.grad.abs().max().item() < 1e-7


def test_its_mean_over_samples_is_the_gradient_of_the_expected_reward():
    """Exact for a distribution over three answers: the mean over all pairs of answers, weighed by their probability."""
    logits = torch.tensor([0.3, -0.5, 1.1], dtype=torch.float64, requires_grad=True)
    rewards = torch.tensor([1.0, 0.0, 0.4], dtype=torch.float64)
    (logits.softmax(0) @ rewards).backward()
    exact, logits.grad = logits.grad, None
    p = logits.softmax(0).detach()
    for first in range(3):
        for second in range(3):
            pair = [first, second]
            (p[first] * p[second] * policy_loss(logits.log_softmax(0)[pair], rewards[pair])).backward()
    assert torch.allclose(-logits.grad, exact, rtol=1e-12)


@pytest.mark.parametrize("pad", [None, 3])
def test_answers_end_with_their_first_end_token(pad):
    net = tiny.llama(initializer_range=0.5)
    torch.manual_seed(1)
    batch = sample_answers(net, [14, 10], 64, length=12, end=0, pad=pad)
    ids, labels, mask = batch["input_ids"], batch["labels"], batch["attention_mask"]
    assert (ids[:, :2] == torch.tensor([14, 10])).all() and (labels[:, :2] == -100).all()
    ended = 0
    for row, label, seen in zip(ids[:, 2:].tolist(), labels[:, 2:].tolist(), mask[:, 2:].tolist(), strict=True):
        stop = row.index(0) + 1 if 0 in row else len(row)
        ended += stop < len(row)
        assert label == row[:stop] + [-100] * (len(row) - stop)
        assert seen == [1] * stop + [0] * (len(row) - stop)
        assert set(row[stop:]) <= {0 if pad is None else pad}
    assert ended > 5  # otherwise the test sees nothing


def test_answers_come_with_the_probability_of_the_model():
    """With one step, the share of an answer is its probability."""
    net = tiny.llama(initializer_range=0.5).eval()
    torch.manual_seed(0)
    batch = sample_answers(net, [5], 4000, length=1, end=0)
    share = torch.bincount(batch["input_ids"][:, 1], minlength=32) / 4000
    expected = net(input_ids=torch.tensor([[5]])).logits[0, -1].softmax(0)
    assert (share - expected).abs().max().item() < 0.03


def test_a_reward_is_learned():
    net = tiny.llama()
    pl.attach(net, pl.LoRAConfig(r=1, alpha=8, target_modules=["lm_head"]))
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.1)
    torch.manual_seed(0)
    means = []
    for _ in range(12):
        batch = sample_answers(net, [5], 64, length=1, end=0)
        rewards = (batch["input_ids"][:, 1] < 8).float()
        policy_loss(answer_log_probability(net, batch), rewards).backward()
        optimizer.step()
        optimizer.zero_grad()
        means.append(rewards.mean().item())
    assert means[0] < 0.4 and min(means[-5:]) > 0.9


def test_sampling_leaves_mode_and_gradients_as_they_were():
    net, modes = tiny.llama().train(), []
    net.register_forward_pre_hook(lambda module, given: modes.append(module.training))
    sample_answers(net, [5], 2, length=2, end=0)
    assert set(modes) == {False}, "dropout would make the answers those of another model"
    assert net.training and all(p.grad is None for p in net.parameters())


def test_wrong_arguments_are_refused():
    with pytest.raises(PeftLabError, match="at least two answers"):
        policy_loss(torch.zeros(1), torch.zeros(1))
    with pytest.raises(PeftLabError, match="one reward for each"):
        policy_loss(torch.zeros(3), torch.zeros(2))
    with pytest.raises(PeftLabError, match="no token"):
        sample_answers(tiny.llama(), [], 2, length=2, end=0)
    with pytest.raises(PeftLabError, match="samples"):
        sample_answers(tiny.llama(), [5], 0, length=2, end=0)


def test_policy_gradient_learns_what_its_reward_says():
    """Answers of few tokens are rewarded. The end token is taken off before the reward sees an answer."""
    net = tiny.llama()
    seen = []

    def short(answer):
        seen.extend(answer)
        return 1.0 - len(answer) / 6

    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    torch.manual_seed(0)
    means = policy_gradient(net, [5], short, optimizer=optimizer, steps=15, samples=16, length=6, end=0)
    assert len(means) == 15 and sum(means[-3:]) / 3 > sum(means[:3]) / 3 + 0.2
    assert 0 not in seen and all(p.grad is None for p in net.parameters())


def test_the_sloppy_writer_is_valid_about_one_time_in_three():
    texts = sloppy.texts(2000, seed=3)
    assert 0.28 < sum(map(sloppy.is_valid, texts)) / 2000 < 0.39  # 2/3 of the quotes, 1/2 of the ends
    assert sloppy.texts(5, seed=3) == texts[:5] != sloppy.texts(5)
    for text in texts[:200]:
        tokens = sloppy.encode(text)
        assert sloppy.decode([sloppy.START, *tokens, sloppy.END]) == text
        assert len(tokens) < sloppy.LONGEST and sloppy.END not in tokens and max(tokens) < sloppy.START
    assert not any(map(sloppy.is_valid, ("", "[1]", "1", '{"a":1,}', "{'a':1}")))


@pytest.mark.parametrize("module", [policy, preferences, sloppy], ids=lambda module: module.__name__)
def test_the_examples_in_the_docstrings_give_what_they_show(module):
    for test in doctest.DocTestFinder().find(module, globs={}):
        test.globs = {"pl": pl, "torch": torch, "model": tiny.llama(), "tokenizer": tiny.tokenizer()}
        report = []
        doctest.DocTestRunner(verbose=False).run(test, out=report.append)
        assert not report, "".join(report)
