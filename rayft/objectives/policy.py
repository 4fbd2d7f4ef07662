"""The policy's loss: clipped ratios to the policy that drew the tokens, times their advantages, and the KL penalty.

Three policies are told apart: the one that trains (logprobs), the one at the beginning of the step as the trainer computes it
(old_logprobs), from which the clipping counts, and the engine that drew the tokens, whose difference from the old one (rounding, or
older weights) is corrected by a weight of its own.

Shapes: N tokens of D answers in a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Ordered
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from rayft.data.template import Sample
from rayft.data.tensors import sequence_tensors
from rayft.model.head import forward_logprobs
from rayft.objectives.base import Batch
from rayft.objectives.bounds import LOG_RATIO_BOUND, Estimator
from rayft.objectives.kl import kl_estimate
from rayft.objectives.preference import sum_by_document

Ratio = Literal["token", "sequence", "sequence_mean"]


@dataclass(frozen=True)
class Clip:
    """How far a ratio may go before its token gives no more gradient: below 1 - low, above 1 + high.

    dual: bound of the loss of tokens with negative advantage, as a multiple of it (arXiv:1912.09729 eq. 5); None without.
    """

    low: float = 0.2
    high: float = 0.2
    dual: float | None = None


def policy_loss(
    logprobs_N: torch.Tensor,
    old_logprobs_N: torch.Tensor,
    advantages_N: torch.Tensor,
    document_N: torch.Tensor,
    documents: int,
    *,
    ratio: Ratio,
    clip: Clip,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss of each token, fp32[N], with the ratios used and whether clipping took the gradient, both without gradient.

    max(-r A, -clip(r, 1 - low, 1 + high) A), arXiv:1707.06347 eq. 7, where r is

    - token: p / p_old of the token;
    - sequence: that of the whole answer (RLOO, arXiv:2402.14740);
    - sequence_mean: the geometric mean over its tokens (GSPO, arXiv:2507.18071 eq. 7).

    The ratio of an answer stands at each of its tokens, which `sequence_mean` aggregation makes one loss again.
    """
    log_ratio_N = logprobs_N - old_logprobs_N
    if ratio != "token":
        log_ratio_D = sum_by_document(log_ratio_N, document_N, documents)
        if ratio == "sequence_mean":
            log_ratio_D = log_ratio_D / torch.bincount(document_N, minlength=documents).clamp(min=1)
        log_ratio_N = log_ratio_D[document_N]
    ratio_N = log_ratio_N.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()
    free_N = -ratio_N * advantages_N
    clipped_N = -ratio_N.clamp(1 - clip.low, 1 + clip.high) * advantages_N
    losses_N = torch.maximum(free_N, clipped_N)
    if clip.dual is not None:
        losses_N = torch.where(advantages_N < 0, torch.minimum(losses_N, -clip.dual * advantages_N), losses_N)
    return losses_N, ratio_N.detach(), (clipped_N > free_N).detach()


def token_tensors(
    samples: Ordered[Sample],
    columns: Mapping[str, Ordered[np.ndarray]],
    *,
    packed: bool,
    pad_id: int,
    shared: bool = False,
) -> dict[str, Any]:
    """`sequence_tensors` of answers with their prompts, and each column's values of the answers' tokens, float32[N]."""
    counts = [int(sample.trained.sum()) for sample in samples]
    for name, arrays in columns.items():
        assert [len(array) for array in arrays] == counts, f"{name} does not have a value for each token"
    values = {
        name: torch.from_numpy(np.concatenate([np.empty(0), *arrays]).astype(np.float32))
        for name, arrays in columns.items()
    }
    return sequence_tensors(samples, packed=packed, pad_id=pad_id, shared=shared) | values


@dataclass(frozen=True)
class PolicyObjective:
    """Weighted sum over tokens of `policy_loss`, and of the KL penalty where it is in the loss.

    A batch is `token_tensors` with the columns old_logprobs, advantages, weights (`token_weights`), importance (the
    engine's correction; 1 without) and, with kl_in_loss, reference. Where the policy that is trained still is the old one, the batch
    may have engine_logprobs in place of old_logprobs and importance, which then follow from this very pass; `tell` is called
    with the log-probabilities, fp32[N]. The KL penalty has no correction for the engine, as TRL's and verl's have none: of answers by
    older weights its gradient is that of tokens which those would draw. The denominator is 1: the weights say it all. Metrics are
    means weighted like the loss. temperature: that the tokens were drawn at; log-probabilities are those of the tempered policy.
    """

    ratio: Ratio = "token"
    clip: Clip = Clip()
    temperature: float = 1.0
    kl_in_loss: Estimator | None = None
    kl_weighted: bool = True
    importance_cap: float = 2.0
    tell: Callable[[torch.Tensor], None] = lambda _: None

    def logprobs(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """log p of each token of the answers at the temperature, fp32[N]."""
        return forward_logprobs(model, batch, temperature=self.temperature)

    def loss(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
        """Summed loss; batch["kl_coef"] float32[1] scales the penalty."""
        logprobs_N = self.logprobs(model, batch)
        if "old_logprobs" in batch:
            old_N, importance_N = batch["old_logprobs"], batch["importance"]
        else:
            old_N = logprobs_N.detach()
            off_N = (old_N.double() - batch["engine_logprobs"]).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
            importance_N = off_N.exp().clamp(max=self.importance_cap).float()
            self.tell(old_N)
        losses_N, ratio_N, clipped_N = policy_loss(
            logprobs_N,
            old_N,
            batch["advantages"],
            batch["target_document"],
            len(batch["last"]),
            ratio=self.ratio,
            clip=self.clip,
        )
        weights_N = batch["weights"]
        losses_N = losses_N * importance_N
        moved_N = kl_estimate(logprobs_N.detach(), old_N, "k3")
        metrics = {
            "policy_loss": _weighted(losses_N, weights_N),
            "ratio": _weighted(ratio_N, weights_N),
            "clip_fraction": _weighted(clipped_N, weights_N),
            "moved": _weighted(moved_N, weights_N),
            "entropy": -_weighted(logprobs_N, weights_N),
        }
        if self.kl_in_loss:
            kl_N = kl_estimate(logprobs_N, batch["reference"], self.kl_in_loss)
            if self.kl_weighted:
                log_ratio_N = (logprobs_N - old_N).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
                kl_N = kl_N * log_ratio_N.exp()
            metrics["kl_loss"] = _weighted(kl_N, weights_N)
            losses_N = losses_N + batch["kl_coef"] * kl_N
        # Without a token the sum is 0, and still depends on every parameter.
        return (losses_N * weights_N).sum() + 0.0 * logprobs_N.sum(), metrics


def _weighted(values_N: torch.Tensor, weights_N: torch.Tensor) -> float:
    return float((values_N.detach().double() * weights_N).sum())
