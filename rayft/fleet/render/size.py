"""What a run needs of a fleet: the node type, the ZeRO stage, worker groups, and the time that a checkpoint takes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from rayft.errors import JobError, ResourceError
from rayft.fleet.render.pack import Need, Pods, Room, fits_alone, packed
from rayft.fleet.render.search import drivers_mib, granted, on_its_own, refuse_other_sizes, trials_at_once
from rayft.plan.architecture import Architecture
from rayft.plan.checkpoint import SaveTime, checkpoint_bytes, estimated
from rayft.plan.choose import FILL, Choice, choose, suggest
from rayft.plan.gpus import Gpu, find_gpu
from rayft.plan.memory import OVERHEAD_CPU
from rayft.spec import Job
from rayft.spec.profile import NodeType, Profile

MIB = 2**20
#: Raylet, agents and the kernel's own buffers of a pod, in MiB.
POD_OVERHEAD_MIB = 1024
#: Host memory of a process that computes on a GPU: libraries, pinned buffers, the data's pages.
GPU_PROCESS_MIB = 4096
#: Kueue counts the head too (workload_types.go, MaxItems 18).
MOST_GROUPS = 17


@dataclass(frozen=True)
class Group:
    """A worker group: pods alike on nodes of one type."""

    name: str
    node: NodeType
    pods: Pods


@dataclass(frozen=True)
class Size:
    """job: with what the profile decides filled in. choice: the memory plan's, where the model could be looked at. notes: what
    people should know."""

    job: Job
    groups: tuple[Group, ...]
    choice: Choice | None
    saving: SaveTime | None
    notes: tuple[str, ...] = ()

    @property
    def gpus(self) -> int:
        """Of all pods."""
        return sum(group.pods.count * group.pods.room.gpus for group in self.groups)


def size(
    job: Job,
    profile: Profile,
    architecture: Architecture | None,
    scorers: Mapping[str, Architecture] | None = None,
) -> Size:
    """The run's size on the fleet of a profile; of a search that of as many trials as may run at a time.

    architecture: of the model; None where it cannot be had, and then nothing is known of memory. Raises ResourceError, with
    what was asked for and what there is, and JobError for a GPU that the fleet has not.
    """
    refuse_other_sizes(job)
    refuse_beyond_limits(job, profile)
    refusal: ResourceError | None = None
    for name, node in _types(job, profile):
        try:
            return _on(job, profile, name, node, architecture, scorers or {})
        except ResourceError as error:
            refusal = refusal or error
    assert refusal is not None
    raise refusal


def refuse_beyond_limits(job: Job, profile: Profile) -> None:
    """Raise ResourceError for a run, or a trial of a search, larger than the profile lets one be."""
    one, whole, by = (
        ("A trial", "search", " x search_share or tune.share") if job.tune else ("The run", "run", "")
    )
    for asked, limit, what in (
        (job.cluster.max_workers, profile.limits.workers, "workers"),
        (gpus_of(job), profile.limits.gpus, "gpus"),
    ):
        most = granted(limit, job, profile)
        if asked > most:
            raise ResourceError(
                f"{one} asks for {asked:g} {what.replace('gpus', 'GPUs')}, and profile {profile.name} lets a {whole} have "
                f"{most} (limits.{what}{by}).",
                "Ask for fewer, or take another profile.",
            )


def gpus_of(job: Job) -> float:
    """GPUs of all processes of the run, or of a trial."""
    return sum(gpus for gpus, _, _ in processes(job))


def processes(job: Job) -> list[tuple[float, float, str]]:
    """GPUs, CPUs and role of every bundle that the run reserves."""
    if not job.reinforced:
        cluster = job.cluster
        return [(cluster.gpus_per_worker, cluster.cpus_per_worker, "worker")] * cluster.max_workers
    from rayft.rlhf.placement import table_of

    table = table_of(job, critic=job.rl.critic, reference=job.reference == "group")
    return [(need.get("GPU", 0.0), need.get("CPU", 0.0), role) for role, need in table.bundles]


def _types(job: Job, profile: Profile) -> list[tuple[str, NodeType]]:
    """Node types that the run may use, in the profile's order. Raises JobError, ResourceError."""
    wants_gpus = any(gpus for gpus, _, _ in processes(job))
    found = [(name, node) for name, node in profile.nodes.items() if bool(node.gpus) == wants_gpus]
    if not found:
        raise ResourceError(
            f"The run needs nodes {'with' if wants_gpus else 'without'} GPUs, and profile {profile.name} has none.",
            "Change cluster.gpus_per_worker, or take another profile.",
        )
    if job.cluster.gpu and wants_gpus:
        wanted = find_gpu(job.cluster.gpu)
        found = [(name, node) for name, node in found if _gpu(profile, name, node) == wanted]
        if not found:
            there = ", ".join(sorted({node.gpu for node in profile.nodes.values() if node.gpu}))
            raise JobError(
                f"cluster.gpu is {job.cluster.gpu}, and profile {profile.name} has {there}.",
                "Name one of them, or none.",
            )
    return found


def _gpu(profile: Profile, name: str, node: NodeType) -> Gpu:
    """What the memory plan knows of a node type's GPU. Raises JobError for one that it does not know."""
    assert node.gpu is not None
    try:
        return find_gpu(node.gpu)
    except JobError as error:
        said = error.message.replace("cluster.gpu", f"Profile {profile.name}: nodes.{name}.gpu")
        raise JobError(said, error.remedy) from None


def _on(
    job: Job,
    profile: Profile,
    name: str,
    node: NodeType,
    architecture: Architecture | None,
    scorers: Mapping[str, Architecture],
) -> Size:
    room = _room_of(node, profile)
    notes: list[str] = []
    choice = None
    beside = drivers_mib(job, trials_at_once(job, profile, gpus_of(job)))
    if architecture is None:
        needs = _needs(job, room, None, None, 0)
        if not node.gpus:
            notes.append(
                "The model could not be looked at from here: memory is the nodes' by share, not by plan."
            )
    elif node.gpus:
        gpu = _gpu(profile, name, node)
        job = job.model_copy(update={"cluster": job.cluster.model_copy(update={"gpu": gpu.name})})
        limit = int(gpu.memory * min(1.0, job.cluster.gpus_per_worker))
        choice = _chosen(job, name, architecture, limit, scorers)
        needs = _needs(job, room, choice, architecture, beside)
    else:
        choice, needs = _densest(job, name, room, architecture, scorers, beside)
    if choice:
        job = job.model_copy(update={"zero": job.zero.model_copy(update={"stage": choice.stage})})
    groups, trials = _most_groups(job, profile, name, node, room, needs)
    if job.tune:
        job, said = on_its_own(job, profile, trials)
        notes += said
    saving = None
    if architecture is not None:
        pods = sum(group.pods.count for group in groups)
        # The fewest nodes that those that are trained, or the least that an elastic run goes on with, may be on.
        each = max(_ranks_on(job, group.pods.room) for group in groups)
        savers = math.ceil(job.cluster.min_workers / max(1, each))
        saving = estimated(
            checkpoint_bytes(job, architecture, scorers),
            savers,
            profile.checkpoint.node_mb_per_s / math.ceil(trials / pods),  # trials on one node save together
            profile.grace.worker_drain_s,
        )
    return Size(job, groups, choice, saving, tuple(notes))


def _ranks_on(job: Job, room: Room) -> int:
    """How many of the ranks that are trained a pod holds."""
    cluster = job.cluster
    pairs = ((room.gpus, cluster.gpus_per_worker), (room.cpus, cluster.cpus_per_worker))
    return int(min(there / asked for there, asked in pairs if asked))


def _most_groups(
    job: Job, profile: Profile, name: str, node: NodeType, room: Room, needs: Sequence[Need]
) -> tuple[tuple[Group, ...], int]:
    """Pods for as many trials of a search as may run at a time, or for a run, and how many that are."""
    for trials in range(trials_at_once(job, profile, gpus_of(job)), 1, -1):
        with contextlib.suppress(ResourceError):
            return _groups(job, profile, name, node, room, needs, trials), trials
    return _groups(job, profile, name, node, room, needs, 1), 1


def _groups(
    job: Job, profile: Profile, name: str, node: NodeType, room: Room, needs: Sequence[Need], trials: int
) -> tuple[Group, ...]:
    if len(set(needs)) == 1:
        found = packed([*needs] * trials, room)
    else:  # each trial is placed on its own, so it gets pods that hold it
        found = [replace(pods, count=pods.count * trials) for pods in packed(needs, room)]
    if not found and all(fits_alone(need, room) for need in needs):
        raise ResourceError(
            f"The run's processes, which are not alike, cannot be spread over nodes {name} of profile {profile.name} so that memory "
            "suffices wherever Ray puts them.",
            "Ask for more CPUs for those that need much memory (cluster.cpus_per_worker, placement), or for another profile.",
        )
    if not found:
        large = next(need for need in needs if not fits_alone(need, room))
        raise ResourceError(
            f"No node {name} of profile {profile.name} holds a process of the run: it needs {_amounts(large)}, and a pod can have "
            f"{_amounts(room)}.",
            "Ask for less per worker (cluster, placement), or for another profile.",
        )
    nodes = sum(pods.count for pods in found)
    if nodes > node.most:
        raise ResourceError(
            f"The run needs {nodes} nodes {name}, and profile {profile.name} lets a run have {node.most} (nodes.{name}.most).",
            "Ask for fewer workers, or for another profile.",
        )
    assert len(found) <= 2 <= MOST_GROUPS
    beside = POD_OVERHEAD_MIB + math.ceil(profile.object_store_gib * 1024)
    whole = [
        replace(pods, room=replace(pods.room, memory_mib=pods.room.memory_mib + beside)) for pods in found
    ]
    names = (name, f"{name}-rest")
    return tuple(Group(names[index], node, pods) for index, pods in enumerate(whole))


def _room_of(node: NodeType, profile: Profile) -> Room:
    """What processes can have of a node, beside what Ray takes."""
    memory = int(node.memory_gib * 1024) - POD_OVERHEAD_MIB - math.ceil(profile.object_store_gib * 1024)
    if memory <= 0:
        raise ResourceError(
            f"Ray alone fills a node of profile {profile.name}: object_store_gib {profile.object_store_gib:g} of memory_gib "
            f"{node.memory_gib:g}.",
            "Lower object_store_gib in the profile.",
        )
    return Room(node.gpus, node.cpus, memory)


def _chosen(
    job: Job, name: str, architecture: Architecture, limit: int, scorers: Mapping[str, Architecture]
) -> Choice:
    choice = choose(job, architecture, limit, scorers)
    if choice.fits:
        return choice
    helps = [overrides for overrides, _ in suggest(job, architecture, limit, scorers)]
    raise ResourceError(
        f"A rank needs {choice.plan.device / 2**30:.1f} GiB at ZeRO stage {choice.stage}, and on {name} it has {limit / 2**30:.1f}.",
        f"It would fit with {' or '.join(helps)}." if helps else "Take a smaller model or larger nodes.",
    )


def _densest(
    job: Job,
    name: str,
    room: Room,
    architecture: Architecture,
    scorers: Mapping[str, Architecture],
    driver_mib: int,
) -> tuple[Choice, list[Need]]:
    """On CPU memory and ranks of a node depend on each other: as many ranks as CPUs allow, fewer until memory suffices."""
    most = max(1, min(int(room.cpus / job.cluster.cpus_per_worker), job.cluster.max_workers))
    for ranks in range(most, 0, -1):
        choice = choose(job, architecture, room.memory_mib * MIB // ranks, scorers)
        if choice.fits:
            return choice, _needs(job, room, choice, architecture, driver_mib)
    _chosen(job, name, architecture, room.memory_mib * MIB, scorers)
    raise AssertionError("unreachable: what does not fit was refused")


def _needs(
    job: Job, room: Room, choice: Choice | None, architecture: Architecture | None, driver_mib: int
) -> list[Need]:
    """Every process with its host memory: by the plan, or by its share of the node's CPUs or GPUs. driver_mib: of the processes that
    drive a trial, which Ray puts anywhere, so that each of the trial's own has a part of it."""
    found, wanted = [], processes(job)
    driver = math.ceil(driver_mib / len(wanted))
    small = math.ceil(2 * OVERHEAD_CPU / MIB)
    asks = [role.startswith("reward ") and not gpus and not _is_model(job, role) for gpus, _, role in wanted]
    for (gpus, cpus, _), asking in zip(wanted, asks, strict=True):
        if asking:  # a function, or an endpoint
            memory = small
        elif choice is None or architecture is None:
            share = gpus / room.gpus if room.gpus and gpus else cpus / room.cpus
            # Those that ask may all come to lie on one node; what is left there is shared.
            memory = int((room.memory_mib - small * sum(asks)) * min(1.0, share))
        elif gpus:
            saved = checkpoint_bytes(job, architecture) / job.cluster.min_workers
            memory = GPU_PROCESS_MIB + math.ceil((choice.plan.host + 2 * saved) / MIB)
        else:
            memory = math.ceil(choice.plan.device / FILL / MIB)
        found.append(Need(gpus, cpus, memory + (0 if choice is None else driver)))
    return found


def _is_model(job: Job, role: str) -> bool:
    return any(source.type == "model" for source in job.rewards if f"reward {source.name}" == role)


def _amounts(what: Need | Room) -> str:
    gpus = f"{what.gpus:g} GPU, " if what.gpus else ""
    return f"{gpus}{what.cpus:g} CPU, {what.memory_mib / 1024:.1f} GiB"
