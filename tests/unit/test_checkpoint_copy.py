"""A checkpoint copied into another run: whole or not at all, wherever the two lie, and on its own from then on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from rayft.checkpoint import (
    CorruptCheckpoint,
    Lease,
    Manifest,
    committed_steps,
    copy_checkpoint,
    latest,
    layout,
    retain,
)
from rayft.checkpoint.survey import survey
from rayft.errors import LeaseLost, StorageError
from rayft.storage import LocalStore, Store, open_store
from tests import checkpoints
from tests.shared import ROOT

KILLED = """
import os, signal, sys
from rayft.checkpoint import Lease, copy_checkpoint
from rayft.checkpoint.survey import survey
from rayft.storage import LocalStore

source, target, moment = sys.argv[1:]


class Dying(LocalStore):
    '''Kills its own process right before the change that `moment` names.'''

    def child(self, *parts):
        return Dying(self.root.joinpath(*parts))

    def upload(self, path, key):
        if moment in key:
            os.kill(os.getpid(), signal.SIGKILL)
        super().upload(path, key)

    def put_parts(self, key, parts):
        if moment in key:
            os.kill(os.getpid(), signal.SIGKILL)
        super().put_parts(key, parts)


store = Dying(target)
lease = Lease.acquire(store, {}, ttl_s=0.5)
copy_checkpoint(LocalStore(source), survey(LocalStore(source)).good[8], store, lease.epoch)
"""


def run_with_checkpoints(store: Store) -> Store:
    """Checkpoints of steps 4 and 8 by a second attempt, on three ranks."""
    lease = Lease.acquire(store, {})
    lease.begin_attempt(None)
    epoch = lease.begin_attempt(None)
    for step in (4, 8):
        checkpoints.save(store, step, epoch=epoch, world_size=3)
    lease.release()
    return store


def manifest_of(store: Store, step: int = 8) -> Manifest:
    return survey(store).good[step]


@pytest.mark.parametrize("places", ["local to local", "local to s3", "s3 to local", "s3 to s3"])
def test_a_copy_is_a_checkpoint_of_its_own(
    places: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    bucket = request.getfixturevalue("s3_bucket") if "s3" in places else ""
    source, target = (
        open_store(f"s3://{bucket}/{name}" if place == "s3" else tmp_path / name)
        for name, place in zip(("source", "target"), places.split(" to "), strict=True)
    )
    run_with_checkpoints(source)
    lease = Lease.acquire(target, {})
    copied = copy_checkpoint(source, manifest_of(source), target, lease.epoch)
    assert copied.epoch == lease.epoch != manifest_of(source).epoch
    source.delete_prefix("checkpoints")
    assert committed_steps(target) == [8]
    checkpoints.check(target, 8)
    # The next attempt resumes from it, commits beyond it, and retention takes it like any other.
    epoch, step = lease.resume()
    assert step == 8
    checkpoints.save(target, 12, epoch=epoch, world_size=1)
    assert committed_steps(target) == [8, 12]
    assert retain(target, 1, epoch=epoch) == [8]
    assert [entry.key for entry in target.list("checkpoints/step-8")] == []


def test_the_state_may_be_another(tmp_path: Path) -> None:
    source, target = run_with_checkpoints(LocalStore(tmp_path / "source")), LocalStore(tmp_path / "target")
    lease = Lease.acquire(target, {})
    copy_checkpoint(source, manifest_of(source), target, lease.epoch, {"position": 3})
    assert manifest_of(target).state == {"position": 3}
    assert manifest_of(source).state == checkpoints.state(8)


@pytest.mark.parametrize("moment", ["rank-00000", "rank-00002", "manifest"])
def test_killed_in_the_middle_nothing_counts_and_the_next_start_copies_it_whole(
    moment: str, tmp_path: Path
) -> None:
    source, target = run_with_checkpoints(LocalStore(tmp_path / "source")), LocalStore(tmp_path / "target")
    command = [sys.executable, "-c", KILLED, str(tmp_path / "source"), str(tmp_path / "target"), moment]
    done = subprocess.run(command, cwd=ROOT, check=False, timeout=120)
    assert done.returncode == -9
    assert committed_steps(target) == []
    assert latest(target) is None
    if moment == "manifest":  # before, files are copied several at a time, and some may be there
        assert any(entry.key.endswith(".bin") for entry in target.list("checkpoints"))
    lease = Lease.acquire(target, {})
    copy_checkpoint(source, manifest_of(source), target, lease.epoch)
    checkpoints.check(target, 8)
    epoch, _ = lease.resume()
    retain(target, 1, epoch=epoch)
    left = {item.epoch for entry in target.list("checkpoints") if (item := layout.parse_object(entry.key))}
    assert left == {manifest_of(target).epoch}, "what the killed one left is still there"


def test_a_damaged_source_is_not_committed(tmp_path: Path) -> None:
    source, target = run_with_checkpoints(LocalStore(tmp_path / "source")), LocalStore(tmp_path / "target")
    manifest = manifest_of(source)
    path = source.local_path(f"{layout.folder(8)}/{manifest.files[1].name}")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    lease = Lease.acquire(target, {})
    with pytest.raises(CorruptCheckpoint, match="step-8 is corrupt"):
        copy_checkpoint(source, manifest, target, lease.epoch)
    assert committed_steps(target) == []


def test_a_source_that_is_pruned_meanwhile_is_told(tmp_path: Path) -> None:
    source, target = run_with_checkpoints(LocalStore(tmp_path / "source")), LocalStore(tmp_path / "target")
    manifest = manifest_of(source)
    source.delete_prefix("checkpoints")
    lease = Lease.acquire(target, {})
    with pytest.raises(StorageError, match="does not exist"):
        copy_checkpoint(source, manifest, target, lease.epoch)
    assert committed_steps(target) == []


def test_whoever_lost_the_lease_commits_nothing(tmp_path: Path) -> None:
    source, target = run_with_checkpoints(LocalStore(tmp_path / "source")), LocalStore(tmp_path / "target")
    lease = Lease.acquire(target, {})
    Lease.acquire(target, {}, takeover=True)
    with pytest.raises(LeaseLost):
        copy_checkpoint(source, manifest_of(source), target, lease.epoch)
    assert committed_steps(target) == []
