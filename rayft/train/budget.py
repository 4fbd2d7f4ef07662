"""The failure budget of a run: it retries only what a retry can cure."""

from __future__ import annotations

from typing import Any

import ray
from ray.train import FailureConfig

ASK_TIMEOUT_S = 30.0


class Budget(FailureConfig):
    """Ray's failure budget, which is 0 as soon as a rank has said why the run must end.

    Ray Train charges every exception alike; without this a diverged run would be tried again to the last retry.
    """

    def __init__(self, recorder: Any, max_failures: int, *, starts: int = 0) -> None:
        """starts: how many starts of a group may fail for want of resources or a worker that died in it."""
        self._recorder = recorder
        self._max_failures = max_failures
        super().__init__(max_failures=max_failures, controller_failure_limit=starts)

    @property  # type: ignore[override]
    def max_failures(self) -> int:
        return 0 if self._ended() else self._max_failures

    @max_failures.setter
    def max_failures(self, value: int) -> None:
        self._max_failures = value

    @property  # type: ignore[override]
    def max_preemption_failures(self) -> int:
        return 0 if self._ended() else self._max_preemption_failures

    @max_preemption_failures.setter
    def max_preemption_failures(self, value: int) -> None:
        self._max_preemption_failures = value

    def _ended(self) -> bool:
        try:
            return ray.get(self._recorder.ended.remote(), timeout=ASK_TIMEOUT_S) is not None
        except Exception:
            return False
