"""The link to a run whose reports somebody else decides on, such as a search: read its rows, let it go on, stop it.

A run with a link is gated. A report is an evaluation of `eval.every_steps` before the run's end. After each one, once the
step's rows are logged and its checkpoint is committed, the ranks (or the driver's loop, where rewards are learned from) wait
until the holder of the link releases that step, or has the run stop. A run that resumes from the checkpoint of a report waits
there again unless it was released.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import ray

from rayft.report.log import Row

ASK_TIMEOUT_S = 60.0
#: Pauses between two looks grow from the first to the longest: short against the time that was waited already.
FIRST_PAUSE_S, LONGEST_PAUSE_S, GROWTH = 0.02, 0.5, 1.3


class Pauses:
    """Pauses between looks at something that is waited for, each longer than the one before."""

    def __init__(self) -> None:
        self._next_s = FIRST_PAUSE_S

    def rest(self, most_s: float = LONGEST_PAUSE_S) -> None:
        """Sleep, `most_s` at most."""
        time.sleep(max(0.0, min(self._next_s, most_s)))
        self._next_s = min(self._next_s * GROWTH, LONGEST_PAUSE_S)


class Link:
    """Between a run and whoever started it in another thread of the same process with `run(job, link=link)`.

    gated: whether the run waits at its reports; else its rows are read, and it can be stopped, and nothing more.
    One link is for one start of one run. opened: the run's recorder is there. ended: no more rows come; the thread of the run
    says how it ended. Neither is set by a start that finds nothing to do. `release` and `stop` may be called before the run
    is started.
    """

    def __init__(self, *, gated: bool = True) -> None:
        self.gated = gated
        self.opened, self.ended = threading.Event(), threading.Event()
        self._lock, self._reading = threading.Lock(), threading.Lock()
        self._recorder: Any = None
        self._request: Callable[[str], None] | None = None
        self._left: list[Row] = []
        self._count = 0
        self._released = -1
        self._reason = ""

    def rows(self, timeout_s: float) -> list[Row]:
        """Rows recorded since the last call, as in the run log; waits for one up to `timeout_s`. For one thread at a time.

        Beside the log's rows there is `{"kind": "gate", "step"}` when the run begins to wait at a report: what was measured at
        that step and its checkpoint are there, and lasting. A run that resumes at a report says it again; the rows of the
        report stand in the run's log (`read_log`), and not in these where an earlier start measured them.
        """
        deadline, pauses = time.monotonic() + timeout_s, Pauses()
        while True:
            ended = self.ended.is_set()  # before looking: what came last is seen then
            rows = self._new()
            left_s = deadline - time.monotonic()
            if rows or ended or left_s <= 0:
                return rows
            pauses.rest(left_s)

    def release(self, step: int) -> None:
        """Let the run go on beyond the report of `step`, and beyond every earlier one."""
        with self._lock:
            self._released = max(self._released, step)
            if self._recorder is not None:
                self._recorder.release.remote(self._released)

    def stop(self, reason: str) -> None:
        """Have the run save and end, as the first SIGTERM does: it ends by PreemptedError, at a gate or wherever it is, and
        the same job under the same name goes on. The first reason counts."""
        with self._lock:
            first, self._reason = not self._reason, self._reason or reason
            request = self._request
        if first and request is not None:
            request(reason)

    def attach(self, recorder: Any, request_stop: Callable[[str], None]) -> None:
        """For the run: its recorder is there, and this is how it is asked to stop."""
        with self._lock:
            self._recorder, self._request = recorder, request_stop
            recorder.release.remote(self._released)
            reason = self._reason
        self.opened.set()
        if reason:
            request_stop(reason)

    def detach(self) -> None:
        """For the run: it is over. Its last rows can still be read; the recorder need not live for that."""
        with self._reading:
            self._left += self._ask()
            with self._lock:
                self._recorder = self._request = None
        self.ended.set()

    def _new(self) -> list[Row]:
        with self._reading:
            rows, self._left = self._left, []
            return rows + self._ask()

    def _ask(self) -> list[Row]:
        if (recorder := self._recorder) is None:
            return []
        try:
            rows: list[Row] = ray.get(recorder.since.remote(self._count), timeout=ASK_TIMEOUT_S)
        except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError):
            return []  # it is busy, or gone, which ends the run with a reason of its own
        self._count += len(rows)
        return rows
