"""The per-node cache: its bound, what is in use, full disks, folders without locks, and `rayft cache`."""

from __future__ import annotations

import errno
import fcntl
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from rayft.errors import JobError, StorageError
from rayft.storage import Held, RetryPolicy, cache_at, hold, node_cache
from rayft.storage.cache import NodeCache, fetching
from rayft.storage.flock import refuse_local_locks
from rayft.storage.s3 import S3Store
from tests.cached import flip, held, names
from tests.s3 import FaultyProxy

QUICK = RetryPolicy(attempts=3, total_s=20, base_s=0.01, cap_s=0.05)
MB = 1_000_000


pytestmark = pytest.mark.usefixtures("forget")


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
    assert names(tmp_path) == "abc"
    take("d")
    assert names(tmp_path) == "abd", "c was used longest ago"
    with held(store.uri, "a", tmp_path) as process:
        assert process.stdout
        process.stdout.readline()
        take("e")
        take("f")
        assert names(tmp_path) == "aef", "a is in use by another process"
        assert "bound" not in caplog.text
        for name in "bc":
            assert process.stdin
            process.stdin.write(f"{name}\n")
            process.stdin.flush()
            process.stdout.readline()
        assert names(tmp_path) == "abc"
        with hold(store, "g", tmp_path) as path:
            assert path.read_bytes() == b"g" * MB
            assert names(tmp_path) == "abcg"
        assert "goes 0.00 GB over its bound of 0.00 GB: the rest is in use." in caplog.text
    caplog.clear()
    with hold(store, "big", tmp_path) as path:  # its users are dead
        assert path.read_bytes() == b"b" * 4 * MB
        assert names(tmp_path) == "big"
    assert "/big alone is larger. RAYFT_CACHE_GB sets the bound." in caplog.text
    take("a")
    assert names(tmp_path) == "a"


def test_what_the_hubs_cache_has_of_the_folder_is_taken_off_the_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYFT_CACHE_GB", "0.005")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache" / "hub"))
    folder = NodeCache(tmp_path / "cache").folder
    assert folder.bound() == 5 * MB
    blobs = tmp_path / "cache" / "hub" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "a").write_bytes(b"a" * 2 * MB)
    (blobs / "snapshot").symlink_to("a")
    assert 2.9 * MB < folder.bound() <= 3 * MB
    monkeypatch.setenv("HF_HOME", str(tmp_path / "elsewhere"))
    assert folder.bound() == 5 * MB


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
    assert names(tmp_path) == "abc"


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
        assert names(tmp_path) == "ab"
        assert main(["cache", "--verify"]) == 0
        flip(damaged)
    capsys.readouterr()
    assert main(["cache", "--verify"]) == 5
    told = capsys.readouterr()
    assert f"damaged: {store.uri}/b (b): removed" in told.out
    assert "1 of the entries" in told.err
    assert names(tmp_path) == "a"
    assert main(["cache", "--clear"]) == 0
    assert names(tmp_path) == ""


def _hold_in(cache: NodeCache, store: S3Store, key: str) -> Held:
    taken = cache.take(fetching(store, key))
    return Held(taken.path / key, taken.release)
