"""Trackers (TensorBoard, MLflow, Weights & Biases) fed with the rows of the run log, each in a thread of its own.

A tracker is a view: when it fails or is slow the run goes on, and the log says so. A restarted run continues the same
tracker run, whose id stands in `trackers.json` of the run folder, and no step is sent twice: what the log held before
this process started has been sent, and so has what the tracker itself says it holds.
"""

from __future__ import annotations

import importlib.util
import json
import queue
import threading
from collections.abc import Callable
from typing import Any, Protocol

from rayft.errors import JobError
from rayft.report.log import Row, read_all
from rayft.spec import Job
from rayft.storage import ObjectNotFound, Store

STATE_KEY = "trackers.json"

#: Kind of a row (with when it was measured, for suites) to the last step that was sent.
Marks = dict[str, int]


class Backend(Protocol):
    """One tracking library, open on one of its runs. Methods may raise anything."""

    #: Last step the tracker already holds, as far as it can tell.
    last_step: int
    #: What finds the same tracker run again after a restart; JSON.
    state: dict[str, Any]

    def log(self, metrics: dict[str, float], step: int, time: float) -> None:
        """Send metrics of one step."""

    def close(self, code: int) -> None:
        """End the tracker run with the exit code of the run."""


def metrics_of(row: Row) -> dict[str, float]:
    """The numbers of a row under the names trackers show; empty for rows that are not tracked."""
    if row["kind"] == "step":
        names = ("loss", "grad_norm", "learning_rate", "tokens_per_s", "trained_tokens_per_s", "padding")
        found = {f"train/{name}": row.get(name) for name in names}
        found |= {f"train/{name}": number for name, number in row.get("metrics", {}).items()}
        found |= {f"seconds/{name}": seconds for name, seconds in row.get("seconds", {}).items()}
        if row.get("peak_memory_gb"):
            found["train/peak_memory_gb"] = max(row["peak_memory_gb"])
    elif row["kind"] == "eval":
        found = {"eval/loss": row.get("loss")}
        found |= {f"eval/{name}": number for name, number in row.get("metrics", {}).items()}
    elif row["kind"] == "suites":
        found = {
            f"{name}/{metric}": v for name, suite in row["results"].items() for metric, v in suite.items()
        }
    else:
        return {}
    return {name: float(number) for name, number in found.items() if number is not None}


class Trackers:
    """All trackers a job names. `on_failure` gets one sentence when one of them is given up."""

    def __init__(self, job: Job, store: Store, on_failure: Callable[[str], None]) -> None:
        wanted = wanted_trackers(job)
        self._feeds: list[_Feed] = []
        if not wanted:
            return
        state, sent = _State(store), _marks(read_all(store))
        for name in wanted:
            self._feeds.append(_Feed(name, _opener(name, job, store), state, dict(sent), on_failure))

    def log(self, row: Row) -> None:
        """Hand a row to every tracker; returns at once."""
        for feed in self._feeds:
            feed.rows.put(row)

    def close(self, code: int = 0, timeout_s: float = 60.0) -> None:
        """Send what is left and end the tracker runs; a tracker that takes longer is left behind and said so."""
        for feed in self._feeds:
            feed.rows.put(code)
        for feed in self._feeds:
            feed.join(timeout_s)


def wanted_trackers(job: Job) -> list[str]:
    """Trackers the job names. Raises JobError where the library of one is not installed."""
    log = job.log
    named = {"tensorboard": log.tensorboard, "mlflow": log.mlflow, "wandb": log.wandb}
    wanted = [name for name, value in named.items() if value]
    for name in wanted:
        if importlib.util.find_spec(name) is None:
            raise JobError(f"log.{name} is set, but {name} is not installed.", f"Install rayft[{name}].")
    return wanted


class _Feed:
    """One tracker and the thread that talks to it. Rows come through `rows`, last the exit code."""

    def __init__(
        self,
        name: str,
        open_backend: Callable[[dict[str, Any]], Backend],
        state: _State,
        sent: Marks,
        on_failure: Callable[[str], None],
    ) -> None:
        self.rows: queue.SimpleQueue[Row | int] = queue.SimpleQueue()
        self._name, self._open, self._state = name, open_backend, state
        self._sent, self._on_failure = sent, on_failure
        self._thread = threading.Thread(target=self._run, name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def join(self, timeout_s: float) -> None:
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self._on_failure(f"{self._name} did not take the last rows within {timeout_s:.0f} s")

    def _run(self) -> None:
        try:
            backend = self._open(self._state.get(self._name))
            self._state.put(self._name, backend.state)
            while isinstance(row := self.rows.get(), dict):
                self._send(backend, row)
            backend.close(row)
        except Exception as error:
            # Whatever a tracker's library raises must not reach training.
            self._on_failure(f"tracking with {self._name} stopped: {type(error).__name__}: {error}")

    def _send(self, backend: Backend, row: Row) -> None:
        metrics, kind = metrics_of(row), _kind(row)
        if not metrics or row["step"] <= max(self._sent.get(kind, -1), backend.last_step):
            return
        backend.log(metrics, row["step"], row["time"])
        self._sent[kind] = row["step"]


class _State:
    """`trackers.json`: what each tracker needs to find its run again."""

    def __init__(self, store: Store) -> None:
        self._store, self._lock = store, threading.Lock()
        try:
            self._values: dict[str, Any] = json.loads(store.get(STATE_KEY))
        except ObjectNotFound:
            self._values = {}

    def get(self, name: str) -> dict[str, Any]:
        with self._lock:
            return self._values.get(name, {})

    def put(self, name: str, value: dict[str, Any]) -> None:
        with self._lock:
            if self._values.get(name) != value:
                self._values[name] = value
                self._store.put(STATE_KEY, json.dumps(self._values, indent=1).encode())


def _opener(name: str, job: Job, store: Store) -> Callable[[dict[str, Any]], Backend]:
    from rayft.report import tracker_backends as backends

    classes: dict[str, Any] = {
        "tensorboard": backends.TensorBoard,
        "mlflow": backends.MLflow,
        "wandb": backends.WeightsAndBiases,
    }
    return lambda state: classes[name](job, store, state)


def _marks(rows: list[Row]) -> Marks:
    marks: Marks = {}
    for row in rows:
        if metrics_of(row):
            marks[_kind(row)] = max(row["step"], marks.get(_kind(row), -1))
    return marks


def _kind(row: Row) -> str:
    return f"{row['kind']} {row.get('when', '')}"
