"""Reward models: scores of whole answers, learned from pairs, ranked lists and single labels.

Shapes: D documents of R rows in a micro-batch, K answers of a row, H score heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from rayft.data.corpus import Corpus
from rayft.data.step import MicroBatch, StepPlan
from rayft.data.tensors import answer_tensors
from rayft.model.score import forward_scores
from rayft.objectives.base import Batch, Infer
from rayft.spec import Reward


def ranking_loss(scores_RKH: torch.Tensor, margins_R: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of each ranking, best first, fp32[R], the mean over heads.

    Plackett-Luce: the first answer wins against all, the second against all after it, and so on; for two answers that
    is Bradley-Terry, -log sigmoid(s_0 - s_1 - margin) (arXiv:2307.09288 eq. 1 and 2), the margin being 0 where it is NaN.
    """
    K = scores_RKH.shape[1]
    if K == 2:
        margins = torch.nan_to_num(margins_R)[:, None]
        return -F.logsigmoid(scores_RKH[:, 0] - scores_RKH[:, 1] - margins).mean(-1)
    # Against each answer, itself and all that come after it; logcumsumexp would do, but its gradient is less exact.
    places = [scores_RKH[:, place:].logsumexp(1) - scores_RKH[:, place] for place in range(K - 1)]
    return torch.stack(places).sum(0).mean(-1)


def label_loss(scores_RH: torch.Tensor, labels_R: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of each label, 1 good and 0 bad, under the logistic model, fp32[R], the mean over heads."""
    labels = labels_R[:, None].expand_as(scores_RH)
    return F.binary_cross_entropy_with_logits(scores_RH, labels, reduction="none").mean(-1)


class RewardObjective:
    """Sum over rows of the losses above, plus `center_coef` times the square of twice the mean score of each row.

    For a pair that is (s_0 + s_1)^2 (arXiv:2312.09244). The denominator is the number of rows, of any layout.
    """

    together = True

    def __init__(self, reward: Reward, *, packed: bool, pad_id: int) -> None:
        self.reward, self.packed, self.pad_id = reward, packed, pad_id

    def denominator(self, step: StepPlan) -> int:
        """Rows of the step."""
        return step.rows

    def begin_step(self, infer: Infer, corpus: Corpus, step: StepPlan, rank: int) -> None:
        """Nothing: a row's loss depends on the row alone."""

    def collate(self, corpus: Corpus, micro_batch: MicroBatch) -> Batch:
        """`answer_tensors`."""
        return answer_tensors(corpus, micro_batch, packed=self.packed, pad_id=self.pad_id)

    def scores(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Score of each document, fp32[D, H]."""
        return forward_scores(model, batch)

    def loss(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
        """Summed loss of the rows; metrics: share of rows in the right order, margin, mean and disagreement of scores."""
        scores_DH = forward_scores(model, batch)
        total = scores_DH.sum() * 0.0  # depends on every parameter, whatever rows there are
        metrics = {"accuracy": 0.0, "margin": 0.0, "mean_score": 0.0, "disagreement": 0.0}
        sizes, values_R = batch["row_sizes"], batch["values"]
        starts = sizes.cumsum(0) - sizes
        for K in sizes.unique().tolist():
            rows = (sizes == K).nonzero().squeeze(1)
            scores_RKH = scores_DH[starts[rows, None] + torch.arange(K, device=starts.device)]
            if K == 1:
                losses, ahead = (
                    label_loss(scores_RKH[:, 0], values_R[rows]),
                    self._ahead_of_zero(scores_RKH, values_R[rows]),
                )
            else:
                losses, ahead = ranking_loss(scores_RKH, values_R[rows]), self._ahead_of_next(scores_RKH)
            centred = (2 * scores_RKH.mean(1)).square().mean(-1)
            total = total + (losses + self.reward.center_coef * centred).sum()
            seen = scores_RKH.detach()
            metrics["accuracy"] += float((ahead > 0).float().mean(1).sum())
            metrics["margin"] += float(ahead.mean(1).sum())
            metrics["mean_score"] += float(seen.mean((1, 2)).sum())
            metrics["disagreement"] += float(seen.std(-1, correction=0).mean(1).sum())
        return total, metrics

    @staticmethod
    def _ahead_of_next(scores_RKH: torch.Tensor) -> torch.Tensor:
        """By how much each answer is ahead of the next one, by the mean of the heads, [R, K - 1]."""
        mean = scores_RKH.detach().mean(-1)
        return mean[:, :-1] - mean[:, 1:]

    @staticmethod
    def _ahead_of_zero(scores_R1H: torch.Tensor, labels_R: torch.Tensor) -> torch.Tensor:
        """By how much a score is on its label's side, [R, 1]."""
        return scores_R1H.detach().mean(-1) * (2 * labels_R - 1)[:, None]
