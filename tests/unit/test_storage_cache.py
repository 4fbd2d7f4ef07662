"""The per-node cache: one download whatever the number of processes, nothing half-made, damaged, stale or boundless."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rayft.errors import JobError, StorageError
from rayft.storage import Held, LocalStore, ObjectNotFound, RetryPolicy, cache_at, hold, made, node_cache
from rayft.storage.cache import NodeCache, fetching
from rayft.storage.cache_record import CHUNK_BYTES
from rayft.storage.flock import refuse_local_locks
from rayft.storage.kept_checksum import KeptChecksum, of_answer
from rayft.storage.s3 import S3Store
from rayft.storage.store import DamagedObject
from tests.cached import held
from tests.s3 import FaultyProxy

QUICK = RetryPolicy(attempts=3, total_s=20, base_s=0.01, cap_s=0.05)
MB = 1_000_000


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """Every test begins as a new process: nothing verified, no marks."""
    cache_at.cache_clear()
    yield
    cache_at.cache_clear()


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
    for damage in (_flip, _cut, Path.unlink):
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
    _flip(make() / "model")
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


def test_what_was_used_longest_ago_goes_and_what_is_in_use_stays(
    s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("RAYFT_CACHE_GB", "0.0035")
    store = S3Store(s3_bucket)
    for name in "abcdefg":
        store.put(name, name.encode() * MB)
    store.put("big", b"b" * 4 * MB)

    def take(name: str) -> None:
        hold(store, name, tmp_path).release()
        time.sleep(0.02)

    for name in "abcab":
        take(name)
    assert _names(tmp_path) == "abc"
    take("d")
    assert _names(tmp_path) == "abd", "c was used longest ago"
    with held(store.uri, "a", tmp_path) as process:
        assert process.stdout
        process.stdout.readline()
        take("e")
        take("f")
        assert _names(tmp_path) == "aef", "a is in use by another process"
        assert "bound" not in caplog.text
        for name in "bc":
            assert process.stdin
            process.stdin.write(f"{name}\n")
            process.stdin.flush()
            process.stdout.readline()
        assert _names(tmp_path) == "abc"
        with hold(store, "g", tmp_path) as path:
            assert path.read_bytes() == b"g" * MB
            assert _names(tmp_path) == "abcg"
        assert "goes 0.00 GB over its bound of 0.00 GB: the rest is in use." in caplog.text
    caplog.clear()
    with hold(store, "big", tmp_path) as path:  # its users are dead
        assert path.read_bytes() == b"b" * 4 * MB
        assert _names(tmp_path) == "big"
    assert "/big alone is larger. RAYFT_CACHE_GB sets the bound." in caplog.text
    take("a")
    assert _names(tmp_path) == "a"


def test_leftovers_of_dead_downloads_go_first(
    s3_bucket: str, s3_proxy: FaultyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYFT_CACHE_GB", "0.0035")
    store = S3Store(s3_bucket, retry=QUICK)
    for name in "abc":
        store.put(name, name.encode() * MB)
    store.put("tiny/a", b"a" * MB)
    store.put("tiny/b", b"b" * MB)
    hold(store, "a", tmp_path).release()
    s3_proxy.add("slow_down", "GET", "tiny/b")
    with pytest.raises(StorageError, match="failed 3 times"):
        node_cache(store, "tiny", tmp_path)
    s3_proxy.clear()
    survey = cache_at(tmp_path).folder.survey()
    assert [(entry.partial, entry.users) for entry in survey] == [(True, 0), (False, 0)]
    hold(store, "b", tmp_path).release()
    hold(store, "c", tmp_path).release()
    assert _names(tmp_path) == "abc"


def test_the_bound_holds_under_concurrent_fetches(
    s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYFT_CACHE_GB", "0.0055")
    store = S3Store(s3_bucket)
    for number in range(12):
        store.put(f"{number}", bytes([number]) * MB)
    wrong: list[object] = []

    def take(first: int) -> None:
        cache = NodeCache(tmp_path)  # as another process: marks and locks of its own
        for step in range(12):
            number = (first + 5 * step) % 12
            with _hold_in(cache, store, f"{number}") as path:
                if path.read_bytes() != bytes([number]) * MB:
                    wrong.append(number)

    threads = [threading.Thread(target=take, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    folder, most = NodeCache(tmp_path).folder, 0
    while any(thread.is_alive() for thread in threads):
        most = max(most, sum(entry.bytes for entry in folder.survey()))
        time.sleep(0.02)
    assert not wrong
    assert 4 * MB <= most <= 5.5 * MB, "four entries in use, and one more"


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
    _put_plain(s3_bucket, "weights", weights)
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
    _put_plain(s3_bucket, "crc", b"w" * MB, ChecksumAlgorithm="CRC32")
    _put_plain(s3_bucket, "sha", b"w" * MB, ChecksumAlgorithm="SHA256")
    _put_plain(s3_bucket, "etag", b"w" * MB)
    _put_in_parts(s3_bucket, "parts", [b"p" * (5 << 20), b"q" * MB])
    kinds = {}
    for name in ("crc", "sha", "etag", "parts"):
        entry = store.stat(name)
        assert entry
        kept = store.kept_checksum(entry)
        assert kept
        kinds[name] = (kept.kind, kept.part_bytes)
        (tmp_path / name).write_bytes(store.get(name))
        assert kept.matches(tmp_path / name)
        _flip(tmp_path / name)
        assert not kept.matches(tmp_path / name)
    assert kinds == {"crc": ("CRC32", 0), "sha": ("SHA256", 0), "etag": ("MD5", 0), "parts": ("MD5", 5 << 20)}
    s3_proxy.add("flipped_response", "GET", "crc")
    with pytest.raises(DamagedObject, match=r"/crc does not match the CRC32 checksum") as caught:
        node_cache(store, "crc", tmp_path / "cache")
    assert caught.value.code == 5


def test_an_etag_that_is_no_md5_is_no_damage(
    s3_bucket: str, s3_proxy: FaultyProxy, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _put_plain(s3_bucket, "etag", b"w" * MB)
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


_FULL = """
import sys
from rayft.errors import RayftError
from rayft.storage import node_cache, open_store
store = open_store(sys.argv[1])
for name in sys.argv[2:]:
    try:
        print(node_cache(store, name, "/mnt/cache").stat().st_size)
    except RayftError as error:
        print(error.code, error)
"""


def test_a_full_disk_ends_in_one_sentence(s3_bucket: str, tmp_path: Path) -> None:
    mount = "mount -t tmpfs -o size=16m tmpfs /mnt"
    unshare = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    try:
        subprocess.run([*unshare, mount], check=True, capture_output=True, timeout=60)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this machine lets no user mount a small disk in a namespace")
    store = S3Store(s3_bucket)
    store.put("small", b"s" * 9 * MB)
    store.put("other", b"o" * 10 * MB)
    store.put("large", b"l" * 20 * MB)
    # No network in the way: the namespace is of users and mounts only.
    inside = f'{mount} && exec "$@"'
    command = [*unshare, inside, "sh", sys.executable, "-c", _FULL, store.uri, "large", "small", "other"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    large, small, other = result.stdout.splitlines()
    assert large.startswith("5 The disk of the node cache /mnt/cache is full: s3://")
    assert "/large needs 0.02 GB, 0.02 GB are free. Free space there" in large
    assert small == str(9 * MB)
    assert other.startswith("5 The disk of the node cache"), "small is in use"


def test_a_disk_that_fills_meanwhile_leaves_no_half_entry(
    s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The size a file may have is a limit that the kernel enforces as it does the disk's."""
    import resource

    store = S3Store(s3_bucket)
    store.put("tiny/a", b"a" * 2 * MB)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MB, limits[1]))
    try:
        with pytest.raises(StorageError, match=r"The disk of the node cache .* is full"):
            node_cache(store, "tiny", tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list((tmp_path / "entries").iterdir())
    assert (node_cache(store, "tiny", tmp_path) / "a").stat().st_size == 2 * MB


def test_folders_without_locks_are_refused(
    s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_lock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    store = S3Store(s3_bucket)
    store.put("a", b"a")
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", no_lock)
        with pytest.raises(StorageError, match="has no locks that hold"):
            node_cache(store, "a", tmp_path / "cache")
    mounts = tmp_path / "mountinfo"
    line = "31 1 0:25 / {} rw,relatime shared:1 - {} server:/x {}\n"
    mounts.write_text(
        line.format("/", "ext4", "rw")
        + line.format(tmp_path, "nfs4", "rw,vers=4.2,local_lock=none")
        + line.format(tmp_path / "far", "nfs", "rw,nolock")
    )
    refuse_local_locks(tmp_path / "near", mounts)
    refuse_local_locks(Path("/other"), mounts)
    with pytest.raises(StorageError, match="nfs mounted with nolock"):
        refuse_local_locks(tmp_path / "far" / "cache", mounts)


def test_a_bound_that_is_no_number_is_refused(
    s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = S3Store(s3_bucket)
    store.put("a", b"a")
    for text in ("many", "-1", "nan"):
        monkeypatch.setenv("RAYFT_CACHE_GB", text)
        with pytest.raises(JobError, match=f"RAYFT_CACHE_GB is '{text}', which is no number of gigabytes"):
            node_cache(store, "a", tmp_path)
    monkeypatch.delenv("RAYFT_CACHE_GB")
    assert cache_at(tmp_path).folder.bound() > MB, "a share of the disk"


def test_the_verb_lists_verifies_and_clears(
    s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rayft.cli import main

    monkeypatch.setenv("RAYFT_CACHE", str(tmp_path))
    monkeypatch.setenv("RAYFT_CACHE_GB", "7")
    monkeypatch.setenv("COLUMNS", "200")
    store = S3Store(s3_bucket)
    for name in "abc":
        store.put(name, name.encode() * MB)
    with hold(store, "a", tmp_path), hold(store, "b", tmp_path) as damaged:
        assert main(["cache"]) == 0
        listed = capsys.readouterr().out
        assert f"{store.uri}/a" in listed
        assert "by 1 process" in listed
        assert f"2 entries, 2.0 MB of at most 7.0 GB (RAYFT_CACHE_GB), in {tmp_path}" in listed
        hold(store, "c", tmp_path).release()
        assert main(["cache", "--clear"]) == 0
        assert "Removed 1 that nobody uses, 1.0 MB." in capsys.readouterr().out
        assert _names(tmp_path) == "ab"
        assert main(["cache", "--verify"]) == 0
        _flip(damaged)
    capsys.readouterr()
    assert main(["cache", "--verify"]) == 5
    told = capsys.readouterr()
    assert f"damaged: {store.uri}/b (b): removed" in told.out
    assert "1 of the entries" in told.err
    assert _names(tmp_path) == "a"
    assert main(["cache", "--clear"]) == 0
    assert _names(tmp_path) == ""


def _names(cache: Path) -> str:
    return "".join(sorted(entry.what.rpartition("/")[2] for entry in cache_at(cache).folder.survey()))


def _flip(path: Path) -> None:
    with path.open("r+b") as file:
        byte = file.read(1)[0]
        file.seek(0)
        file.write(bytes([byte ^ 1]))


def _locks(process: subprocess.Popen[str], cache: Path) -> bool:
    """Whether the process is the one that downloads: it holds a lock file open and writes into a partial entry."""
    files = Path(f"/proc/{process.pid}/fd")
    return any("done.jsonl" in os.readlink(file) for file in files.iterdir())


@contextlib.contextmanager
def _many(count: int, store: str, key: str, cache: Path) -> Iterator[list[subprocess.Popen[str]]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(held(store, key, cache)) for _ in range(count)]


def _hold_in(cache: NodeCache, store: S3Store, key: str) -> Held:
    taken = cache.take(fetching(store, key))
    return Held(taken.path / key, taken.release)


def _put_plain(bucket: str, key: str, data: bytes, **arguments: str) -> None:
    """Without the checksum that boto3 adds by itself."""
    _client().put_object(Bucket=bucket, Key=key, Body=data, **arguments)


def _put_in_parts(bucket: str, key: str, parts: list[bytes]) -> None:
    client, at = _client(), {"Bucket": bucket, "Key": key}
    upload = client.create_multipart_upload(**at)["UploadId"]
    sent = [
        {
            "PartNumber": number,
            "ETag": client.upload_part(**at, UploadId=upload, PartNumber=number, Body=part)["ETag"],
        }
        for number, part in enumerate(parts, 1)
    ]
    client.complete_multipart_upload(**at, UploadId=upload, MultipartUpload={"Parts": sent})


def _client() -> Any:
    import boto3
    from botocore.config import Config

    return boto3.session.Session().client("s3", config=Config(request_checksum_calculation="when_required"))


def _cut(path: Path) -> None:
    os.truncate(path, 100)
