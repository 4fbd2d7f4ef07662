"""A worker group that has no room yet: say what it waits for, and for how long that is worth it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import ray
from ray.train.v2._internal.execution.callback import ControllerCallback

from rayft.errors import PreemptedError
from rayft.spec.groups import Cluster
from rayft.train.cluster import amounts, worker_resources

ASK_TIMEOUT_S = 30.0
#: A group starts within this where there is room, which need not be said.
GRACE_S = 10.0
SAY_EVERY_S = 10.0


class Phases(ControllerCallback):  # type: ignore[misc]
    """Tells the recorder what Ray Train's controller does; the controller runs this in its own process."""

    def __init__(self, recorder: Any) -> None:
        self._recorder = recorder

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """Called by the controller."""
        self._recorder.controller.remote(current_state._state_type.state_name)


class Waiting:
    """What the driver says, and when it gives up, while the workers of the next attempt are not there."""

    def __init__(self, recorder: Any, cluster: Cluster, say: Callable[[str], None]) -> None:
        self._recorder, self._cluster, self._say = recorder, cluster, say
        self._said = 0.0

    def look(self, *, ending: bool) -> None:
        """ending: whether the driver's own node goes, too. Raises PreemptedError where a group that trained before is not worth
        waiting for any more; the first start of a group has a time-out of its own."""
        try:
            attempt, seconds = ray.get(self._recorder.waiting_s.remote(), timeout=ASK_TIMEOUT_S)
        except ray.exceptions.GetTimeoutError:
            return
        if not seconds:
            return
        if ending:
            raise self._given_up("The driver's node is taken away while the run waits for workers.")
        if attempt and seconds >= self._cluster.wait_s + GRACE_S:
            raise self._given_up(
                f"No nodes came within {self._cluster.wait_s:g} s in the place of those that are gone: {self._missing()}."
            )
        if seconds >= GRACE_S and time.monotonic() - self._said >= SAY_EVERY_S:
            self._said = time.monotonic()
            self._say(f"waiting for {self._missing()}")

    def _given_up(self, why: str) -> PreemptedError:
        error = PreemptedError(why, "Start it again under the same name to go on from its last checkpoint.")
        self._recorder.end.remote(error)
        return error

    def _missing(self) -> str:
        need, wanted = amounts(worker_resources(self._cluster)), self._cluster.num_workers
        count = f"{wanted[0]} to {wanted[1]}" if isinstance(wanted, tuple) else f"{wanted}"
        free = {k: v for k, v in ray.available_resources().items() if k in ("CPU", "GPU")}
        return f"{count} x {need}; free: {amounts(free) or 'nothing'}"
