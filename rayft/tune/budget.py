"""What a search may spend: time since it first began, less what lay between two drivers, and GPU-hours of all its trials."""

from __future__ import annotations

import time
from collections.abc import Callable

from rayft.report.trials import TrialState
from rayft.spec.tune import Tune


class Spending:
    """before_s: seconds that earlier drivers of the search took. states: the ledger as of now."""

    def __init__(self, tune: Tune, before_s: float, states: Callable[[], dict[str, TrialState]]) -> None:
        self.tune, self._before_s, self._states = tune, before_s, states
        self._began = time.monotonic()

    def seconds(self) -> float:
        """Wall-clock seconds of the search so far."""
        return self._before_s + time.monotonic() - self._began

    def over(self) -> str:
        """Which budget is spent, in words; "" while there is some left."""
        limit = self.tune.time_budget_s
        if limit is not None and self.seconds() >= limit:
            return f"budget of {limit:g} s is spent"
        hours = self.tune.gpu_hours
        if hours is not None:
            used = sum(state.gpu_hours for state in self._states().values())
            if used >= hours:
                return f"budget of {hours:g} GPU-hours is spent ({used:.3g} used)"
        return ""
