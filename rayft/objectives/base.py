"""What a method has to bring: how documents become tensors, and the sum of its loss over a micro-batch."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import nn

from rayft.data.corpus import Corpus
from rayft.data.step import MicroBatch


class Objective(Protocol):
    """A training method as the learner sees it."""

    def collate(self, corpus: Corpus, micro_batch: MicroBatch) -> dict[str, Any]:
        """Tensors of one micro-batch; an empty one gives a dummy that carries no loss."""
        ...

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> tuple[torch.Tensor, dict[str, float]]:
        """Sum (not mean) of the loss over the micro-batch, an fp32 scalar with gradient, and summed metrics."""
        ...
