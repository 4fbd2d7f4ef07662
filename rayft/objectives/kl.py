"""How far the policy is from the reference: estimators of the KL divergence from samples, and what keeps it near a target.

With d = log p(token) - log p_ref(token) of tokens drawn from the policy (Schulman, "Approximating KL Divergence", 2020;
http://joschu.net/blog/kl-approx.html): k1 = d, unbiased and noisy; k2 = d^2 / 2, biased and calm; k3 = exp(-d) - 1 + d,
unbiased, calm, never negative.

As a penalty in the reward, k1 gives the gradient of the divergence. In the loss k2 does (its gradient on samples of the
policy is d grad log p), and k1 and k3 do if they are weighted with the ratio to the policy that drew the sample; without
the weight k1's gradient is 0 on average, and k3's is that of the divergence the other way round.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rayft.objectives.bounds import K3_BOUND, LOG_RATIO_BOUND, Estimator


def kl_estimate(logprobs_N: torch.Tensor, reference_N: torch.Tensor, estimator: Estimator) -> torch.Tensor:
    """KL of each token, fp32[N], with gradient where the log-probabilities have one."""
    d_N = (logprobs_N.float() - reference_N.float()).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    if estimator == "k1":
        return d_N
    if estimator == "k2":
        return 0.5 * d_N.square()
    return (torch.exp(-d_N) - 1 + d_N).clamp(max=K3_BOUND)


@dataclass
class KlController:
    """The coefficient of the penalty: fixed, or with a target moved towards it (arXiv:1909.08593 section 2.2).

    coef is all its state and belongs into a checkpoint. target: nats an answer, or None; horizon: answers over which the coefficient
    changes by a fifth at most.
    """

    coef: float
    target: float | None = None
    horizon: int = 10_000

    def update(self, kl: float, answers: int) -> None:
        """After a step whose answers' mean KL (summed over tokens) was `kl`."""
        if self.target is not None:
            error = min(0.2, max(-0.2, kl / self.target - 1))
            self.coef *= 1 + error * answers / self.horizon
