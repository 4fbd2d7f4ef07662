"""Where a sampled value lies in its range: what a chart's axis and a measure of importance need of a dimension."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rayft.report.trials import TrialState, number


@dataclass(frozen=True)
class Scale:
    """One hyper-parameter. low, high: of the range; log: spread evenly by its logarithm; options: of a choice, in order."""

    key: str
    low: float = 0.0
    high: float = 1.0
    log: bool = False
    options: tuple[str, ...] = ()

    def place(self, value: Any) -> float | None:
        """Place of a value from 0 to 1; None where it has none (not sampled in this trial)."""
        if value is None and "null" not in self.options:
            return None
        if self.options:
            text = label(value)
            if text not in self.options:
                return None
            return self.options.index(text) / (len(self.options) - 1) if len(self.options) > 1 else 0.5
        at = number(value)
        if at is None or self.high <= self.low:
            return None if at is None else 0.5
        low, high = self.low, self.high
        if self.log:
            if at <= 0:
                return 0.0
            at, low, high = math.log(at), math.log(low), math.log(high)
        return min(1.0, max(0.0, (at - low) / (high - low)))


def label(value: Any) -> str:
    """A value as text, numbers shortly."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def scales_of(space: Mapping[str, Any], trials: Sequence[TrialState]) -> list[Scale]:
    """A scale for every key of `tune.space` that differs between trials; numbers as far as the trials reach.

    space: key -> dimension of the spec. PBT may go beyond the range by its factors, so the range is the trials'.
    """
    found = []
    for key, dimension in space.items():
        values = [values[key] for trial in trials for values in values_of(trial) if key in values]
        texts = dict.fromkeys(label(value) for value in values)
        if len(texts) < 2:
            continue
        numbers = [at for value in values if (at := number(value)) is not None]
        if len(numbers) < len(values) or _is_choice(dimension, texts):
            order = sorted(texts, key=lambda text: (_as_number(text), text))
            found.append(Scale(key, options=tuple(order)))
        else:
            low, high = min(numbers), max(numbers)
            found.append(Scale(key, low, high, _is_log(dimension) and low > 0))
    return found


def values_of(trial: TrialState) -> list[dict[str, Any]]:
    """The values of each segment of a trial; the proposed ones where it has none."""
    return [segment.values for segment in trial.segments] or [trial.values]


def _is_log(dimension: Any) -> bool:
    return getattr(dimension, "loguniform", None) is not None


def _is_choice(dimension: Any, texts: Mapping[str, None]) -> bool:
    """Few given values, evenly apart, read better than a range; a mutated value is no longer one of them."""
    given = getattr(dimension, "choice", None) or getattr(dimension, "grid", None) or ()
    return bool(given) and len(texts) <= 12


def _as_number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.inf
