"""Groups of actors: how they are placed, called and waited for."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rayft.errors import RayftError, ResourceError, WorkerError
from rayft.spec import Cluster
from rayft.train.cluster import worker_resources
from rayft.train.failures import as_rayft_error, worker_failure


class RoleDied(WorkerError):
    """A process of a role is gone; what it held is rebuilt from the last checkpoint."""


class Group:
    """The processes of one role, rank by rank."""

    def __init__(self, role: str, actors: Sequence[Any]) -> None:
        self.role, self.actors = role, list(actors)

    def __len__(self) -> int:
        return len(self.actors)

    def start(self, method: str, *args: Any, **kwargs: Any) -> Call:
        """Call `method` on every rank, with the same arguments."""
        return Call(self.role, method, [getattr(a, method).remote(*args, **kwargs) for a in self.actors])

    def start_each(self, method: str, arguments: Sequence[Any]) -> Call:
        """Call `method` on every rank, with an argument of its own for each."""
        refs = [getattr(a, method).remote(one) for a, one in zip(self.actors, arguments, strict=True)]
        return Call(self.role, method, refs)

    def start_first(self, method: str, *args: Any) -> Call:
        """Call `method` on the first rank alone."""
        return Call(self.role, method, [getattr(self.actors[0], method).remote(*args)])

    def call(self, method: str, *args: Any, timeout_s: float, **kwargs: Any) -> list[Any]:
        """What every rank's `method` returns; raises as `wait` does."""
        return wait([self.start(method, *args, **kwargs)], timeout_s)[0]

    def kill(self) -> None:
        """End the processes."""
        for actor in self.actors:
            ray.kill(actor)


@dataclass(frozen=True)
class Call:
    """A method that ranks of a role are at work on."""

    role: str
    method: str
    refs: list[Any]


def wait(calls: Sequence[Call], timeout_s: float, late: RayftError | None = None) -> list[list[Any]]:
    """The results of each call, rank by rank.

    Raises the RayftError that ended one, RoleDied for a process that died or was still silent after `timeout_s` (then `late` if
    that is given), and MemoryExceededError where one had no memory. Whichever fails first counts: one that is gone leaves others
    waiting in a collective.
    """
    of = {ref: call for call in calls for ref in call.refs}
    left, deadline = list(of), time.monotonic() + timeout_s
    while left:
        ready, left = ray.wait(left, num_returns=1, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            call = of[left[0]]
            raise late or RoleDied(
                f"The role {call.role} gave no answer to `{call.method}` for {timeout_s:.0f} s.",
                "Raise cluster.hang_timeout_s if it was only slow.",
            )
        _refuse_failed(of[ready[0]], ready[0])
    return [[ray.get(ref, timeout=60) for ref in call.refs] for call in calls]


def _refuse_failed(call: Call, ref: Any) -> None:
    try:
        ray.get(ref, timeout=60)
    except ray.exceptions.RayTaskError as error:
        # One that lost its neighbour in a collective says so before Ray knows that the neighbour is gone.
        ending = worker_failure(error)
        if ending is not None:
            raise ending from error
        raise RoleDied(f"The role {call.role} failed in `{call.method}`: {_reason(error)}.") from error
    except ray.exceptions.RayError as error:
        if "out of memory" in str(error).lower() or "OutOfMemory" in type(error).__name__:
            raise as_rayft_error(error, 0) from error
        raise RoleDied(
            f"A process of the role {call.role} died in `{call.method}`: {_reason(error)}."
        ) from error


def reserve(cluster: Cluster, timeout_s: float, say: Any) -> PlacementGroup:
    """A bundle for each rank of the policy; the other roles live beside them. Raises ResourceError after the time-out."""
    need = worker_resources(cluster)
    reserved = placement_group([need] * cluster.max_workers, strategy="PACK")
    waited = 0.0
    while not reserved.wait(timeout_seconds=5):
        waited += 5
        if waited >= timeout_s:
            remove_placement_group(reserved)
            raise ResourceError(
                f"The cluster had no room for {cluster.max_workers} bundles of {need} within {timeout_s:.0f} s.",
                "Free resources, ask for fewer, or raise cluster.start_timeout_s.",
            )
        say(f"waiting for {cluster.max_workers} bundles of {need}; free: {ray.available_resources()}")
    return reserved


def place(
    actor: Any, reserved: PlacementGroup, bundle: int, environment: dict[str, str], gpus: float, *args: Any
) -> Any:
    """Start an actor in a bundle of the policy's."""
    there = PlacementGroupSchedulingStrategy(reserved, placement_group_bundle_index=bundle)
    return (
        ray.remote(actor)
        .options(
            num_cpus=0,
            num_gpus=math.floor(gpus * 10_000) / 10_000,  # Ray counts in ten-thousandths, and rounds up
            scheduling_strategy=there,
            runtime_env={"env_vars": environment},
            max_restarts=0,
        )
        .remote(*args)
    )


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__).rstrip(".")
