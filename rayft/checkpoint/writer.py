"""Saving: one copy to host memory blocks training, the rest happens in a background thread of each rank."""

from __future__ import annotations

import contextlib
import json
import queue
import socket
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rayft.checkpoint import layout
from rayft.checkpoint.checksum import CHUNK_BYTES, checksum
from rayft.checkpoint.commit import commit
from rayft.checkpoint.fragments import Fragment
from rayft.checkpoint.host_buffer import HostBuffer
from rayft.checkpoint.manifest import (
    Manifest,
    StoredFile,
    StoredFragment,
    StoredTensor,
    to_json,
)
from rayft.errors import StorageError
from rayft.storage import Store

TIMEOUT_S = 1800.0


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
    began: float


class CheckpointWriter:
    """Writes this rank's fragments; on rank 0 also the manifest that commits the checkpoint once all ranks are there.

    store: the run's folder; epoch: from the lease, the same on all ranks. At most `backlog` saves are under
    way, each with a host buffer of this rank's data that is kept for the next; a further `save` waits. A save
    that failed in the background raises at the next `save` or `wait`, once; only its step is lost, and
    whoever goes on need not save again. All ranks save the same steps in the same order. With
    `background=False` everything happens inside `save`.

    reserve_bytes: about the size of this rank's data. Its memory is then prepared in the background, so that the first
    save blocks no longer than the others.

    Raises `StorageError` where the storage does not hold the record of `epoch`: a path that the nodes do not
    share.
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
        reserve_bytes: int = 0,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        if epoch and not store.exists(layout.record_key(epoch)):
            raise StorageError(
                f"{store.uri} on {socket.gethostname()} does not hold what the driver wrote there.",
                "Its nodes do not share this path: use s3:// or a shared file system, mounted at the same place.",
            )
        self._store, self._epoch, self._rank, self._world_size = store, epoch, rank, world_size
        self._timeout_s = timeout_s
        self._last_step = self._ended_step = -1
        # Rank 0 only, as the other ranks do not see the commit: its step, and its seconds since `save` was called.
        self.last_committed: int | None = None
        self.last_took_s = 0.0
        self._backlog = backlog
        self._reserve_bytes = reserve_bytes
        self._free: queue.Queue[HostBuffer] = queue.Queue()
        self._todo: queue.Queue[_Save | None] = queue.Queue()
        self._failure: Exception | None = None
        self._thread: threading.Thread | None = None
        if background:
            self._thread = threading.Thread(target=self._work, name="rayft-checkpoint", daemon=True)
            self._thread.start()
        else:
            self._make_buffers()

    @property
    def busy(self) -> bool:
        """Whether a save is under way."""
        return self._ended_step < self._last_step

    def save(self, step: int, fragments: Iterable[Fragment], state: dict[str, Any]) -> float:
        """Copy the fragments and publish them; returns the seconds waited for an earlier save.

        fragments: what this rank owns; over all ranks they tile every tensor exactly once. May be a
        generator: only one needs to exist at a time. state: a JSON object, rank 0's counts. Raises what an
        earlier save failed with once this one is under way, `StorageError` if no earlier one ends in time,
        `ValueError` for a step not later than the last.
        """
        if step <= self._last_step:
            raise ValueError(f"step {step} is not later than step {self._last_step}, which was saved before")
        frozen_state = json.loads(json.dumps(state, allow_nan=False))
        began = time.monotonic()
        buffer = self._take_buffer(self._timeout_s)
        waited_s = time.monotonic() - began
        failure = self._take_failure()
        try:
            buffer.clear()
            save = _Save(
                step, frozen_state, [_place(buffer, fragment) for fragment in fragments], buffer, began
            )
        except BaseException:
            self._free.put(buffer)
            raise
        self._last_step = step
        if self._thread is not None:
            self._todo.put(save)
        else:
            self._run(save)
            failure = self._take_failure()
        if failure is not None:
            raise failure
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
        failure = self._take_failure()
        if failure is not None:
            raise failure

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
                f"Writing the checkpoint of step {self._last_step} to {self._store.uri} has not ended "
                f"within {timeout_s:.0f} s.",
                "See whether the storage is slow or another rank is stuck; save less often or raise the time-out.",
            ) from None

    def _take_failure(self) -> Exception | None:
        failure, self._failure = self._failure, None
        return failure

    def _make_buffers(self) -> None:
        for _ in range(self._backlog):
            buffer = HostBuffer()
            with contextlib.suppress(MemoryError):  # `save` says so, if it needs that much
                buffer.reserve(self._reserve_bytes)
            self._free.put(buffer)

    def _work(self) -> None:
        self._make_buffers()
        while (save := self._todo.get()) is not None:
            self._run(save)

    def _run(self, save: _Save) -> None:
        try:
            self._publish(save)
            if self._rank == 0:
                commit(
                    self._store,
                    self._epoch,
                    self._world_size,
                    save.step,
                    save.state,
                    timeout_s=self._timeout_s,
                )
                self.last_took_s = time.monotonic() - save.began
                self.last_committed = save.step
        except Exception as error:
            self._failure = error
        finally:
            self._ended_step = save.step
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
