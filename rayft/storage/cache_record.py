"""What an entry of the node cache holds, written down beside it: its files with sizes and checksums.

Checksums are xxh3_64 of every 16 MiB, taken from memory while a file is made, so a byte that the disk or a hand changes
later is found.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import xxhash

CHUNK_BYTES = 16 << 20
_THREADS = 4
_RECORD = "entry.json"


@dataclass(frozen=True)
class File:
    """A file of an entry: path below its content, bytes, and a checksum for every `CHUNK_BYTES`."""

    path: str
    size: int
    chunks: tuple[str, ...]


@dataclass(frozen=True)
class Record:
    """What an entry is (for people), and its files."""

    what: str
    files: tuple[File, ...]

    @property
    def bytes(self) -> int:
        return sum(file.size for file in self.files)


def checksum(data: bytes | bytearray | memoryview) -> str:
    """Checksum of one chunk, as 16 hex digits; releases the GIL."""
    return xxhash.xxh3_64_hexdigest(data)


def write_record(folder: Path, record: Record) -> None:
    """Write the record of the entry `folder`, atomically."""
    temporary = folder / f"{_RECORD}.tmp"
    temporary.write_text(json.dumps(asdict(record)), encoding="utf-8")
    os.replace(temporary, folder / _RECORD)


def read_record(folder: Path) -> Record | None:
    """The record of the entry `folder`; None if there is none that can be read."""
    try:
        values = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
        return Record(values["what"], tuple(file_of(value) for value in values["files"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def file_of(values: dict[str, object]) -> File:
    """The inverse of `dataclasses.asdict`. Raises KeyError, TypeError or ValueError for anything else."""
    path, size, chunks = values["path"], values["size"], values["chunks"]
    if not isinstance(path, str) or not isinstance(size, int) or not isinstance(chunks, list):
        raise TypeError("not a file of a record")
    return File(path, size, tuple(chunks))


def touch(folder: Path) -> None:
    """The entry was used now."""
    os.utime(folder / _RECORD)


def stamp(folder: Path) -> int:
    """Of the entry's record: another number once the entry was made anew."""
    return (folder / _RECORD).stat().st_ino


def last_use(folder: Path) -> float:
    """When the entry was last taken, in seconds since 1970."""
    return (folder / _RECORD).stat().st_mtime


def files_in(folder: Path) -> tuple[File, ...]:
    """The records of all files below `folder`, from their bytes on disk."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    with ThreadPoolExecutor(_THREADS, "rayft-cache") as pool:
        return tuple(
            File(path.relative_to(folder).as_posix(), path.stat().st_size, chunks)
            for path, chunks in zip(paths, pool.map(_chunks, paths), strict=True)
        )


def damaged(content: Path, files: Iterable[File]) -> list[str]:
    """Paths of the files below `content` that are missing, of another size or of another content."""
    files = list(files)
    with ThreadPoolExecutor(_THREADS, "rayft-cache") as pool:
        whole: Sequence[bool] = list(pool.map(lambda file: _is_whole(content / file.path, file), files))
    return [file.path for file, intact in zip(files, whole, strict=True) if not intact]


def bytes_on_disk(folder: Path) -> int:
    """What the files below `folder` take of the disk; those that others remove meanwhile count nothing."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(parent, name)).st_blocks * 512
            except FileNotFoundError:
                continue
    return total


def _is_whole(path: Path, file: File) -> bool:
    try:
        return path.stat().st_size == file.size and _chunks(path) == file.chunks
    except OSError:  # gone, or a sector that cannot be read
        return False


def _chunks(path: Path) -> tuple[str, ...]:
    found, buffer = [], bytearray(CHUNK_BYTES)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        while True:
            filled = 0
            while filled < CHUNK_BYTES and (count := file.readinto(view[filled:])):
                filled += count
            if filled:
                found.append(checksum(view[:filled]))
            if filled < CHUNK_BYTES:
                return tuple(found)
