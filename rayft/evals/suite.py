"""What a suite type brings, and the statistics that all of them share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from rayft.generate.engine import Engine
from rayft.spec import Suite

#: What was measured on one row: plain values that travel between ranks. `row` is its number; what was generated
#: stands under `prompt`, `answer` and `reference`.
Record = dict[str, Any]


class SuiteType(Protocol):
    """A suite with its rows read and checked. Every rank makes one and measures some of the rows."""

    def __init__(
        self, suite: Suite, engine: Engine, tokenizer: PreTrainedTokenizerBase, cache_dir: Path
    ) -> None:
        """Read and check all rows. Raises DataError naming file and row."""

    def __len__(self) -> int:
        """Rows to measure."""
        ...

    def measure(self, rows: Sequence[int]) -> list[Record]:
        """One record for each of these rows, none left out. With no rows the engine is called all the same."""
        ...

    def summarise(self, records: Sequence[Record]) -> dict[str, float]:
        """The suite's metrics from the records of all rows, in row order."""
        ...


def fraction(name: str, hits: Sequence[bool | int]) -> dict[str, float]:
    """Share of hits and its binomial standard error, sqrt(p (1 - p) / n); nothing when there are no rows."""
    if not hits:
        return {}
    share = sum(hits) / len(hits)
    return {name: share, f"{name}_stderr": math.sqrt(share * (1 - share) / len(hits))}


def mean(name: str, values: Sequence[float]) -> dict[str, float]:
    """Mean and its standard error from the sample variance; nothing when there are no values."""
    if not values:
        return {}
    average = sum(values) / len(values)
    spread = sum((value - average) ** 2 for value in values) / max(len(values) - 1, 1)
    return {name: average, f"{name}_stderr": math.sqrt(spread / len(values))}
