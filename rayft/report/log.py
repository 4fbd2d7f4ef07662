"""The run log: one JSON object per line, appended by the one writer that holds the run's lease.

Rows (every row also gets `time` in seconds since 1970, `epoch` of the lease and `attempt`):

    {"kind": "step", "step", "position", "loss", "grad_norm", "learning_rate", "rows", "tokens", "trained_tokens",
     "tokens_per_s", "trained_tokens_per_s", "padding", "seconds": {"data", "forward", "backward", "optimizer",
     "checkpoint"}, "peak_memory_gb": [one per rank], "metrics": {the method's own, means over the step}}
    {"kind": "eval", "step", "loss" (none where rewards score answers), "tokens" (or, where all is a mean over them, "rows"),
        "metrics", "took_s", "too_long" (held-out prompts that were left out for their length)}
    {"kind": "issued", "step", "prompts"}: rows of all prompts that have been asked for a step; {"kind": "generated", "step",
        "prompts"}: that all of these are answered and scored; {"kind": "ledger", "step", "trained", "uniform" (answered, and dropped since their answers all had the same reward), "too_long"}: what became of them
    {"kind": "suites", "when": "before" | "after", "step", "results": {suite: {metric: value}}, "took_s"}
    {"kind": "event", "event", "message", ...}; `open` (a driver starts) carries `began`, `user`, `team` and `devices` asked for,
        `start` and `resume` (an attempt begins) `resumed_step` and `devices` held, `checkpoint` (it is committed) its `step` and,
        where Ray Train drives the run, `took_s` since it was begun, `end` `code` and `terminal`; any may carry
        `waited: [from, to]`, when there was no room on the cluster

A local run folder has `log.jsonl`. An object store cannot append, so there the log is a series of segments
`log/<epoch>-<n>.jsonl`; the newest one is rewritten every few seconds until it is full.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from rayft.errors import LeaseLost, StorageError
from rayft.report.sinks import SEGMENTS, FileSink, SegmentSink, Sink

if TYPE_CHECKING:
    from rayft.storage import Store

Row = dict[str, Any]

LOG_KEY = "log.jsonl"


class RunLog:
    """Appends rows for the holder of the run's lease; safe to call from several threads of that process.

    `held()` tells whether this process still holds the lease. It is asked before every write, so that a driver that
    was stopped and replaced in the meantime does not write on; rows it had already handed to the operating system
    are dropped by `read_log`. On an object store rows are written in the background: while the store is away they
    wait in memory, and only `flush` and `close` raise its StorageError.
    """

    def __init__(
        self,
        store: Store,
        epoch: int,
        held: Callable[[], bool],
        *,
        attempt: int = 1,
        flush_interval_s: float = 3.0,
    ) -> None:
        self.epoch = epoch
        self.attempt = attempt
        self._uri = store.uri
        self._held = held
        self._lost = False
        self._lock = threading.Lock()  # over rows in memory; never held while a store may be slow
        self._writing = threading.RLock()  # over the sink
        self._pending: list[bytes] = []
        self._closed = threading.Event()
        self._flusher: threading.Thread | None = None
        path = store.local_path(LOG_KEY)
        self._sink: Sink = FileSink(path) if path else SegmentSink(store, epoch)
        if path is None:
            self._flusher = threading.Thread(
                target=self._flush_every, args=(flush_interval_s,), name="run-log", daemon=True
            )
            self._flusher.start()

    def begin_attempt(
        self, epoch: int, attempt: int, resumed_step: int | None, message: str = "", **fields: Any
    ) -> None:
        """Start of a worker group: rows of earlier epochs beyond `resumed_step` no longer count.

        `resumed_step` is the step of the checkpoint it starts from, None for a start from the model.
        """
        with self._lock:
            self.epoch, self.attempt = epoch, attempt
        event = "start" if resumed_step is None else "resume"
        self.event(event, message, resumed_step=resumed_step, **fields)

    def append(self, row: Row) -> None:
        """Add one row. Raises LeaseLost where another driver has taken over, StorageError where the disk refuses."""
        with self._lock:
            if self._lost:
                raise self._lease_lost()
            stamped = {"time": round(time.time(), 3), "epoch": self.epoch, "attempt": self.attempt, **row}
            self._pending.append(_encode(stamped))
        if self._flusher is None:
            self._write()

    def event(self, event: str, message: str = "", **fields: Any) -> None:
        """Add an event row."""
        self.append({"kind": "event", "event": event, "message": message, **fields})

    def flush(self) -> None:
        """Make everything appended so far durable. Raises LeaseLost or StorageError; rows not written are kept."""
        with self._writing:
            if self._pending:
                self._write()
            self._sink.sync()

    def close(self) -> None:
        """Flush and stop writing in the background."""
        self._closed.set()
        if self._flusher and self._flusher is not threading.current_thread():
            self._flusher.join(timeout=60)
        try:
            if not self._lost:
                self.flush()
        finally:
            self._sink.close()

    def _write(self) -> None:
        with self._writing:
            if self._lost or not self._held():
                self._lost = True
                raise self._lease_lost()
            with self._lock:
                rows = list(self._pending)
            self._sink.write(b"".join(rows))
            with self._lock:
                del self._pending[: len(rows)]

    def _flush_every(self, interval_s: float) -> None:
        while not self._closed.wait(interval_s):
            if not self._pending:
                continue
            try:
                self._write()
            except LeaseLost:
                return
            except StorageError:
                continue  # the rows stay pending; flush() and close() say what is wrong

    def _lease_lost(self) -> LeaseLost:
        return LeaseLost(
            f"The log of {self._uri} is not written on: another driver has taken over this run.",
            "Nothing to do; the newer driver goes on.",
        )


def read_log(store: Store) -> list[Row]:
    """Rows that count, in order of epoch and writing: one run, however often it was stopped and taken over.

    A start that resumed from step n makes rows of earlier epochs beyond n void, except events, which stay as
    history (but not `checkpoint` events, whose checkpoints no longer count). Of several rows of one kind and step
    the last counts. A line that a killed writer left torn is skipped.
    """
    return current_rows(read_all(store))


def read_all(store: Store) -> list[Row]:
    """Every row that was ever written, those that no longer count included, in the order of writing."""
    return read_lines(store)[0]


def read_lines(store: Store) -> tuple[list[Row], int]:
    """`read_all`, and how many lines were torn."""
    lines = [line for line in _raw(store).splitlines() if line.strip()]
    rows = [row for line in lines if (row := _parsed(line)) is not None]
    return rows, len(lines) - len(rows)


def current_rows(rows: Iterable[Row]) -> list[Row]:
    """The rows among all written ones that count (see `read_log`)."""
    ordered = sorted(rows, key=lambda row: row["epoch"])
    resumed = {
        row["epoch"]: -1 if row["resumed_step"] is None else row["resumed_step"]
        for row in ordered
        if row["kind"] == "event" and "resumed_step" in row
    }
    last: dict[tuple[Any, ...], Row] = {}
    for number, row in enumerate(ordered):
        history = row["kind"] == "event" and row["event"] != "checkpoint"
        if not history and "step" in row:
            limits = [step for epoch, step in resumed.items() if epoch > row["epoch"]]
            if limits and row["step"] > min(limits):
                continue
        key = ("event", number) if row["kind"] == "event" else (row["kind"], row.get("step"), row.get("when"))
        last.pop(key, None)  # so that the row that counts also stands where it was written
        last[key] = row
    return list(last.values())


def _raw(store: Store) -> bytes:
    parts = [store.get(LOG_KEY)] if store.exists(LOG_KEY) else []
    parts += [store.get(entry.key) for entry in store.list(SEGMENTS)]
    return b"\n".join(parts)


def _parsed(line: bytes) -> Row | None:
    try:
        row: Row = json.loads(line)
    except ValueError:
        return None
    return row


def _encode(row: Row) -> bytes:
    return (
        json.dumps(_plain(row), allow_nan=False, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
    )


def _plain(value: Any) -> Any:
    """JSON has no NaN or infinity (they become null), and no numpy scalars."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
