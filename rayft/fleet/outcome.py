"""How a submission ended: the run's own exit code, from the run log first and the job API where the log is silent.

A code of the API alone may be anything: a native crash picks numbers of its own, and a stopped job has none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from rayft.errors import EXIT_CODES, PreemptedError, RayftError, WorkerError
from rayft.fleet.attempts import Attempt
from rayft.report.log import Row, read_all
from rayft.storage import RetryPolicy, Store, open_store

#: Seconds that the job API may lag behind the run log in saying that a driver has ended.
CLOCK_S = 5.0
#: A storage that cannot be reached from here must not hold up whoever only looks.
RETRY = RetryPolicy(attempts=3, total_s=10.0)


@dataclass(frozen=True)
class Outcome:
    """The exit code of a run's attempt and one sentence about it."""

    code: int
    message: str


class RunFolder:
    """The folder of a run as it is seen from here; what cannot be read from here is simply not known."""

    def __init__(self, run_uri: str) -> None:
        self.uri = run_uri
        self._store: Store | None = None
        if "://" in run_uri or Path(run_uri).is_dir():
            try:
                self._store = open_store(run_uri, RETRY)
            except RayftError:
                self._store = None

    @property
    def store(self) -> Store | None:
        """The store; None where there is no such folder here (any more, or yet)."""
        if self._store is None and Path(self.uri).is_dir():
            self._store = open_store(self.uri, RETRY)
        return self._store

    def rows(self) -> list[Row] | None:
        """Everything in the run log; None where it cannot be read from here."""
        store = self.store
        if store is None:
            return None
        try:
            return read_all(store)
        except RayftError:
            return None

    def end_since(self, started: float | None) -> Outcome | None:
        """How the attempt that was submitted at `started` ended; None while it has not, or where it is not known."""
        return end_in(self.rows(), started)


def end_in(rows: list[Row] | None, started: float | None, ended: float | None = None) -> Outcome | None:
    """The last end in a run log that belongs to the attempt from `started` to `ended` (None: it is the last one)."""
    first, last = started or 0.0, math.inf if ended is None else ended + CLOCK_S
    ends = [
        row
        for row in rows or []
        if row["kind"] == "event" and row["event"] == "end" and first <= row["time"] <= last
    ]
    return Outcome(int(ends[-1]["code"]), str(ends[-1]["message"])) if ends else None


def outcome_of(attempt: Attempt, end: Outcome | None) -> Outcome:
    """What an attempt that is no longer live came to. end: what the run log says of it, if anything."""
    if end is not None:
        return end
    if attempt.status == "SUCCEEDED":
        return Outcome(0, EXIT_CODES[0])
    if attempt.code in EXIT_CODES and attempt.code != 0:
        return Outcome(attempt.code, EXIT_CODES[attempt.code])
    if attempt.status == "STOPPED":
        return Outcome(
            PreemptedError.code, "it was stopped before it could say how it ends; its last checkpoint counts"
        )
    how = "without an exit code" if attempt.code is None else f"with {attempt.code}, no code of rayft's"
    return Outcome(
        WorkerError.code,
        f"its driver ended {how} and left no word in the run log; its last checkpoint counts",
    )
