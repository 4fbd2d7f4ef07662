"""Checkpoints on an S3 that fails in every way: nothing torn is ever loaded, the earlier checkpoint stays.

The server is real (moto over HTTP, its own process), the faults happen on the wire.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from rayft.checkpoint import (
    CheckpointReader,
    CheckpointWriter,
    Fragment,
    Lease,
    committed_steps,
    latest,
    retain,
)
from rayft.errors import StorageError
from rayft.storage import RetryPolicy
from rayft.storage.s3 import S3Store
from tests import checkpoints
from tests.s3 import FaultyProxy, Kind

QUICK = RetryPolicy(attempts=5, total_s=30, base_s=0.01, cap_s=0.05)
PART = 5 << 20
ELEMENTS = 3 * PART // 4 + 5  # of fp32: four parts
WRITES = ["rank-00000-of-00002.bin", "rank-00001-of-00002.bin", "rank-00000-of-00002.json", "manifest"]


@pytest.fixture
def store(s3_bucket: str, s3_proxy: FaultyProxy) -> S3Store:
    """A store behind the proxy that holds the good checkpoint of step 4."""
    store = S3Store(s3_bucket, "runs/one", retry=QUICK, part_bytes=PART, parallel=3)
    checkpoints.save(store, 4)
    return store


def large(rank: int) -> Iterator[Fragment]:
    """A fragment that goes up in several parts, on each of two ranks."""
    values = np.arange(ELEMENTS, dtype=np.float32) + rank
    yield Fragment("large", "param", (2, ELEMENTS), "float32", rank * ELEMENTS, values)


def save_large(store: S3Store, step: int) -> None:
    with ExitStack() as stack:  # both ranks end, also where one fails
        for rank in range(2):
            writer = CheckpointWriter(store, 0, rank, 2, timeout_s=60)
            stack.callback(writer.close, 60)
            writer.save(step, large(rank), checkpoints.state(step))


def assert_only(store: S3Store, step: int) -> None:
    assert committed_steps(store) == [step]
    assert latest(store) == step
    checkpoints.check(store, step)


@pytest.mark.parametrize("kind", ["slow_down", "reset", "lost_response", "truncated_request", "slow"])
def test_faults_that_pass_are_survived(store: S3Store, s3_proxy: FaultyProxy, kind: Kind) -> None:
    for method in ("PUT", "POST", "GET"):
        s3_proxy.add(kind, method, "step-8", times=3, seconds=0.1)
    save_large(store, 8)
    assert s3_proxy.hits[kind] >= 6
    s3_proxy.clear()
    s3_proxy.add("truncated_response", "GET", ".bin", times=3)
    reader = CheckpointReader(store, 8)
    expected = np.concatenate([fragment.data for rank in range(2) for fragment in large(rank)])
    np.testing.assert_array_equal(reader.read("large"), expected)
    assert s3_proxy.hits["truncated_response"] == 3
    assert latest(store) == 8


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        pytest.param(kind, part, marks=() if row == column else pytest.mark.full)
        for row, kind in enumerate(["full", "slow_down", "reset", "denied"])
        for column, part in enumerate(WRITES)
    ],
)
def test_a_fault_that_stays_ends_the_save_and_keeps_the_checkpoint_before(
    store: S3Store, s3_proxy: FaultyProxy, kind: Kind, part: str
) -> None:
    s3_proxy.add(kind, "PUT", part)
    with pytest.raises(
        StorageError, match=r"storage is full|was denied|failed 5 times|part of rank . of 2"
    ) as caught:
        checkpoints.save(store, 8, timeout_s=1)
    assert caught.value.code == 5
    assert caught.value.remedy
    s3_proxy.clear()
    assert_only(store, 4)
    checkpoints.save(store, 12)
    assert retain(store, 1) == [4]
    assert_only(store, 12)
    assert {entry.key.split("/")[1] for entry in store.list("checkpoints")} == {"step-12"}


@pytest.mark.parametrize("part", WRITES)
def test_storage_that_confirms_half_a_write(store: S3Store, s3_proxy: FaultyProxy, part: str) -> None:
    s3_proxy.add("torn_write", "PUT", part)
    if part == "manifest":
        checkpoints.save(store, 8)  # the commit itself is not read back: the next reader finds out
    else:
        with pytest.raises(StorageError, match=r"is not committed|did not match|is corrupt|part of rank"):
            checkpoints.save(store, 8, timeout_s=1)
    s3_proxy.clear()
    assert_only(store, 4)


def test_an_upload_that_fails_in_the_middle_leaves_no_parts_behind(
    store: S3Store, s3_proxy: FaultyProxy
) -> None:
    s3_proxy.add("full", "PUT", "partNumber=4")
    with pytest.raises(StorageError, match="storage is full"):
        save_large(store, 8)
    s3_proxy.clear()
    assert store.discard_unfinished("", lambda key: True) == []
    assert_only(store, 4)


def test_a_background_save_fails_at_the_next_call_and_training_may_go_on(
    store: S3Store, s3_proxy: FaultyProxy
) -> None:
    s3_proxy.add("full", "PUT", "step-8")
    writer = CheckpointWriter(store, 0, 0, 1)
    writer.save(8, checkpoints.fragments(8, 0, 1), checkpoints.state(8))
    with pytest.raises(StorageError, match="storage is full"):
        writer.save(12, checkpoints.fragments(12, 0, 1), checkpoints.state(12))
    writer.close()
    assert committed_steps(store) == [4, 12]


def test_damage_that_the_storage_keeps_is_walked_over(store: S3Store) -> None:
    checkpoints.save(store, 8)
    key = "checkpoints/step-8/0000000-rank-00001-of-00002.bin"
    data = bytearray(store.get(key))
    data[1] ^= 1
    store.put(key, data)
    skipped: list[tuple[int, str]] = []
    assert latest(store, on_skip=lambda step, reason: skipped.append((step, reason))) == 4
    assert skipped[0][0] == 8
    assert "does not match its checksum" in skipped[0][1]
    store.put(key, data[:-1])
    assert committed_steps(store) == [4]


@pytest.mark.parametrize("kind", ["slow_down", "reset", "truncated_response"])
def test_storage_that_does_not_answer_is_no_reason_to_go_back(
    store: S3Store, s3_proxy: FaultyProxy, kind: Kind, tmp_path: Path
) -> None:
    """A checkpoint that cannot be read now is not corrupt: resuming from an older one would throw work away."""
    checkpoints.save(store, 8)
    s3_proxy.add(kind, "GET", "step-8")
    with pytest.raises(StorageError, match=r"Reading s3://.*step-8.* failed 5 times"):
        latest(store)
    s3_proxy.clear()
    assert latest(store) == 8


def test_the_lease_on_an_unreliable_storage(store: S3Store, s3_proxy: FaultyProxy) -> None:
    s3_proxy.add("lost_response", "PUT", "lease/", times=2)
    s3_proxy.add("slow_down", "GET", "lease", times=2)
    lease = Lease.acquire(store, {}, ttl_s=0.5)
    assert lease.resume() == (3, 4)
    lease.heartbeat()
    s3_proxy.add("reset", "", "lease")
    lease.start_heartbeat()  # a storage that is away for a while is not the end of the lease
    s3_proxy.clear()
    lease.release()
    assert s3_proxy.hits["lost_response"] == 2
    assert not lease.held()
