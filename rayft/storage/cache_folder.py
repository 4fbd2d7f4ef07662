"""The node cache's folder: its entries, what they take of its bound, and which of them may go.

`entries/NAME` is an entry (its files under `content/`, `entry.json`), `entries/NAME.partial` one that is being made or
whose maker died, `locks/NAME` the lock of its maker, `uses/` the marks of processes, `trash/` what is being deleted,
`lock` guards all of it for moments.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import os
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rayft.errors import JobError, StorageError
from rayft.storage.cache_marks import Marks
from rayft.storage.cache_record import bytes_on_disk, last_use, read_record
from rayft.storage.flock import locked, refuse_local_locks, try_lock

_LOG = logging.getLogger(__name__)
_LOCK_TIMEOUT_S = 600.0  # for moments only, but deleting big entries on a slow disk takes some
_PARTIAL = ".partial"
_PLAN = "plan"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class CacheEntry:
    """An entry as `rayft cache` lists it. last_use: seconds since 1970; users: living processes that use it.

    partial: it is being made (then users counts its maker), or its maker died.
    """

    name: str
    what: str
    bytes: int
    last_use: float
    users: int
    partial: bool = False


class CacheFolder:
    """The folder `root`, shared by all processes of the node. `bytes_bound`: default by `RAYFT_CACHE_GB` or the disk."""

    def __init__(self, root: Path, bytes_bound: int | None = None) -> None:
        self.root = root
        self._bound = bytes_bound
        for name in ("entries", "locks", "uses", "trash"):
            (root / name).mkdir(parents=True, exist_ok=True)
        refuse_local_locks(root)
        self.marks = Marks(root / "uses")

    def entry(self, name: str) -> Path:
        return self.root / "entries" / name

    def partial(self, name: str) -> Path:
        return self.root / "entries" / (name + _PARTIAL)

    def lock(self, name: str) -> Path:
        """Lock file of whoever makes the entry."""
        return self.root / "locks" / name

    @contextlib.contextmanager
    def guarded(self, *, shared: bool = False) -> Iterator[None]:
        """Entries do not come or go meanwhile; shared: marks of this process may be set."""
        what = "tidying the node cache"
        with locked(self.root / "lock", _LOCK_TIMEOUT_S, what, shared=shared):
            yield

    def use(self, name: str) -> bool:
        """Mark the entry as used by this process, if it is there."""
        with self.guarded(shared=True):
            if not (self.entry(name) / "entry.json").exists():
                return False
            self.marks.add(name)
            return True

    def reserve(self, name: str, what: str, need: int) -> Path:
        """Make room for an entry of `need` bytes and count it from now on; its partial folder, perhaps with leftovers.

        Raises `StorageError` if the disk has not that much space whatever is evicted.
        """
        partial = self.partial(name)
        with self.guarded():
            self._make_room(name, what, need)
            partial.mkdir(exist_ok=True)
            (partial / _PLAN).write_text(f"{need} {what}", encoding="utf-8")
        return partial

    def commit(self, name: str) -> None:
        """The partial folder becomes the entry, used by this process. One that is there gets its files replaced one by one,
        so that those who use it find them at any time."""
        partial, entry = self.partial(name), self.entry(name)
        with self.guarded():
            if entry.exists():
                for file in [*_files(partial / "content"), partial / "entry.json"]:
                    target = entry / file.relative_to(partial)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    os.replace(file, target)
                shutil.rmtree(partial)
            else:
                os.replace(partial, entry)
                for extra in (_PLAN, "done.jsonl"):  # of no use any more
                    (entry / extra).unlink(missing_ok=True)
            self.marks.add(name)
            self._make_room(name, "", 0)  # what was made may be larger than it was estimated

    def bound(self) -> int:
        """Bytes that the cache may keep: RAYFT_CACHE_GB without what the hub's own cache has of it (HF_HOME, where that lies in
        this folder); by default half of what the disk has for it."""
        if self._bound is not None:
            return self._bound
        text = os.environ.get("RAYFT_CACHE_GB", "")
        if not text:
            return (shutil.disk_usage(self.root).free + bytes_on_disk(self.root / "entries")) // 2
        try:
            gigabytes = float(text)
        except ValueError:
            gigabytes = math.nan
        if not (math.isfinite(gigabytes) and gigabytes >= 0):
            raise JobError(
                f"RAYFT_CACHE_GB is {text!r}, which is no number of gigabytes.", "Set it to one, such as 200."
            )
        return max(0, int(gigabytes * 1e9) - self._of_the_hub())

    def survey(self) -> list[CacheEntry]:
        """All entries, the one used last first."""
        with self.guarded():
            return sorted(self._scan(), key=lambda entry: -entry.last_use)

    def remove(self, name: str | None = None) -> list[CacheEntry]:
        """Remove an entry, or all, and what dead processes left; none that is in use. Returns the removed."""
        with self.guarded():
            self._sweep()
            entries = [e for e in self._scan() if not e.users and name in (None, e.name)]
            for entry in entries:
                self._evict(entry)
        return entries

    def _of_the_hub(self) -> int:
        home = Path(os.environ.get("HF_HOME") or "~").expanduser().absolute()
        return bytes_on_disk(home) if self.root in home.parents else 0

    def _make_room(self, name: str, what: str, need: int) -> None:
        """Evict what was used longest ago until `need` more bytes are within the bound and on the disk."""
        self._sweep()
        # A partial of `name` is what room is made for: it counts as `need`, and what it has is on the disk already.
        entries = [entry for entry in self._scan() if not (entry.partial and entry.name == name)]
        bound, used = self.bound(), sum(entry.bytes for entry in entries)
        free = shutil.disk_usage(self.root).free - self._outstanding(name)
        excess, short = used + need - bound, need - bytes_on_disk(self.partial(name)) - free
        if max(excess, short) <= 0:
            return
        # Leftovers of the dead go first.
        idle = [entry for entry in entries if not entry.users and entry.name != name]
        for entry in sorted(idle, key=lambda entry: (not entry.partial, entry.last_use)):
            if max(excess, short) <= 0:
                return
            self._evict(entry)
            excess, short = excess - entry.bytes, short - entry.bytes
        if short > 0 and what:
            raise full(self.root, what, need)
        if excess > 0 and what:
            reason = f"{what} alone is larger" if need > bound else "the rest is in use"
            _LOG.warning(
                "The node cache %s goes %.2f GB over its bound of %.2f GB: %s. RAYFT_CACHE_GB sets the bound.",
                self.root,
                excess / 1e9,
                bound / 1e9,
                reason,
            )

    def _scan(self) -> list[CacheEntry]:
        users = self.marks.all()
        found = []
        for folder in (self.root / "entries").iterdir():
            if folder.name.endswith(_PARTIAL):
                found.append(self._scan_partial(folder))
            elif (record := read_record(folder)) is not None:
                name = folder.name
                found.append(CacheEntry(name, record.what, record.bytes, last_use(folder), users[name]))
            else:  # nobody can know what it is
                size = bytes_on_disk(folder)
                found.append(CacheEntry(folder.name, "unknown", size, 0.0, users[folder.name]))
        return found

    def _scan_partial(self, folder: Path) -> CacheEntry:
        name = folder.name.removesuffix(_PARTIAL)
        planned, what = _plan(folder)
        alive = self._is_made(name)
        size = bytes_on_disk(folder)
        size = max(planned, size) if alive else size
        return CacheEntry(name, what, size, folder.stat().st_mtime, int(alive), partial=True)

    def _outstanding(self, name: str) -> int:
        """Bytes that living makers of other entries than `name` will still write."""
        own = self.partial(name)
        folders = [f for f in (self.root / "entries").iterdir() if f.name.endswith(_PARTIAL) and f != own]
        alive = [f for f in folders if self._is_made(f.name.removesuffix(_PARTIAL))]
        return sum(max(0, _plan(folder)[0] - bytes_on_disk(folder)) for folder in alive)

    def _is_made(self, name: str) -> bool:
        try:
            with self.lock(name).open("r+b") as file:
                return not try_lock(file.fileno(), self.lock(name))
        except FileNotFoundError:
            return False

    def _evict(self, entry: CacheEntry) -> None:
        trash = self.root / "trash" / uuid.uuid4().hex
        os.replace(self.partial(entry.name) if entry.partial else self.entry(entry.name), trash)
        # A deletion that is interrupted leaves nothing that looks like an entry.
        shutil.rmtree(trash, ignore_errors=True)
        with contextlib.suppress(FileNotFoundError), self.lock(entry.name).open("r+b") as file:
            if try_lock(file.fileno(), self.lock(entry.name)):
                self.lock(entry.name).unlink()

    def _sweep(self) -> None:
        for trash in (self.root / "trash").iterdir():
            shutil.rmtree(trash, ignore_errors=True)


def full(root: Path, what: str, need: int) -> StorageError:
    """The error for a disk that cannot take an entry."""
    free = shutil.disk_usage(root).free
    return StorageError(
        f"The disk of the node cache {root} is full: {what} needs {need / 1e9:.2f} GB, {free / 1e9:.2f} GB are free.",
        "Free space there (`rayft cache --clear` removes what is not in use), or set RAYFT_CACHE to a larger disk.",
    )


@contextlib.contextmanager
def explained(root: Path, what: str, need: int = 0) -> Iterator[None]:
    """Turn what the disk under the cache refuses into a `StorageError`."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise full(root, what, need) from error
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise StorageError(
            f"The node cache {root} failed with {what}: {reason}.",
            "Give this user write permission there, or set RAYFT_CACHE to another folder.",
        ) from error
    except StorageError:
        raise
    except Exception as error:
        if "os error 28" in str(error) or "No space left" in str(error):  # as libraries word it
            raise full(root, what, need) from error
        raise


def _plan(partial: Path) -> tuple[int, str]:
    try:
        planned, _, what = (partial / _PLAN).read_text(encoding="utf-8").partition(" ")
        return int(planned), what
    except (OSError, ValueError):
        return 0, "unknown"


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
