"""What a step is made of before it trains."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from rayft.rlhf.rollout import Rollout


@dataclass
class Scored:
    """Answers with their scores, float64[S], and those of each source."""

    rollouts: list[Rollout] = field(default_factory=list)
    scores_S: np.ndarray = field(default_factory=lambda: np.empty(0))
    by_source: dict[str, np.ndarray] = field(default_factory=dict)

    def add(
        self,
        rollouts: Sequence[Rollout],
        scores_S: np.ndarray,
        by_source: dict[str, np.ndarray],
        which_S: np.ndarray,
    ) -> None:
        """Take in those of the answers that `which_S` (bool[S]) names."""
        self.rollouts += [rollout for rollout, chosen in zip(rollouts, which_S, strict=True) if chosen]
        self.scores_S = np.concatenate([self.scores_S, scores_S[which_S]])
        for name, scores in by_source.items():
            before = self.by_source.get(name, np.empty(0))
            self.by_source[name] = np.concatenate([before, scores[which_S]])


@dataclass
class Step:
    """The answers of a step; dropped: those that are not trained on, since their group had no spread.

    ledger: what became of each prompt that was drawn, by its row. seconds: by phase, of the step's own time; ahead: of the time
    beside the step before. sync: what sending the weights took. padding: share of what its updates compute.
    """

    next_position: int
    ledger: dict[str, list[int]] = field(
        default_factory=lambda: {"trained": [], "too_long": [], "uniform": []}
    )
    answers: Scored = field(default_factory=Scored)
    dropped: Scored = field(default_factory=Scored)
    seconds: dict[str, float] = field(default_factory=dict)
    ahead: dict[str, float] = field(default_factory=dict)
    sync: dict[str, float] = field(default_factory=dict)
    padding: float = 0.0

    @property
    def prompts(self) -> list[int]:
        """Rows of all prompts that it was drawn for, in the order in which they were asked."""
        drawn = [*self.answers.rollouts, *self.dropped.rollouts]
        return [row for _, row in sorted({(r.prompt.position, r.prompt.row) for r in drawn})]

    @contextlib.contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the time inside to a phase."""
        began = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - began
