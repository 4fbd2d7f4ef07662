"""The pass over the data before the first step in which the reference model's log-probabilities are computed.

It follows the run's own steps, so that the reference has read each answer in the same micro-batch as the policy will:
at the first step the two agree to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from rayft.data.corpus import Corpus
from rayft.data.step import StepPlan
from rayft.learner.learner import Learner

#: Sequences and their log-probabilities of every rank, on every rank.
Gather = Callable[[Any], list[Any]]


def compute_references(
    learner: Learner,
    corpus: Corpus,
    steps: Iterable[StepPlan],
    rank: int,
    gather: Gather,
    *,
    epoch_rows: int,
) -> int:
    """Compute what the cache does not hold of the steps; returns how many sequences that were.

    The learner's model must be as the run started it. All ranks call it with the same steps, of which an epoch has
    `epoch_rows` positions: where an objective wants the same of a row every time, one epoch without news is the last.
    """
    objective: Any = learner.objective
    references = objective.references.of(corpus)
    computed = 0
    news_at: int | None = None
    for step in steps:
        if references.has(objective.wanted(step)):
            news_at = step.position if news_at is None else news_at
            if objective.same_every_epoch and step.position - news_at >= epoch_rows:
                break
            continue
        news_at = step.next_position
        batches = list(objective.sequences(corpus, step, rank))
        results = learner.infer((batch for _, batch in batches), "logprobs")
        own = [(names, values.tolist()) for (names, _), values in zip(batches, results, strict=True)]
        for names, values in (pair for part in gather(own) for pair in part):
            references.add(names, values)
            computed += len(names)
        if rank == 0:
            references.save()
    if rank == 0:
        references.save(all_=True)
    return computed
