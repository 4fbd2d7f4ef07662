"""Where the processes of a run live: one table of bundles, refused where it can never fit, waited for where it can."""

from __future__ import annotations

import ipaddress
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rayft.errors import ResourceError
from rayft.spec import Job
from rayft.train.cluster import may_grow, worker_resources

Resources = dict[str, float]


@dataclass(frozen=True)
class Spot:
    """Where one process lives: its bundle, its share of the bundle's GPUs, its CPU threads."""

    bundle: int
    gpus: float
    threads: int

    @property
    def device(self) -> str:
        """What torch calls it."""
        return "cuda" if self.gpus else "cpu"


@dataclass(frozen=True)
class Table:
    """bundles: resources of each, and whose it is. spots: of each role's processes, rank by rank."""

    bundles: list[tuple[str, Resources]]
    spots: dict[str, list[Spot]]

    @property
    def devices(self) -> Resources:
        """What all bundles hold together."""
        names = sorted({name for _, need in self.bundles for name in need})
        return {name: sum(need.get(name, 0.0) for _, need in self.bundles) for name in names}


def table_of(job: Job, *, critic: bool, reference: bool) -> Table:
    """The bundles and spots of a job, whose method has a critic or a reference of its own, or not."""
    cluster, placement = job.cluster, job.placement
    ranks, per_rank = cluster.max_workers, cluster.gpus_per_worker
    bundles: list[tuple[str, Resources]] = [("policy", worker_resources(cluster))] * ranks
    roles = [("critic", placement.critic, ranks)] if critic else []
    roles += [("reference", placement.reference, ranks)] if reference else []
    roles += [("rollout", placement.rollout, job.rollout.engines)] if job.rollout.engines else []
    # Models first: one after the other around the bundles, as few as can be share a GPU, which the job has counted on.
    for source in sorted(job.rewards, key=lambda source: source.type != "model"):
        # Only a model computes on a GPU; a function or an endpoint takes none from those that do.
        place = placement.rewards
        place = place if source.type == "model" else place.model_copy(update={"gpus": 0.0})
        roles.append((f"reward {source.name}", place, source.workers))
    spots: dict[str, list[Spot]] = {"policy": []}
    # Processes in the bundle of each rank: what they ask for, and None for an equal share of what is left.
    asked: list[list[tuple[str, float | None]]] = [[] for _ in range(ranks)]
    beside = 0
    for role, place, count in roles:
        if place.apart:
            gpus = (1.0 if per_rank else 0.0) if place.gpus is None else place.gpus
            own = worker_resources(cluster) if role == "critic" else _resources(place.cpus, gpus)
            first = len(bundles)
            bundles += [(role, own)] * count
            threads = cluster.threads if role == "critic" else max(1, int(place.cpus))
            spots[role] = [Spot(first + number, own.get("GPU", 0.0), threads) for number in range(count)]
        else:
            start = beside if role.startswith("reward ") else 0  # rewards are spread over the bundles
            beside += count if role.startswith("reward ") else 0
            for number in range(count):
                asked[(start + number) % ranks].append((role, place.gpus))
    share = min(_share(per_rank, own) for own in asked)
    for rank, own_asked in enumerate([("policy", None), *own] for own in asked):
        for role, gpus_asked in own_asked:
            gpus = share if gpus_asked is None else gpus_asked
            spots.setdefault(role, []).append(Spot(rank, gpus, cluster.threads))
    return Table(bundles, spots)


def _share(gpus: float, asked: Sequence[tuple[str, float | None]]) -> float:
    """What a rank's policy, and every process beside it that names no part, has of the rank's GPUs; the job has made sure that
    something is left."""
    left = gpus - sum(part for _, part in asked if part)
    assert left > 0 or not gpus
    return left / (1 + sum(part is None for _, part in asked))


#: How long it is looked for a way to spread bundles over nodes: ways that are tried, and bundles at most.
MOST_TRIES, MOST_BUNDLES = 2_000, 200


def refuse_what_never_fits(table: Table) -> None:
    """Raise ResourceError, with the arithmetic, if this cluster's nodes can never hold all bundles at once."""
    if not may_grow():
        alive = [node for node in ray.nodes() if node["Alive"]]
        refuse_beyond(table, [(node["NodeManagerAddress"], node["Resources"]) for node in alive])


def refuse_beyond(table: Table, nodes: Sequence[tuple[str, Resources]]) -> None:
    """Raise ResourceError, with the arithmetic, if nodes (name, resources) can never hold all bundles at once."""
    names = sorted({name for _, need in table.bundles for name in need})
    asked = ", ".join(
        f"{count} x {_amounts(need)} for {role}" for (role, need), count in _counted(table.bundles)
    )
    there = "; ".join(
        f"{node}: {_amounts({name: have.get(name, 0) for name in names})}" for node, have in nodes
    )
    remedy = (
        "Ask for fewer processes or less per process (cluster, rollout.engines, placement), or add nodes."
    )
    for role, need in table.bundles:
        if not any(all(have.get(name, 0) >= amount for name, amount in need.items()) for _, have in nodes):
            raise ResourceError(
                f"No node has {_amounts(need)}, which a process of {role} needs ({there}).", remedy
            )
    for name in names:
        wanted = sum(need.get(name, 0) for _, need in table.bundles)
        total = sum(have.get(name, 0) for _, have in nodes)
        if wanted > total:
            raise ResourceError(
                f"The run needs {wanted:g} {name} ({asked}); the cluster has {total:g} ({there}).", remedy
            )
    if not _can_be_spread([need for _, need in table.bundles], [have for _, have in nodes]):
        raise ResourceError(
            f"The run needs {asked}, which cannot be spread over the nodes ({there}) so that each lies on one.",
            remedy,
        )


def _can_be_spread(bundles: Sequence[Resources], nodes: Sequence[Resources]) -> bool:
    """Whether all bundles fit onto the nodes at once; True, too, where finding out would take long."""
    names = {name for need in bundles for name in need}
    left = [{name: have.get(name, 0) for name in names} for have in nodes]
    largest_first = sorted(bundles, key=lambda need: (need.get("GPU", 0), need.get("CPU", 0)), reverse=True)
    tries = 0

    def spread(number: int) -> bool:
        nonlocal tries
        tries += 1
        if number == len(largest_first) or tries > MOST_TRIES:
            return True
        need, tried = largest_first[number], []
        for free in left:
            if free in tried or any(free[name] < amount for name, amount in need.items()):
                continue
            tried.append(dict(free))  # on another node with as much free it would go no better
            for name, amount in need.items():
                free[name] -= amount
            if spread(number + 1):
                return True
            for name, amount in need.items():
                free[name] += amount
        return False

    return len(bundles) > MOST_BUNDLES or spread(0)


def reserve(
    table: Table, timeout_s: float, say: Callable[[str], None], heed: Callable[[], None] = lambda: None
) -> PlacementGroup:
    """All bundles or none. Raises ResourceError after the time-out, and what `heed` raises."""
    reserved = placement_group([dict(need) for _, need in table.bundles], strategy="PACK")
    try:
        await_room(reserved, table, timeout_s, say, heed)
    except BaseException:
        remove_placement_group(reserved)
        raise
    return reserved


def await_room(
    reserved: PlacementGroup,
    table: Table,
    timeout_s: float,
    say: Callable[[str], None],
    heed: Callable[[], None] = lambda: None,
) -> None:
    """Return when all bundles have their room (again, after a node was lost). Raises ResourceError after the time-out. Every few
    seconds of the wait it is said, and `heed` is called, which may raise to give it up."""
    needs = ", ".join(
        f"{count} x {_amounts(need)} ({role})" for (role, need), count in _counted(table.bundles)
    )
    waited = 0.0
    while not reserved.wait(timeout_seconds=5):
        waited += 5
        there = {name: value for name, value in ray.available_resources().items() if name in ("CPU", "GPU")}
        free = _amounts(there) or "nothing"
        if waited >= timeout_s:
            raise ResourceError(
                f"The cluster had no room for {needs} within {timeout_s:.0f} s; free: {free}.",
                "Free resources, ask for fewer, or raise cluster.start_timeout_s (of the first start) or cluster.wait_s.",
            )
        say(f"waiting for {needs}; free: {free}")
        heed()


def place(actor: Any, reserved: PlacementGroup, spot: Spot, environment: dict[str, str], *args: Any) -> Any:
    """Start an actor at a spot; it is told the spot first."""
    there = PlacementGroupSchedulingStrategy(reserved, placement_group_bundle_index=spot.bundle)
    environment = environment | {"OMP_NUM_THREADS": str(spot.threads)}
    if not spot.gpus:
        # Ray hides no GPU from a process that asked for none, and what finds one would use it beside those it belongs to.
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return (
        ray.remote(actor)
        .options(
            num_cpus=0,
            num_gpus=math.floor(spot.gpus * 10_000) / 10_000,  # Ray counts in ten-thousandths, and rounds up
            scheduling_strategy=there,
            runtime_env={"env_vars": environment},
            max_restarts=0,
        )
        .remote(spot, *args)
    )


def in_physical_order(where: Sequence[tuple[str, Sequence[str]]]) -> list[int]:
    """Indices sorted by node and GPU: bundles come in an order of Ray's own, and neighbouring ranks talk most."""

    def key(index: int) -> tuple[bytes, list[tuple[int, str]], int]:
        address, gpus = where[index]
        # Numbers by their size; identifiers, which have no order of their own, as they are written.
        named = sorted((int(gpu) if gpu.isdigit() else 0, gpu) for gpu in gpus)
        return ipaddress.ip_address(address).packed, named, index

    return sorted(range(len(where)), key=key)


def _resources(cpus: float, gpus: float) -> Resources:
    return {"CPU": cpus} | ({"GPU": gpus} if gpus else {})


def _counted(bundles: Sequence[tuple[str, Resources]]) -> list[tuple[tuple[str, Resources], int]]:
    found: list[tuple[tuple[str, Resources], int]] = []
    for bundle in bundles:
        if found and found[-1][0] == bundle:
            found[-1] = (bundle, found[-1][1] + 1)
        else:
            found.append((bundle, 1))
    return found


def _amounts(resources: Resources) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in resources.items())
