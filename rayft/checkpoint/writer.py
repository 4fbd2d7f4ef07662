"""Saving: one copy to host memory blocks training, the rest happens in a background thread of each rank."""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from rayft.checkpoint import layout
from rayft.checkpoint.checksum import CHUNK_BYTES, checksum
from rayft.checkpoint.fragments import Fragment
from rayft.checkpoint.host_buffer import HostBuffer
from rayft.checkpoint.manifest import (
    Manifest,
    StoredFile,
    StoredFragment,
    StoredTensor,
    from_json,
    merge,
    to_json,
)
from rayft.checkpoint.records import check_epoch
from rayft.errors import StorageError
from rayft.storage import Store

TIMEOUT_S = 1800.0
_LEASE_CHECK_S = 10.0  # while waiting for other ranks
_POLL_S = (0.05, 2.0)
_INDEX_READERS = 16


@dataclass(frozen=True)
class _Placed:
    """A fragment in the host buffer."""

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    offset: int
    length: int
    start: int
    stop: int


@dataclass(frozen=True)
class _Save:
    step: int
    state: dict[str, Any]
    placed: list[_Placed]
    buffer: HostBuffer


class CheckpointWriter:
    """Writes this rank's fragments; on rank 0 also the manifest that commits the checkpoint once all ranks are there.

    store: the run's folder; epoch: from the lease, the same on all ranks. At most `backlog` saves are under way, each
    with a host buffer of this rank's data that is kept for the next; a further `save` waits. A save that failed in the
    background raises at the next `save` or `wait`, once, and its step is lost; earlier checkpoints stay. All ranks save
    the same steps in the same order. With `background=False` everything happens inside `save`.
    """

    def __init__(
        self,
        store: Store,
        epoch: int,
        rank: int,
        world_size: int,
        *,
        backlog: int = 1,
        background: bool = True,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        self._store, self._epoch, self._rank, self._world_size = store, epoch, rank, world_size
        self._timeout_s = timeout_s
        self._last_step = -1
        self.last_committed: int | None = None  # rank 0 only: the other ranks do not see the commit
        self._free: queue.Queue[HostBuffer] = queue.Queue()
        for _ in range(backlog):
            self._free.put(HostBuffer())
        self._backlog = backlog
        self._todo: queue.Queue[_Save | None] = queue.Queue()
        self._failure: Exception | None = None
        self._thread: threading.Thread | None = None
        if background:
            self._thread = threading.Thread(target=self._work, name="rayft-checkpoint", daemon=True)
            self._thread.start()

    @property
    def busy(self) -> bool:
        """Whether a save is under way."""
        return self._free.qsize() < self._backlog

    def save(self, step: int, fragments: Iterable[Fragment], state: dict[str, Any]) -> float:
        """Copy the fragments and publish them; returns the seconds waited for an earlier save.

        fragments: what this rank owns; over all ranks they tile every tensor exactly once. May be a generator: only one
        needs to exist at a time. state: a JSON object, rank 0's counts. Raises what an earlier save failed with,
        `StorageError` if that one does not end in time, `ValueError` for a step that is not later than the last.
        """
        if step <= self._last_step:
            raise ValueError(f"step {step} is not later than step {self._last_step}, which was saved before")
        self._raise_failure()
        frozen_state = json.loads(json.dumps(state, allow_nan=False))
        began = time.monotonic()
        buffer = self._take_buffer(self._timeout_s)
        waited_s = time.monotonic() - began
        try:
            self._raise_failure()
            buffer.clear()
            save = _Save(step, frozen_state, [_place(buffer, fragment) for fragment in fragments], buffer)
        except BaseException:
            self._free.put(buffer)
            raise
        self._last_step = step
        if self._thread is not None:
            self._todo.put(save)
        else:
            self._run(save)
            self._raise_failure()
        return waited_s

    def wait(self, timeout_s: float | None = None) -> None:
        """Return when every save so far has ended; raises what one failed with, `StorageError` after the time-out."""
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        deadline = time.monotonic() + timeout_s
        buffers = []
        try:
            for _ in range(self._backlog):
                buffers.append(self._take_buffer(max(0.0, deadline - time.monotonic())))
        finally:
            for buffer in buffers:
                self._free.put(buffer)
        self._raise_failure()

    def close(self, timeout_s: float | None = None) -> None:
        """`wait`, then end the background thread and free the buffers."""
        try:
            self.wait(timeout_s)
        finally:
            self._todo.put(None)

    def _take_buffer(self, timeout_s: float) -> HostBuffer:
        try:
            return self._free.get(timeout=timeout_s)
        except queue.Empty:
            raise StorageError(
                f"Writing the checkpoint of step {self._last_step} to {self._store.uri} has not ended within {timeout_s:.0f} s.",
                "See whether the storage is slow or another rank is stuck; save less often or raise the time-out.",
            ) from None

    def _raise_failure(self) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _work(self) -> None:
        while (save := self._todo.get()) is not None:
            self._run(save)

    def _run(self, save: _Save) -> None:
        try:
            self._publish(save)
            if self._rank == 0:
                self._commit(save.step, save.state)
                self.last_committed = save.step
        except Exception as error:
            self._failure = error
        finally:
            self._free.put(save.buffer)

    def _publish(self, save: _Save) -> None:
        """The data, then the index that says it is complete."""
        folder = self._store.child(layout.folder(save.step))
        name = layout.data_name(self._epoch, self._rank, self._world_size)
        tensors = tuple(_stored(save.buffer, placed, name) for placed in save.placed)
        files = (StoredFile(name, save.buffer.size),)
        index = Manifest(save.step, self._epoch, self._world_size, {}, files, tensors)
        folder.put_parts(name, save.buffer.parts())
        folder.put(layout.index_name(self._epoch, self._rank, self._world_size), to_json(index))

    def _commit(self, step: int, state: dict[str, Any]) -> None:
        sizes = self._wait_for_ranks(step)
        folder = self._store.child(layout.folder(step))
        names = self._index_names()
        with ThreadPoolExecutor(min(_INDEX_READERS, len(names)), "rayft-index") as pool:
            indexes = list(pool.map(lambda name: from_json(folder.get(name), folder.where(name)), names))
        manifest = merge(indexes, state)
        for file in manifest.files:
            if sizes.get(file.name) != file.size:
                raise StorageError(
                    f"The checkpoint of step {step} is not committed: {folder.where(file.name)} has "
                    f"{sizes.get(file.name, 0)} bytes instead of {file.size}.",
                    "The storage confirmed a write that it did not keep: look at it; the checkpoints before are kept.",
                )
        encoded = to_json(manifest)
        check_epoch(self._store, self._epoch)
        self._store.put(layout.manifest_key(step, self._epoch), encoded)

    def _wait_for_ranks(self, step: int) -> dict[str, int]:
        """Wait until every rank's index of this epoch is there; returns the sizes of all objects in the step's folder."""
        began = checked = time.monotonic()
        pause_s, longest_s = _POLL_S
        folder = self._store.child(layout.folder(step))
        while True:
            sizes = {entry.key: entry.size for entry in folder.list()}
            missing = [rank for rank, name in enumerate(self._index_names()) if name not in sizes]
            if not missing:
                return sizes
            now = time.monotonic()
            if now - began > self._timeout_s:
                raise StorageError(
                    f"The checkpoint of step {step} in {self._store.uri} is not committed: after {self._timeout_s:.0f} s "
                    f"the data of rank {', '.join(map(str, missing))} of {self._world_size} is missing.",
                    "Look at the log of those ranks; the checkpoints before are kept.",
                )
            if now - checked > _LEASE_CHECK_S:
                check_epoch(self._store, self._epoch)
                checked = now
            time.sleep(pause_s)
            pause_s = min(longest_s, 1.5 * pause_s)

    def _index_names(self) -> list[str]:
        return [layout.index_name(self._epoch, rank, self._world_size) for rank in range(self._world_size)]


def _place(buffer: HostBuffer, fragment: Fragment) -> _Placed:
    start = buffer.append(fragment.data)
    return _Placed(
        fragment.name,
        fragment.kind,
        fragment.shape,
        fragment.dtype,
        fragment.offset,
        fragment.data.size,
        start,
        buffer.size,
    )


def _stored(buffer: HostBuffer, placed: _Placed, file: str) -> StoredTensor:
    checksums = tuple(
        checksum(buffer.parts(at, min(at + CHUNK_BYTES, placed.stop)))
        for at in range(placed.start, placed.stop, CHUNK_BYTES)
    )
    fragment = StoredFragment(placed.offset, placed.length, file, placed.start, checksums)
    return StoredTensor(placed.name, placed.kind, placed.shape, placed.dtype, (fragment,))
