"""What every generation engine does: continue prompts, and score given continuations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

#: Token ids, and for each whether its log-probability counts (the first token has none and must not count).
Scored = tuple[Sequence[int], Sequence[bool]]

#: The largest of all ranks' numbers, a collective; by it the ranks of a sharded model run equally many forwards.
Sync = Callable[[int], int]


@dataclass(frozen=True)
class Drawn:
    """A sampled answer: its tokens (the one that ends it included), the log-probability of each at the temperature it was
    drawn at, and whether it ended by itself."""

    ids: list[int]
    logprobs: list[float]
    ended: bool


class Engine(Protocol):
    """A model that generates and scores. Order of the results is the order of the arguments.

    context: tokens of prompt and answer together that the model takes; None without a limit.
    """

    @property
    def context(self) -> int | None: ...

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> list[list[int]]:
        """Continue each prompt until a turn ends (that token included) or `max_new_tokens` are there.

        temperature 0 is greedy. Sampling is a function of seed and the prompt's index, whatever the batches.
        """
        ...

    def score(self, sequences: Sequence[Scored]) -> list[tuple[float, int]]:
        """Sum of the natural log-probabilities of each sequence's counted tokens, and their number."""
        ...
