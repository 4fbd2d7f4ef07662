"""How many trials a cluster holds at once: what a trial's processes ask for, against the nodes there are.

Ray Tune sees only the process that drives a trial; the workers are placed by Ray Train or by the roles of an RLHF run. So what
Tune cannot count is counted here, before a trial may start.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import ray

from rayft.errors import ResourceError
from rayft.rlhf.placement import table_of
from rayft.spec import Job
from rayft.train.cluster import amounts, may_grow, worker_resources

Resources = dict[str, float]
#: What trials ask for; other resources of a node are not theirs.
COUNTED = ("CPU", "GPU")


def bundles_of(job: Job) -> list[Resources]:
    """What each of a trial's processes occupies; of an elastic trial those of its least size."""
    if job.reinforced:
        table = table_of(job, critic=bool(job.rl.critic), reference=job.reference == "group")
        return [dict(need) for _, need in table.bundles]
    return [worker_resources(job.cluster)] * job.cluster.min_workers


def total_of(bundles: Iterable[Resources]) -> Resources:
    """Everything that bundles ask for together."""
    total: Resources = {}
    for bundle in bundles:
        for name, amount in bundle.items():
            total[name] = total.get(name, 0.0) + amount
    return total


def trials_that_fit(
    bundles: list[Resources], nodes: Iterable[Mapping[str, float]], share: float = 1.0
) -> int:
    """How many trials of such bundles fit on nodes (resources of each) at once, within a share of all their resources.

    Bundles are laid first fit, largest first, as Ray packs them; a bundle lies on one node, a trial's on any.
    """
    free = [dict(node) for node in nodes]
    granted = {name: share * sum(node.get(name, 0.0) for node in free) for name in COUNTED}
    need = total_of(bundles)
    count = 0
    while all(granted[name] + 1e-9 >= (count + 1) * need.get(name, 0.0) for name in COUNTED):
        if not _lay(bundles, free):
            break
        count += 1
        if count >= 10_000:  # a trial that asks for nothing
            break
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


def refuse_no_trial(job: Job, share: float) -> None:
    """Raise ResourceError, with the arithmetic, where not even one trial fits the cluster or the share of it."""
    if may_grow():
        return
    bundles, nodes = bundles_of(job), nodes_now()
    if trials_that_fit(bundles, nodes, share):
        return
    asked = f"a trial asks for {len(bundles)} x {amounts(bundles[0])}"
    if len({tuple(sorted(bundle.items())) for bundle in bundles}) > 1:
        asked = f"a trial asks for {amounts(total_of(bundles))} in {len(bundles)} processes"
    there = "; ".join(amounts({name: node.get(name, 0.0) for name in COUNTED}) for node in nodes)
    of_it = f", and tune.share grants {share:g} of it" if share < 1 else ""
    raise ResourceError(
        f"No trial fits: {asked}; the cluster's nodes have {there}{of_it}.",
        "Ask for fewer workers or less per worker (cluster, placement), raise tune.share, or add nodes.",
    )
