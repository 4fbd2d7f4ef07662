"""How the run log's lines reach storage: appended to a local file, or as segments on an object store."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from rayft.errors import StorageError

if TYPE_CHECKING:
    from rayft.storage import Store

SEGMENTS = "log"
SEGMENT_BYTES = 256 * 1024


class Sink(Protocol):
    def write(self, lines: bytes) -> None: ...
    def sync(self) -> None: ...
    def close(self) -> None: ...


class FileSink:
    """Whole lines appended to a local file, one `write` each, so that readers and a stale writer never tear a line."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
            self._heal()
        except OSError as error:
            raise self._failed(error) from error

    def write(self, lines: bytes) -> None:
        before = os.fstat(self._fd).st_size
        try:
            written = os.write(self._fd, lines)
            while written < len(lines):  # the disk is filling up: the next write says so
                written += os.write(self._fd, lines[written:])
        except OSError as error:
            os.ftruncate(self._fd, before)
            raise self._failed(error) from error

    def sync(self) -> None:
        os.fsync(self._fd)

    def close(self) -> None:
        os.close(self._fd)

    def _heal(self) -> None:
        """Cut off the line that a killed writer left unfinished."""
        size = os.fstat(self._fd).st_size
        tail = b""
        while len(tail) < size and b"\n" not in tail:
            step = min(size - len(tail), 64 * 1024)
            tail = os.pread(self._fd, step, size - len(tail) - step) + tail
        torn = len(tail) - (tail.rfind(b"\n") + 1)
        if torn:
            os.ftruncate(self._fd, size - torn)

    def _failed(self, error: OSError) -> StorageError:
        return StorageError(
            f"The run log {self._path} cannot be written: {error.strerror}.",
            "Free space or give another `storage`.",
        )


class SegmentSink:
    """Segments on an object store; the newest is kept in memory and put again, longer, until it is full."""

    def __init__(self, store: Store, epoch: int) -> None:
        self._store = store
        self._prefix = f"{SEGMENTS}/{epoch:07d}-"
        self._number = sum(entry.key.startswith(self._prefix) for entry in store.list(SEGMENTS))
        self._segment = b""

    def write(self, lines: bytes) -> None:
        segment = self._segment + lines
        self._store.put(f"{self._prefix}{self._number:06d}.jsonl", segment)
        self._segment = segment
        if len(segment) >= SEGMENT_BYTES:
            self._number += 1
            self._segment = b""

    def sync(self) -> None:
        """A put is durable when it returns."""

    def close(self) -> None:
        """Nothing is held open."""
