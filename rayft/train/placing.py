"""When a worker group begins to wait for its room on the cluster, as Ray Train's controller knows it."""

from __future__ import annotations

from typing import Any

from ray.train.v2._internal.execution.callback import WorkerGroupCallback


class Placing(WorkerGroupCallback):
    """Tells the recorder that a group of workers asks for its room; how long that takes the group knows when it is there."""

    def __init__(self, recorder: Any) -> None:
        self._recorder = recorder

    def before_worker_group_start(self, worker_group_context: Any) -> None:
        """Called before the group's placement group is asked for."""
        self._recorder.placing.remote()
