"""How many pods of what size hold a run's processes, so that Ray's own packing finds room for all of them.

Ray puts a placement group down greedily: the largest bundle goes to the node with the largest part of it left, and as many
of the others follow as fit there. A pod that fits the sum exactly is therefore only safe where bundles are alike or there
is one pod; else pods are alike, and their size is one at which that very procedure succeeds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

#: Ray counts resources in ten-thousandths.
_EPSILON = 1e-4


@dataclass(frozen=True, order=True)
class Need:
    """What one process occupies, as Ray counts; memory in MiB, of which Ray knows nothing."""

    gpus: float
    cpus: float
    memory_mib: int = 0


@dataclass(frozen=True)
class Room:
    """What a pod offers."""

    gpus: int
    cpus: int
    memory_mib: int


@dataclass(frozen=True)
class Pods:
    """`count` pods alike."""

    count: int
    room: Room


def fits_alone(need: Need, node: Room) -> bool:
    """Whether a node holds one such process."""
    return _fits(need, _Left(node)) and need.memory_mib <= node.memory_mib


def packed(needs: Sequence[Need], node: Room) -> list[Pods]:
    """Pods that hold all needs, each at most as large as a node; full ones first. Empty where that cannot be had."""
    if not all(fits_alone(need, node) for need in needs):
        return []
    if len(set(needs)) == 1:
        found = list(_alike(needs[0], len(needs), node))
        rooms = [pods.room for pods in found for _ in range(pods.count)]
        return found if holds(rooms, needs) else []
    for count in range(_fewest(needs, node), len(needs) + 1):
        for room in _sizes(needs, count, node):
            if holds([room] * count, needs):
                return [Pods(count, room)]
    return []


def _fewest(needs: Sequence[Need], node: Room) -> int:
    """No fewer nodes than this hold the sum."""
    sums = [
        (sum(need.gpus for need in needs), node.gpus),
        (sum(need.cpus for need in needs), node.cpus),
        (sum(need.memory_mib for need in needs), node.memory_mib),
    ]
    return max(1, *(math.ceil(wanted / there - _EPSILON) for wanted, there in sums if wanted))


def holds(rooms: Sequence[Room], needs: Sequence[Need]) -> bool:
    """Whether Ray's procedure (bundle_scheduling_policy.cc, pack) finds room for all needs, and memory suffices."""
    left = [_Left(room) for room in rooms]
    waiting = sorted(needs, reverse=True)
    while waiting:
        fitting = [place for place in left if _fits(waiting[0], place)]
        if not fitting:
            return False
        best = max(fitting, key=lambda place: place.score(waiting[0]))
        rest = []
        for need in waiting:
            if _fits(need, best):
                best.take(need)
            else:
                rest.append(need)
        if best.memory_mib < 0:
            return False
        waiting = rest
    return True


class _Left:
    def __init__(self, room: Room) -> None:
        self.gpus, self.cpus, self.memory_mib = float(room.gpus), float(room.cpus), room.memory_mib

    def score(self, need: Need) -> float:
        pairs = ((self.gpus, need.gpus), (self.cpus, need.cpus))
        return sum((there - wanted) / there for there, wanted in pairs if wanted)

    def take(self, need: Need) -> None:
        self.gpus -= need.gpus
        self.cpus -= need.cpus
        self.memory_mib -= need.memory_mib


def _fits(need: Need, left: _Left) -> bool:
    return need.gpus <= left.gpus + _EPSILON and need.cpus <= left.cpus + _EPSILON


def _alike(need: Need, count: int, node: Room) -> Iterator[Pods]:
    """Nodes as full as they get, and one pod for the rest."""
    bounds = [(node.gpus, need.gpus), (node.cpus, need.cpus), (node.memory_mib, need.memory_mib)]
    each = min(math.floor(there / wanted + _EPSILON) for there, wanted in bounds if wanted)
    full, rest = divmod(count, each)
    if full:
        yield Pods(full, _room([need] * each, node))
    if rest:
        yield Pods(1, _room([need] * rest, node))


def _room(needs: Sequence[Need], node: Room) -> Room:
    """Exactly what they need; beside GPUs at least the share of the node's CPUs and memory that goes with them."""
    gpus = math.ceil(sum(need.gpus for need in needs) - _EPSILON)
    cpus = math.ceil(sum(need.cpus for need in needs) - _EPSILON)
    return _with_share(gpus, max(1, cpus), sum(need.memory_mib for need in needs), node)


def _with_share(gpus: int, cpus: int, memory_mib: int, node: Room) -> Room:
    share = gpus / node.gpus if node.gpus else 0.0
    return Room(gpus, max(cpus, int(node.cpus * share)), max(memory_mib, int(node.memory_mib * share)))


def _sizes(needs: Sequence[Need], count: int, node: Room) -> Iterator[Room]:
    """Sizes of `count` equal pods, from the sum divided by them up to the whole node."""
    if count == 1:
        room = _room(needs, node)
        if room.gpus <= node.gpus and room.cpus <= node.cpus and room.memory_mib <= node.memory_mib:
            yield room
        return
    if node.gpus and any(need.gpus for need in needs):
        for gpus in range(math.ceil(sum(need.gpus for need in needs) / count - _EPSILON), node.gpus + 1):
            yield _with_share(gpus, 1, 0, node)
        return
    for cpus in range(max(1, math.ceil(sum(need.cpus for need in needs) / count - _EPSILON)), node.cpus + 1):
        yield Room(0, cpus, max(node.memory_mib * cpus // node.cpus, *(need.memory_mib for need in needs)))
