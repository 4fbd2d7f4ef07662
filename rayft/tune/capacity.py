"""How many trials a cluster holds at once: what a trial's processes ask for, against the nodes there are.

Ray Tune sees only the process that drives a trial; the workers are placed by Ray Train or by the roles of an RLHF run. So what
Tune cannot count is counted here, before a trial may start.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import ray

from rayft.rlhf.placement import table_of
from rayft.spec import Job
from rayft.spec.search import jobs_over
from rayft.train.cluster import worker_resources

Resources = dict[str, float]
#: What trials ask for; other resources of a node are not theirs.
COUNTED = ("CPU", "GPU")
#: What trials that ask for nothing are counted up to.
MOST = 10_000
#: Keys that decide what a trial asks for.
OF_THE_SIZE = re.compile(r"(method|cluster|placement|rollout|rewards|rl)(\.|$)")


@dataclass(frozen=True)
class Size:
    """What a trial asks for. bundles: of each of its processes, of an elastic trial those of its least size. most: all that it may
    come to hold."""

    bundles: list[Resources]
    most: Resources


def size_of(job: Job) -> Size:
    """What a trial of this job asks for."""
    if job.reinforced:
        table = table_of(job, critic=bool(job.rl.critic), reference=job.reference == "group")
        bundles = [dict(need) for _, need in table.bundles]
        return Size(bundles, total_of(bundles))
    worker = worker_resources(job.cluster)
    return Size([worker] * job.cluster.min_workers, total_of([worker] * job.cluster.max_workers))


def sizes_of(search: Job) -> list[Size]:
    """What trials of a search ask for, by the values of its space, the least first."""
    found: list[Size] = []
    for job in jobs_over(search, OF_THE_SIZE):
        size = size_of(job)
        found += [] if size in found else [size]

    def devices(size: Size) -> list[float]:
        least = total_of(size.bundles)
        return [one.get(name, 0.0) for one in (least, size.most) for name in ("GPU", "CPU")]

    return sorted(found, key=devices)


def total_of(bundles: Iterable[Resources]) -> Resources:
    """Everything that bundles ask for together."""
    total: Resources = {}
    for bundle in bundles:
        for name, amount in bundle.items():
            total[name] = total.get(name, 0.0) + amount
    return total


def trials_that_fit(bundles: list[Resources], nodes: Iterable[Mapping[str, float]]) -> int:
    """How many trials of such bundles fit on nodes (resources of each) at once.

    Bundles are laid first fit, largest first, as Ray packs them; a bundle lies on one node, a trial's on any.
    """
    free = [dict(node) for node in nodes]
    count = 0
    while count < MOST and _lay(bundles, free):
        count += 1
    return count


def _lay(bundles: list[Resources], free: list[dict[str, float]]) -> bool:
    """Take the bundles' room from the nodes; False, with nothing taken, where there is none."""
    taken: list[tuple[dict[str, float], Resources]] = []
    for bundle in sorted(
        bundles, key=lambda need: (need.get("GPU", 0.0), need.get("CPU", 0.0)), reverse=True
    ):
        node = next(
            (
                node
                for node in free
                if all(node.get(name, 0.0) + 1e-9 >= amount for name, amount in bundle.items())
            ),
            None,
        )
        if node is None:
            for other, need in taken:
                for name, amount in need.items():
                    other[name] += amount
            return False
        for name, amount in bundle.items():
            node[name] -= amount
        taken.append((node, bundle))
    return True


def nodes_now() -> list[Resources]:
    """Resources of every node that is alive."""
    return [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]


def free_now() -> list[Resources]:
    """What is free on every node, as the cluster's own books say, a second or so late."""
    from ray._private.state import available_resources_per_node

    found: dict[str, dict[str, Any]] = available_resources_per_node()
    return [{name: float(amount) for name, amount in node.items()} for node in found.values()]
