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
    the same tokens.
    """

    number: int
    prompts: tuple[tuple[int, ...], ...]
    seeds: tuple[int, ...]


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
    def example(self) -> Sample:
        """Prompt and answer, the answer's tokens trained."""
        ids = np.array([*self.prompt.ids, *self.ids], dtype=np.int32)
        return Sample(ids, np.arange(len(ids)) >= len(self.prompt.ids))


def units_of(prompts: Sequence[Prompt], num_generations: int, unit_prompts: int, seed: int) -> list[Unit]:
    """The units of a step's prompts, each prompt with all its samples beside each other."""
    units = []
    for number, start in enumerate(range(0, len(prompts), unit_prompts)):
        asked = [
            (p, sample) for p in prompts[start : start + unit_prompts] for sample in range(num_generations)
        ]
        seeds = tuple(seed_of(seed, prompt.position, sample) for prompt, sample in asked)
        units.append(Unit(number, tuple(prompt.ids for prompt, _ in asked), seeds))
    return units


def seed_of(seed: int, position: int, sample: int) -> int:
    """Seed of one answer: every position of the run and every sample draws from a stream of its own."""
    state = np.random.SeedSequence([seed, position, sample]).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))


def collect(
    prompts: Sequence[Prompt], num_generations: int, drawn: Sequence[tuple[int, Drawn, str]]
) -> list[Rollout]:
    """Rollouts of a step from what was drawn (version, answer, its text) for its units in their order."""
    asked = [(prompt, sample) for prompt in prompts for sample in range(num_generations)]
    return [
        Rollout(prompt, sample, answer.ids, answer.logprobs, answer.ended, version, text)
        for (prompt, sample), (version, answer, text) in zip(asked, drawn, strict=True)
    ]
