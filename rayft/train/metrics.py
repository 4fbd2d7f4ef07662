"""A run's state as Ray metrics, for Prometheus and the dashboard in `cluster/grafana/`."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from rayft.report.log import Row

#: Name (Ray puts `ray_` before it) and meaning; each has the tags `run`, `user` and `team`.
METRICS = {
    "rayft_step": "Optimizer steps that are done.",
    "rayft_tokens_per_second": "Tokens per second of the last step.",
    "rayft_loss": "Loss of the last step.",
    "rayft_checkpoint_age_seconds": "Seconds since the last committed checkpoint, or since the driver started if there is none.",
    "rayft_restarts": "Times that worker groups or drivers of the run started again.",
}
TAGS = ("run", "user", "team")
#: Prometheus asks every 10 to 60 s; Ray passes on what it is given every 10.
AGE_EVERY_S = 5.0


class RunMetrics:
    """Follows the rows of a run log. Whatever goes wrong here is kept from the run."""

    def __init__(self, run: str, owner: dict[str, str], rows: Sequence[Row]) -> None:
        """owner: `user` and `team`. rows: of the run so far."""
        self._tags = {"run": run, **owner}
        self._gauges: dict[str, Any] = {}
        self._attempts = 0
        self._committed = time.time()
        self._closed = threading.Event()
        with self._harmless():
            from ray.util.metrics import Gauge

            for name, meaning in METRICS.items():
                self._gauges[name] = Gauge(name, meaning, TAGS)
            for row in rows:
                self._follow(row)
            self._show_age()
            threading.Thread(target=self._age, name="rayft-metrics", daemon=True).start()

    def row(self, row: Row) -> None:
        """Take in a row of the log; it has its `time`."""
        with self._harmless():
            self._follow(row)
            if row["kind"] == "step":
                self._set("rayft_step", row["step"])
                self._set("rayft_tokens_per_second", row["tokens_per_s"])
                self._set("rayft_loss", row["loss"])
            elif row["kind"] == "event":
                self._set("rayft_restarts", max(0, self._attempts - 1))
                self._show_age()

    def close(self) -> None:
        """The run ends."""
        self._closed.set()

    def _follow(self, row: Row) -> None:
        if row["kind"] == "event":
            self._attempts += row["event"] in ("start", "resume")
            if row["event"] == "checkpoint":
                self._committed = row["time"]

    def _age(self) -> None:
        while not self._closed.wait(AGE_EVERY_S):
            with self._harmless():
                self._show_age()

    def _show_age(self) -> None:
        self._set("rayft_checkpoint_age_seconds", max(0.0, time.time() - self._committed))

    def _set(self, name: str, value: Any) -> None:
        if value is not None and name in self._gauges:
            self._gauges[name].set(float(value), tags=self._tags)

    @contextlib.contextmanager
    def _harmless(self) -> Iterator[None]:
        with contextlib.suppress(Exception):
            yield
