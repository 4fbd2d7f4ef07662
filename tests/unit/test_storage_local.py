"""Local folders: what a killed writer, a full disk and missing rights leave behind."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rayft.errors import StorageError
from rayft.storage import LocalStore


def test_a_killed_writer_leaves_the_old_object_and_a_leftover_that_can_be_discarded(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.put("step/data.bin", b"old")
    script = f"""
import os, signal
from rayft.storage import LocalStore
def parts():
    yield b"half of the new "
    os.kill(os.getpid(), signal.SIGKILL)
LocalStore({str(tmp_path)!r}).put_parts("step/data.bin", parts())
"""
    assert subprocess.run([sys.executable, "-c", script], check=False, timeout=60).returncode == -9
    assert store.get("step/data.bin") == b"old"
    assert [entry.key for entry in store.list()] == ["step/data.bin"]
    assert len(os.listdir(tmp_path / "step")) == 2
    assert store.discard_unfinished("step", lambda key: key != "step/data.bin") == []
    assert store.discard_unfinished("step", lambda key: True) == ["step/data.bin"]
    assert os.listdir(tmp_path / "step") == ["data.bin"]


def test_full_disk_keeps_the_old_object_and_says_so(tmp_path: Path) -> None:
    """A limit on the file size stands for the full disk: the kernel refuses the write in the same way."""
    script = f"""
import resource
from rayft.storage import LocalStore
store = LocalStore({str(tmp_path)!r})
store.put("data", b"old")
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    store.put("data", bytes(2 << 20))
except Exception as error:
    print(type(error).__name__, error.code, error)
print(store.get("data"), store.list())
"""
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    first, second = run.stdout.splitlines()
    assert first.startswith(
        f"StorageError 5 Writing {tmp_path}/data failed: File too large. Free space there ("
    )
    assert second.startswith("b'old' [Entry(key='data', size=3")
    assert os.listdir(tmp_path) == ["data"]


def test_a_full_file_system_ends_the_write(tmp_path: Path) -> None:
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "none", tmp_path],
        capture_output=True,
        check=False,
        timeout=30,
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system needs rights that this user lacks")
    try:
        store = LocalStore(tmp_path)
        store.put("old", b"old")
        with pytest.raises(StorageError, match=f"{tmp_path}/new failed: No space left on device") as caught:
            store.put("new", bytes(2 << 20))
        assert caught.value.remedy.startswith("Free space there (")
        assert [entry.key for entry in store.list()] == ["old"]
        store.put("new", bytes(1 << 19))  # the failed write gave its space back
    finally:
        subprocess.run(["umount", tmp_path], check=True, timeout=30)


def test_a_path_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match=r"failed: (File exists|Not a directory)"):
        LocalStore(tmp_path / "file").put("key", b"")


def test_file_systems_without_hard_links_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    with pytest.raises(StorageError, match="has no hard links"):
        LocalStore(tmp_path).put_if_absent("lock", b"me")
    assert os.listdir(tmp_path) == []


def test_a_link_whose_reply_was_lost_still_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS may repeat a link that succeeded and report that the target exists."""
    link = os.link

    def linked_but_reported_as_existing(source: Path, target: Path) -> None:
        link(source, target)
        raise FileExistsError(errno.EEXIST, "File exists")

    monkeypatch.setattr(os, "link", linked_but_reported_as_existing)
    assert LocalStore(tmp_path).put_if_absent("lock", b"me")


def test_emptied_folders_disappear(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.put("a/b/c/one", b"")
    store.put("a/two", b"")
    store.delete(["a/b/c/one"])
    assert os.listdir(tmp_path / "a") == ["two"]
    store.delete(["a/two"])
    assert os.listdir(tmp_path) == []
    assert tmp_path.exists()
