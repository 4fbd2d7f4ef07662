"""Which entries of the node cache living processes use.

Every process has one file, held by a lock until it ends, however it ends, with the names of the entries it uses, one a
line. A file that nobody holds is that of a dead process and is removed. Reading and changing them is guarded by the
cache's own lock: shared to change the own file, exclusive to read all.
"""

from __future__ import annotations

import os
import threading
import uuid
from collections import Counter, deque
from pathlib import Path

from rayft.storage.flock import try_lock


class Marks:
    """The marks of this process, and those of all, in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._descriptor: int | None = None
        self._forget()
        os.register_at_fork(after_in_child=self._forget)

    def add(self, name: str) -> None:
        """This process uses the entry, once more. The caller holds the cache's lock, shared or exclusive."""
        with self._mutex:
            stale = bool(self._dropped) or name not in self._counts
            self._settle()
            self._counts[name] += 1
            if stale:
                self._write()

    def drop(self, name: str) -> None:
        """Once less. Shows at the next `add` or `all`; takes no lock, so that a finalizer may call it."""
        self._dropped.append(name)

    def all(self) -> Counter[str]:
        """How many living processes use each entry. The caller holds the cache's lock exclusively."""
        with self._mutex:
            if self._dropped:
                self._settle()
                self._write()
        users: Counter[str] = Counter()
        for path in self._folder.iterdir():
            with path.open("r+b") as file:
                if try_lock(file.fileno(), path):
                    path.unlink()
                else:
                    users.update(file.read().decode().split())
        return users

    def _settle(self) -> None:
        while self._dropped:
            name = self._dropped.popleft()
            self._counts[name] -= 1
            if self._counts[name] <= 0:
                del self._counts[name]

    def _write(self) -> None:
        if self._descriptor is None:
            path = self._folder / f"{os.getpid()}-{uuid.uuid4().hex[:8]}"
            # Not a file object: one that a forked child forgot would be closed there.
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            try_lock(self._descriptor, path)
        data = "".join(f"{name}\n" for name in self._counts).encode()
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, data, 0)

    def _forget(self) -> None:
        """Also in a forked child, which marks what it takes itself; until it ends it keeps its parent's marks alive."""
        self._mutex = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._dropped: deque[str] = deque()
        self._descriptor = None
