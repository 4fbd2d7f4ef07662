"""One run of a trial, driven in a thread: its reports as they come, what it has spent, and its job."""

from __future__ import annotations

import math
import threading
import time
from typing import Any

from rich.console import Console

from rayft.errors import RayftError, WorkerError
from rayft.report.log import read_log
from rayft.report.trials import Fork
from rayft.spec import Job
from rayft.spec.tune import FORKING
from rayft.storage import open_store
from rayft.train.link import Link
from rayft.train.run import absolute_uri
from rayft.tune.common import Baseline
from rayft.tune.held import Held
from rayft.tune.reports import Reports
from rayft.tune.space import job_of
from rayft.tune.trackers import trial_log

#: A run that is asked to leave at a report has nothing left to save but its last words.
LEAVE_S = 180.0
#: Checkpoints that a run keeps where others may fork them.
KEPT_FOR_FORKS = 12


class Segment:
    """One run of a trial, driven in a thread. given: step of the last report that the search has had of it."""

    def __init__(self, job: Job, run: str, given: int, spent: dict[str, float], *, gated: bool) -> None:
        self.job, self.run = job, run
        self.store = open_store(f"{absolute_uri(job.storage)}/{job.name}")
        self.reports, self.given = Reports(), given
        self.attempted = self.ran = False
        #: Measurements before training that this run makes for all.
        self.shares: list[Baseline] = []
        self._gated, self._over = gated, False
        self._spent_before, self._held, self._began_at = spent, Held(), given
        self._link: Link | None = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._read()

    @property
    def forked(self) -> bool:
        """Whether the run begins from a checkpoint, where nothing is measured before training."""
        return self.job.checkpoint.fork is not None

    @property
    def started(self) -> bool:
        return self._thread is not None

    @property
    def steps(self) -> int:
        """How far the search has followed the run since it was started."""
        return self.given - self._began_at

    def measured(self) -> list[Baseline]:
        """Of what it shares, that which is there now, each once."""
        there = [baseline for baseline in self.shares if baseline.kind in self.reports.before]
        self.shares = [baseline for baseline in self.shares if baseline not in there]
        return there

    def pending(self) -> tuple[int, dict[str, float], bool] | None:
        """A report that an earlier process logged and did not give; for a run under way, the gate is opened first."""
        if self._link is not None:
            self._link.release(self.given)
            return None
        found = self.reports.next()
        if found is None:
            return None
        self.given = found[0]
        return (*found, False)

    def start(self) -> None:
        """Drive the run in a thread of its own."""
        self._began_at = self.given
        link = self._link = Link(gated=self._gated)
        link.release(self.given)

        def drive() -> None:
            try:
                if self.job.reinforced:
                    from rayft.rlhf.run import run as run_job
                else:
                    from rayft.train.run import run as run_job
                run_job(self.job, console=Console(), takeover=True, link=link)
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=drive, name="rayft-trial", daemon=True)
        self._thread.start()

    def listen(self, seconds: float) -> tuple[int, dict[str, float], bool] | None:
        """Wait for rows for a while; a report if there is one. Raises what ended the run."""
        assert self._link is not None
        assert self._thread is not None
        ended = not self._thread.is_alive()
        rows = [] if ended else self._link.rows(seconds)
        self._held.feed(rows)
        self.attempted |= any(row.get("event") in ("start", "resume") for row in rows)
        self.reports.feed(rows)
        if not ended:
            found = self.reports.next()
            if found is not None:
                self.given = found[0]
                return (*found, False)
            return None
        self._close_account()
        if isinstance(self._error, RayftError):
            raise self._error
        if self._error is not None:
            raise WorkerError(
                f"The run ended by {type(self._error).__name__}: {self._error}.",
                "See the log of the process that drove the trial.",
            )
        if not self._over:
            self._over, self.reports = True, Reports()
            self._read()
        found = self.reports.next()  # of a run that waited for nobody, some may be left
        if found is not None:
            self.given = found[0]
            return (*found, False)
        return (*self.reports.last(), True)

    def leave(self, reason: str) -> None:
        """Ask the run to save and end, and wait for that."""
        if self._thread is None or self._link is None:
            return
        if self._thread.is_alive():
            self._link.stop(reason)
            self._thread.join(timeout=LEAVE_S)
        self._close_account()

    def spent(self) -> dict[str, float]:
        """GPU-hours, CPU-hours and seconds that the trial has held workers so far, all its segments together."""
        own = self._held.spent(time.time())
        return {name: self._spent_before[name] + amount for name, amount in own.items()}

    def _close_account(self) -> None:
        """The run is over: what it still logged, and nothing after, is its own."""
        if self._link is not None:
            self._held.feed(self._link.rows(0.0))
            self._held.close(time.time())

    def _read(self) -> None:
        if self.store.exists("job.yaml"):
            self.reports.feed(read_log(self.store))
            self.reports.skip(self.given)


def run_name(search: str, trial: str, segment: int) -> str:
    """The name of a trial's run, the same after every restart."""
    return f"{search}-{trial}" + (f"-{segment}" if segment else "")


def trial_job(search: Job, run: str, values: dict[str, Any], forked: Fork | None) -> Job:
    """The job of a trial's run: the search's with the values, in the search's folder, with the data cache that all share."""
    job = job_of(search, values)
    storage = f"{search.storage.rstrip('/')}/{search.name}/trials"
    data = job.data.model_copy(update={"cache": job.data.cache or f"{search.storage.rstrip('/')}/cache"})
    checkpoint: dict[str, Any] = {}
    if search.tune is not None and search.tune.scheduler in FORKING:
        # A decision names a checkpoint of another trial, which goes on while the fork waits for its turn.
        reports = job.eval.every_steps or 1
        between = job.checkpoint.every_steps or reports  # a run that waits at a report has saved there anyway
        checkpoint["every_steps"] = between
        # Forked is that of the donor's comparison before, when another trial comes to its next.
        rounds = 2 * (search.tune.perturb_steps or reports)
        saved = sum(math.ceil(rounds / steps) for steps in {reports, between})
        checkpoint["keep"] = max(job.checkpoint.keep, KEPT_FOR_FORKS, saved + 1)
    if forked:
        checkpoint["fork_from"] = f"{storage}/{forked.run}@{forked.step}"
    return job.model_copy(
        update={
            "name": run,
            "storage": storage,
            "data": data,
            "log": trial_log(search, values),
            "cluster": job.cluster.model_copy(update={"preflight": False}),  # the search has looked
            "checkpoint": job.checkpoint.model_copy(update=checkpoint),
        }
    )
