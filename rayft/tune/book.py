"""The ledger from the driver's side: what the search folder holds, and what has been written to it since."""

from __future__ import annotations

import threading
from typing import Any

import ray

from rayft.report.log import Row, read_all
from rayft.report.trials import TRIAL, TrialState, trials_of
from rayft.storage import Store

ASK_TIMEOUT_S = 600.0  # a flush to S3 is tried again for minutes


class Book:
    """Rows of a search, old and new. recorder: the sole writer of the search folder's log. epoch: of the driver's lease."""

    def __init__(self, store: Store, recorder: Any, epoch: int) -> None:
        self.rows: list[Row] = [row for row in read_all(store) if row.get("epoch", 0) < epoch]
        self._recorder, self._epoch = recorder, epoch
        self._seen = 0
        self._lock = threading.Lock()
        self._states: dict[str, TrialState] = {}
        self._counted = -1

    def tell(self, row: Row) -> None:
        """Write a row of the ledger, durable when this returns. Raises StorageError."""
        ray.get(self._recorder.row.remote({"kind": TRIAL, **row}), timeout=ASK_TIMEOUT_S)
        ray.get(self._recorder.flush.remote(), timeout=ASK_TIMEOUT_S)

    def states(self) -> dict[str, TrialState]:
        """The trials as of now, by id."""
        with self._lock:
            new = ray.get(self._recorder.since.remote(self._seen), timeout=ASK_TIMEOUT_S)
            self._seen += len(new)
            self.rows += [{**row, "epoch": self._epoch} for row in new]
            if len(self.rows) != self._counted:
                self._counted, self._states = len(self.rows), trials_of(self.rows)
            return self._states

    def seconds_before(self) -> float:
        """What earlier drivers of the search took, in seconds."""
        spans: dict[int, tuple[float, float]] = {}
        for row in self.rows:
            if (epoch := row.get("epoch", 0)) < self._epoch:
                first, last = spans.get(epoch, (row["time"], row["time"]))
                spans[epoch] = (min(first, row["time"]), max(last, row["time"]))
        return sum(last - first for first, last in spans.values())
