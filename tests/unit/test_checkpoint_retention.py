"""Retention: what goes, what stays, and that the last good checkpoint always does."""

from __future__ import annotations

from pathlib import Path

import pytest

from rayft.checkpoint import CheckpointReader, CheckpointWriter, Lease, committed_steps, latest, retain
from rayft.errors import LeaseLost
from rayft.storage import LocalStore, Store
from rayft.storage.s3 import S3Store
from tests import checkpoints


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return LocalStore(tmp_path / "run")
    return S3Store(request.getfixturevalue("s3_bucket"), "runs/run")


def folders(store: Store) -> list[str]:
    return sorted({entry.key.split("/")[1] for entry in store.list("checkpoints")})


def corrupt(store: LocalStore, step: int) -> None:
    path = store.root / f"checkpoints/step-{step}/0000000-rank-00000-of-00002.bin"
    path.write_bytes(path.read_bytes()[::-1])


def write_only_rank_0(store: Store, step: int, epoch: int) -> None:
    """A save whose other rank died: data and index of one of two ranks, no manifest."""
    writer = CheckpointWriter(store, epoch, 1, 2, background=False)
    writer.save(step, checkpoints.fragments(step, 1, 2), {})


def test_the_newest_and_the_chosen_stay(store: Store) -> None:
    for step in (1, 2, 3, 4, 5):
        checkpoints.save(store, step)
    assert retain(store, 2, keep_steps=[2, 99]) == [1, 3]
    assert committed_steps(store) == [2, 4, 5]
    assert folders(store) == ["step-2", "step-4", "step-5"]
    for step in (2, 4, 5):
        checkpoints.check(store, step)
    assert retain(store, 2, keep_steps=[2]) == []
    assert retain(store, 9) == []
    assert committed_steps(store) == [2, 4, 5]


def test_damaged_checkpoints_do_not_count_as_kept(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    for step in (1, 2, 3, 4):
        checkpoints.save(store, step)
    corrupt(store, 3)
    corrupt(store, 4)
    assert retain(store, 1) == [1]
    assert latest(store) == 2
    checkpoints.save(store, 5)
    assert retain(store, 1) == [2, 3, 4]
    assert latest(store) == 5


def test_nothing_is_deleted_where_nothing_is_good(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    for step in (1, 2):
        checkpoints.save(store, step)
        corrupt(store, step)
    assert retain(store, 1) == []
    assert folders(store) == ["step-1", "step-2"]


def test_a_damaged_commit_stays_until_a_later_one_is_good(store: Store) -> None:
    lease = Lease.acquire(store, {})
    first = lease.begin_attempt(None)
    for step in (4, 8):
        checkpoints.save(store, step, epoch=first)
    store.delete([f"checkpoints/step-8/{first:07d}-rank-00001-of-00002.bin"])
    second = lease.begin_attempt(8)
    assert retain(store, 1, epoch=second) == []
    assert folders(store) == ["step-4", "step-8"]
    checkpoints.save(store, 12, epoch=second)
    assert retain(store, 1, epoch=second) == [4]
    assert folders(store) == ["step-12"]


def test_without_verification_the_newest_stay(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    for step in (1, 2):
        checkpoints.save(store, step)
    corrupt(store, 2)
    assert retain(store, 1, verify=False) == [1]


def test_what_is_in_flight_stays_and_what_failed_goes(store: Store) -> None:
    lease = Lease.acquire(store, {})
    epoch = lease.begin_attempt(None)
    write_only_rank_0(store, 2, epoch)  # failed: a later step was committed
    checkpoints.save(store, 4, epoch=epoch)
    write_only_rank_0(store, 6, epoch)  # in flight
    assert retain(store, 1, epoch=epoch) == []
    assert folders(store) == ["step-4", "step-6"]
    checkpoints.save(store, 6, epoch=epoch)
    assert retain(store, 1, epoch=epoch) == [4]
    checkpoints.check(store, 6)


def test_what_dead_epochs_left_goes(store: Store) -> None:
    lease = Lease.acquire(store, {})
    first = lease.begin_attempt(None)
    for step in (4, 8):
        checkpoints.save(store, step, epoch=first)
    write_only_rank_0(store, 12, first)
    unfinished = f"checkpoints/step-16/{first:07d}-rank-00000-of-00002.bin"
    leave_unfinished(store, unfinished)
    second = lease.begin_attempt(4)  # so 8 is no part of the history any more
    current = f"checkpoints/step-8/{second:07d}-rank-00000-of-00002.bin"
    leave_unfinished(store, current)
    assert retain(store, 3, epoch=second) == []
    assert folders(store) == ["step-4"]
    checkpoints.check(store, 4)
    assert store.discard_unfinished("", lambda key: True) == [current]


def leave_unfinished(store: Store, key: str) -> None:
    """What a killed writer leaves: a temporary file, or an open multipart upload."""
    if isinstance(store, S3Store):
        store.client.create_multipart_upload(Bucket=store.bucket, Key=f"{store.prefix}/{key}")
    elif isinstance(store, LocalStore):
        path = store.local_path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_name(f".{path.name}.{'0' * 32}.tmp").write_bytes(b"half")


def test_the_same_step_of_a_stale_and_of_the_current_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LocalStore(tmp_path)
    lease = Lease.acquire(store, {})
    first = lease.begin_attempt(None)
    checkpoints.save(store, 4, epoch=first)
    second = lease.begin_attempt(4)
    checkpoints.save(store, 8, epoch=second)
    with monkeypatch.context() as patch:
        patch.setattr("rayft.checkpoint.commit.check_epoch", lambda *_: None)
        checkpoints.save(store, 8, epoch=first)
    assert retain(store, 5, epoch=second) == []
    checkpoints.check(store, 8)
    assert all(f"{second:07d}" in entry.key for entry in store.list("checkpoints/step-8"))


def test_a_step_saved_again_after_a_resume(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    lease = Lease.acquire(store, {})
    first = lease.begin_attempt(None)
    checkpoints.save(store, 4, epoch=first)
    second = lease.begin_attempt(4)
    checkpoints.save(store, 4, epoch=second, world_size=3)
    assert CheckpointReader(store, 4).manifest.world_size == 3
    assert retain(store, 1, epoch=second) == []
    checkpoints.check(store, 4)
    assert all(f"{second:07d}" in entry.key for entry in store.list("checkpoints"))


def test_a_stale_caller_may_delete_nothing(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    lease = Lease.acquire(store, {})
    epoch = lease.begin_attempt(None)
    for step in (4, 8):
        checkpoints.save(store, step, epoch=epoch)
    lease.begin_attempt(4)
    with pytest.raises(LeaseLost):
        retain(store, 1, epoch=epoch)
    assert folders(store) == ["step-4", "step-8"]


def test_keeping_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        retain(LocalStore(tmp_path), 0)
