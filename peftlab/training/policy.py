"""Learning from a reward: the policy gradient with a baseline (REINFORCE, Williams 1992).

The model writes answers of its own and a function rewards them. With y drawn from p(y|x),

    d/dtheta E[R(y)] = E[ (R(y) - b) d/dtheta log p(y|x) ]

for every baseline b that does not depend on y. Here b is the mean reward of the *other* answers to the same prompt. The
section sec-recipes-reward of the book derives it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peftlab.checks import whole
from peftlab.core.modes import device_of, mode
from peftlab.errors import PeftLabError
from peftlab.training.packing import IGNORE
from peftlab.training.preferences import answer_log_probability


def sample_answers(
    model: nn.Module, prompt: Sequence[int], samples: int, *, length: int, end: int, pad: int | None = None
) -> dict[str, Tensor]:
    """Draw answers to one prompt from the model itself, at temperature 1.

    Args:
        model: a causal language model of transformers; it is read in eval mode, without gradients.
        prompt: the prompt's token ids, t of them.
        samples: how many answers.
        length: the longest answer, in tokens.
        end: the token that ends an answer; it belongs to the answer.
        pad: what follows an answer that ended early; `end` if not given.

    Returns:
        A batch of `samples` rows: `input_ids`, `attention_mask`, and `labels` with -100 on the prompt and behind the
        end, all (samples, t + length) or shorter. torch's global generator draws.

    Raises:
        PeftLabError: a number below 1, or a prompt without a token.

    >>> from peftlab.training.policy import sample_answers
    >>> batch = sample_answers(model, [14, 10], 4, length=3, end=0)
    >>> batch["labels"][:, :2].unique()
    tensor([-100])
    """
    samples, length = whole("samples", samples, least=1), whole("length", length, least=1)
    if not len(prompt):
        raise PeftLabError("The prompt has no token; a model needs one to go on from.")
    ids = torch.tensor([list(prompt)] * samples, device=device_of(model))
    pad = end if pad is None else pad
    generate: Any = model  # a mixin gives it `generate`
    with torch.no_grad(), mode(model, False):
        ids = generate.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, do_sample=True, temperature=1.0,
            top_k=0, top_p=1.0, eos_token_id=end, pad_token_id=pad,
        )  # fmt: skip
    answers = ids[:, len(prompt) :]
    ended = (answers == end).cumsum(1)
    real = (ended == 0) | ((answers == end) & (ended == 1))  # up to the first end token, and with it
    front = torch.ones_like(ids[:, : len(prompt)])
    labels = torch.cat([front * IGNORE, answers.masked_fill(~real, IGNORE)], 1)
    return {"input_ids": ids, "attention_mask": torch.cat([front, real.long()], 1), "labels": labels}


def policy_loss(log_probabilities: Tensor, rewards: Tensor) -> Tensor:
    """Return the loss whose gradient is minus the policy gradient, with the mean of the other rewards as baseline.

    Args:
        log_probabilities: of n answers to one prompt (n,), with gradients: `answer_log_probability` gives them.
        rewards: of the same answers (n,).

    Returns:
        A scalar, - mean over i of (R_i - b_i) log p_i. Its value means nothing, its gradient does.

    Raises:
        PeftLabError: shapes that differ, or a single answer, which leaves no others to compare with.

    >>> from peftlab.training.policy import policy_loss
    >>> policy_loss(torch.tensor([-1.0, -2.0]), torch.tensor([1.0, 0.0]))
    tensor(-0.5000)
    """
    n = len(rewards) if rewards.ndim else 0
    if rewards.shape != log_probabilities.shape or n < 2:
        raise PeftLabError(
            f"A policy gradient needs one reward for each of at least two answers; found rewards "
            f"{tuple(rewards.shape)} and log-probabilities {tuple(log_probabilities.shape)}."
        )
    rewards = rewards.to(log_probabilities)
    # b_i = sum over j != i of R_j / (n - 1)
    baseline = (rewards.sum() - rewards) / (n - 1)
    return -((rewards - baseline) * log_probabilities).mean()


def policy_gradient(
    model: nn.Module,
    prompt: Sequence[int],
    reward: Callable[[list[int]], float],
    *,
    optimizer: torch.optim.Optimizer,
    steps: int,
    samples: int,
    length: int,
    end: int,
    pad: int | None = None,
) -> list[float]:
    """Train a model by its own answers to one prompt, and return the mean reward of each step, before its update.

    Args:
        model: changed in place; what `optimizer` holds is trained.
        reward: a function of an answer's token ids, without the end token. An answer that was cut because it did not
            end gets it without an end, too: give such answers what they deserve.
        steps, samples: updates, and answers drawn for each.
        prompt, length, end, pad: as in `sample_answers`. torch's global generator draws.

    Raises:
        PeftLabError: a number below 1, fewer than two samples, or a prompt without a token.

    >>> from peftlab.training.policy import policy_gradient
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> means = policy_gradient(model, [5], len, optimizer=optimizer, steps=2, samples=4, length=3, end=0)
    >>> len(means)
    2
    """
    steps, means = whole("steps", steps, least=1), []
    for _ in range(steps):
        batch = sample_answers(model, prompt, samples, length=length, end=end, pad=pad)
        answers = [[token for token in row if token not in (IGNORE, end)] for row in batch["labels"].tolist()]
        rewards = torch.tensor([float(reward(answer)) for answer in answers])
        loss = policy_loss(answer_log_probability(model, batch), rewards.to(batch["labels"].device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        means.append(rewards.mean().item())
    optimizer.zero_grad()
    return means
