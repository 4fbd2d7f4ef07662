"""The critic's loss: how well it foretold the returns of the states before each token.

Shapes: N tokens of the answers of a micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from rayft.model.score import forward_values
from rayft.objectives.base import Batch


def value_loss(
    values_N: torch.Tensor, old_values_N: torch.Tensor, returns_N: torch.Tensor, clip: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Half the squared error of each token, fp32[N], and where clipping took the gradient.

    With `clip` the larger of that and the error of the value held within `clip` of the one at the time of the rollout
    (Huang et al., "The 37 Implementation Details of Proximal Policy Optimization", 2022, detail 9).
    """
    errors_N = (values_N - returns_N).square()
    if clip is None:
        return 0.5 * errors_N, torch.zeros_like(errors_N, dtype=torch.bool)
    held_N = old_values_N + (values_N - old_values_N).clamp(-clip, clip)
    held_errors_N = (held_N - returns_N).square()
    return 0.5 * torch.maximum(errors_N, held_errors_N), (held_errors_N > errors_N).detach()


@dataclass(frozen=True)
class ValueObjective:
    """Weighted sum over tokens of `value_loss`.

    A batch is `rayft.objectives.policy.token_tensors` with the columns old_values, returns and weights; the
    denominator is 1, metrics are means weighted like the loss.
    """

    clip: float | None = 0.2

    def values(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Value of the state before each token of the answers, fp32[N]."""
        return forward_values(model, batch)

    def loss(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
        """Summed loss."""
        values_N = self.values(model, batch)
        losses_N, clipped_N = value_loss(values_N, batch["old_values"], batch["returns"], self.clip)
        weights_N = batch["weights"]
        metrics = {
            "value_loss": float((losses_N.detach().double() * weights_N).sum()),
            "value_clip_fraction": float((clipped_N.double() * weights_N).sum()),
            "value": float((values_N.detach().double() * weights_N).sum()),
            "return": float((batch["returns"].double() * weights_N).sum()),
        }
        return (losses_N * weights_N).sum() + 0.0 * values_N.sum(), metrics
