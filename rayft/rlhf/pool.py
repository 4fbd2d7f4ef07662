"""Engines apart, from the driver's side: weights out to all of them, units to whichever is free."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import zip_longest

from rayft.errors import WorkerError
from rayft.rlhf.engines import Answers, Held
from rayft.rlhf.finished import Interrupted
from rayft.rlhf.group import Call, Group, Task, first_done, wait
from rayft.rlhf.rollout import Unit
from rayft.rlhf.weights import Shipped

#: Seconds for which an engine may finish a unit when the run should leave: it is drawn again otherwise.
GRACE_S = 30.0


class EnginePool:
    """The engines of a run, which all hold the same version of the weights, or none yet."""

    def __init__(self, group: Group, timeout_s: float) -> None:
        self._group, self._timeout_s = group, timeout_s
        self.version: int | None = None

    def forget(self) -> None:
        """What engines hold is not asked for any more. Its copy in the object store is freed, within a second or so."""
        self.version = None
        self._group.forget("take_weights")

    def send(self, version: int, policy: Group) -> dict[str, float]:
        """Have every engine hold the policy's weights; returns bytes, calls and times.

        Raises OtherWeights where an engine holds other bytes than were sent.
        """
        shipped: list[Shipped] = policy.call("ship", timeout_s=self._timeout_s)
        shipments = [shipment for own in shipped for shipment in own.shipments]
        [held] = wait([self._group.set_up("take_weights", version, shipments)], self._timeout_s)
        wanted = [shipment.checksum for shipment in shipments]
        for rank, engine in enumerate(held):
            refuse_other_bytes(rank, engine, wanted, version)
        self.version = version
        seconds: dict[str, float] = {}
        for own in (*shipped, *held):  # ranks and engines work side by side: the slowest counts
            for name, value in own.seconds.items():
                seconds[name] = max(seconds.get(name, 0.0), value)
        size = sum(shipment.size for shipment in shipments)
        return {"bytes": size, "buckets": len(shipments), "calls": len(policy) + len(self._group)} | seconds

    def generate(
        self, units: Sequence[Unit], leave: Callable[[], bool] | None = None
    ) -> dict[int, tuple[int, Answers]]:
        """Version and answers by the number of their unit. A unit whose engine dies is done again by the next process.

        leave: whether to begin no more of them; those that engines are at work on are waited for a little longer.
        """
        asked_at: float | None = None

        def heed() -> None:
            nonlocal asked_at
            if leave is not None and leave():
                asked_at = asked_at or time.monotonic()
                if time.monotonic() - asked_at > GRACE_S:
                    raise Interrupted

        left, idle = deque(units), deque(range(len(self._group)))
        at_work: dict[int, tuple[Unit, Task]] = {}
        done: dict[int, tuple[int, Answers]] = {}
        while left or at_work:
            if leave is not None and leave():
                left.clear()
                if not at_work:
                    break
            while left and idle:
                rank, unit = idle.popleft(), left.popleft()
                [task] = self._group.start_one(rank, "generate", unit).tasks
                at_work[id(task)] = (unit, task)
            try:
                tasks = [task for _, task in at_work.values()]
                task, answered = first_done(tasks, self._timeout_s, heed=heed if leave is not None else None)
            except Interrupted:
                break
            unit, _ = at_work.pop(id(task))
            done[unit.number] = answered
            idle.append(task.rank)
        return done

    def build(self) -> Call:
        """Have the engines load the base model."""
        return self._group.set_up("build")


class OtherWeights(WorkerError):
    """An engine holds other weights than were sent."""


def refuse_other_bytes(rank: int, engine: Held, wanted: list[str], version: int) -> None:
    """Raise OtherWeights unless an engine's checksums are those of what was sent."""
    if engine.checksums != wanted:
        wrong = sum(a != b for a, b in zip_longest(engine.checksums, wanted))
        raise OtherWeights(
            f"Engine {rank} holds other weights than version {version}, which was sent: {wrong} of {len(wanted)} checksums differ.",
            "Its memory or what carried the bytes is broken: look at the node, and run again.",
        )
