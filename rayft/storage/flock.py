"""Locks between the processes of a node: `flock` on a file, which the kernel frees when its holder dies, however."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from rayft.errors import StorageError

_POLL_S = (0.001, 0.05)  # first, and at most: most waits are for moments
_PROGRESS_S = 2.0
_MOUNTS = Path("/proc/self/mountinfo")
#: Options with which a network file system keeps locks within one node, by type (nfs(5), mount.lustre(8), mount.cifs(8)).
_LOCAL_LOCKS = {
    "nfs": {"nolock", "local_lock=flock", "local_lock=all"},
    "nfs4": {"nolock", "local_lock=flock", "local_lock=all"},
    "lustre": {"localflock"},
    "cifs": {"nobrl"},
    "smb3": {"nobrl"},
}


@contextlib.contextmanager
def locked(
    path: Path,
    timeout_s: float,
    what: str,
    *,
    shared: bool = False,
    progress: Callable[[], int] | None = None,
) -> Iterator[None]:
    """Hold the lock of the file `path`, which is created.

    Waits at most `timeout_s`, counted anew whenever `progress()` (looked at every two seconds) has changed. The file may
    be deleted by its holder: who waited for it then locks its successor. Raises `StorageError`, which says that another
    process was waited for to finish `what`.
    """
    while True:
        # NFS wants a file open for writing for an exclusive lock and for reading for a shared one.
        with path.open("a+b") as file:
            _wait(file.fileno(), path, timeout_s, what, shared, progress)
            if _is_at(file.fileno(), path):
                yield
                return


def try_lock(descriptor: int, path: Path, *, shared: bool = False) -> bool:
    """Lock an open file unless another holds it. Raises `StorageError` where the file system has no locks."""
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES):
            return False
        if error.errno == errno.EINTR:
            return False
        raise no_locks(path.parent, os.strerror(error.errno or 0)) from error
    return True


def refuse_local_locks(folder: Path, mounts: Path = _MOUNTS) -> None:
    """Raise `StorageError` if `folder` lies on a network mount whose locks other nodes do not see."""
    found = _mount_of(folder, mounts)
    if found is None:
        return
    kind, options = found
    keeping = sorted(_LOCAL_LOCKS.get(kind, set()) & options)
    if keeping:
        raise no_locks(folder, f"{kind} mounted with {keeping[0]}")


def no_locks(folder: Path, reason: str) -> StorageError:
    """The error for a folder in which processes cannot exclude each other."""
    return StorageError(
        f"The file system of {folder} has no locks that hold ({reason}), so processes cannot share a cache there.",
        "Set RAYFT_CACHE to a folder on the node's own disk.",
    )


def _wait(
    descriptor: int,
    path: Path,
    timeout_s: float,
    what: str,
    shared: bool,
    progress: Callable[[], int] | None,
) -> None:
    pause, slowest = _POLL_S
    now = time.monotonic()
    deadline, look, seen = now + timeout_s, now + _PROGRESS_S, progress() if progress else 0
    while not try_lock(descriptor, path, shared=shared):
        now = time.monotonic()
        if progress and now >= look:
            look = now + _PROGRESS_S
            done = progress()
            if done != seen:
                deadline, seen = now + timeout_s, done
        if now >= deadline:
            raise StorageError(
                f"Waited {timeout_s:.0f} s for another process on this node to finish {what} (lock {path}).",
                "See whether that process is stuck and stop it, then start again.",
            )
        time.sleep(pause)
        pause = min(1.5 * pause, slowest)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    own = os.fstat(descriptor)
    return (own.st_dev, own.st_ino) == (there.st_dev, there.st_ino)


def _mount_of(folder: Path, mounts: Path) -> tuple[str, set[str]] | None:
    """File system type and options of the mount that holds `folder`; None where that cannot be read."""
    try:
        lines = mounts.read_text().splitlines()
    except OSError:
        return None
    real, best, found = str(folder.resolve()), -1, None
    for line in lines:
        before, _, after = line.partition(" - ")
        fields, source = before.split(), after.split()
        if len(fields) < 6 or len(source) < 3:
            continue
        point = re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), fields[4])
        inside = real == point or real.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= best:  # of several mounts at one place the last one counts
            best, found = len(point), (source[0], set(fields[5].split(",")) | set(source[2].split(",")))
    return found
