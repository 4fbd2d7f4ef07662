"""The per-node cache: one download whatever the number of processes, nothing half-made, nothing stale."""

from __future__ import annotations

import fcntl
import threading
from pathlib import Path

import pytest

from rayft.errors import StorageError
from rayft.storage import LocalStore, ObjectNotFound, node_cache
from rayft.storage.s3 import S3Store
from tests.s3 import FaultyProxy


def test_local_objects_are_not_copied(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    store.put("model/config.json", b"{}")
    assert node_cache(store, "model", tmp_path / "cache") == tmp_path / "store/model"
    with pytest.raises(ObjectNotFound, match="no-model"):
        node_cache(store, "no-model", tmp_path / "cache")


def test_a_folder_is_downloaded_once_by_many(s3_bucket: str, s3_proxy: FaultyProxy, tmp_path: Path) -> None:
    store = S3Store(s3_bucket, "models")
    store.put("tiny/config.json", b"{}")
    store.put("tiny/deep/weights.bin", b"w" * 1000)
    s3_proxy.add("slow", "GET", "weights.bin", seconds=0.2)
    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(node_cache(store, "tiny", tmp_path / "cache")))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 4
    assert len(set(found)) == 1
    assert (found[0] / "deep/weights.bin").read_bytes() == b"w" * 1000
    assert found[0].name == "tiny"
    assert s3_proxy.hits == {"slow": 1}


def test_a_changed_object_is_fetched_anew(s3_bucket: str, tmp_path: Path) -> None:
    store = S3Store(s3_bucket)
    store.put("rows.jsonl", b"old")
    assert node_cache(store, "rows.jsonl", tmp_path).read_bytes() == b"old"
    store.put("rows.jsonl", b"new")
    assert node_cache(store, "rows.jsonl", tmp_path).read_bytes() == b"new"
    with pytest.raises(ObjectNotFound, match="nothing"):
        node_cache(store, "nothing", tmp_path)


def test_a_download_that_died_is_made_again(s3_bucket: str, tmp_path: Path) -> None:
    store = S3Store(s3_bucket)
    store.put("tiny/config.json", b"{}")
    ready = node_cache(store, "tiny", tmp_path).parent
    (ready / "tiny/config.json").unlink()
    (ready / "tiny/half-written").write_bytes(b"?")
    ready.rename(ready.with_suffix(".partial"))  # as a killed downloader leaves it
    again = node_cache(store, "tiny", tmp_path)
    assert [path.name for path in again.iterdir()] == ["config.json"]


def test_waiting_for_another_process_ends(s3_bucket: str, tmp_path: Path) -> None:
    store = S3Store(s3_bucket)
    store.put("tiny/config.json", b"{}")
    ready = node_cache(store, "tiny", tmp_path).parent
    ready.rename(ready.with_suffix(".away"))
    with ready.with_suffix(".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(
            StorageError, match=r"another process on this node to finish the download of s3://.*/tiny"
        ):
            node_cache(store, "tiny", tmp_path, lock_timeout_s=0.1)
