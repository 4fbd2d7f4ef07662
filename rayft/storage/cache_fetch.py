"""Downloading the objects of one entry of the node cache: ranges in parallel, checked, and gone on with after a death."""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from rayft.storage.cache_record import CHUNK_BYTES, File, checksum, damaged, file_of
from rayft.storage.store import DamagedObject, Entry, Store

_LOG = logging.getLogger(__name__)
_DONE = "done.jsonl"


def fetch(store: Store, wanted: Sequence[tuple[Entry, str]], partial: Path) -> tuple[File, ...]:
    """Download each object to its path below `partial/content`; the records of the files, in that order.

    `store.parallel` ranges of 16 MiB travel at once, of one file or of several. What a dead process finished in `partial`
    is kept if its checksums agree. Raises `StorageError`: `ObjectChanged` or `ObjectNotFound` where an object is no longer
    the one of its entry, `DamagedObject` where it does not match the checksum that the service keeps.
    """
    content = partial / "content"
    done = _finished(partial)
    names = {path for _, path in wanted}
    for path in sorted(content.rglob("*"), reverse=True) if content.exists() else ():
        if path.is_file() and path.relative_to(content).as_posix() not in done.keys() & names:
            path.unlink()  # half a file of a dead process
    with (partial / _DONE).open("a") as log:
        downloads = [
            _Download(store, entry, content, path, log.fileno()) for entry, path in wanted if path not in done
        ]
        with ThreadPoolExecutor(store.parallel, "rayft-fetch") as pool:
            futures = [
                pool.submit(download.piece, start) for download in downloads for start in download.starts
            ]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    done |= {download.path: download.file for download in downloads}
    return tuple(done[path] for _, path in wanted)


def _finished(partial: Path) -> dict[str, File]:
    """The files that a dead process has finished, as far as they are whole."""
    try:
        lines = (partial / _DONE).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return {}
    files = {}
    for line in lines:
        try:
            file = file_of(json.loads(line))
        except (ValueError, KeyError, TypeError):  # its last line, cut
            continue
        files[file.path] = file
    for path in damaged(partial / "content", files.values()):
        del files[path]
    return files


class _Download:
    """One object on its way to one file; the thread that brings the last piece finishes it."""

    def __init__(self, store: Store, entry: Entry, content: Path, path: str, log: int) -> None:
        self.path = path
        self.starts = range(0, max(entry.size, 1), CHUNK_BYTES)
        self.file = File(path, entry.size, ())
        self._store, self._entry, self._log = store, entry, log
        self._target = content / path
        self._left, self._lock = len(self.starts), threading.Lock()
        self._chunks: list[str] = [""] * len(range(0, entry.size, CHUNK_BYTES))

    def piece(self, start: int) -> None:
        """Bring the piece that begins at byte `start`, and finish the file if it was the last one."""
        self._bring(start)
        with self._lock:
            self._left -= 1
            last = self._left == 0
        if last:
            self._finish()

    def _bring(self, start: int) -> None:
        self._target.parent.mkdir(parents=True, exist_ok=True)
        data = bytearray(min(CHUNK_BYTES, self._entry.size - start))
        if data:
            self._store.read_piece(self._entry, start, memoryview(data))
            self._chunks[start // CHUNK_BYTES] = checksum(data)
        descriptor = os.open(self._target, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            view = memoryview(data)
            while view:
                count = os.pwrite(descriptor, view, start)
                view, start = view[count:], start + count
        finally:
            os.close(descriptor)

    def _finish(self) -> None:
        kept = self._store.kept_checksum(self._entry)
        if kept is not None and not kept.matches(self._target):
            first = list(self._chunks)
            for start in self.starts:
                self._bring(start)
            if not kept.matches(self._target):
                where = self._store.where(self._entry.key)
                if kept.certain or self._chunks != first:
                    raise DamagedObject(
                        f"{where} does not match the {kept.kind} checksum that the service keeps with it, twice.",
                        "Upload it again.",
                    )
                _LOG.warning("%s: its ETag is not the MD5 of its content; fetched twice alike.", where)
        self.file = File(self.path, self._entry.size, tuple(self._chunks))
        os.write(self._log, (json.dumps(asdict(self.file)) + "\n").encode())
