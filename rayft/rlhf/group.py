"""Groups of actors: how they are called, waited for, and started again where nothing is lost with them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray

from rayft.errors import RayftError, WorkerError
from rayft.train.failures import as_rayft_error, worker_failure

#: How often a wait that can be given up asks whether it should be.
HEED_EVERY_S = 1.0


class RoleDied(WorkerError):
    """A process of a role is gone, and what it held is rebuilt from the last checkpoint."""

    def __init__(self, role: str, message: str, remedy: str = "") -> None:
        super().__init__(message, remedy)
        self.args = (role, message, remedy)  # what pickling gives back to __init__
        self.role = role


class Group:
    """The processes of one role, rank by rank.

    make: starts the process of a rank. restarts: how often (more) processes of a role that holds nothing of its own are started
    again in the middle of a step; every other death raises RoleDied. restart_s: seconds that each call to a process that starts again
    may take. tell: told what a restart was for and what it cost.
    """

    def __init__(
        self,
        role: str,
        make: Callable[[int], Any],
        size: int,
        *,
        restarts: int = 0,
        restart_s: float = 1800.0,
        tell: Callable[[str], None] = print,
    ) -> None:
        self.role, self._make, self.restarts, self._tell = role, make, restarts, tell
        self._restart_s = restart_s
        self._kept: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self.actors: list[Any] = [make(rank) for rank in range(size)]

    def __len__(self) -> int:
        return len(self.actors)

    def keep(self, method: str, *args: Any, **kwargs: Any) -> None:
        """Make this call (the last one of each method, in the order of the first) on processes that start again."""
        self._kept[method] = (args, kwargs)

    def forget(self, method: str) -> None:
        """Keep no call of `method`."""
        self._kept.pop(method, None)

    def start(self, method: str, *args: Any, **kwargs: Any) -> Call:
        """Call `method` on every rank, with the same arguments."""
        return Call([Task(self, rank, method, args, kwargs) for rank in range(len(self))])

    def start_each(self, method: str, arguments: Sequence[Any], *shared: Any) -> Call:
        """Call `method` on every rank, with an argument of its own for each, and those that all share."""
        assert len(arguments) == len(self)
        return Call([Task(self, rank, method, (one, *shared), {}) for rank, one in enumerate(arguments)])

    def start_with(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> Call:
        """Call `method` on the first ranks, each with arguments of its own."""
        return Call([Task(self, rank, method, own, {}) for rank, own in enumerate(arguments)])

    def start_one(self, rank: int, method: str, *args: Any) -> Call:
        """Call `method` on one rank alone."""
        return Call([Task(self, rank, method, args, {})])

    def call(self, method: str, *args: Any, timeout_s: float, **kwargs: Any) -> list[Any]:
        """What every rank's `method` returns; raises as `wait` does."""
        return wait([self.start(method, *args, **kwargs)], timeout_s)[0]

    def set_up(self, method: str, *args: Any, **kwargs: Any) -> Call:
        """`keep` and `start`."""
        self.keep(method, *args, **kwargs)
        return self.start(method, *args, **kwargs)

    def revive(self, rank: int, why: RoleDied) -> dict[str, Any]:
        """Start the process of a rank again and bring it to where it was; returns what the calls for that gave, by method. Raises
        `why` where that cannot be."""
        if self.restarts == 0:
            raise why
        self.restarts -= 1
        began = time.monotonic()
        ray.kill(self.actors[rank])
        self.actors[rank] = self._make(rank)
        gave = {}
        for method, (args, kwargs) in list(self._kept.items()):
            [[gave[method]]] = wait([Call([Task(self, rank, method, args, kwargs)])], self._restart_s)
        self._tell(f"{why.message} It was started again within {time.monotonic() - began:.1f} s.")
        return gave

    def kill(self) -> None:
        """End the processes."""
        for actor in self.actors:
            ray.kill(actor)


@dataclass
class Task:
    """A method that one rank is at work on; it can be asked for again."""

    group: Group
    rank: int
    method: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    ref: Any = field(init=False)

    def __post_init__(self) -> None:
        self.ask()

    def ask(self) -> None:
        """Ask the process that is this rank now."""
        self.ref = getattr(self.group.actors[self.rank], self.method).remote(*self.args, **self.kwargs)


@dataclass
class Call:
    """A method that ranks of a role are at work on."""

    tasks: list[Task]


def wait(
    calls: Sequence[Call],
    timeout_s: float,
    late: RayftError | None = None,
    heed: Callable[[], None] | None = None,
) -> list[list[Any]]:
    """The results of each call, rank by rank; raises as `first_done` does."""
    left = [task for call in calls for task in call.tasks]
    results: dict[int, Any] = {}
    while left:
        task, result = first_done(left, timeout_s, late, heed)
        left.remove(task)
        results[id(task)] = result
    return [[results[id(task)] for task in call.tasks] for call in calls]


def first_done(
    tasks: Sequence[Task],
    timeout_s: float,
    late: RayftError | None = None,
    heed: Callable[[], None] | None = None,
) -> tuple[Task, Any]:
    """The first of the tasks that is done, and its result. heed: called every second of the wait; it may raise to give it up.

    A process that died, or that was silent for `timeout_s`, is started again and asked again where its role can; else RoleDied is
    raised (`late`, if given, for silence). Raises the RayftError that ended a task, and MemoryExceededError where one had no
    memory. Whichever fails first counts: one that is gone leaves others waiting in a collective.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        by_ref = {task.ref: task for task in tasks}
        left_s = max(0.0, deadline - time.monotonic())
        patience_s = left_s if heed is None else min(HEED_EVERY_S, left_s)
        ready, silent = ray.wait(list(by_ref), num_returns=1, timeout=patience_s)
        if heed is not None and not ready and patience_s < left_s:
            heed()
            continue
        if ready:
            task = by_ref[ready[0]]
            try:
                return task, ray.get(task.ref, timeout=60)
            except ray.exceptions.RayError as error:
                why = _death(task, error)
        else:
            task = by_ref[silent[0]]
            if late is not None:
                raise late
            why = RoleDied(
                task.group.role,
                f"The role {task.group.role} gave no answer to `{task.method}` for {timeout_s:.0f} s.",
                "Raise cluster.hang_timeout_s if it was only slow.",
            )
        gave = task.group.revive(task.rank, why)
        if task.method in gave:  # starting again did just this
            return task, gave[task.method]
        task.ask()
        deadline = time.monotonic() + timeout_s


def _death(task: Task, error: BaseException) -> RoleDied:
    """RoleDied for a process that is gone. Raises the error that a task ended the run with, and RoleDied for one that failed: the
    same process again would fail again."""
    role, method = task.group.role, task.method
    if isinstance(error, ray.exceptions.RayTaskError):
        if isinstance(error.cause, RoleDied):
            # What it asked another role for is gone; it is well itself.
            raise RoleDied(*error.cause.args) from error
        # One that lost its neighbour in a collective says so before Ray knows that the neighbour is gone.
        ending = worker_failure(error)
        if ending is not None:
            raise ending from error
        raise RoleDied(role, f"The role {role} failed in `{method}`: {_reason(error)}.") from error
    if "out of memory" in str(error).lower() or "OutOfMemory" in type(error).__name__:
        raise as_rayft_error(error, 0) from error
    return RoleDied(role, f"A process of the role {role} died in `{method}`: {_reason(error)}.")


def _reason(error: BaseException) -> str:
    if isinstance(error, ray.exceptions.ActorUnavailableError):
        return "it cannot be reached any more"
    # Ray adds identifiers and a list of what might have been the cause.
    text = str(error).split("Some common causes include")[0]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = lines[-1] if lines else type(error).__name__
    return said.split("Worker exit type:")[0].strip().rstrip(".")
