"""Groups of actors: how they are placed, called and waited for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rayft.errors import RayftError, ResourceError, WorkerError
from rayft.spec import Cluster
from rayft.train.cluster import worker_resources


class RoleDied(WorkerError):
    """A process of a role is gone; what it held is rebuilt from the last checkpoint."""


class Group:
    """The processes of one role, rank by rank."""

    def __init__(self, role: str, actors: Sequence[Any]) -> None:
        self.role, self.actors = role, list(actors)

    def __len__(self) -> int:
        return len(self.actors)

    def call(self, method: str, *args: Any, timeout_s: float, **kwargs: Any) -> list[Any]:
        """What every rank's `method` returns. Raises its RayftError, RoleDied, or WorkerError after the time-out."""
        return self.wait(method, [getattr(a, method).remote(*args, **kwargs) for a in self.actors], timeout_s)

    def call_each(self, method: str, arguments: Sequence[Any], *, timeout_s: float) -> list[Any]:
        """`call` with an argument of its own for each rank."""
        refs = [getattr(a, method).remote(one) for a, one in zip(self.actors, arguments, strict=True)]
        return self.wait(method, refs, timeout_s)

    def wait(
        self, method: str, refs: Sequence[Any], timeout_s: float, late: RayftError | None = None
    ) -> list[Any]:
        """The results of `refs`, which call `method`. Raises `late` after the time-out (default: a WorkerError)."""
        # One that fails leaves the others waiting in a collective: look at whichever is ready first.
        left = list(refs)
        while left:
            ready, left = ray.wait(left, num_returns=1, timeout=timeout_s)
            if not ready:
                raise late or WorkerError(
                    f"The role {self.role} gave no answer to `{method}` for {timeout_s:.0f} s.",
                    "Run again to resume; raise cluster.hang_timeout_s if it was only slow.",
                )
            self._result(method, ready[0])
        return [ray.get(ref, timeout=60) for ref in refs]

    def kill(self) -> None:
        """End the processes."""
        for actor in self.actors:
            ray.kill(actor)

    def _result(self, method: str, ref: Any) -> None:
        try:
            ray.get(ref, timeout=60)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, RayftError):
                raise error.cause from None
            raise
        except ray.exceptions.RayActorError as error:
            rank = f"A process of the role {self.role}"
            raise RoleDied(f"{rank} died during `{method}`: {_reason(error)}.") from error


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
            num_gpus=gpus,
            scheduling_strategy=there,
            runtime_env={"env_vars": environment},
            max_restarts=0,
        )
        .remote(*args)
    )


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__).rstrip(".")
