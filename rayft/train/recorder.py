"""The recorder: one Ray actor beside the driver that writes the run log and knows how every rank is doing."""

from __future__ import annotations

import time
from typing import Any

import ray

from rayft.checkpoint import Lease
from rayft.errors import RayftError
from rayft.report.log import Row, RunLog, read_log
from rayft.report.trackers import Trackers
from rayft.spec import Job
from rayft.storage import open_store
from rayft.train.account import devices_of
from rayft.train.group import NO_MORE_SHARDS, Notice
from rayft.train.metrics import RunMetrics


class Recorder:
    """Sole writer of the run log. Ranks send rows and heartbeats, the driver reads them.

    Also the place where a run's end is recorded once, so that a restarted worker group does not try again what
    retrying cannot cure, and where a wish to stop is passed on to the ranks.
    """

    def __init__(self, job: Job, run_uri: str, owner: dict[str, Any], epoch: int) -> None:
        store = open_store(run_uri)
        self.job = job
        self.log = RunLog(store, epoch, Lease(store, owner).held, attempt=0)
        self.trackers = Trackers(job, store, self._tracker_failed)
        self.rows: list[Row] = []
        self._before = read_log(store)
        self.last_step = max((row["step"] for row in self._before if row["kind"] == "step"), default=0)
        self.metrics: RunMetrics | None = None
        #: When groups of workers began to wait for their room, since the last one that had it.
        self._placing: list[float] = []
        self.attempt = 0
        self.ranks: dict[int, dict[str, Any]] = {}
        self.ending: RayftError | None = None
        self.notice: Notice | None = None
        self.moved = 0
        self._released = -1
        self._waiting_since: float | None = None

    def open(self, began: float, owner: dict[str, str], *, holds: bool = True) -> None:
        """The driver's first word. began: when it started. owner: `user` and `team`, who the run is counted for. holds: whether it
        holds the devices of its job; a search holds none beside its trials."""
        devices = devices_of(self.job, self.job.cluster.min_workers) if holds else {}
        message = f"by {owner['user']}" + (f", team {owner['team']}" if owner["team"] else "")
        self.log.event("open", message, began=round(began, 3), devices=devices, **owner)
        self.metrics = RunMetrics(self.job.name, owner, self._before)
        self._before = []

    def placing(self) -> None:
        """A worker group asks for its resources."""
        self._placing.append(time.time())

    def begin_attempt(
        self,
        epoch: int,
        resumed_step: int | None,
        message: str,
        *,
        workers: int,
        placing_s: float | None = None,
        **fields: Any,
    ) -> int:
        """A worker group starts; returns its number, counted from 1. The event says how many steps are repeated.

        placing_s: seconds that this group waited for its room on the cluster.
        """
        self.attempt += 1
        self.ranks.clear()
        if self.notice is not None and self.notice.moving:
            self.notice = None
        repeated = max(0, self.last_step - (resumed_step or 0))
        self.last_step = resumed_step or 0
        message += f", {repeated} steps are repeated" if repeated else ""
        fields |= {"workers": workers, "repeated": repeated}
        fields.setdefault("devices", devices_of(self.job, workers))
        if self._placing and placing_s is not None:
            fields["waited"] = [round(self._placing[0], 3), round(self._placing[-1] + placing_s, 3)]
        self._placing = []
        self.log.begin_attempt(epoch, self.attempt, resumed_step, message, **fields)
        event = "start" if resumed_step is None else "resume"
        self._show({"kind": "event", "event": event, "message": message, **fields})
        return self.attempt

    def row(self, row: Row) -> None:
        """Append a row to the run log."""
        if row["kind"] == "step":
            self.last_step = row["step"]
        self.log.append(row)
        self._show(row)
        self.trackers.log(self.rows[-1])

    def event(self, event: str, message: str = "", **fields: Any) -> None:
        """Append an event."""
        self.row({"kind": "event", "event": event, "message": message, **fields})

    def beat(self, rank: int, attempt: int, state: dict[str, Any]) -> Notice | None:
        """A rank shows that it makes progress; the answer is why it should leave, or None."""
        if attempt == self.attempt:
            self.ranks[rank] = {**state, "seen": time.monotonic()}
        return self.notice

    def silent(self) -> dict[int, dict[str, Any]]:
        """Every rank's last state with `silent_s`, the seconds since its last sign of life."""
        now = time.monotonic()
        return {rank: {**state, "silent_s": now - state["seen"]} for rank, state in self.ranks.items()}

    def forget_ranks(self) -> None:
        """The ranks are gone; what they last said no longer matters."""
        self.ranks.clear()

    def end(self, error: RayftError) -> None:
        """A rank found out why the run must end; the first reason counts."""
        self.ending = self.ending or error

    def ended(self) -> RayftError | None:
        """Why the run must end, or None."""
        return self.ending

    def request_stop(self, reason: str) -> None:
        """Ask the ranks to save and stop. That no more shards come outlives other reasons: ranks may wait for one."""
        if self.notice is None or self.notice.reason != NO_MORE_SHARDS:
            self.notice = Notice(reason)

    def request_move(self, reason: str) -> None:
        """Ask the ranks to save and leave, since nodes of theirs are taken away; the failure budget grows by one for it."""
        if self.notice is None:
            self.notice = Notice(reason, moving=True)
            self.moved += 1
            self.event("drain", f"{reason}; the run saves and goes on elsewhere")

    def release(self, step: int) -> None:
        """Open the gates of a gated run up to that of the report at `step`."""
        self._released = max(self._released, step)

    def at_gate(self, step: int, *, first: bool) -> tuple[bool, Notice | None]:
        """Whether the gate at the report of `step` is open, and why to leave, if so. first: whether this is the first look."""
        if first:  # no row of the log: a run that waits is to read like any other
            self.rows.append({"time": time.time(), "kind": "gate", "step": step})
        return self._released >= step, self.notice

    def heard(self) -> bool:
        """Whether the ranks should leave."""
        return self.notice is not None

    def allowance(self) -> tuple[RayftError | None, int, int]:
        """For the failure budget: why the run must end, how often it moved, and the number of the attempt."""
        return self.ending, self.moved, self.attempt

    def controller(self, state: str) -> None:
        """Ray Train's controller is in a new state."""
        scheduling = state in ("SCHEDULING", "RESCHEDULING")
        self._waiting_since = (self._waiting_since or time.monotonic()) if scheduling else None

    def waiting_s(self) -> tuple[int, float]:
        """Attempts begun so far, and seconds that the workers of the next one have been waited for (0: they are there)."""
        since = self._waiting_since
        return self.attempt, 0.0 if since is None else time.monotonic() - since

    def since(self, count: int) -> list[Row]:
        """Rows recorded after the first `count`."""
        return self.rows[count:]

    def close(self, code: int, message: str, terminal: bool) -> None:
        """The run ends: the last event, the trackers' last rows, a durable log."""
        self.event("end", message, code=code, terminal=terminal)
        self.trackers.close(code)
        if self.metrics is not None:
            self.metrics.close()
        self.log.flush()

    def flush(self) -> None:
        """Make the rows so far durable."""
        self.log.flush()

    def _tracker_failed(self, message: str) -> None:
        """Called from a tracker's thread; a tracker never ends a run."""
        self.log.event("failure", message)

    def _show(self, row: Row) -> None:
        self.rows.append({"time": time.time(), **row})
        if self.metrics is not None:
            self.metrics.row(self.rows[-1])


def start_recorder(job: Job, run_uri: str, owner: dict[str, Any], epoch: int) -> Any:
    """Start the recorder on the driver's node; it ends with the driver."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(Recorder).options(num_cpus=0, scheduling_strategy=here, max_concurrency=1)
    return actor.remote(job, run_uri, owner, epoch)
