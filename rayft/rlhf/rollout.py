"""Rollouts: what an engine is asked for, and what it answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rayft.data.template import Sample
from rayft.generate.engine import Drawn
from rayft.rlhf.prompts import Prompt


@dataclass(frozen=True)
class Unit:
    """Prompts that one engine answers in one call.

    Which they are and their seeds follow from the step, never from who is free: done again with the same weights, a unit has
    the same tokens. answers: which of all that are wanted these are.
    """

    number: int
    prompts: tuple[tuple[int, ...], ...]
    seeds: tuple[int, ...]
    answers: range


@dataclass(frozen=True)
class Rollout:
    """One answer. logprobs: of its tokens under the engine; ended: by itself; version: of the engine's weights."""

    prompt: Prompt
    sample: int
    ids: list[int]
    logprobs: list[float]
    ended: bool
    version: int
    text: str

    @property
    def length(self) -> int:
        """Tokens of prompt and answer."""
        return len(self.prompt.ids) + len(self.ids)

    @property
    def example(self) -> Sample:
        """Prompt and answer, the answer's tokens trained."""
        ids = np.array([*self.prompt.ids, *self.ids], dtype=np.int32)
        return Sample(ids, np.arange(len(ids)) >= len(self.prompt.ids))


#: A prompt, and the number of one of its samples.
Asked = tuple[Prompt, int]


def asked_of(prompts: Sequence[Prompt], num_generations: int) -> list[Asked]:
    """The answers that are wanted, each prompt with all its samples beside each other."""
    return [(prompt, sample) for prompt in prompts for sample in range(num_generations)]


def units_of(asked: Sequence[Asked], size: int, seed: int) -> list[Unit]:
    """Units of `size` answers each; the last may have fewer."""
    units = []
    for number, start in enumerate(range(0, len(asked), size)):
        answers = range(start, min(start + size, len(asked)))
        seeds = tuple(seed_of(seed, asked[i][0].position, asked[i][1]) for i in answers)
        units.append(Unit(number, tuple(asked[i][0].ids for i in answers), seeds, answers))
    return units


def seed_of(seed: int, position: int, sample: int) -> int:
    """Seed of one answer: every position of the run and every sample draws from a stream of its own."""
    state = np.random.SeedSequence([seed, position, sample]).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))


def rollout_of(asked: Asked, version: int, answer: Drawn, text: str) -> Rollout:
    """What was drawn for one answer that was wanted."""
    prompt, sample = asked
    return Rollout(prompt, sample, answer.ids, answer.logprobs, answer.ended, version, text)
