"""KL estimators: their expectations and gradients on a vocabulary of two tokens, where both are known; the controller."""

from __future__ import annotations

import pytest
import torch

from rayft.objectives.kl import KlController, kl_estimate

REFERENCE = torch.tensor([0.3, 0.7], dtype=torch.float64).log()


def policy(theta: torch.Tensor) -> torch.Tensor:
    return torch.stack([theta, torch.zeros_like(theta)]).log_softmax(0)


def divergence(theta: torch.Tensor) -> torch.Tensor:
    logp = policy(theta)
    return (logp.exp() * (logp - REFERENCE)).sum()


def gradient(loss: torch.Tensor, theta: torch.Tensor) -> float:
    return float(torch.autograd.grad(loss, theta)[0])


@pytest.fixture
def theta() -> torch.Tensor:
    return torch.tensor(0.8, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_are_unbiased(estimator: str, theta: torch.Tensor) -> None:
    logp = policy(theta).detach()
    mean = (logp.exp() * kl_estimate(logp, REFERENCE, estimator)).sum()  # type: ignore[arg-type]
    assert mean.item() == pytest.approx(divergence(theta).item(), rel=1e-6)


def test_k2_is_half_a_square() -> None:
    assert kl_estimate(torch.tensor([-1.0]), torch.tensor([-1.5]), "k2").tolist() == [0.125]


@pytest.mark.parametrize(
    ("estimator", "weighted", "right"),
    [("k1", True, True), ("k3", True, True), ("k2", False, True), ("k1", False, False), ("k3", False, False)],
)
def test_which_losses_have_the_gradient_of_the_divergence(
    estimator: str, weighted: bool, right: bool, theta: torch.Tensor
) -> None:
    """The expectation over the policy's own samples of the loss's gradient, with the ratio as weight or without."""
    logp = policy(theta)
    kl = kl_estimate(logp, REFERENCE, estimator)  # type: ignore[arg-type]
    if weighted:
        kl = kl * (logp - logp.detach()).exp()
    found = gradient((logp.detach().exp() * kl).sum(), theta)
    expected = gradient(divergence(theta), theta)
    assert (found == pytest.approx(expected, rel=1e-5)) is right
    if (estimator, weighted) == ("k1", False):
        assert found == pytest.approx(0.0, abs=1e-7)


def test_k1_in_the_reward_has_the_gradient_of_the_divergence(theta: torch.Tensor) -> None:
    logp = policy(theta)
    penalty = kl_estimate(logp, REFERENCE, "k1").detach()
    found = gradient((logp.detach().exp() * penalty * logp).sum(), theta)
    assert found == pytest.approx(gradient(divergence(theta), theta), rel=1e-5)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("ratio", [-100.0, 100.0])
def test_nothing_overflows(estimator: str, ratio: float) -> None:
    logp = torch.tensor([ratio], requires_grad=True)
    kl = kl_estimate(logp, torch.zeros(1), estimator)  # type: ignore[arg-type]
    kl.sum().backward()
    assert torch.isfinite(kl).all()
    assert logp.grad is not None
    assert torch.isfinite(logp.grad).all()


def test_the_coefficient_moves_towards_the_target() -> None:
    """By the error, at most a fifth, in proportion to the answers seen."""
    controller = KlController(0.1, target=6.0, horizon=1000)
    controller.update(6.6, 100)
    assert controller.coef == pytest.approx(0.1 * 1.01)
    controller.update(60.0, 500)
    assert controller.coef == pytest.approx(0.1 * 1.01 * 1.1)
    controller.update(0.0, 500)
    assert controller.coef == pytest.approx(0.1 * 1.01 * 1.1 * 0.9)
    fixed = KlController(0.1)
    fixed.update(60.0, 500)
    assert fixed.coef == 0.1
