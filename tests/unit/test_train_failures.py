"""What Ray raises becomes the one error a user sees, with its code, and says whether trying again makes sense."""

from __future__ import annotations

import pytest
import ray
import torch

from rayft.errors import (
    EXIT_CODES,
    DataError,
    DivergedError,
    JobError,
    MemoryExceededError,
    NodeMemoryError,
    PreemptedError,
    ResourceError,
    StorageError,
    WorkerError,
)
from rayft.train.failures import as_lost_recorder, as_rayft_error, worker_failure


class OutOfMemoryError(Exception):
    """Named as Ray's own, whose text this is."""


def test_a_node_without_memory_is_worth_another_try() -> None:
    """Ray's monitor kills by node, whoever took the memory; a rank that cannot allocate is at its own limit."""
    text = "Task was killed due to the node running low on memory.\nMemory on the node was 22.9GB / 23.5GB (0.97)."
    found = as_rayft_error(OutOfMemoryError(text), max_failures=3)
    assert isinstance(found, NodeMemoryError)
    assert (found.code, found.terminal) == (7, False)
    assert "22.9GB / 23.5GB" in found.message
    own = worker_failure(torch.OutOfMemoryError("CUDA out of memory"))
    assert isinstance(own, MemoryExceededError)
    assert (own.code, own.terminal) == (7, True)


def test_a_recorder_that_is_lost() -> None:
    killed = ray.exceptions.OutOfMemoryError(
        "7 worker(s) were killed due to the node running low on memory. Memory on the node was 22.76GB used / 23.54GB limit.\nMore."
    )
    error = as_lost_recorder(killed)
    assert isinstance(error, NodeMemoryError)
    assert "22.76GB used / 23.54GB limit" in str(error)
    assert "More" not in str(error)
    assert isinstance(as_lost_recorder(ray.exceptions.ActorDiedError()), WorkerError)
    for other in (KeyError("step"), JobError("no"), ray.exceptions.GetTimeoutError("late")):
        assert as_lost_recorder(other) is other


def test_a_rayft_error_is_found_below_what_wraps_it() -> None:
    wrapped = RuntimeError("training failed")
    wrapped.worker_failures = {1: DataError("row 7 is empty.", "Drop it.")}  # type: ignore[attr-defined]
    assert as_rayft_error(wrapped, 0) is wrapped.worker_failures[1]  # type: ignore[attr-defined]
    last = as_rayft_error(RuntimeError("actor died"), 2)
    assert isinstance(last, WorkerError)
    assert "more than 2 times" in last.message


@pytest.mark.parametrize(
    ("kind", "terminal"),
    [
        (JobError, True),
        (DataError, True),
        (DivergedError, True),
        (MemoryExceededError, True),
        (ResourceError, False),
        (StorageError, False),
        (PreemptedError, False),
        (WorkerError, False),
    ],
)
def test_terminal_ends(kind: type, terminal: bool) -> None:
    assert kind("x").terminal is terminal
    assert kind.code in EXIT_CODES
