"""Nodes that are being taken away: what the cluster announces, and what it means for a run that trains on them.

A node is drained when it is told to go (SIGTERM to its `ray start --block`, `ray drain-node`, a spot notice that ends in either):
Ray starts nothing new on it and says by when it is gone. The ranks then save and leave at the next border between micro-batches.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection

import ray

from rayft.errors import LeaseLost, PreemptedError, RayftError, ResourceError, WorkerError


def draining_nodes() -> dict[str, float]:
    """Ids of the nodes that are being taken away, and seconds until they are gone (infinite where nobody said)."""
    from ray._private.state import state

    now = time.time()
    return {
        node: deadline_ms / 1000 - now if deadline_ms else float("inf")
        for node, deadline_ms in state.get_draining_nodes().items()
    }


class Drains:
    """Looks for nodes that are being taken away, and says of each once what follows."""

    def __init__(self, *, end: Callable[[str], None], move: Callable[[str], None]) -> None:
        """end: called when the driver's own node goes, since nothing outlives it; move: when another goes that the run is on."""
        self._end, self._move = end, move
        self._here = ray.get_runtime_context().get_node_id()
        self._ending = False
        self._told: set[str] = set()

    @property
    def ending(self) -> bool:
        """Whether the driver's node is going."""
        return self._ending

    def look(self, in_use: Collection[str]) -> None:
        """in_use: ids of the nodes that the run's processes are on."""
        going = draining_nodes()
        if self._here in going and not self._ending:
            self._ending = True
            self._end(f"the driver's {describe(self._here, going)}")
        new = (going.keys() & set(in_use)) - self._told - {self._here}
        self._told |= new
        if new and not self._ending:
            self._move(", ".join(describe(node, going) for node in sorted(new)))


def describe(node: str, going: dict[str, float]) -> str:
    """A node by its address, and how long it is still there."""
    address = next((n["NodeManagerAddress"] for n in ray.nodes() if n["NodeID"] == node), node)
    left = going[node]
    within = f" within {max(0.0, left):.0f} s" if left != float("inf") else ""
    return f"node {address} is taken away{within}"


def as_taken_away(error: BaseException) -> BaseException:
    """What an error means where the driver's own node is being taken away: that nothing can be started there any more, or that
    processes died with it, which is resumable and no failure of the job. Every other error as it is."""
    meant = (WorkerError, ResourceError, ray.exceptions.RayError)
    if isinstance(error, LeaseLost) or not isinstance(error, meant) or not ray.is_initialized():
        return error
    with contextlib.suppress(Exception):  # a cluster that is gone already says nothing
        here, going = ray.get_runtime_context().get_node_id(), draining_nodes()
        if here in going:
            why = error.message if isinstance(error, RayftError) else f"{type(error).__name__}: {error}"
            return PreemptedError(
                f"The driver's {describe(here, going)}: {why}",
                "Start it again under the same name to go on from its last checkpoint.",
            )
    return error
