"""Bytes of a checkpoint's files, never handed out before their checksums agree. Local and cached files are mapped."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rayft.checkpoint import layout
from rayft.checkpoint.checksum import CHUNK_BYTES, checksum
from rayft.checkpoint.manifest import CorruptCheckpoint, Manifest, StoredFragment, StoredTensor
from rayft.storage import Held, Store, hold

_WINDOW_CHUNKS = (
    16  # chunks fetched at once: bounds the memory of reading a huge fragment from a remote store
)
_SPAN_BYTES = _WINDOW_CHUNKS * CHUNK_BYTES
_VERIFY_THREADS = 4


@dataclass(frozen=True)
class _Chunk:
    """A piece of a file that has a checksum of its own."""

    file: str
    start: int
    length: int
    checksum: str
    owner: str


class VerifiedFiles:
    """The files of one committed checkpoint.

    With `cache_dir`, files of a remote store come through the node cache there, until `discard`, and are mapped;
    without, ranges are fetched.
    """

    def __init__(self, store: Store, manifest: Manifest, cache_dir: Path | None = None) -> None:
        self._store, self._manifest, self._cache_dir = store, manifest, cache_dir
        self._sizes = {file.name: file.size for file in manifest.files}
        self._maps: dict[str, mmap.mmap] = {}
        self._held: dict[str, Held] = {}
        self._lock = threading.Lock()

    def read(
        self, tensor: StoredTensor, piece: StoredFragment, start: int, stop: int, out: np.ndarray
    ) -> None:
        """Copy the bytes `start` to `stop` of a fragment into `out` (uint8). Raises `CorruptCheckpoint`."""
        chunks = _chunks_of(tensor, piece)[start // CHUNK_BYTES : -(-stop // CHUNK_BYTES)]
        for at in range(0, len(chunks), _WINDOW_CHUNKS):
            window = chunks[at : at + _WINDOW_CHUNKS]
            data = self._verified(window)
            first = window[0].start - piece.byte_offset  # where the window begins in the fragment
            low, high = max(start, first), min(stop, first + data.size)
            out[low - start : high - start] = data[low - first : high - first]
            self._release(window)

    def verify(self) -> None:
        """Verify every checksum, in parallel. Raises `CorruptCheckpoint` for the first damage found."""
        chunks = [
            chunk
            for tensor in self._manifest.tensors
            for piece in tensor.fragments
            for chunk in _chunks_of(tensor, piece)
        ]
        with ThreadPoolExecutor(_VERIFY_THREADS, "rayft-verify") as pool:
            try:
                for _ in pool.map(self._verify_span, _spans(chunks)):
                    pass
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def discard(self) -> None:
        """The node's copies are not wanted any more; they go when no other process uses them."""
        with self._lock:
            for held in self._held.values():
                held.discard()
            self._held.clear()

    def _verify_span(self, chunks: list[_Chunk]) -> None:
        if self._mapped(chunks[0].file) is None:
            self._verified(chunks)
            return
        for chunk in chunks:
            self._verified([chunk])
            self._release([chunk])

    def _verified(self, chunks: list[_Chunk]) -> np.ndarray:
        """The bytes from the first chunk to the last, all close together in one file, once the checksums agree."""
        first, last = chunks[0], chunks[-1]
        data = self._bytes(first.file, first.start, last.start + last.length - first.start)
        for chunk in chunks:
            at = chunk.start - first.start
            if checksum([data.data[at : at + chunk.length]]) != chunk.checksum:
                raise CorruptCheckpoint(
                    f"step-{self._manifest.step} is corrupt: {chunk.owner} in {self._where(chunk.file)} at byte "
                    f"{chunk.start} does not match its checksum.",
                    "Use an earlier checkpoint, and look at the disk or the storage service.",
                )
        return data

    def _bytes(self, file: str, start: int, length: int) -> np.ndarray:
        mapped = self._mapped(file)
        if mapped is not None:
            return np.frombuffer(mapped, np.uint8, length, start)
        out = np.empty(length, np.uint8)
        self._store.read_into(self._key(file), start, out.data)
        return out

    def _release(self, chunks: list[_Chunk]) -> None:
        """Give the pages of a mapped file back: they stay in the page cache, but count for this process no longer."""
        mapped = self._mapped(chunks[0].file)
        if mapped is not None and hasattr(mapped, "madvise"):
            start = chunks[0].start - chunks[0].start % mmap.PAGESIZE
            mapped.madvise(mmap.MADV_DONTNEED, start, chunks[-1].start + chunks[-1].length - start)

    def _mapped(self, file: str) -> mmap.mmap | None:
        with self._lock:
            if file not in self._maps:
                path = self._path(file)
                if path is None:
                    return None
                self._maps[file] = self._map(file, path)
            return self._maps[file]

    def _path(self, file: str) -> Path | None:
        if self._cache_dir is not None:
            # Not verified as a whole: of a checkpoint every chunk is, when it is read.
            self._held[file] = hold(self._store, self._key(file), self._cache_dir, verify=False)
            return self._held[file].path
        return self._store.local_path(self._key(file))

    def _map(self, file: str, path: Path) -> mmap.mmap:
        # The size is checked first: touching a mapping behind the end of its file kills the process.
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            raise CorruptCheckpoint(f"step-{self._manifest.step} is corrupt: {path} is missing.") from None
        if size != self._sizes[file]:
            raise CorruptCheckpoint(
                f"step-{self._manifest.step} is corrupt: {path} has {size} bytes instead of {self._sizes[file]}."
            )
        with path.open("rb") as handle:
            return mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)

    def _key(self, file: str) -> str:
        return f"{layout.folder(self._manifest.step)}/{file}"

    def _where(self, file: str) -> str:
        return self._store.where(self._key(file))


def _chunks_of(tensor: StoredTensor, piece: StoredFragment) -> list[_Chunk]:
    length = piece.length * tensor.itemsize
    owner = f"{tensor.kind} {tensor.name!r}"
    return [
        _Chunk(piece.file, piece.byte_offset + at, min(CHUNK_BYTES, length - at), digest, owner)
        for at, digest in zip(range(0, length, CHUNK_BYTES), piece.checksums, strict=True)
    ]


def _spans(chunks: list[_Chunk]) -> Iterator[list[_Chunk]]:
    """Chunks grouped so that each group is one read: of one file, in order, and not longer than `_SPAN_BYTES`."""
    span: list[_Chunk] = []
    for chunk in sorted(chunks, key=lambda chunk: (chunk.file, chunk.start)):
        if span and (chunk.file != span[0].file or chunk.start + chunk.length - span[0].start > _SPAN_BYTES):
            yield span
            span = []
        span.append(chunk)
    if span:
        yield span
