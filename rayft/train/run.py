"""One run from the driver's side: lease, data, workers, watch, and what is left behind when it ends."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ray
from rich.console import Console

from rayft.checkpoint import Lease
from rayft.errors import JobError, RayftError
from rayft.report.page import write_page
from rayft.report.progress import Progress
from rayft.report.trackers import wanted_trackers
from rayft.spec import Job
from rayft.storage import Store, open_store
from rayft.train import fork
from rayft.train.account import owner_of_run
from rayft.train.cluster import connect, refuse_impossible
from rayft.train.draining import as_taken_away
from rayft.train.failures import as_lost_recorder
from rayft.train.finish import finish, show_result
from rayft.train.history import End, EndedBefore, already_ended, refuse_other_origin, take_job
from rayft.train.link import Link
from rayft.train.prepare import prepare
from rayft.train.recorder import start_recorder
from rayft.train.requests import StopRequests
from rayft.train.signals import StopSignals
from rayft.train.watch import Watch

#: What preparing needs of libraries that take seconds to import.
HEAVY = ("torch", "transformers.models.auto.configuration_auto", "transformers.models.auto.tokenization_auto")


ASK_TIMEOUT_S = 60.0

#: What happens between the lease and its release: prepare, train, leave behind.
Body = Callable[[Job, Store, str, Lease, Any, Console, StopSignals, End | None], None]


#: Looks at the nodes before a run starts on them: job, URI of the run folder, recorder, console. Raises what is wrong.
LookFirst = Callable[[Job, str, Any, Console], None]


def run(
    job: Job,
    *,
    console: Console | None = None,
    takeover: bool = False,
    look_first: LookFirst | None = None,
    link: Link | None = None,
) -> int:
    """Start or resume the run `job.name`; returns 0, or raises the RayftError that carries the exit code.

    link: through which somebody follows the run, and decides at its reports where it is gated. Outside of the main thread no signals are taken.
    """
    body = functools.partial(_run_under_lease, gated=link is not None and link.gated)
    return run_with(body, job, console=console, takeover=takeover, look_first=look_first, link=link)


def run_with(
    body: Body,
    job: Job,
    *,
    console: Console | None = None,
    takeover: bool = False,
    look_first: LookFirst | None = None,
    link: Link | None = None,
) -> int:
    """`run`, whatever the method does between start and end."""
    console = console or Console()
    run_uri = absolute_uri(job.storage).rstrip("/") + f"/{job.name}"
    store = open_store(run_uri)
    if already_ended(store, job, console):
        return 0
    with StopSignals() as signals:
        _run(body, job, store, run_uri, console, signals, takeover=takeover, look_first=look_first, link=link)
    show_result(store, job, console)
    return 0


def _run(
    body: Body,
    job: Job,
    store: Store,
    run_uri: str,
    console: Console,
    signals: StopSignals,
    *,
    takeover: bool,
    look_first: LookFirst | None,
    link: Link | None,
) -> None:
    lease = Lease.acquire(store, {"job": job.name}, takeover=takeover, on_wait=console.print)
    lease.start_heartbeat()
    began = time.time()
    recorder: Any = None
    try:
        wanted_trackers(job)  # refuses what is not installed before anything starts
        end_before = take_job(store, job)
        with StopRequests(store, signals):
            with signals.lent_to_ray(), importing(*HEAVY):
                connect(job.cluster)
            refuse_impossible(job.cluster)
            recorder = start_recorder(job, run_uri, lease.owner, lease.epoch)
            ray.get(recorder.open.remote(began, owner_of_run()), timeout=ASK_TIMEOUT_S)
            if link is not None:
                link.attach(recorder, signals.request)
            if look_first is not None:
                look_first(job, run_uri, recorder, console)
            elif job.cluster.preflight:
                raise JobError("cluster.preflight is what `rayft run` does.", "Start the job with it.")
            body(job, store, run_uri, lease, recorder, console, signals, end_before)
        _record_end(recorder, store, 0, "done")
    except EndedBefore:
        raise
    except BaseException as raised:
        error = as_lost_recorder(as_taken_away(raised))
        if isinstance(error, RayftError):
            _record_end(recorder, store, error.code, error.message, terminal=error.terminal)
        else:
            _record_end(recorder, store, 1, f"{type(error).__name__}: {error}")
        if error is raised:
            raise
        raise error from raised
    finally:
        if link is not None:
            link.detach()
        lease.release()


def _run_under_lease(
    job: Job,
    store: Store,
    run_uri: str,
    lease: Lease,
    recorder: Any,
    console: Console,
    signals: StopSignals,
    end_before: End | None,
    *,
    gated: bool,
) -> None:
    from rayft.train.fit import fit_group

    cache_uri = absolute_uri(job.data.cache) if job.data.cache else run_uri.rpartition("/")[0] + "/cache"
    prepared = prepare(job, run_uri, cache_uri, lease.owner, console.print)
    prepared = dataclasses.replace(prepared, plan=dataclasses.replace(prepared.plan, gated=gated))
    refuse_other_origin(store, job.name, prepared.origin(), end_before)
    plan = prepared.plan
    fork.begin(job, store, lease, prepared.origin(), recorder, total=plan.total_steps, end=plan.end)
    ray.get(recorder.event.remote("plan", **prepared.memory), timeout=ASK_TIMEOUT_S)
    progress = Progress(console, prepared.plan.total_steps, every=job.log.every_steps)

    def show(rows: list[Any]) -> None:
        for row in rows:
            progress.row(row)

    watch = Watch(recorder, store, job.cluster.hang_timeout_s, show)
    fit_group(prepared, recorder, watch, lease, signals, console.print)
    finish(prepared.plan.job, prepared.files, store, recorder)
    watch.show_rows()


@contextlib.contextmanager
def importing(*modules: str) -> Iterator[None]:
    """Import modules in a thread meanwhile: Ray takes seconds to start, and so do they. None of them imports Ray."""

    def load() -> None:
        with contextlib.suppress(Exception):  # whoever needs the module sees the error
            for module in modules:
                importlib.import_module(module)

    thread = threading.Thread(target=load, name="rayft-import", daemon=True)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def absolute_uri(uri: str) -> str:
    """`uri` with a relative path made absolute, since workers run in folders of their own."""
    return uri if "://" in uri else str(Path(uri).expanduser().absolute())


def _record_end(recorder: Any, store: Store, code: int, message: str, *, terminal: bool = False) -> None:
    """The run's last event, and the page that shows it."""
    if recorder is None:
        return
    try:
        ray.get(recorder.close.remote(code, message, terminal), timeout=120)
        write_page(store)
    except Exception:
        # The reason for the end is raised by the caller; a log that cannot be written must not hide it.
        return
