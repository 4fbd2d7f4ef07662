"""A run with a link, in a thread of this process, as a search has it."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console

from rayft.report.log import Row
from rayft.spec import Job
from rayft.train.link import Link

RUN_S = 240


class Linked:
    """A run that was started with a link; its rows so far."""

    def __init__(self, job: Job) -> None:
        self.link, self.rows = Link(), list[Row]()
        self.error: BaseException | None = None
        self.code: int | None = None
        self._job = job
        self._thread = threading.Thread(target=self._run, name=f"run-{job.name}", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        from rayft.rlhf.run import run as run_reinforced
        from rayft.train.run import run

        start: Callable[..., int] = run_reinforced if self._job.reinforced else run
        try:
            self.code = start(self._job, console=Console(file=io.StringIO()), link=self.link)
        except BaseException as error:
            self.error = error

    def until(self, what: str, condition: Callable[[Row], bool]) -> Row:
        """The first new row for which it is true; fails when the run ends before, or the time is over."""
        deadline = time.monotonic() + RUN_S
        while time.monotonic() < deadline:
            new = self.link.rows(1.0)
            self.rows += new
            if found := next(filter(condition, new), None):
                return found
            if self.link.ended.is_set() and not new:
                self._thread.join(60)
                raise AssertionError(f"the run ended before: {what}") from self.error
        raise AssertionError(f"waited {RUN_S} s for: {what}")

    def gate(self, step: int) -> None:
        """Wait until the run waits at the report of a step."""
        self.until(f"the gate of step {step}", lambda row: row["kind"] == "gate" and row["step"] == step)

    def more(self, seconds: float) -> list[Row]:
        """Rows of the next seconds."""
        deadline, new = time.monotonic() + seconds, list[Row]()
        while (left := deadline - time.monotonic()) > 0:
            new += self.link.rows(left)
        self.rows += new
        return new

    def end(self) -> BaseException | None:
        """Wait for the end; returns what the run raised."""
        self._thread.join(RUN_S)
        assert not self._thread.is_alive(), f"the run {self._job.name} did not end"
        self.rows += self.link.rows(0)
        return self.error

    def steps(self, kind: str = "step") -> list[Any]:
        """Steps of the rows of a kind."""
        return [row["step"] for row in self.rows if row["kind"] == kind]
