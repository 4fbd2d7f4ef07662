"""The failure budget of a run: it retries only what a retry can cure."""

from __future__ import annotations

from typing import Any

import ray
from ray.train import FailureConfig

from rayft.errors import RayftError

ASK_TIMEOUT_S = 30.0


class Budget(FailureConfig):
    """Ray's failure budget, which is 0 as soon as a rank has said why the run must end, and grows by one with every move away
    from nodes that are taken away.

    Ray Train charges every exception alike; without this a diverged run would be tried again to the last retry.
    """

    def __init__(self, recorder: Any, max_failures: int, *, starts: int = 0) -> None:
        """starts: how many first starts of the group may fail for want of resources or a worker that died in it. A group that
        trained before is waited for by the driver, for as long as the job says (`cluster.wait_s`)."""
        self._recorder = recorder
        self._max_failures = max_failures
        super().__init__(max_failures=max_failures, controller_failure_limit=starts)

    @property  # type: ignore[override]
    def max_failures(self) -> int:
        ending, moved, _ = self._allowance()
        return 0 if ending else self._max_failures + moved

    @max_failures.setter
    def max_failures(self, value: int) -> None:
        self._max_failures = value

    @property  # type: ignore[override]
    def max_preemption_failures(self) -> int:
        return 0 if self._allowance()[0] else self._max_preemption_failures

    @max_preemption_failures.setter
    def max_preemption_failures(self, value: int) -> None:
        self._max_preemption_failures = value

    @property  # type: ignore[override]
    def controller_failure_limit(self) -> int:
        ending, _, attempt = self._allowance()
        if ending:
            return 0
        return -1 if attempt else self._controller_failure_limit

    @controller_failure_limit.setter
    def controller_failure_limit(self, value: int) -> None:
        self._controller_failure_limit = value

    def _allowance(self) -> tuple[RayftError | None, int, int]:
        try:
            found: tuple[RayftError | None, int, int] = ray.get(
                self._recorder.allowance.remote(), timeout=ASK_TIMEOUT_S
            )
        except Exception:
            return None, 0, 0
        return found
