"""From whatever Ray raises to the one error a user sees."""

from __future__ import annotations

from typing import Any

import ray

from rayft.errors import (
    DivergedError,
    JobError,
    MemoryExceededError,
    NodeMemoryError,
    RayftError,
    ResourceError,
    WorkerError,
)


class Moving(WorkerError):
    """The ranks have saved and left nodes that are taken away; the group starts again elsewhere, which no budget is charged for."""


def as_rayft_error(error: BaseException, max_failures: int) -> RayftError:
    """The error to show for what `Trainer.fit` raised."""
    chain = list(_causes(error))
    for cause in chain:
        if isinstance(cause, RayftError):
            return cause
    text = "\n".join(f"{type(cause).__name__}: {cause}" for cause in chain)
    names = {type(cause).__name__ for cause in chain}
    if names & {"WorkerGroupStartupTimeoutError", "InsufficientClusterResourcesError"}:
        return ResourceError(
            f"The workers did not get their resources: {_last_line(text)}.",
            "Free resources, ask for fewer workers, or raise cluster.start_timeout_s.",
        )
    if "OutOfMemory" in text or "out of memory" in text or "memory monitor" in text:
        return NodeMemoryError(
            f"A worker's node ran out of memory: {_memory_line(text)}.",
            "See what else runs there, and try again; or lower train.micro_batch_size or data.max_length, raise "
            "zero.stage, or set train.gradient_checkpointing.",
        )
    return WorkerError(
        f"The workers failed more than {max_failures} times; the last failure was: {_last_line(text)}.",
        "Run again to resume from the last checkpoint; --debug shows the traceback.",
    )


def as_lost_recorder(error: BaseException) -> BaseException:
    """What an actor's end means that nothing else has made an error of: the recorder's, without which a run has no log. Every other
    error as it is, also that of a recorder that could not begin."""
    lost = (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError)
    if not isinstance(error, lost) or getattr(error, "actor_init_failed", False):
        return error
    text = str(error)
    if "OutOfMemory" in text or "low on memory" in text or "memory monitor" in text:
        return NodeMemoryError(
            f"The driver's node ran out of memory, and the process that writes the run's log was killed: {_memory_line(text)}.",
            "See what else runs there, and run again to resume from the last checkpoint.",
        )
    return WorkerError(
        "The process that writes the run's log died.",
        "Run again to resume from the last checkpoint; the cluster's logs say why it died.",
    )


def worker_failure(error: BaseException) -> RayftError | None:
    """What a rank's own exception means for the run: an error that ends it, or None for one worth a restart."""
    import torch

    if isinstance(getattr(error, "cause", None), RayftError):
        error = error.cause  # type: ignore[attr-defined]  # what a Ray task or actor raised
    if isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    ):
        return MemoryExceededError(
            f"Out of memory: {_last_line(str(error))}.",
            "Lower train.micro_batch_size or data.max_length, raise zero.stage, or set train.gradient_checkpointing.",
        )
    if isinstance(error, WorkerError):
        return None
    if isinstance(error, RayftError):
        return error
    return None


def diverged(step: int, what: str) -> DivergedError:
    """The error for a loss or gradient that is no number any more."""
    return DivergedError(
        f"Training diverged at step {step}: {what}.",
        "Lower train.learning_rate or raise train.warmup_ratio; `rayft check` looks for broken rows.",
    )


def changed_job(name: str, changes: list[str]) -> JobError:
    """The error for another job under the name of an existing run."""
    return JobError(
        f"The run {name!r} exists with another job; these keys differ: {'; '.join(changes)}.",
        "Use another name, or restore the keys to resume it.",
    )


def _causes(error: BaseException) -> Any:
    """The exception, what it wraps in Ray's several ways, and their causes, outermost first."""
    seen: list[int] = []
    todo: list[Any] = [error]
    while todo:
        current = todo.pop(0)
        if not isinstance(current, BaseException) or id(current) in seen:
            continue
        seen.append(id(current))
        yield current
        failures = getattr(current, "worker_failures", None)
        todo += list(failures.values()) if isinstance(failures, dict) else []
        for name in ("_base_exc", "cause", "controller_failure", "health_check_failure", "__cause__"):
            todo.append(getattr(current, name, None))


def _memory_line(text: str) -> str:
    """The line that says how much memory there was; Ray adds a page of advice after it."""
    lines = [line.strip() for line in text.splitlines() if "memory" in line.lower()]
    return next((line for line in lines if "GB" in line), lines[0] if lines else "no reason given").rstrip(
        "."
    )


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return (lines[-1] if lines else "no reason given").rstrip(".")
