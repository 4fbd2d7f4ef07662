"""What a method has to bring: how documents become tensors, and the sum of its loss over a micro-batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn

from rayft.data.corpus import Corpus
from rayft.data.step import MicroBatch, StepPlan

Batch = dict[str, Any]

#: A sequence whose log-probability is asked for: a document, or one's prompt with another's answer.
Sequence = tuple[int, ...]


class Infer(Protocol):
    """`Learner.infer`: the results of `function` of the objective on this rank's micro-batches, without gradients."""

    def __call__(self, micro_batches: Iterable[Batch], function: str) -> Iterator[Any]: ...


class Loss(Protocol):
    """What the learner needs of a method."""

    def loss(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
        """Sum (not mean) of the loss over the micro-batch, an fp32 scalar with gradient, and summed metrics.

        Metrics have the same names in every micro-batch; the step's are divided by its denominator like the loss.
        """
        ...


class Objective(Loss, Protocol):
    """A method that learns from rows of a corpus, as the learner and the loop see it."""

    #: Whether all documents of a row must be in one micro-batch.
    together: bool

    def denominator(self, step: StepPlan) -> int:
        """What the loss of a whole step is divided by, global over ranks and micro-batches."""
        ...

    def begin_step(self, infer: Infer, corpus: Corpus, step: StepPlan, rank: int) -> None:
        """Find out what the loss needs to know of the whole step. All ranks come here; collectives are allowed."""
        ...

    def collate(self, corpus: Corpus, micro_batch: MicroBatch) -> Batch:
        """Tensors of one micro-batch; an empty one gives a dummy that carries no loss."""
        ...


def sum_over_ranks(value: torch.Tensor) -> torch.Tensor:
    """The sum of every rank's `value`; a collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    value = value.to("cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(value)
    return value
