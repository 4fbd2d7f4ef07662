"""What a step is made of before it trains."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from rayft.rlhf.rollout import Rollout


@dataclass
class Step:
    """The answers of a step. ledger: what became of each prompt that was drawn.

    seconds: by phase, of the step's own time; ahead: of the time beside the step before. sync: what sending the weights took.
    """

    rollouts: list[Rollout]
    scores_S: np.ndarray
    by_source: dict[str, np.ndarray]
    next_position: int
    ledger: dict[str, list[int]]
    seconds: dict[str, float] = field(default_factory=dict)
    ahead: dict[str, float] = field(default_factory=dict)
    sync: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the time inside to a phase."""
        began = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - began
