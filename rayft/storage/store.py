"""The interface every storage back end implements, and `open_store`, which picks one by URI."""

from __future__ import annotations

import posixpath
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from rayft.errors import JobError, StorageError
from rayft.storage.kept_checksum import KeptChecksum
from rayft.storage.retry import RetryPolicy

Data = bytes | bytearray | memoryview


class ObjectNotFound(StorageError):
    """The object does not exist."""


class DamagedObject(StorageError):
    """The storage answers, but what it holds is not what was written: too short, or altered."""


class ObjectChanged(StorageError):
    """The object is no longer the version that was asked for."""


@dataclass(frozen=True)
class Entry:
    """One stored object: key, size in bytes, and a version that changes when it is overwritten (ETag, mtime)."""

    key: str
    size: int
    version: str = ""


#: Named here because inside `Store` the word `list` is the method.
Entries = list[Entry]
Keys = list[str]


class Store(ABC):
    """Objects below one URI, named by relative keys with `/`. Thread-safe, and can be pickled to another process.

    Every method raises `StorageError`; reading what is not there raises its subclass `ObjectNotFound`.
    """

    uri: str
    #: Requests that go well at once.
    parallel: int = 8

    @abstractmethod
    def child(self, *parts: str) -> Store:
        """The store below this one at the folder `parts`."""

    @abstractmethod
    def put_parts(self, key: str, parts: Sequence[Data]) -> None:
        """Store the concatenation of `parts` at `key`, atomically and durably, without building it in memory."""

    @abstractmethod
    def put_if_absent(self, key: str, data: Data) -> bool:
        """Create `key` only if it does not exist; False if it does. Of several concurrent callers one gets True.

        A retry after a lost response is answered by comparing contents, so `data` must be unique to the
        caller.
        """

    @abstractmethod
    def read_into(self, key: str, start: int, out: memoryview) -> None:
        """Fill `out` with the bytes of `key` from `start`; an object too short for that is an error."""

    @abstractmethod
    def get(self, key: str) -> bytes:
        """The whole object."""

    @abstractmethod
    def upload(self, path: Path, key: str) -> None:
        """Store the file `path` at `key`, atomically."""

    @abstractmethod
    def download(self, key: str, path: Path) -> None:
        """Write the object to the file `path`, atomically and with its size verified."""

    @abstractmethod
    def list(self, prefix: str = "") -> Entries:
        """Every object in the folder `prefix` and below, sorted by key."""

    @abstractmethod
    def stat(self, key: str) -> Entry | None:
        """The object's entry, or None if it does not exist."""

    @abstractmethod
    def delete(self, keys: Iterable[str]) -> None:
        """Delete the objects; what does not exist is skipped."""

    @abstractmethod
    def discard_unfinished(self, prefix: str, dead: Callable[[str], bool]) -> Keys:
        """Remove what killed writers left in the folder `prefix` (temporary files, open multipart uploads).

        Only where `dead(key)` is true for the key they were writing to. Returns those keys.
        """

    def put(self, key: str, data: Data) -> None:
        """Store `data` at `key`, atomically and durably."""
        self.put_parts(key, [data])

    def copy_from(self, source: Store, source_key: str, key: str) -> None:
        """Store the object `source_key` of another store at `key`, atomically, by way of this process where need be."""
        if (path := source.local_path(source_key)) is not None:
            self.upload(path, key)
        elif (path := self.local_path(key)) is not None:
            source.download(source_key, path)
        else:
            raise NotImplementedError(f"from {source.uri} to {self.uri}")

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """`length` bytes of the object from `start`; an object too short for that is an error."""
        out = bytearray(length)
        self.read_into(key, start, memoryview(out))
        return bytes(out)

    def read_piece(self, entry: Entry, start: int, out: memoryview) -> None:
        """Fill `out` with the bytes of `entry` from `start`, in one request.

        Raises `ObjectChanged` where the store tells that the object is no longer of the entry's version.
        """
        self.read_into(entry.key, start, out)

    def kept_checksum(self, entry: Entry) -> KeptChecksum | None:
        """The checksum that the store keeps with the object, or None. Raises `ObjectChanged`."""
        return None

    def exists(self, key: str) -> bool:
        """Whether the object exists."""
        return self.stat(key) is not None

    def size(self, key: str) -> int:
        """The object's size in bytes."""
        entry = self.stat(key)
        if entry is None:
            raise not_found(self.where(key))
        return entry.size

    def delete_prefix(self, prefix: str) -> None:
        """Delete every object in the folder `prefix` and below."""
        self.delete([entry.key for entry in self.list(prefix)])

    def local_path(self, key: str) -> Path | None:
        """The object as a file on this machine (for mmap), or None where the store is remote."""
        return None

    def where(self, key: str) -> str:
        """The object's full URI, for messages."""
        return f"{self.uri.rstrip('/')}/{key}" if key else self.uri


def open_store(uri: str | Path, retry: RetryPolicy | None = None) -> Store:
    """The store at `uri`: a path (`/abs`, `rel/path`, `file:///abs`) or `s3://bucket/prefix`.

    S3 takes endpoint, region and credentials from the standard AWS variables and files. Raises `JobError` for
    any other scheme.
    """
    text = str(uri)
    scheme, separator, rest = text.partition("://")
    if not separator:
        from rayft.storage.local import LocalStore

        return LocalStore(Path(text))
    if scheme == "file":
        from rayft.storage.local import LocalStore

        return LocalStore(Path(unquote(urlsplit(text).path)))
    if scheme == "s3":
        from rayft.storage.s3 import S3Store

        bucket, _, prefix = rest.partition("/")
        if not bucket:
            raise JobError(f"The storage URI {text!r} names no bucket.", "Write s3://BUCKET/PREFIX.")
        return S3Store(bucket, prefix.strip("/"), retry=retry or RetryPolicy())
    raise JobError(
        f"Storage at {text!r} is not supported.",
        "Use a path or s3://BUCKET/PREFIX; for an S3-compatible service set AWS_ENDPOINT_URL.",
    )


def checked_key(key: str) -> str:
    """`key` if it is a clean relative path, else `ValueError`: no key may climb out of its store."""
    if key in ("", ".") or key.startswith("/") or posixpath.normpath(key) != key or key.startswith(".."):
        raise ValueError(f"not a clean relative key: {key!r}")
    return key


def not_found(where: str) -> ObjectNotFound:
    """The error for reading `where`, which does not exist."""
    return ObjectNotFound(
        f"{where} does not exist.", "Check the name; a checkpoint in use may have been deleted by hand."
    )


def truncated(where: str, start: int, wanted: int, got: int) -> DamagedObject:
    """The error for an object that ends before the bytes asked for."""
    return DamagedObject(
        f"{where} is truncated: {wanted} bytes wanted from offset {start}, {got} there.",
        "The object is damaged or was overwritten; use an earlier checkpoint or restore it.",
    )
