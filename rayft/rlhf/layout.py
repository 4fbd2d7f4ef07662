"""The layout of a step's updates: which answers each one learns from, and which rank computes which of them together.

Decided before anything is computed: log-probabilities are looked at in the very micro-batches that are trained on, so the first
ratio is exactly 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rayft.data.step import deal, packed_layout, padded_layout
from rayft.rlhf.plan import RlPlan
from rayft.rlhf.rollout import Rollout
from rayft.spec import Job


@dataclass(frozen=True)
class MiniBatch:
    """The answers of one optimizer update, and the micro-batches of each rank: indices of answers, equally many everywhere.

    shared: whether answers to one prompt that are beside each other have it once.
    """

    answers: list[int]
    ranks: list[list[list[int]]]
    shared: bool = False


def lay_out(
    lengths: Sequence[int],
    job: Job,
    *,
    ranks: int,
    packed: bool,
    step: int,
    prompts: Sequence[int] | None = None,
) -> list[MiniBatch]:
    """The mini-batches of a step whose answers have `lengths` tokens, prompts included.

    prompts: how many of each answer's tokens are the prompt, where answers to one prompt (`rl.num_generations`, beside each
    other) are to share it in a pack.
    """
    if prompts is not None and not packed:
        raise ValueError("only in a pack can answers share a prompt")
    order = np.arange(len(lengths))
    if job.rl.num_mini_batches > 1:
        # Where a prompt is shared its answers stay beside each other: parting them would compute it once more.
        beside = (job.rl.num_generations or 1) if prompts is not None else 1
        groups = np.arange(len(lengths)).reshape(-1, beside)
        order = np.random.default_rng([job.seed, step]).permutation(groups).ravel()
    mini_batches = []
    # The last step of an epoch may have fewer answers than mini-batches.
    for part in np.array_split(order, min(job.rl.num_mini_batches, len(order))):
        if prompts is not None:
            of_prompts = Prompts(lengths, prompts, job.rl.num_generations or 1)
            dealt = of_prompts.deal(part, job.data.max_length, job.train.micro_batch_size, ranks)
            mini_batches.append(MiniBatch([int(i) for i in part], dealt, shared=True))
            continue
        own = [lengths[i] for i in part]
        layout = packed_layout if packed else padded_layout
        slots = layout(own, job.data.max_length, job.train.micro_batch_size, ranks)
        loads = [sum(own[i] for row in slot for i in row) for slot in slots]
        dealt = [
            [[int(part[i]) for row in slot for i in row] for slot in mine]
            for mine in deal(slots, loads, ranks)
        ]
        mini_batches.append(MiniBatch([int(i) for i in part], dealt))
    return mini_batches


def padding_of(layout: Sequence[MiniBatch], lengths: Sequence[int], *, packed: bool) -> float:
    """Share of the computed tokens that is padding: none in packs."""
    batches = [batch for part in layout for own in part.ranks for batch in own if batch and not packed]
    computed = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    return 1 - sum(lengths[i] for batch in batches for i in batch) / computed if computed else 0.0


def layout_of(rollouts: Sequence[Rollout], plan: RlPlan, *, ranks: int, step: int) -> list[MiniBatch]:
    """The layout of a step of a run."""
    return lay_out(
        [rollout.length for rollout in rollouts],
        plan.job,
        ranks=ranks,
        packed=plan.packed,
        step=step,
        prompts=[len(rollout.prompt.ids) for rollout in rollouts] if plan.shared else None,
    )


@dataclass(frozen=True)
class Prompts:
    """Answers of which `generations` each, beside each other, have the same prompt. lengths: of prompt and answer; prompts: of the
    prompt alone."""

    lengths: Sequence[int]
    prompts: Sequence[int]
    generations: int

    def deal(
        self, answers: Sequence[int], max_length: int, micro_batch_size: int, ranks: int
    ) -> list[list[list[int]]]:
        """Micro-batches of each rank. Answers to a prompt stay together, unless parting them, which costs the prompt once more for
        each part, lets the rank with most tokens have fewer."""
        best: tuple[int, list[list[list[int]]]] | None = None
        parts = 1
        while best is None or parts <= self.generations:
            units = self._units(answers, parts, max_length * micro_batch_size)
            sizes = [self.size(unit) for unit in units]
            slots = packed_layout(sizes, max_length, micro_batch_size, ranks)
            dealt = deal(slots, [sum(sizes[u] for row in slot for u in row) for slot in slots], ranks)
            most = max(sum(sizes[u] for slot in own for row in slot for u in row) for own in dealt)
            if best is None or most < best[0]:
                answers_of = [
                    [sorted(i for row in slot for u in row for i in units[u]) for slot in own]
                    for own in dealt
                ]
                best = (most, answers_of)
            parts *= 2
        return best[1]

    def size(self, unit: Sequence[int]) -> int:
        """Tokens of answers to one prompt beside each other: all but the last token of the prompt once, the rest for each."""
        shared = self.prompts[unit[0]] - 1 if len(unit) > 1 else 0
        return shared + sum(self.lengths[i] - shared for i in unit)

    def _units(self, answers: Sequence[int], parts: int, capacity: int) -> list[list[int]]:
        """Each prompt's answers in so many parts, and in more where one is longer than the capacity."""
        by_prompt: dict[int, list[int]] = {}
        for i in sorted(int(i) for i in answers):
            by_prompt.setdefault(i // self.generations, []).append(i)
        units: list[list[int]] = []
        for own in by_prompt.values():
            count = min(parts, len(own))
            while True:
                cut = [[int(i) for i in part] for part in np.array_split(own, count)]
                if count == len(own) or all(self.size(unit) <= capacity for unit in cut):
                    break
                count = min(len(own), 2 * count)
            units += cut
        return units
