"""One run from the driver's side: lease, data, workers, watch, and what is left behind when it ends."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from rich.console import Console

from rayft.checkpoint import Lease
from rayft.errors import LeaseLost, PreemptedError, RayftError
from rayft.report.lineage import write_lineage
from rayft.report.log import read_log
from rayft.report.page import write_page
from rayft.report.progress import Progress
from rayft.report.trackers import wanted_trackers
from rayft.spec import Job, changed_keys, dump_job
from rayft.storage import Store, open_store
from rayft.train.cluster import connect, refuse_impossible, worker_resources
from rayft.train.failures import Budget, as_rayft_error, changed_job
from rayft.train.finish import finish, job_of_run, show_result
from rayft.train.prepare import Prepared, prepare
from rayft.train.recorder import start_recorder
from rayft.train.setup import worker_environment
from rayft.train.watch import Watch
from rayft.train.worker import run_worker

#: Seconds that an elastic group waits for its resources before its size is chosen again.
ELASTIC_WAIT_S = 30.0
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@dataclass
class Ended:
    """What `fit` came to in its thread."""

    error: BaseException | None = None


def run(job: Job, *, console: Console | None = None, takeover: bool = False) -> int:
    """Start or resume the run `job.name`; returns 0, or raises the RayftError that carries the exit code."""
    console = console or Console()
    run_uri = absolute_uri(job.storage).rstrip("/") + f"/{job.name}"
    store = open_store(run_uri)
    if already_ended(store, job, console):
        return 0
    lease = Lease.acquire(store, {"job": job.name}, takeover=takeover, on_wait=console.print)
    lease.start_heartbeat()
    recorder: Any = None
    try:
        wanted_trackers(job)  # refuses what is not installed before anything starts
        store.put("job.yaml", dump_job(job).encode())
        connect(job.cluster)
        refuse_impossible(job.cluster)
        recorder = start_recorder(job, run_uri, lease.owner, lease.epoch)
        _run_under_lease(job, store, run_uri, lease, recorder, console)
        _record_end(recorder, store, 0, "done")
    except RayftError as error:
        _record_end(recorder, store, error.code, error.message, terminal=error.terminal)
        raise
    except BaseException as error:
        _record_end(recorder, store, 1, f"{type(error).__name__}: {error}")
        raise
    finally:
        lease.release()
    show_result(store, job, console)
    return 0


def _run_under_lease(
    job: Job, store: Store, run_uri: str, lease: Lease, recorder: Any, console: Console
) -> None:
    cache_uri = absolute_uri(job.data.cache) if job.data.cache else run_uri.rpartition("/")[0] + "/cache"
    prepared = prepare(job, run_uri, cache_uri, lease.owner, console.print)
    write_lineage(store, prepared.origin())
    ray.get(recorder.event.remote("plan", **prepared.memory), timeout=60)
    progress = Progress(console, prepared.plan.total_steps, every=job.log.every_steps)

    def show(rows: list[Any]) -> None:
        for row in rows:
            progress.row(row)

    watch = Watch(recorder, store, job.cluster.hang_timeout_s, show)
    _fit(prepared, recorder, watch, lease)
    finish(prepared, store, recorder)
    watch.show_rows()


def _fit(prepared: Prepared, recorder: Any, watch: Watch, lease: Lease) -> None:
    """Run Ray Train in a thread while this one watches, prepares later shards and takes signals."""
    job = prepared.plan.job
    trainer = build_trainer(prepared, recorder)
    ended = Ended()

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:
            ended.error = error

    thread = threading.Thread(target=fit, name="rayft-fit", daemon=True)
    with _stop_on_signal(lambda reason: ray.get(recorder.request_stop.remote(reason), timeout=30)):
        thread.start()
        while thread.is_alive():
            thread.join(timeout=watch.interval_s)
            prepared.shards.advance(0)
            watch.look()
            refuse_lost(lease)
    watch.show_rows()
    if ended.error is not None:
        ending = ray.get(recorder.ended.remote(), timeout=60)
        raise ending or as_rayft_error(ended.error, job.cluster.max_failures) from ended.error


def refuse_lost(lease: Lease) -> None:
    """Raise LeaseLost if another driver has taken over while this one was stopped."""
    if not lease.held():
        raise LeaseLost(
            f"Another driver has taken over {lease.store.uri}; this one stops.",
            "Nothing is lost; follow the other.",
        )


def build_trainer(prepared: Prepared, recorder: Any) -> TorchTrainer:
    """The Ray Train trainer of a run. Its own storage is scratch: what to resume from stands in our manifests."""
    plan = prepared.plan
    cluster = plan.job.cluster
    scratch = Path(tempfile.gettempdir()) / f"rayft-{os.getuid()}" / f"{plan.job.name}-{plan.owner['id'][:8]}"
    elastic = isinstance(cluster.num_workers, tuple)
    # How long to wait for the resources of a group. An elastic one chose its size by what the cluster said was free,
    # which lags behind a node's death, so it soon asks again.
    wait_s = min(cluster.start_timeout_s, ELASTIC_WAIT_S) if elastic else cluster.start_timeout_s
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(wait_s)
    return TorchTrainer(
        run_worker,
        train_loop_config={"plan": plan, "recorder": recorder},
        torch_config=TorchConfig(
            backend="nccl" if cluster.gpus_per_worker else "gloo",
            timeout_s=int(max(1800, 2 * cluster.hang_timeout_s)),
        ),
        scaling_config=ScalingConfig(
            num_workers=cluster.num_workers,
            use_gpu=cluster.gpus_per_worker > 0,
            resources_per_worker=worker_resources(cluster),
            elastic_resize_monitor_interval_s=cluster.elastic_interval_s,
        ),
        run_config=RunConfig(
            name=plan.job.name,
            storage_path=str(scratch),
            failure_config=Budget(
                recorder, cluster.max_failures, starts=cluster.max_failures if elastic else 0
            ),
            worker_runtime_env={"env_vars": worker_environment(plan.job, plan.stage)},
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
        ),
    )


def already_ended(store: Store, job: Job, console: Console) -> bool:
    """Whether there is nothing to do. Raises JobError for another job, and again the error that ended this one for good."""
    if not store.exists("job.yaml"):
        return False
    before = job_of_run(store)
    changes = changed_keys(before, job)
    if changes:
        raise changed_job(job.name, changes)
    ends = [row for row in read_log(store) if row["kind"] == "event" and row["event"] == "end"]
    if not ends:
        return False
    last = ends[-1]
    if last["code"] == 0:
        console.print(f"The run {job.name} is done; its model is in {store.where('model')}.")
        return True
    if last["terminal"]:
        error = RayftError(
            f"The run {job.name} ended before and an unchanged retry cannot cure it: {last['message']}",
            "Change the job and give it another name.",
        )
        error.code = last["code"]
        raise error
    return False


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


class _stop_on_signal:
    """While inside, the first SIGTERM or SIGINT asks the run to save and stop; the second one interrupts."""

    def __init__(self, request: Callable[[str], Any]) -> None:
        self._request = request
        self._asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS}

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: Any) -> None:
        if self._asked:
            raise PreemptedError(
                "The run was interrupted before it could save.",
                "Start it again to go on from the last checkpoint.",
            )
        self._asked = True
        threading.Thread(target=self._request, args=(signal.Signals(number).name,), daemon=True).start()
