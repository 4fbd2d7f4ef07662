"""Supervised fine-tuning: negative log-likelihood of the trained tokens."""

from __future__ import annotations

import torch
from torch import nn

from rayft.data.corpus import Corpus
from rayft.data.step import MicroBatch, StepPlan
from rayft.data.tensors import micro_batch_tensors
from rayft.model.head import forward_nll
from rayft.objectives.base import Batch, Infer


class SftObjective:
    """Sum over trained tokens of -log p(token | tokens before it in the same document).

    With the global number of trained tokens as denominator this is their mean, whatever the split over ranks,
    micro-batches and packs.
    """

    together = False

    def __init__(self, *, packed: bool, pad_id: int) -> None:
        self.packed, self.pad_id = packed, pad_id

    def denominator(self, step: StepPlan) -> int:
        """Trained tokens of the step."""
        return step.trained_tokens

    def begin_step(self, infer: Infer, corpus: Corpus, step: StepPlan, rank: int) -> None:
        """Nothing: a token's loss depends on its document alone."""

    def collate(self, corpus: Corpus, micro_batch: MicroBatch) -> Batch:
        """Tensors of one micro-batch; an empty one is a dummy token without a target."""
        return micro_batch_tensors(corpus, micro_batch, packed=self.packed, pad_id=self.pad_id)

    def loss(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
        """Summed negative log-likelihood in nats, fp32 scalar; no metrics beyond it."""
        return forward_nll(model, batch), {}
