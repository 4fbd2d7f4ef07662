"""The per-node cache: one copy per machine of remote objects and converted models, whoever wants it, within a bound.

Whatever rayft puts on a node's own disk goes through here: `hold` and `node_cache` for what a store has, `made` for what is
computed from a file. One process makes an entry while the others wait; if it dies, the next goes on. A process verifies
an entry when it takes it for the first time, and what is damaged is made anew. An entry is in use until its `Held` is released
or the process ends; entries that nobody uses go, those used longest ago first, where the bound wants it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from rayft.errors import StorageError
from rayft.storage.cache_fetch import fetch
from rayft.storage.cache_folder import CacheEntry, CacheFolder, explained
from rayft.storage.cache_record import (
    File,
    Record,
    bytes_on_disk,
    damaged,
    files_in,
    read_record,
    stamp,
    touch,
    write_record,
)
from rayft.storage.flock import locked
from rayft.storage.store import (
    Entries,
    ObjectChanged,
    ObjectNotFound,
    Store,
    checked_key,
    not_found,
    open_store,
)

_LOG = logging.getLogger(__name__)
LOCK_TIMEOUT_S = 3600.0  # without progress of the process that is waited for: a conversion shows none
_ATTEMPTS = 3  # an object that changes, or an entry that goes, again and again

#: Makes an entry's files below `partial/content`: all of them, or those of these paths. Returns their records.
Make = Callable[[Path, Sequence[str] | None], Sequence[File]]


@dataclass(frozen=True)
class Making:
    """How an entry comes to be. what: it, for people; doing: the words before that; need: its bytes, as far as known."""

    name: str
    what: str
    need: int
    make: Make
    doing: str
    timeout_s: float


class Held:
    """An entry that this process uses, until `release`, the end of `with`, or its end as an object."""

    def __init__(
        self,
        path: Path,
        release: Callable[[], None] | None = None,
        remove: Callable[[], object] | None = None,
    ) -> None:
        self.path = path
        self._release, self._remove = release, remove

    def release(self) -> None:
        """The entry may go. Twice does nothing."""
        release, self._release = self._release, None
        if release is not None:
            release()

    def discard(self) -> None:
        """Release it, and remove the entry if no other process uses it: it will not be wanted again."""
        self.release()
        if self._remove is not None:
            self._remove()

    def __enter__(self) -> Path:
        return self.path

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def __del__(self) -> None:
        self.release()


class NodeCache:
    """The cache in the folder `root`; one object per process and folder (`cache_at`). Thread-safe."""

    def __init__(self, root: Path, bytes_bound: int | None = None) -> None:
        with explained(root, "the cache"):
            self.folder = CacheFolder(root, bytes_bound)
        self._verified: dict[str, int] = {}
        self._verifying = threading.Lock()

    def take(self, job: Making, *, verify: bool = True) -> Held:
        """The entry that `job` makes, made if it is not there or damaged; `path` is its content folder.

        verify: look at its bytes where this process has not done so. Raises `StorageError`.
        """
        for _ in range(_ATTEMPTS):
            with explained(self.folder.root, job.what, job.need):
                if not self.folder.use(job.name):
                    self._make(job)
                held = Held(
                    self.folder.entry(job.name) / "content",
                    functools.partial(self.folder.marks.drop, job.name),
                    functools.partial(self.folder.remove, job.name),
                )
                if not verify or self._is_whole(job):
                    touch(self.folder.entry(job.name))
                    return held
                held.release()
        raise StorageError(
            f"The node cache {self.folder.root} does not keep {job.what} whole.",
            "Look at its disk (dmesg), or set RAYFT_CACHE to a folder on another one.",
        )

    def verify(self) -> list[tuple[CacheEntry, list[str]]]:
        """Look at every byte; entries with damaged files, and which. They are removed, but for those in use."""
        found = []
        with explained(self.folder.root, "its content"):
            for entry in self.folder.survey():
                if entry.partial or not self.folder.use(entry.name):
                    continue
                broken = self._damaged(entry.name)
                self.folder.marks.drop(entry.name)
                if broken:
                    found.append((entry, broken))
                    self.folder.remove(entry.name)
        return found

    def _make(self, job: Making) -> None:
        """The entry, made by this process or by the one that is waited for, and marked as used."""
        with self._lock(job):
            if self.folder.use(job.name):
                return
            partial = self.folder.reserve(job.name, job.what, job.need)
            try:
                files = tuple(job.make(partial, None))
                self._finish(job.name, Record(job.what, files))
            except Exception as error:
                # What failed on its way can be gone on with; what is outdated, unreadable or fills the disk cannot.
                outdated = isinstance(error, (ObjectChanged, ObjectNotFound))
                if outdated or not isinstance(error, StorageError):
                    shutil.rmtree(partial, ignore_errors=True)
                raise

    def _is_whole(self, job: Making) -> bool:
        """Whether the entry is as it was made; this process looks at its bytes once. Mends it where it is not."""
        entry = self.folder.entry(job.name)
        if self._verified.get(job.name) == stamp(entry):
            return True
        with self._verifying:
            if self._verified.get(job.name) == stamp(entry) or not self._damaged(job.name):
                self._verified[job.name] = stamp(entry)
                return True
        with self._lock(job):
            broken = self._damaged(job.name)  # another process may have mended it meanwhile
            if broken:
                self._mend(job, broken)
        return False

    def _mend(self, job: Making, broken: list[str]) -> None:
        more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        _LOG.warning(
            "The node's copy of %s is damaged (%s%s); it is fetched anew.", job.what, broken[0], more
        )
        record = read_record(self.folder.entry(job.name))
        old = record.files if record else ()
        need = sum(file.size for file in old if file.path in broken) or job.need
        partial = self.folder.reserve(job.name, job.what, need)
        new = {file.path: file for file in job.make(partial, broken if record else None)}
        kept = tuple(file for file in old if file.path not in new)
        self._finish(job.name, Record(job.what, (*kept, *new.values())))
        self.folder.marks.drop(job.name)  # it was marked before

    def _finish(self, name: str, record: Record) -> None:
        write_record(self.folder.partial(name), record)
        self.folder.commit(name)
        # The checksums were taken from memory, so this process need not look at the disk again.
        self._verified[name] = stamp(self.folder.entry(name))

    def _lock(self, job: Making) -> contextlib.AbstractContextManager[None]:
        return locked(
            self.folder.lock(job.name),
            job.timeout_s,
            f"{job.doing} {job.what}",
            progress=functools.partial(bytes_on_disk, self.folder.partial(job.name)),
        )

    def _damaged(self, name: str) -> list[str]:
        record = read_record(self.folder.entry(name))
        return damaged(self.folder.entry(name) / "content", record.files) if record else ["entry.json"]


@functools.lru_cache(maxsize=64)
def cache_at(root: Path) -> NodeCache:
    """The cache of this process in the absolute folder `root`."""
    return NodeCache(root)


def node_cache_dir() -> Path:
    """Folder of what every process of this node shares: RAYFT_CACHE, or `~/.cache/rayft`."""
    return Path(os.environ.get("RAYFT_CACHE") or "~/.cache/rayft").expanduser().absolute()


def hold(
    store: Store,
    key_or_prefix: str,
    cache_dir: Path | str,
    *,
    keep: Callable[[str], bool] | None = None,
    verify: bool = True,
    lock_timeout_s: float = LOCK_TIMEOUT_S,
) -> Held:
    """A local file or folder with the content of the object or folder `key_or_prefix`, in use until it is released.

    A local store answers with the original. Else the copy lies in the node cache at `cache_dir`, under a name that depends
    on the source's versions: a changed source is fetched anew. keep: of a folder, which objects, by their path in it.
    verify: False for files whose reader verifies them himself. Raises `StorageError`; waits for another process at most
    `lock_timeout_s` without progress.
    """
    original = store.local_path(key_or_prefix)
    if original is not None:
        if not original.exists():
            raise not_found(str(original))
        return Held(original)
    cache = cache_at(Path(cache_dir).expanduser().absolute())
    for attempt in range(1, _ATTEMPTS + 1):
        job = fetching(store, key_or_prefix, keep, lock_timeout_s)
        try:
            held = cache.take(job, verify=verify)
        except (ObjectChanged, ObjectNotFound) as error:
            if attempt == _ATTEMPTS:
                raise StorageError(
                    f"{job.what} changed {attempt} times while it was fetched ({error.message})",
                    "Start again when nobody writes there any more.",
                ) from error
            continue
        held.path = held.path / Path(key_or_prefix).name
        return held
    raise AssertionError("unreachable")


def node_cache(
    store: Store,
    key_or_prefix: str,
    cache_dir: Path | str,
    *,
    keep: Callable[[str], bool] | None = None,
    lock_timeout_s: float = LOCK_TIMEOUT_S,
) -> Path:
    """`hold` until this process ends."""
    return _for_good(hold(store, key_or_prefix, cache_dir, keep=keep, lock_timeout_s=lock_timeout_s))


def hold_file(where: str, cache_dir: Path) -> Held:
    """The file at a path or at an `s3://` URI, on this machine. Raises `StorageError` for an object that is not there."""
    if not where.startswith("s3://"):
        return Held(Path(where).expanduser())
    folder, _, name = where.rpartition("/")
    return hold(open_store(folder), name, cache_dir)


def made(
    name: str, what: str, need: Callable[[], int], build: Callable[[Path], None], cache_dir: Path
) -> Path:
    """The folder that `build(folder)` fills, made once per node, bounded and verified as what is fetched; in use until this
    process ends. name: changes with what it is made from. need: bytes it will take, about; asked when it is to be made."""

    def make(partial: Path, _: Sequence[str] | None) -> Sequence[File]:
        shutil.rmtree(partial / "content", ignore_errors=True)  # half of it, by a process that died
        build(partial / "content")
        return files_in(partial / "content")

    cache = cache_at(cache_dir.expanduser().absolute())
    size = 0 if cache.folder.entry(name).exists() else need()
    return _for_good(cache.take(Making(name, what, size, make, "the making of", LOCK_TIMEOUT_S)))


_kept: dict[Path, Held] = {}


def _for_good(held: Held) -> Path:
    if _kept.setdefault(held.path, held) is not held:
        held.release()
    return held.path


def fetching(
    store: Store,
    key_or_prefix: str,
    keep: Callable[[str], bool] | None = None,
    timeout_s: float = LOCK_TIMEOUT_S,
) -> Making:
    """How the object, or the objects of the folder, are fetched as they are now. Raises `ObjectNotFound`."""
    where = store.where(key_or_prefix)
    entry = store.stat(key_or_prefix)
    entries = [entry] if entry else _in_folder(store, key_or_prefix, keep)
    if not entries:
        raise not_found(where)
    top = Path(key_or_prefix).parent
    wanted = [(one, Path(checked_key(one.key)).relative_to(top).as_posix()) for one in entries]

    def make(partial: Path, only: Sequence[str] | None) -> Sequence[File]:
        return fetch(store, [(one, path) for one, path in wanted if only is None or path in only], partial)

    text = "\n".join([where, *(f"{one.key} {one.size} {one.version}" for one in entries)])
    name = hashlib.sha256(text.encode()).hexdigest()[:32]
    return Making(name, where, sum(one.size for one in entries), make, "the download of", timeout_s)


def _in_folder(store: Store, prefix: str, keep: Callable[[str], bool] | None) -> Entries:
    entries = [one for one in store.list(prefix) if not one.key.endswith("/")]  # a web console's "folder"
    return [one for one in entries if keep is None or keep(one.key.removeprefix(f"{prefix}/"))]
