"""The per-node cache: one download whatever the number of processes, nothing half-made, damaged, stale or boundless."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rayft.errors import JobError, StorageError
from rayft.storage import LocalStore, ObjectNotFound, RetryPolicy, cache_at, made, node_cache
from rayft.storage.cache_record import CHUNK_BYTES
from rayft.storage.kept_checksum import KeptChecksum, of_answer
from rayft.storage.s3 import S3Store
from rayft.storage.store import DamagedObject
from tests.cached import cut, flip, held, put_in_parts, put_plain
from tests.s3 import FaultyProxy

QUICK = RetryPolicy(attempts=3, total_s=20, base_s=0.01, cap_s=0.05)
MB = 1_000_000


pytestmark = pytest.mark.usefixtures("forget")


def wait_for(what: str, holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline, f"waited a minute for {what}"
        time.sleep(0.02)


def test_local_objects_are_not_copied(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    store.put("model/config.json", b"{}")
    assert node_cache(store, "model", tmp_path / "cache") == tmp_path / "store/model"
    with pytest.raises(ObjectNotFound, match="no-model"):
        node_cache(store, "no-model", tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_folder_is_downloaded_once_by_many_threads(
    s3_bucket: str, s3_proxy: FaultyProxy, tmp_path: Path
) -> None:
    store = S3Store(s3_bucket, "models")
    store.put("tiny/config.json", b"{}")
    store.put("tiny/deep/weights.bin", b"w" * 1000)
    store.put("tiny/deep/nothing", b"")
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
    assert (found[0] / "deep/nothing").read_bytes() == b""
    assert found[0].name == "tiny"
    assert s3_proxy.hits == {"slow": 1}


def test_eight_processes_download_once(s3_bucket: str, s3_proxy: FaultyProxy, tmp_path: Path) -> None:
    store = S3Store(s3_bucket)
    weights = os.urandom(CHUNK_BYTES + 5)
    store.put("tiny/weights.bin", weights)
    s3_proxy.add("slow", "GET", "weights.bin", seconds=0.5)
    with _many(8, store.uri, "tiny", tmp_path) as processes:
        paths = {process.stdout.readline().strip() for process in processes if process.stdout}
        assert len(paths) == 1
        (entry,) = cache_at(tmp_path).folder.survey()
    assert entry.users == 8
    assert Path(paths.pop(), "weights.bin").read_bytes() == weights
    assert s3_proxy.hits == {"slow": 2}, "one request for each of the two ranges"


def test_another_goes_on_where_the_holder_was_killed(
    s3_bucket: str, s3_proxy: FaultyProxy, tmp_path: Path
) -> None:
    store = S3Store(s3_bucket)
    store.put("tiny/first", b"1" * MB)
    store.put("tiny/second", b"2" * MB)
    s3_proxy.add("slow", "GET", "tiny/first")
    s3_proxy.add("slow", "GET", "tiny/second", times=1, seconds=30)
    with held(store.uri, "tiny", tmp_path) as first, held(store.uri, "tiny", tmp_path) as second:
        wait_for("the first file", lambda: any(p.read_text() for p in tmp_path.glob("entries/*/done.jsonl")))
        wait_for("the second request", lambda: s3_proxy.hits["slow"] == 2)
        assert cache_at(tmp_path).folder.survey()[0].partial
        # Whichever of the two is downloading.
        maker, other = (first, second) if _locks(first, tmp_path) else (second, first)
        os.kill(maker.pid, signal.SIGKILL)
        assert other.stdout
        path = Path(other.stdout.readline().strip())
    assert (path / "first").read_bytes() == b"1" * MB
    assert (path / "second").read_bytes() == b"2" * MB
    assert s3_proxy.hits == {"slow": 2}, "what was whole is not fetched again"
    (entry,) = cache_at(tmp_path).folder.survey()
    assert not entry.partial


def test_a_corrupted_byte_is_found_and_mended(
    s3_bucket: str, s3_proxy: FaultyProxy, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = S3Store(s3_bucket)
    good = os.urandom(MB)
    store.put("tiny/good", good)
    store.put("tiny/weights", good)
    weights = node_cache(store, "tiny", tmp_path) / "weights"
    for damage in (flip, cut, Path.unlink):
        node_cache(store, "tiny", tmp_path)
        damage(weights)
        s3_proxy.hits.clear()
        s3_proxy.add("slow", "GET", f"{s3_bucket}/tiny/")
        assert node_cache(store, "tiny", tmp_path) == weights.parent, "this process has looked at it already"
        with held(store.uri, "tiny", tmp_path) as process:
            assert process.stdout
            assert Path(process.stdout.readline().strip()) == weights.parent
            assert weights.read_bytes() == good
            said = process.communicate("", timeout=60)[1]
        assert "The node's copy of s3://" in said
        assert "/tiny is damaged (tiny/weights); it is fetched anew." in said
        assert s3_proxy.hits == {"slow": 1}, "only the damaged file"
        s3_proxy.clear()
    cache_at.cache_clear()
    node_cache(store, "tiny", tmp_path)
    (weights.parent.parent.parent / "entry.json").write_text("{")
    cache_at.cache_clear()
    assert (node_cache(store, "tiny", tmp_path) / "weights").read_bytes() == good
    assert "entry.json" in caplog.text


def test_what_is_made_is_kept_verified_and_bounded_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    calls = []

    def build(folder: Path) -> None:
        calls.append(folder)
        folder.mkdir()
        (folder / "model").write_bytes(b"m" * MB)

    def make() -> Path:
        return made("model-1", "the model", lambda: MB, build, tmp_path)

    assert make() == make()
    assert len(calls) == 1
    cache_at.cache_clear()
    assert (make() / "model").read_bytes() == b"m" * MB
    assert len(calls) == 1
    flip(make() / "model")
    cache_at.cache_clear()
    assert (make() / "model").read_bytes() == b"m" * MB
    assert len(calls) == 2
    assert "the model is damaged (model)" in caplog.text

    def fail(folder: Path) -> None:
        folder.mkdir()
        (folder / "half").write_bytes(b"h" * MB)
        raise JobError("It cannot be read.")

    with pytest.raises(JobError, match="cannot be read"):
        made("model-2", "another", lambda: MB, fail, tmp_path)
    assert [entry.name for entry in cache_at(tmp_path).folder.survey()] == ["model-1"]


def test_a_changed_object_is_fetched_anew(s3_bucket: str, s3_proxy: FaultyProxy, tmp_path: Path) -> None:
    store = S3Store(s3_bucket)
    store.put("rows.jsonl", b"old")
    assert node_cache(store, "rows.jsonl", tmp_path).read_bytes() == b"old"
    store.put("rows.jsonl", b"new")
    assert node_cache(store, "rows.jsonl", tmp_path).read_bytes() == b"new"
    with pytest.raises(ObjectNotFound, match="nothing"):
        node_cache(store, "nothing", tmp_path)
    s3_proxy.add("slow", "GET", "rows.jsonl", times=1, seconds=1)
    found: list[bytes] = []
    store.put("rows.jsonl", b"newer")
    thread = threading.Thread(
        target=lambda: found.append(node_cache(store, "rows.jsonl", tmp_path).read_bytes())
    )
    thread.start()
    wait_for("the request", lambda: s3_proxy.hits)
    store.put("rows.jsonl", b"newest of all")
    thread.join(60)
    assert found == [b"newest of all"], "it was overwritten while it was fetched"
    assert not [entry for entry in cache_at(tmp_path).folder.survey() if entry.partial]


def test_an_object_that_never_stays_the_same_ends(
    s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = S3Store(s3_bucket)
    store.put("rows", b"0")
    read_piece = store.read_piece

    def overwrite(*args: object) -> None:
        store.put("rows", os.urandom(8))
        read_piece(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(store, "read_piece", overwrite)
    with pytest.raises(StorageError, match="/rows changed 3 times while it was fetched"):
        node_cache(store, "rows", tmp_path)


FULL = pytest.mark.full


@pytest.mark.parametrize(
    "kind",
    [
        "truncated_response",
        "flipped_response",
        pytest.param("slow_down", marks=FULL),
        pytest.param("reset", marks=FULL),
    ],
)
def test_ranges_survive_passing_faults(
    s3_bucket: str, s3_proxy: FaultyProxy, tmp_path: Path, kind: str
) -> None:
    store = S3Store(s3_bucket, retry=QUICK)
    weights = os.urandom(CHUNK_BYTES + 5)
    put_plain(s3_bucket, "weights", weights)
    s3_proxy.add(kind, "GET", "weights", times=2)  # type: ignore[arg-type]
    assert node_cache(store, "weights", tmp_path).read_bytes() == weights
    assert s3_proxy.hits == {kind: 2}


@pytest.mark.parametrize(
    "kind",
    ["truncated_response", pytest.param("slow_down", marks=FULL), pytest.param("reset", marks=FULL)],
)
def test_ranges_that_always_fail_end_in_one_sentence(
    s3_bucket: str, s3_proxy: FaultyProxy, tmp_path: Path, kind: str
) -> None:
    store = S3Store(s3_bucket, retry=QUICK)
    store.put("weights", b"w" * MB)
    s3_proxy.add(kind, "GET", "weights")  # type: ignore[arg-type]
    with pytest.raises(StorageError, match=r"Reading s3://.*/weights failed 3 times within") as caught:
        node_cache(store, "weights", tmp_path)
    assert caught.value.code == 5
    assert "\n" not in str(caught.value)
    s3_proxy.clear()
    assert node_cache(store, "weights", tmp_path).read_bytes() == b"w" * MB


def test_bytes_are_held_against_what_the_service_keeps(
    s3_bucket: str, s3_proxy: FaultyProxy, tmp_path: Path
) -> None:
    store = S3Store(s3_bucket, retry=QUICK)
    put_plain(s3_bucket, "crc", b"w" * MB, ChecksumAlgorithm="CRC32")
    put_plain(s3_bucket, "sha", b"w" * MB, ChecksumAlgorithm="SHA256")
    put_plain(s3_bucket, "etag", b"w" * MB)
    put_in_parts(s3_bucket, "parts", [b"p" * (5 << 20), b"q" * MB])
    kinds = {}
    for name in ("crc", "sha", "etag", "parts"):
        entry = store.stat(name)
        assert entry
        kept = store.kept_checksum(entry)
        assert kept
        kinds[name] = (kept.kind, kept.part_bytes)
        (tmp_path / name).write_bytes(store.get(name))
        assert kept.matches(tmp_path / name)
        flip(tmp_path / name)
        assert not kept.matches(tmp_path / name)
    assert kinds == {"crc": ("CRC32", 0), "sha": ("SHA256", 0), "etag": ("MD5", 0), "parts": ("MD5", 5 << 20)}
    s3_proxy.add("flipped_response", "GET", "crc")
    with pytest.raises(DamagedObject, match=r"/crc does not match the CRC32 checksum") as caught:
        node_cache(store, "crc", tmp_path / "cache")
    assert caught.value.code == 5


def test_an_etag_that_is_no_md5_is_no_damage(
    s3_bucket: str, s3_proxy: FaultyProxy, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put_plain(s3_bucket, "etag", b"w" * MB)
    s3_proxy.add("flipped_response", "GET", "etag")  # every time alike
    node_cache(S3Store(s3_bucket), "etag", tmp_path)
    assert "its ETag is not the MD5 of its content; fetched twice alike" in caplog.text
    md5 = "0" * 32
    assert of_answer({}, md5) == KeptChecksum("MD5", md5)
    assert of_answer({"ServerSideEncryption": "aws:kms"}, md5) is None
    assert of_answer({"ChecksumCRC32": "AAAAAA==-2", "ChecksumType": "COMPOSITE"}, "opaque") is None


def test_waiting_for_another_process_ends(s3_bucket: str, tmp_path: Path) -> None:
    store = S3Store(s3_bucket)
    store.put("tiny/config.json", b"{}")
    name = node_cache(store, "tiny", tmp_path).parent.parent.name
    cache_at.cache_clear()
    (tmp_path / "entries" / name).rename(tmp_path / "away")
    with (tmp_path / "locks" / name).open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(
            StorageError, match=r"another process on this node to finish the download of s3://.*/tiny"
        ):
            node_cache(store, "tiny", tmp_path, lock_timeout_s=0.1)


def _locks(process: subprocess.Popen[str], cache: Path) -> bool:
    """Whether the process is the one that downloads: it holds a lock file open and writes into a partial entry."""
    files = Path(f"/proc/{process.pid}/fd")
    return any("done.jsonl" in os.readlink(file) for file in files.iterdir())


@contextlib.contextmanager
def _many(count: int, store: str, key: str, cache: Path) -> Iterator[list[subprocess.Popen[str]]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(held(store, key, cache)) for _ in range(count)]
