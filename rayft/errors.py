"""Errors that end a run: each carries the exit code of the verb and a remedy for the user.

The codes are the contract between rayft and whoever runs it (`ray job`, KubeRay, a shell): see README.md, "Exit codes".
"""

from __future__ import annotations


class RayftError(Exception):
    """Base of every error meant for a user: one sentence that says what is wrong and where, and a remedy.

    The two strings are the exception's `args`, so it survives pickling between Ray processes unchanged.
    `code`: exit code of the verb. `terminal`: an unchanged retry cannot cure it; the run log records that, and a retry
    exits at once.
    """

    code = 1
    terminal = False

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message, remedy)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message} {self.remedy}".strip()


class JobError(RayftError):
    """The job file or the command line is wrong."""

    code = 2
    terminal = True


class DataError(RayftError):
    """The data is wrong."""

    code = 3
    terminal = True


class ResourceError(RayftError):
    """Not enough resources, or the run name is held by another writer."""

    code = 4


class StorageError(RayftError):
    """Storage failed, or what it holds is corrupt."""

    code = 5


class DivergedError(RayftError):
    """Training diverged: the loss is NaN, infinite or exploded."""

    code = 6
    terminal = True


class MemoryExceededError(RayftError):
    """A process ran out of memory."""

    code = 7
    terminal = True


class NodeMemoryError(MemoryExceededError):
    """A node ran out of memory and Ray killed a worker there; another process may have taken the memory."""

    terminal = False


class PreemptedError(RayftError):
    """The machine is being taken away; the run is saved and resumable."""

    code = 8


class WorkerError(RayftError):
    """A worker or actor failed beyond its budget."""

    code = 9


class LeaseLost(WorkerError):
    """Another driver has taken over this run name; nothing more may be written."""


EXIT_CODES: dict[int, str] = {
    0: "done",
    1: "a bug in rayft",
    2: "the job file or command line is wrong",
    3: "the data is wrong",
    4: "not enough resources",
    5: "storage failed",
    6: "training diverged",
    7: "out of memory",
    8: "preempted, resumable",
    9: "a worker failed beyond its budget",
}
