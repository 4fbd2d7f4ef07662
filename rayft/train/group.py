"""What a worker group is started with: the run's plan, its environment, its entry point.

Ray Train's controller reads this in a process of its own before any worker starts, so it imports nothing heavy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ray

from rayft.data.cache import CacheSpec
from rayft.spec import Job
from rayft.train.failures import worker_failure

ASK_TIMEOUT_S = 60.0

#: Why ranks are asked to stop when a shard cannot be made: those that wait for one need not wait any longer.
NO_MORE_SHARDS = "a shard of the data cannot be made"


@dataclass(frozen=True)
class Notice:
    """Why the ranks should save and leave. moving: the run goes on elsewhere by itself, since their nodes are taken away."""

    reason: str
    moving: bool = False


@dataclass(frozen=True)
class RunPlan:
    """All a worker needs to know, decided once by the driver and the same on every rank.

    owner: identity of the driver in the lease. stage: ZeRO stage. packed: whether documents share a row.
    train_spec, eval_spec: the tokenised cache. total_steps: optimizer steps of the run
    (at most, where it ends at position `end`). gated: whether the ranks wait after each report (rayft.train.link).
    """

    job: Job
    run_uri: str
    owner: dict[str, Any]
    stage: int
    packed: bool
    train_spec: CacheSpec
    eval_spec: CacheSpec | None
    cache_uri: str
    total_steps: int
    end: int | None
    checkpoint_every: int
    gated: bool = False


def worker_environment(job: Job, stage: int) -> dict[str, str]:
    """Environment variables that a rank's process starts with.

    On a CPU, glibc is told to keep what was freed. Buckets, gradients and activations otherwise get new mappings at
    every step, and the kernel clears each page again: 1.9 GB a step for 135M parameters under ZeRO-2. One arena, since
    Ray Train trains in a thread, and only the main arena can hold large blocks. The price is memory between the blocks:
    a fifth more at the peak. ZeRO-3 is chosen where memory is short, so there large blocks are given back at once.
    """
    environment = {
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": str(job.cluster.threads),
    }
    if job.cluster.gpus_per_worker:
        return environment
    environment["DS_ACCELERATOR"] = "cpu"
    if stage < 3:
        environment |= {
            "MALLOC_ARENA_MAX": "1",
            "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
            "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
        }
    else:  # a fixed threshold; by default it rises with what is freed, and blocks of up to 32 MB stay
        environment["MALLOC_TRIM_THRESHOLD_"] = str(1 << 20)
    return environment


def run_worker(config: dict[str, Any]) -> None:
    """Entry point of Ray Train's workers. What ends the run for good is told to the recorder before it is raised."""
    from rayft.train.worker import Worker

    plan, recorder = config["plan"], config["recorder"]
    try:
        Worker(plan, recorder).train()
    except BaseException as error:
        ending = worker_failure(error)
        if ending is not None:
            ray.get(recorder.end.remote(ending), timeout=ASK_TIMEOUT_S)
            raise ending from error
        raise
