"""Writers killed, stopped and continued as real processes: what was reported committed is there, whole, and alone."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest

from rayft.checkpoint import Lease, committed_steps, latest, layout, retain
from rayft.errors import ResourceError
from rayft.storage import LocalStore
from tests import checkpoints
from tests.shared import ROOT

KILLS = 8
TTL_S = 0.5

WRITER = """
import os, signal, sys, threading
from rayft.checkpoint import CheckpointWriter, Lease, retain
from rayft.errors import LeaseLost
from rayft.storage import LocalStore
from tests import checkpoints

path, stop_before = sys.argv[1:]


class Stopping(LocalStore):
    '''Stops its own process (SIGSTOP) once, right before the change that `stop_before` names.'''

    def child(self, *parts):
        return Stopping(self.root.joinpath(*parts))

    def put_parts(self, key, parts):
        if stop_before == "commit" and "manifest" in key and "step-8" in key:
            stop()
        super().put_parts(key, parts)

    def delete(self, keys):
        keys = list(keys)
        if stop_before == "delete" and any("step-8" in key for key in keys):
            stop()
        super().delete(keys)


def stop():
    global stop_before
    stop_before = ""
    print("stopping", flush=True)
    # To this very thread: a signal to the process may be taken by another one, and this one goes on for a while.
    signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)


store = Stopping(path)
lease = Lease.acquire(store, {}, ttl_s=0.5)
lease.start_heartbeat()
epoch, step = lease.resume()
writers = [CheckpointWriter(store, epoch, rank, 2, timeout_s=60) for rank in range(2)]
print("ready", flush=True)
step = step or 0
try:
    while True:
        step += 4
        for rank, writer in enumerate(writers):
            writer.save(step, checkpoints.fragments(step, rank, 2), checkpoints.state(step))
        for writer in writers:
            writer.wait()
        print(writers[0].last_committed, flush=True)
        if step % 12 == 0:
            retain(store, 1, epoch=epoch)
except LeaseLost:
    print("lost", flush=True)
try:
    lease.begin_attempt(step)
except LeaseLost:
    print("lost for good", flush=True)
lease.stop()
"""


@contextmanager
def writer(path: Path, stop_before: str = "") -> Iterator[tuple[subprocess.Popen[str], IO[str]]]:
    command = [sys.executable, "-c", WRITER, str(path), stop_before]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        try:
            yield process, process.stdout
        finally:
            process.kill()


def test_kill_9_at_random_moments(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    moments = random.Random(17)
    reported = 0
    for _ in range(KILLS):
        with writer(tmp_path) as (process, output):
            assert output.readline() == "ready\n"
            time.sleep(moments.uniform(0, 0.25))
            process.kill()
            lines = output.read().splitlines()
        reported = int(lines[-1]) if lines else reported
        skipped: list[int] = []
        step = latest(store, on_skip=lambda at, reason, skipped=skipped: skipped.append(at))  # type: ignore[misc]
        assert skipped == []
        if reported:
            assert step is not None
            assert step >= reported
        if step is not None:
            checkpoints.check(store, step)
    assert reported > 12 * KILLS / 4
    lease = Lease.acquire(store, {})
    epoch, step = lease.resume()
    retain(store, 1, epoch=epoch)
    assert {entry.key.split("/")[1] for entry in store.list("checkpoints")} == {f"step-{step}"}
    assert all(
        not name.endswith(".tmp") for _, _, names in os.walk(tmp_path / "checkpoints") for name in names
    )


def take_over(store: LocalStore, process: subprocess.Popen[str]) -> tuple[int, int | None]:
    """What a second driver does once the first is stopped; then the first continues and ends."""
    lease = Lease.acquire(store, {}, ttl_s=TTL_S)
    epoch, step = lease.resume()
    process.send_signal(signal.SIGCONT)
    return epoch, step


def test_stopped_between_the_check_and_the_commit(tmp_path: Path) -> None:
    """The worst moment: the first driver has just seen that the lease is its own."""
    store = LocalStore(tmp_path)
    with writer(tmp_path, "commit") as (process, output):
        assert [output.readline() for _ in range(3)] == ["ready\n", "4\n", "stopping\n"]
        epoch, step = take_over(store, process)
        assert step == 4
        assert output.read().splitlines() == ["8", "lost", "lost for good"]
    assert store.exists(layout.manifest_key(8, 3))  # its commit did land
    assert (committed_steps(store), latest(store)) == ([4], 4)
    checkpoints.save(store, 8, epoch=epoch)
    checkpoints.check(store, 8)
    assert retain(store, 2, epoch=epoch) == []
    assert not store.exists(layout.manifest_key(8, 3))
    assert committed_steps(store) == [4, 8]


def test_stopped_between_the_check_and_a_deletion(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    with writer(tmp_path, "delete") as (process, output):
        assert [output.readline() for _ in range(5)] == ["ready\n", "4\n", "8\n", "12\n", "stopping\n"]
        _, step = take_over(store, process)
        assert step == 12
        assert "lost" in output.read().splitlines()
    assert latest(store) == 12
    checkpoints.check(store, 12)


def test_a_holder_that_is_only_slow_keeps_its_lease(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    with writer(tmp_path) as (process, output):
        assert output.readline() == "ready\n"
        with pytest.raises(ResourceError, match=f":{process.pid} "):
            Lease.acquire(store, {}, ttl_s=TTL_S)
        committed = int(output.readline())
        assert committed % 4 == 0
