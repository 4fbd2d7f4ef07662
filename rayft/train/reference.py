"""The pass over the data before the first step in which the reference model's log-probabilities are computed.

It follows the run's own steps, so that the reference reads each answer in the same micro-batch as the policy will: what
this run computes agrees with the policy at the first step to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from rayft.data.corpus import Corpus
from rayft.data.step import StepPlan
from rayft.learner.learner import Learner
from rayft.objectives.base import Objective

#: Sequences and their log-probabilities of every rank, on every rank.
Gather = Callable[[Any], list[Any]]


def compute_references(
    learner: Learner[Objective], corpus: Corpus, steps: Iterable[StepPlan], rank: int, gather: Gather
) -> int:
    """Compute what is not known yet of the steps; returns how many sequences that were.

    The learner's model must be as the run started it. All ranks call it with the same steps, and rank 0 reads and writes
    what is kept. Raises StorageError.
    """
    objective: Any = learner.objective
    references = objective.references.of(corpus)
    if not references.agreed:
        references.agree(gather(references.load() if rank == 0 else None)[0])
    documents, before = corpus.document_count(), len(references)
    for step in steps:
        if objective.same_every_epoch and len(references) >= documents:
            break
        if references.has(objective.wanted(step)):
            continue
        batches = list(objective.sequences(corpus, step, rank))
        results = learner.infer((batch for _, batch in batches), "logprobs")
        own = [(names, values.tolist()) for (names, _), values in zip(batches, results, strict=True)]
        for names, values in (pair for part in gather(own) for pair in part):
            references.add(names, values)
        if rank == 0:
            references.save()
    if rank == 0:
        references.save(last=True)
    return len(references) - before
