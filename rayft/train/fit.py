"""Ray Train under watch: one trainer in a thread, this one looking after it, its data and signals."""

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

from rayft.checkpoint import Lease
from rayft.errors import LeaseLost, PreemptedError
from rayft.train.budget import Budget
from rayft.train.cluster import worker_resources
from rayft.train.failures import as_rayft_error
from rayft.train.group import run_worker, worker_environment
from rayft.train.prepare import Prepared
from rayft.train.watch import Watch

#: Seconds that an elastic group waits for its resources before its size is chosen again.
ELASTIC_WAIT_S = 30.0
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@dataclass
class Ended:
    """What `fit` came to in its thread."""

    error: BaseException | None = None


def fit_group(prepared: Prepared, recorder: Any, watch: Watch, lease: Lease) -> None:
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
