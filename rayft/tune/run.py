"""One search from the driver's side: lease, desk, Ray Tune in a thread, the table meanwhile, and the answers at the end."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import ray
from ray import tune as ray_tune
from ray.exceptions import RayError, RayTaskError
from ray.tune import FailureConfig, RunConfig, Stopper, TuneConfig, Tuner
from rich.console import Console

from rayft.checkpoint import Lease
from rayft.errors import JobError, PreemptedError, RayftError, WorkerError
from rayft.report.log import read_all
from rayft.report.trackers import wanted_trackers
from rayft.report.trials import TrialState, trials_of
from rayft.spec import Job, Log, changed_keys, dump_job
from rayft.storage import Store, open_store
from rayft.train.account import owner_of_run
from rayft.train.cluster import connect
from rayft.train.draining import Drains, as_taken_away
from rayft.train.finish import job_of_run
from rayft.train.fit import refuse_lost
from rayft.train.history import last_end
from rayft.train.recorder import start_recorder
from rayft.train.requests import StopRequests
from rayft.train.run import HEAVY, LookFirst, absolute_uri, importing
from rayft.train.signals import StopSignals
from rayft.tune.algorithm import Proposals
from rayft.tune.answers import answer
from rayft.tune.book import Book
from rayft.tune.budget import Spending
from rayft.tune.choose import NOT_ITS_OWN
from rayft.tune.desk import start_desk
from rayft.tune.page import write_page
from rayft.tune.propose import proposer_of, refuse_missing_packages
from rayft.tune.scheduler import Kept
from rayft.tune.schedulers import POPULATIONS, make_scheduler, turn_of
from rayft.tune.share import refuse_no_trial
from rayft.tune.space import Space
from rayft.tune.table import SearchTable
from rayft.tune.trackers import close_parent, open_parent
from rayft.tune.trial import DRIVER, About, TrialRun

ASK_TIMEOUT_S = 60.0
LOOK_EVERY_S = 0.5
#: Trials that save and leave take less; after this the rest are ended where they are, at their last checkpoint.
LEAVE_S = 240.0
#: Ray Tune's own ways that are not ours: it shows tables, copies logs and writes snapshots that nothing here reads.
TUNE_ENVIRONMENT = {
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}


def run(
    job: Job, *, console: Console | None = None, takeover: bool = False, look_first: LookFirst | None = None
) -> int:
    """Start a search or go on with the one of that name; returns 0, or raises the RayftError that carries the exit code.

    look_first: looks at the nodes once, before the first trial.
    """
    console = console or Console()
    if job.tune is None:
        raise JobError(
            "This job has no group `tune`.", "Add one (`rayft schema` lists its keys), or use `rayft run`."
        )
    refuse_missing_packages(job)
    wanted_trackers(job)
    search_uri = absolute_uri(job.storage).rstrip("/") + f"/{job.name}"
    store = open_store(search_uri)
    if over(store, job):
        answer(store, job, console, export=False)
        return 0
    refuse_other_space(store, job)
    with StopSignals() as signals:
        _search(job, store, search_uri, console, signals, takeover=takeover, look_first=look_first)
    return 0


def over(store: Store, job: Job) -> bool:
    """Whether this very search has ended well."""
    if not store.exists("job.yaml") or dump_job(job_of_run(store)) != dump_job(job):
        return False
    end, rows = last_end(store), read_all(store)
    if end is None or end.code != 0 or any(map(retried, trials_of(rows).values())):
        return False
    # A driver that was killed has written no end of its own.
    ended = max(row["epoch"] for row in rows if row.get("event") == "end")
    return bool(ended == max(row["epoch"] for row in rows))


def retried(state: TrialState) -> bool:
    """Whether a trial failed for what the machines did, which the next start of the search tries once more."""
    return state.status == "failed" and state.code in NOT_ITS_OWN


class GaveUp(WorkerError):
    """Ray Tune ended for what one process met."""


def error_of(error: BaseException) -> BaseException:
    """What Ray Tune's end means: the error for users below what it made of it; or that it gave up, which it does for any end of a
    trial's process but two kinds, such as that by Ray's memory monitor."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, RayftError):
            return found
        if isinstance(found, RayError) and not isinstance(found, RayTaskError):
            # Without the traceback: its frames hold the trials' processes, which end with their last handle.
            reason = f"{type(found).__name__}: {str(found).strip().partition(chr(10))[0]}"
            return GaveUp(f"Ray Tune gave up ({reason}).", "Start the search again under the same name.")
        found = found.__cause__ or found.__context__
    return error


def refuse_other_space(store: Store, job: Job) -> None:
    """Raise JobError where the search has trials of another job or space: they could not be compared with the new ones."""
    if not store.exists("job.yaml"):
        return
    before = job_of_run(store)
    if before.tune is None:
        raise JobError(f"The name {job.name!r} is a run's, and no search's.", "Give the search another name.")
    changes = changed_keys(before, job)
    searched = any(change.startswith(("tune.", "seed")) for change in changes)
    trials = trials_of(read_all(store)).values()
    # A mistake elsewhere in the job may be corrected until something has been measured.
    if changes and any(searched or trial.curve or trial.ended for trial in trials):
        raise JobError(
            f"The search {job.name!r} has trials of another job; these keys differ: {'; '.join(changes)}.",
            "Use another name, or restore the keys to go on with it.",
        )


def _search(
    job: Job,
    store: Store,
    search_uri: str,
    console: Console,
    signals: StopSignals,
    *,
    takeover: bool,
    look_first: LookFirst | None,
) -> None:
    lease = Lease.acquire(store, {"job": job.name}, takeover=takeover, on_wait=console.print)
    lease.start_heartbeat()
    began = time.time()
    recorder: Any = None
    try:
        refuse_other_space(store, job)
        store.put("job.yaml", dump_job(job).encode())
        with StopRequests(store, signals):
            with signals.lent_to_ray(), importing(*HEAVY):
                connect(job.cluster)
            assert job.tune is not None
            refuse_no_trial(job, job.tune.share)
            # Trials have trackers of their own.
            recorder = start_recorder(
                job.model_copy(update={"log": Log()}), search_uri, lease.owner, lease.epoch
            )
            ray.get(recorder.open.remote(began, owner_of_run(), holds=False), timeout=ASK_TIMEOUT_S)
            if look_first is not None:
                look_first(job, search_uri, recorder, console)
            book = Book(store, recorder, lease.epoch)
            say(console, open_parent(job, store))
            Search(job, store, search_uri, book, recorder, lease, console, signals).run()
            ray.get(recorder.flush.remote(), timeout=ASK_TIMEOUT_S)
            choice = answer(store, job, console)
        _end(recorder, store, job, 0, "done")
        say(console, close_parent(job, store, choice, 0))
    except BaseException as raised:
        error = as_taken_away(raised)
        if recorder is not None:
            code = error.code if isinstance(error, RayftError) else 1
            message = error.message if isinstance(error, RayftError) else f"{type(error).__name__}: {error}"
            _end(recorder, store, job, code, message)
            say(console, close_parent(job, store, None, code))
        if error is raised:
            raise
        raise error from raised
    finally:
        lease.release()


def say(console: Console, sentence: str) -> None:
    """What went wrong with a tracker, if something did."""
    if sentence:
        console.print(sentence, style="yellow", soft_wrap=True, highlight=False)


class Search:
    """Ray Tune at work on a search, under watch."""

    def __init__(
        self,
        job: Job,
        store: Store,
        search_uri: str,
        book: Book,
        recorder: Any,
        lease: Lease,
        console: Console,
        signals: StopSignals,
    ) -> None:
        assert job.tune is not None
        self.job, self.tune, self.store, self.search_uri = job, job.tune, store, search_uri
        self.book, self.recorder, self.lease, self.console, self.signals = (
            book,
            recorder,
            lease,
            console,
            signals,
        )
        for state in book.states().values():
            if retried(state):
                reason = f"tried once more; it failed with {state.code}: {state.reason}"
                book.tell({"event": "again", "trial": state.trial, "reason": reason})
        self.spending = Spending(self.tune, book.seconds_before(), book.states)
        self._leaving, self._left_at = "", 0.0
        #: Which budget is spent; the trials that it leaves unfinished go on when the search is given more.
        self._spent = ""
        self._prepare()

    def _prepare(self) -> None:
        """What has Ray Tune's memory of the search, made of the ledger."""
        job, book, turn = self.job, self.book, turn_of(self.job)
        before = book.states()
        self.desk = start_desk(
            self.recorder, self.tune.share, self.tune.max_concurrent, yielding=turn is not None
        )
        self.kept = Kept(make_scheduler(job), self.tune, before, book.tell, self.spending.over)
        self.proposals = Proposals(
            job,
            proposer_of(job),
            self.desk,
            book.states,
            book.tell,
            self.spending,
            at_once=self.tune.scheduler in POPULATIONS,
        )
        self.proposals.leaving = lambda: bool(self._leaving)

    def run(self) -> None:
        """To the end of the search. Raises PreemptedError where it was asked to stop before, and what makes it pointless."""
        for left in reversed(range(self.job.cluster.max_failures + 1)):
            error = self._fit()
            if not isinstance(error, GaveUp) or not left or self._leaving or self.kept.fatal is not None:
                break
            say(self.console, f"{error.message} The search goes on from its ledger.")
            self._prepare()
        self._conclude(error)

    def _fit(self) -> BaseException | None:
        """Ray Tune at work until all trials are over or have left; what it gave up for, if it did."""
        error: list[BaseException] = []

        def fit() -> None:
            try:
                self._tuner().fit()
            except BaseException as caught:
                error.append(error_of(caught))

        thread = threading.Thread(target=fit, name="rayft-tune", daemon=True)
        # A trial looks after the nodes that it is on; the driver's is the search's own.
        drains = Drains(end=self.leave, move=lambda _: None)
        with (
            self.signals.asking(self.leave),
            SearchTable(self.console, self.tune.aims, Space(self.job).trials) as table,
        ):
            thread.start()
            while thread.is_alive():
                thread.join(timeout=LOOK_EVERY_S)
                table.show(self.book.states())
                refuse_lost(self.lease)
                drains.look(())
                if self.kept.fatal is not None:
                    self.leave(self.kept.fatal.message)
                elif not self._leaving and (spent := self.spending.over()):
                    self._spent = spent
                    self.leave(spent)
            table.show(self.book.states())
        if not self._leaving:  # the trials may have heard of a spent budget first
            self._spent = self.spending.over()
        return error[0] if error else None

    def _conclude(self, error: BaseException | None) -> None:
        """What the search's end means: nothing more, or why it did not come to its own."""
        if self.kept.fatal is not None:
            raise self.kept.fatal
        if error is not None:
            raise error
        if self._spent:
            for state in self.book.states().values():
                if not state.ended:
                    self.book.tell({"event": "waiting", "trial": state.trial, "reason": self._spent})
        elif self._leaving:
            states = self.book.states().values()
            ended = sum(state.ended for state in states)
            raise PreemptedError(
                f"The search was asked to stop ({self._leaving}); {ended} of its {len(states)} trials have ended, the others are saved.",
                "Start it again under the same name to go on.",
            )

    def leave(self, reason: str) -> None:
        """Have every trial save and end; they go on when the search is started again."""
        if not self._leaving:
            self._leaving, self._left_at = reason, time.monotonic()
            self.desk.stop.remote(reason)

    def gone(self) -> bool:
        """Whether Ray Tune may drop what is left: all that runs has left, or had its time for it."""
        if not self._leaving:
            return False
        return not self.kept.under_way() or time.monotonic() - self._left_at > LEAVE_S

    def _tuner(self) -> Tuner:
        os.environ.update(TUNE_ENVIRONMENT)
        logging.getLogger("ray.tune").setLevel(logging.ERROR)  # the table says it, in the ledger's words
        about = About(
            self.job,
            self.search_uri,
            self.desk,
            str(Path.cwd()),
            gated=self.tune.scheduler != "none",
            turn=turn_of(self.job),
        )
        trainable = ray_tune.with_parameters(TrialRun, about=about)
        # Ray keeps trainables of a cluster by name; two searches must not take each other's.
        trainable.__name__ = f"rayft-{self.job.name}-{self.lease.owner['id'][:8]}"
        scratch = Path(tempfile.gettempdir()) / f"rayft-{os.getuid()}" / "tune"
        return Tuner(
            ray_tune.with_resources(trainable, DRIVER),
            tune_config=TuneConfig(
                search_alg=self.proposals,
                scheduler=self.kept,
                num_samples=Space(self.job).trials,
                # A process that is kept for another trial still drives the one that HyperBand paused, which holds its workers.
                reuse_actors=self.tune.scheduler != "hyperband",
            ),
            run_config=RunConfig(
                name=trainable.__name__,
                storage_path=str(scratch),
                failure_config=FailureConfig(max_failures=self.job.cluster.max_failures),
                stop=_Gone(self.gone),
                verbose=0,
            ),
        )


class _Gone(Stopper):  # type: ignore[misc]
    """Ends Ray Tune's loop when a search that leaves has left."""

    def __init__(self, gone: Any) -> None:
        self._gone = gone

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Ray Tune keeps a copy for a restart of its own, and here the ledger has everything."""
        return {}

    def stop_all(self) -> bool:
        return bool(self._gone())


def _end(recorder: Any, store: Store, job: Job, code: int, message: str) -> None:
    """The search's last event, and the page that shows it. No end is for good: a search may be gone on with."""
    with contextlib.suppress(Exception):  # the reason for the end is raised by the caller
        ray.get(recorder.close.remote(code, message, False), timeout=120)
        write_page(store, job)
