"""Connect to a Ray cluster, or start one here, and refuse what can never fit."""

from __future__ import annotations

import contextlib
import json
import os
from typing import Any

import ray

from rayft.errors import JobError, ResourceError
from rayft.plan.gpus import find_gpu
from rayft.spec import Cluster

#: What Ray puts before the kind of a node's accelerators to make a resource of it.
ACCELERATOR = "accelerator_type:"


def connect(cluster: Cluster) -> None:
    """Join the cluster of RAY_ADDRESS, or start a local one for the length of this process."""
    if ray.is_initialized():
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": True}
    if os.environ.get("RAY_ADDRESS"):
        ray.init(**quiet)
        return
    # Nobody drains a cluster that lives as long as this process.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    # Every process of a run has an environment of its own, so none of them could take an idle one that Ray starts in advance.
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
    try:
        # `local`: the address file of a cluster that was killed would otherwise be believed.
        ray.init(address="local", include_dashboard=False, **quiet)
    except Exception as error:
        if "timed out during startup" not in str(error):
            raise
        raise ResourceError(
            "Ray did not start on this machine: its processes did not answer in time.",
            "Free memory or CPU (the machine is overloaded), and try again.",
        ) from error


def reported_gpu() -> str | None:
    """The GPU of the joined cluster's nodes, as the memory plan calls it; None where they have none that it knows, or several kinds."""
    known = set()
    for node in ray.nodes():
        for resource in node["Resources"] if node["Alive"] else ():
            if resource.startswith(ACCELERATOR):
                with contextlib.suppress(JobError):  # some other accelerator, or a name that says no size
                    known.add(find_gpu(resource.removeprefix(ACCELERATOR)).name)
    return known.pop() if len(known) == 1 else None


def worker_resources(cluster: Cluster) -> dict[str, float]:
    """What one rank occupies, as Ray resources."""
    resources = {"CPU": cluster.cpus_per_worker}
    if cluster.gpus_per_worker:
        resources["GPU"] = cluster.gpus_per_worker
    return resources


def refuse_impossible(cluster: Cluster) -> None:
    """Raise ResourceError if the nodes there are can never hold the workers asked for, naming both."""
    need = worker_resources(cluster)
    least = cluster.num_workers[0] if isinstance(cluster.num_workers, tuple) else cluster.num_workers
    nodes = [node for node in ray.nodes() if node["Alive"]]
    room = sum(_fits(node["Resources"], need) for node in nodes)
    if room >= least or may_grow():
        return
    there = "; ".join(
        f"{node['NodeManagerAddress']}: {amounts({k: node['Resources'].get(k, 0) for k in ('CPU', 'GPU')})}"
        for node in nodes
    )
    raise ResourceError(
        f"cluster.num_workers asks for {least} workers with {amounts(need)} each; the cluster holds {room} ({there}).",
        "Ask for fewer workers or less per worker, or add nodes.",
    )


def may_grow() -> bool:
    """Whether an autoscaler might add nodes: it leaves its state in Ray's internal store, each version of its own kind."""
    from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
    from ray.experimental.internal_kv import _internal_kv_get

    # Names of src/ray/common/constants.h.
    if _internal_kv_get(b"__autoscaler_v2_enabled", namespace=b"__autoscaler") == b"1":
        return True
    # Version 1 also watches clusters of which it has no configuration; there every node is of a type of its own.
    status = json.loads(_internal_kv_get(DEBUG_AUTOSCALING_STATUS) or "{}")
    types = (status.get("autoscaler_report") or {}).get("active_nodes") or {}
    return any(not name.startswith("node_") for name in types)


def _fits(there: dict[str, float], need: dict[str, float]) -> int:
    return min(int(there.get(name, 0) / amount) for name, amount in need.items())


def amounts(resources: dict[str, float]) -> str:
    """Resources as a person reads them."""
    return ", ".join(f"{amount:g} {name}" for name, amount in resources.items())
