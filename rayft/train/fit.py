"""Ray Train under watch: one trainer in a thread, this one looking after it, its data and signals."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.train import RunConfig, ScalingConfig

from rayft.checkpoint import Lease
from rayft.errors import LeaseLost, RayftError, StorageError
from rayft.train.budget import Budget
from rayft.train.cluster import worker_resources
from rayft.train.draining import Drains
from rayft.train.failures import as_rayft_error
from rayft.train.group import NO_MORE_SHARDS, run_worker, worker_environment
from rayft.train.placing import Placing
from rayft.train.prepare import Prepared, Shards
from rayft.train.process_group import ProcessGroup, Trainer
from rayft.train.signals import StopSignals
from rayft.train.waiting import Phases, Waiting
from rayft.train.watch import Watch

#: Seconds that an elastic group waits for its resources before its size is chosen again.
ELASTIC_WAIT_S = 30.0
#: How often tasks that tokenise are looked at: as many as there are CPUs run at once, and each takes a second or so.
SHARDS_EVERY_S = 0.2


@dataclass
class Ended:
    """What `fit` came to in its thread."""

    error: BaseException | None = None


def fit_group(
    prepared: Prepared,
    recorder: Any,
    watch: Watch,
    lease: Lease,
    signals: StopSignals,
    say: Callable[[str], None],
) -> None:
    """Run Ray Train in a thread while this one watches, prepares later shards and takes signals. say: shown to the user."""
    job = prepared.plan.job
    trainer = build_trainer(prepared, recorder)
    ended = Ended()

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:
            ended.error = error

    def ask_to_stop(reason: str) -> None:
        recorder.request_stop.remote(reason)

    def ask_to_move(reason: str) -> None:
        recorder.request_move.remote(reason)

    drains = Drains(end=ask_to_stop, move=ask_to_move)
    waiting = Waiting(recorder, job.cluster, say)
    thread = threading.Thread(target=fit, name="rayft-fit", daemon=True)
    data = LateShards(prepared.shards, ask_to_stop, patience_s=job.cluster.hang_timeout_s)
    with signals.asking(ask_to_stop):
        thread.start()
        while thread.is_alive():
            looked = time.monotonic()
            while thread.is_alive() and time.monotonic() - looked < watch.interval_s:
                data.advance()
                thread.join(
                    timeout=watch.interval_s if data.settled else min(SHARDS_EVERY_S, watch.interval_s)
                )
            watch.look()
            drains.look(watch.nodes)
            waiting.look(ending=drains.ending)
            refuse_lost(lease)
    watch.show_rows()
    if ended.error is not None:
        ending = ray.get(recorder.ended.remote(), timeout=60)
        raise data.error or ending or as_rayft_error(ended.error, job.cluster.max_failures) from ended.error


class LateShards:
    """Shards that are made while training runs.

    One that cannot be made asks the ranks to save and stop, and is told when they have: a step that has been taken is
    not lost to a row that is read later, and a run that never reads the row does not end by it.
    """

    def __init__(self, shards: Shards, ask_to_stop: Callable[[str], None], *, patience_s: float) -> None:
        self.error: RayftError | None = None
        self._shards, self._ask_to_stop, self._patience_s = shards, ask_to_stop, patience_s
        self._failed_at = 0.0
        self._asked = False

    @property
    def settled(self) -> bool:
        """Whether all shards are made, or none will be any more."""
        return self._asked or self._shards.done

    def advance(self) -> None:
        """Look after the tasks. Raises the error of one that failed if the ranks have not stopped in `patience_s`."""
        if self.error is None:
            try:
                self._shards.advance(0)
                self._shards.refuse_empty()
            except RayftError as error:
                self.error, self._failed_at = error, time.monotonic()
        if self.error is not None and not self._asked and self._shards.idle():
            self._asked = True  # not before: whether a shard is there must look alike to all ranks
            self._ask_to_stop(NO_MORE_SHARDS)
        if self.error is not None and time.monotonic() - self._failed_at > self._patience_s:
            raise self.error


def refuse_lost(lease: Lease) -> None:
    """Raise LeaseLost if another driver has taken over while this one was stopped."""
    try:
        held = lease.held()
    except StorageError:
        return  # a storage that is away for a while says nothing; the next commit says it if it stays away
    if not held:
        raise LeaseLost(
            f"Another driver has taken over {lease.store.uri}; this one stops.",
            "Nothing is lost; follow the other.",
        )


def build_trainer(prepared: Prepared, recorder: Any) -> Trainer:
    """The Ray Train trainer of a run. Its own storage is scratch: what to resume from stands in our manifests."""
    plan = prepared.plan
    cluster = plan.job.cluster
    scratch = Path(tempfile.gettempdir()) / f"rayft-{os.getuid()}" / f"{plan.job.name}-{plan.owner['id'][:8]}"
    elastic = isinstance(cluster.num_workers, tuple)
    # How long to wait for the resources of a group. An elastic one chose its size by what the cluster said was free,
    # which lags behind a node's death, so it soon asks again.
    wait_s = min(cluster.start_timeout_s, ELASTIC_WAIT_S) if elastic else cluster.start_timeout_s
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(wait_s)
    return Trainer(
        run_worker,
        train_loop_config={"plan": plan, "recorder": recorder},
        backend_config=ProcessGroup(
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
            callbacks=[Phases(recorder), Placing(recorder)],
            worker_runtime_env={"env_vars": worker_environment(plan.job, plan.stage)},
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
        ),
    )
