"""S3 that misbehaves: what passes is retried, what does not is explained, and no answer is ever wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from rayft.errors import StorageError
from rayft.storage import RetryPolicy
from rayft.storage.s3 import S3Store
from tests.s3 import FaultyProxy

QUICK = RetryPolicy(attempts=4, total_s=30, base_s=0.01, cap_s=0.05)
PART = 5 << 20
BIG = bytes(range(256)) * (3 * PART // 256)


@pytest.fixture
def store(s3_bucket: str, s3_proxy: FaultyProxy) -> S3Store:
    return S3Store(s3_bucket, "run", retry=QUICK, part_bytes=PART, parallel=2)


@pytest.mark.parametrize("kind", ["slow_down", "reset", "lost_response", "truncated_request"])
@pytest.mark.parametrize("size", [1000, 3 * PART])
def test_writes_survive_passing_faults(store: S3Store, s3_proxy: FaultyProxy, kind: str, size: int) -> None:
    s3_proxy.add(kind, "PUT", "data.bin", times=2)  # type: ignore[arg-type]
    s3_proxy.add(kind, "POST", "data.bin", times=2)  # type: ignore[arg-type]
    store.put("data.bin", BIG[:size])
    s3_proxy.clear()
    assert store.get("data.bin") == BIG[:size]
    assert s3_proxy.hits[kind] >= 2
    if kind != "lost_response":  # there the server may keep an upload whose identifier never arrived
        assert store.discard_unfinished("", lambda key: True) == []


@pytest.mark.parametrize("kind", ["slow_down", "reset", "truncated_response"])
def test_reads_survive_passing_faults(
    store: S3Store, s3_proxy: FaultyProxy, tmp_path: Path, kind: str
) -> None:
    store.put("data.bin", BIG)
    for read in (
        lambda: store.get("data.bin"),
        lambda: store.get_range("data.bin", 0, len(BIG)),
        lambda: (store.download("data.bin", tmp_path / "x"), (tmp_path / "x").read_bytes())[1],
    ):
        s3_proxy.clear()
        s3_proxy.add(kind, "GET", "data.bin", times=3)  # type: ignore[arg-type]
        assert read() == BIG
    s3_proxy.add("truncated_response", "GET", "list-type", times=2)
    assert [entry.key for entry in store.list()] == ["data.bin"]


def test_retries_are_bounded_and_name_the_last_error(store: S3Store, s3_proxy: FaultyProxy) -> None:
    s3_proxy.add("slow_down", "PUT")
    with pytest.raises(
        StorageError, match=r"Writing s3://.*/run/x failed 4 times within .* SlowDown"
    ) as caught:
        store.put("x", b"")
    assert "Check that the storage is up" in caught.value.remedy
    assert s3_proxy.hits == {"slow_down": 4}


def test_a_body_that_stays_truncated_is_an_error(
    store: S3Store, s3_proxy: FaultyProxy, tmp_path: Path
) -> None:
    store.put("data", b"x" * 1000)
    s3_proxy.add("truncated_response", "GET")
    for read in (lambda: store.get("data"), lambda: store.get_range("data", 0, 1000)):
        with pytest.raises(StorageError, match=r"Reading s3://.*/run/data failed 4 times"):
            read()
    with pytest.raises(StorageError, match="Reading"):
        store.download("data", tmp_path / "data")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [("full", "the storage is full .XMinioStorageFull"), ("denied", "was denied .AccessDenied")],
)
@pytest.mark.parametrize("size", [1000, 3 * PART])
def test_what_no_retry_can_help_fails_at_once(
    store: S3Store, s3_proxy: FaultyProxy, kind: str, sentence: str, size: int
) -> None:
    s3_proxy.add(kind, "PUT")  # type: ignore[arg-type]
    with pytest.raises(StorageError, match=sentence):
        store.put("x", BIG[:size])
    assert s3_proxy.hits[kind] <= (1 if size == 1000 else 3)  # one attempt per part
    s3_proxy.clear()
    assert store.list() == []
    assert store.discard_unfinished("", lambda key: True) == []  # the upload was aborted


def test_a_missing_bucket_and_missing_credentials_are_named(
    store: S3Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StorageError, match="the bucket does not exist"):
        S3Store("no-such-bucket-here", retry=QUICK).put("x", b"")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(StorageError, match="no usable AWS credentials"):
        S3Store(store.bucket, retry=QUICK).put("x", b"")


def test_an_endpoint_nobody_answers_on(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match=r"failed 4 times .* Could not connect to the endpoint"):
        S3Store(s3_bucket, retry=QUICK).get("x")


def test_put_if_absent_after_a_lost_response_knows_its_own_bytes(
    store: S3Store, s3_proxy: FaultyProxy
) -> None:
    s3_proxy.add("lost_response", "PUT", times=1)
    assert store.put_if_absent("lock", b"mine")
    s3_proxy.add("lost_response", "PUT", times=1)
    assert not store.put_if_absent("lock", b"of another")
    assert store.get("lock") == b"mine"


def test_a_completion_whose_response_was_lost_is_recognised(store: S3Store, s3_proxy: FaultyProxy) -> None:
    s3_proxy.add("lost_response", "POST", "uploadId", times=1)
    s3_proxy.add("no_such_upload", "POST", "uploadId", times=1)
    store.put("data.bin", BIG)
    assert store.get("data.bin") == BIG
    s3_proxy.add("reset", "POST", "uploadId", times=1)  # this time nothing was completed
    s3_proxy.add("no_such_upload", "POST", "uploadId", times=1)
    with pytest.raises(StorageError, match="NoSuchUpload"):
        store.put("other.bin", BIG)
    assert not store.exists("other.bin")


def test_listing_and_deleting_beyond_one_page(store: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [f"many/{number:03d}" for number in range(25)]
    for key in keys:
        store.put(key, b"")
    pages = store.client.list_objects_v2
    monkeypatch.setattr(store.client, "list_objects_v2", lambda **arguments: pages(**arguments, MaxKeys=10))
    monkeypatch.setattr("rayft.storage.s3._DELETE_BATCH", 7)
    assert [entry.key for entry in store.list("many")] == keys
    store.delete_prefix("many")
    assert store.list() == []


def test_unfinished_uploads_of_the_dead_are_aborted(store: S3Store) -> None:
    for key in ("dead/a", "alive/b"):
        store.client.create_multipart_upload(Bucket=store.bucket, Key=f"run/{key}")
    assert store.discard_unfinished("", lambda key: key.startswith("dead")) == ["dead/a"]
    assert store.discard_unfinished("dead", lambda key: True) == []
    assert store.discard_unfinished("alive", lambda key: True) == ["alive/b"]
