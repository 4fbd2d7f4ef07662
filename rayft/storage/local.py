"""Local folders (and mounted file systems) as a store."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from rayft.errors import StorageError
from rayft.storage.store import Data, Entries, Entry, Keys, Store, checked_key, not_found, truncated

#: Temporary files are `.<name>.<32 hex digits>.tmp` beside their target; `list` does not show them.
_TMP_SUFFIX = ".tmp"
_WRITE_BYTES = 32 << 20


class LocalStore(Store):
    """Objects as files below a folder, which is created by the first write."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root).expanduser().absolute()
        self.uri = str(self.root)

    def __reduce__(self) -> tuple[type[LocalStore], tuple[str]]:
        return LocalStore, (self.uri,)

    def child(self, *parts: str) -> LocalStore:
        return LocalStore(self.root / checked_key("/".join(parts)))

    def local_path(self, key: str) -> Path:
        return self.root / checked_key(key)

    def put_parts(self, key: str, parts: Iterable[Data]) -> None:
        _publish(self.local_path(key), parts)

    def put_if_absent(self, key: str, data: Data) -> bool:
        target = self.local_path(key)
        with _explained("creating", target):
            temporary = _write_temporary(target, [data])
            try:
                created = _link(temporary, target)
            finally:
                temporary.unlink(missing_ok=True)
            _sync_folder(target.parent)
        return created

    def read_into(self, key: str, start: int, out: memoryview) -> None:
        path = self.local_path(key)
        with _explained("reading", path), path.open("rb", buffering=0) as file:
            file.seek(start)
            done = 0
            while done < len(out):
                count = file.readinto(out[done:])
                if not count:
                    raise truncated(str(path), start, len(out), done)
                done += count

    def get(self, key: str) -> bytes:
        path = self.local_path(key)
        with _explained("reading", path):
            return path.read_bytes()

    def upload(self, path: Path, key: str) -> None:
        if not path.is_file():
            raise not_found(str(path))
        _publish(self.local_path(key), _file_parts(path))

    def download(self, key: str, path: Path) -> None:
        LocalStore(path.absolute().parent).upload(self.local_path(key), path.name)

    def list(self, prefix: str = "") -> Entries:
        folder = self.root / checked_key(prefix) if prefix else self.root
        entries: Entries = []
        with _explained("listing", folder):
            for path in _files(folder):
                if path.name.endswith(_TMP_SUFFIX) and path.name.startswith("."):
                    continue
                entry = self.stat(path.relative_to(self.root).as_posix())
                if entry is not None:  # else deleted since it was listed
                    entries.append(entry)
        return sorted(entries, key=lambda entry: entry.key)

    def stat(self, key: str) -> Entry | None:
        path = self.local_path(key)
        with _explained("looking at", path):
            try:
                status = path.stat()
            except (FileNotFoundError, NotADirectoryError):
                return None
        if not stat.S_ISREG(status.st_mode):
            return None
        return Entry(key, status.st_size, f"{status.st_ino}-{status.st_mtime_ns}")

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            path = self.local_path(key)
            with _explained("deleting", path):
                path.unlink(missing_ok=True)
                self._remove_empty_folders(path.parent)

    def discard_unfinished(self, prefix: str, dead: Callable[[str], bool]) -> Keys:
        folder = self.root / checked_key(prefix) if prefix else self.root
        discarded = []
        with _explained("cleaning", folder):
            for path in list(_files(folder)):
                name = _target_name(path.name)
                if name is None:
                    continue
                key = path.with_name(name).relative_to(self.root).as_posix()
                if dead(key):
                    path.unlink(missing_ok=True)
                    self._remove_empty_folders(path.parent)
                    discarded.append(key)
        return discarded

    def _remove_empty_folders(self, folder: Path) -> None:
        """Folders are not objects: an emptied one goes, up to the root. One that a writer just filled stays."""
        while folder != self.root and self.root in folder.parents:
            try:
                folder.rmdir()
            except OSError:
                return
            folder = folder.parent


def _files(folder: Path) -> Iterator[Path]:
    for parent, _, names in os.walk(folder):
        for name in names:
            yield Path(parent, name)


def _target_name(name: str) -> str | None:
    """The name a temporary file was to become, or None if `name` is no temporary file."""
    if not (name.startswith(".") and name.endswith(_TMP_SUFFIX)):
        return None
    target, _, token = name[1 : -len(_TMP_SUFFIX)].rpartition(".")
    return target if target and len(token) == 32 else None


def _file_parts(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(_WRITE_BYTES):
            yield block


def _publish(target: Path, parts: Iterable[Data]) -> None:
    """Write `parts` to `target` so that readers see the old file or the whole new one, also after a power cut."""
    with _explained("writing", target):
        temporary = _write_temporary(target, parts)
        try:
            os.replace(temporary, target)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        _sync_folder(target.parent)


def _write_temporary(target: Path, parts: Iterable[Data]) -> Path:
    """A durable temporary file beside `target`; removed again if writing fails."""
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}{_TMP_SUFFIX}")
    descriptor = _create(temporary)
    try:
        with open(descriptor, "wb", buffering=0) as file:
            for part in parts:
                view = memoryview(part).cast("B")
                while view:
                    view = view[file.write(view[:_WRITE_BYTES]) :]
            os.fsync(descriptor)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def _create(path: Path) -> int:
    for attempt in range(5):
        _make_folder(path.parent)
        try:
            return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:  # a concurrent delete took the folder while it was empty
            if attempt == 4:
                raise
    raise AssertionError("unreachable")


def _make_folder(folder: Path) -> None:
    """Create the folder and its parents, durably."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    _sync_folder(folder.parent)


def _link(source: Path, target: Path) -> bool:
    """Hard-link `source` to `target`; False if the target exists. Exact on NFS too, where a reply can be lost."""
    try:
        os.link(source, target)
    except FileExistsError:
        return source.stat().st_nlink == 2
    except OSError as error:
        if source.stat().st_nlink == 2:
            return True
        if error.errno in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
            raise StorageError(
                f"The file system of {target.parent} has no hard links, so runs there cannot exclude each other.",
                "Use a file system with hard links (ext4, xfs, NFS, Lustre, CephFS), or s3://.",
            ) from error
        raise
    return True


def _sync_folder(folder: Path) -> None:
    """Make renames in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems refuse: they order renames themselves
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _explained(doing: str, path: Path) -> Iterator[None]:
    """Turn an `OSError` into a `StorageError` that names the path and the remedy."""
    try:
        yield
    except FileNotFoundError as error:
        raise not_found(str(path)) from error
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise StorageError(f"{doing.capitalize()} {path} failed: {reason}.", _remedy(error, path)) from error


def _remedy(error: OSError, path: Path) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        with contextlib.suppress(OSError):
            existing = next(parent for parent in path.parents if parent.exists())
            free = shutil.disk_usage(existing).free >> 20
            return f"Free space there ({free} MiB free) or keep fewer checkpoints, then start again."
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "Give this user write permission there, or choose another storage path."
    return "Check the file system (mounts, dmesg), then start again: what was committed is kept."
