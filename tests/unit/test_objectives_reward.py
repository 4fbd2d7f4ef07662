"""Losses of reward models in closed form, and what a model of known truth is learned as."""

from __future__ import annotations

import math
from itertools import permutations

import pytest
import torch

from rayft.objectives.reward import label_loss, ranking_loss

NO_MARGIN = torch.tensor([math.nan])


def scores(*values: float) -> torch.Tensor:
    """One row of answers, one head: [1, K, 1]."""
    return torch.tensor(values)[None, :, None]


def test_two_answers_are_bradley_terry() -> None:
    expected = -math.log(1 / (1 + math.exp(-(0.3 - 1.1))))
    assert ranking_loss(scores(0.3, 1.1), NO_MARGIN).item() == pytest.approx(expected)
    with_margin = -math.log(1 / (1 + math.exp(-(0.3 - 1.1 - 0.5))))
    assert ranking_loss(scores(0.3, 1.1), torch.tensor([0.5])).item() == pytest.approx(with_margin)


def test_plackett_luce_of_two_entries_equals_bradley_terry() -> None:
    """The general formula, reached by a third answer that never wins."""
    pair = ranking_loss(scores(0.3, 1.1), NO_MARGIN)
    three = ranking_loss(scores(0.3, 1.1, -1e4), NO_MARGIN)
    assert three.item() == pytest.approx(pair.item(), rel=1e-6)


def test_rankings_are_a_distribution() -> None:
    values = (0.2, -1.0, 0.7, 2.0)
    total = sum(math.exp(-ranking_loss(scores(*order), NO_MARGIN).item()) for order in permutations(values))
    assert total == pytest.approx(1.0, abs=1e-6)


def test_large_scores_stay_finite() -> None:
    row = scores(-1e4, 1e4, 0.0).requires_grad_()
    loss = ranking_loss(row, NO_MARGIN).sum()
    loss.backward()
    assert math.isfinite(loss.item())
    assert row.grad is not None
    assert torch.isfinite(row.grad).all()


def test_labels_are_logistic_and_heads_are_averaged() -> None:
    two_heads = torch.tensor([[0.5, -1.0], [0.5, -1.0]])
    losses = label_loss(two_heads, torch.tensor([1.0, 0.0])).tolist()
    good = [-math.log(1 / (1 + math.exp(-s))) for s in (0.5, -1.0)]
    bad = [-math.log(1 / (1 + math.exp(s))) for s in (0.5, -1.0)]
    assert losses == pytest.approx([sum(good) / 2, sum(bad) / 2])


def test_synthetic_bradley_terry_data_gives_back_the_true_scores() -> None:
    """Comparisons drawn from known scores: the loss is least at the true differences, and the accuracy is Bayes's."""
    generator = torch.Generator().manual_seed(0)
    true = torch.randn(12, generator=generator)
    count = 40_000
    one, other = torch.randint(12, (2, count), generator=generator)
    one, other = one[one != other], other[one != other]
    wins = torch.rand(len(one), generator=generator) < torch.sigmoid(true[one] - true[other])
    chosen, rejected = torch.where(wins, one, other), torch.where(wins, other, one)
    train = len(one) // 2
    learned = torch.zeros(12, requires_grad=True)
    optimizer = torch.optim.LBFGS([learned], max_iter=100)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        pairs = torch.stack([learned[chosen[:train]], learned[rejected[:train]]], 1)[..., None]
        loss = ranking_loss(pairs, torch.full((train,), math.nan)).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    found = learned.detach() - learned.detach().mean()
    assert (found - (true - true.mean())).abs().max() < 0.15
    right = (learned[chosen[train:]] > learned[rejected[train:]]).float().mean().item()
    bayes = torch.sigmoid((true[one[train:]] - true[other[train:]]).abs()).mean().item()
    error = math.sqrt(bayes * (1 - bayes) / (len(one) - train))
    assert abs(right - bayes) < 3 * error
