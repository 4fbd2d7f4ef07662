"""One writer per run: a lease as a history of numbered records, which holds no lock and survives SIGSTOP.

A driver acquires the lease, then opens an epoch for each worker group it starts. Whoever creates the next
record takes over; a driver that sleeps through this finds out when it next writes, and what it commits
meanwhile is outside the lineage. Clocks of two machines are never compared: the only clock is that of the one
who waits.
"""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

from rayft.checkpoint import layout, process, records
from rayft.checkpoint.records import Event, Record
from rayft.checkpoint.survey import OnSkip, latest
from rayft.errors import LeaseLost, ResourceError, StorageError
from rayft.storage import ObjectNotFound, Store

TTL_S = 30.0
_BEATS_PER_TTL = 5
_POLL_S = 0.5


class Lease:
    """The right to write below `store` (the run's folder), for the driver with the identity `owner`.

    Made by `acquire`. A process that acts for the driver (Ray Train's controller) makes its own handle from
    `Lease(store, owner)`; only the driver itself beats. `epoch` is the newest one this handle opened.
    """

    def __init__(self, store: Store, owner: dict[str, Any], *, ttl_s: float = TTL_S) -> None:
        self.store, self.owner = store, owner
        self.epoch = 0
        self._beat_s = ttl_s / _BEATS_PER_TTL
        self._count = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @classmethod
    def acquire(
        cls,
        store: Store,
        owner_info: dict[str, Any],
        *,
        ttl_s: float = TTL_S,
        takeover: bool = False,
        on_wait: Callable[[str], None] | None = None,
    ) -> Lease:
        """Take the lease if it is free: released, its holder certainly gone, or silent for `ttl_s` seconds.

        owner_info: anything of use to people (user, job id), as JSON. takeover: do not wait and see. on_wait:
        told once before waiting. Raises `ResourceError` if the holder lives, `StorageError` if the storage
        has no conditional writes.
        """
        owner = {**owner_info, **process.identity(), "id": uuid.uuid4().hex, "beat_s": ttl_s / _BEATS_PER_TTL}
        newest = records.newest_record(store)
        if newest and newest.event != "released" and not takeover and not process.is_gone(newest.owner):
            newest = _wait_and_see(store, newest, ttl_s, on_wait)
        lease = cls(store, owner, ttl_s=ttl_s)
        mine = records.append(store, newest, "acquired", owner)
        if mine is None:
            raise _refusal(store, records.newest_record(store))
        lease.epoch = mine.epoch
        _prove_conditional_writes(store, mine)
        return lease

    def resume(self, *, verify: bool = True, on_skip: OnSkip | None = None) -> tuple[int, int | None]:
        """Open an epoch for a worker group; returns it and the step to resume from (None: from nothing).

        First a record fences off the group before, which may still be writing; only then is the newest good
        checkpoint looked for, so none can appear or vanish in between. Raises `LeaseLost`, or `StorageError`.
        """
        self._append("fenced")
        step = latest(self.store, verify=verify, on_skip=on_skip)
        return self.begin_attempt(step), step

    def begin_attempt(self, resumed_step: int | None) -> int:
        """Open an epoch that resumes from `resumed_step`; returns it. Raises `LeaseLost`.

        From now on commits of earlier epochs count up to that step only. Choose the step after `acquire` or
        by `resume`: a step chosen while a group of an earlier epoch may still write and delete can be gone.
        """
        self._append("started", resumed_step)
        return self.epoch

    def held(self) -> bool:
        """Whether this driver is still the writer."""
        return _is_held(records.newest_record(self.store), self.owner)

    def heartbeat(self) -> None:
        """Show whoever waits for the lease that its holder lives."""
        self._count += 1
        beat = {"id": self.owner["id"], "count": self._count}
        self.store.put(layout.HEARTBEAT, json.dumps(beat).encode())

    def start_heartbeat(self) -> None:
        """Beat from a daemon thread until `stop`, or until another driver has taken over."""
        if self._thread is None:
            self._stop.clear()
            self._thread = threading.Thread(target=self._beat, name="rayft-heartbeat", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Stop beating; the lease stays held until `release`."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def release(self) -> None:
        """Give the lease back, so that the next start need not wait. Nothing happens if it was lost."""
        self.stop()
        try:
            newest = records.newest_record(self.store)
            if _is_held(newest, self.owner):
                records.append(self.store, newest, "released", self.owner)
        except StorageError:
            # A storage that fails is why the run ends, and its error the one to show; the lease runs out by itself.
            return

    def _append(self, event: Event, resumed: int | None = None) -> None:
        while True:
            newest = records.newest_record(self.store)
            if not _is_held(newest, self.owner):
                raise LeaseLost(
                    f"{self.store.uri} is no longer written by this driver but by {_name(newest)}.",
                    "Nothing is lost. Follow that run, or stop it and start again.",
                )
            mine = records.append(self.store, newest, event, self.owner, resumed)
            if mine is not None:
                self.epoch = mine.epoch
                return

    def _beat(self) -> None:
        while True:
            try:
                if not self.held():
                    return
                self.heartbeat()
            except StorageError:
                # A storage that does not answer ends the run at its next commit, with the reason; until then go on.
                pass
            if self._stop.wait(self._beat_s):
                return


def _is_held(newest: Record | None, owner: dict[str, Any]) -> bool:
    return newest is not None and newest.event != "released" and newest.owner["id"] == owner["id"]


def _wait_and_see(
    store: Store, holder: Record, ttl_s: float, on_wait: Callable[[str], None] | None
) -> Record:
    """The record to follow once the holder has given no sign of life for `ttl_s` seconds, or has released the lease.

    Five of the holder's own beats, if those are longer. Raises `ResourceError` if it lives.
    """
    wait_s = max(ttl_s, _BEATS_PER_TTL * float(holder.owner["beat_s"]))
    if on_wait:
        on_wait(
            f"{store.uri} was last written by {_name(holder)}; watching up to {wait_s:.0f} s whether it still is"
        )
    before = _count(store, holder)
    deadline = time.monotonic() + wait_s
    while time.monotonic() < deadline:
        time.sleep(min(_POLL_S, wait_s / 10))
        if records.newest_epoch(store) != holder.epoch:
            newest = records.newest_record(store)
            if newest is not None and newest.event == "released":
                return newest
            raise _refusal(store, newest)
        if _count(store, holder) != before:
            raise _refusal(store, holder)
    return holder


def _count(store: Store, holder: Record) -> int | None:
    """The holder's heartbeat counter; None while it has not beaten (a beat of an earlier holder is none of its)."""
    try:
        beat = json.loads(store.get(layout.HEARTBEAT))
    except ObjectNotFound:
        return None
    return int(beat["count"]) if beat["id"] == holder.owner["id"] else None


def _refusal(store: Store, holder: Record | None) -> ResourceError:
    return ResourceError(
        f"{store.uri} is being written by {_name(holder)}.",
        "Wait for it, stop it, or use another run name.",
    )


def _name(holder: Record | None) -> str:
    if holder is None:
        return "nobody"
    return f"{holder.owner['host']}:{holder.owner['pid']} (since {holder.created})"


def _prove_conditional_writes(store: Store, mine: Record) -> None:
    """A service that ignores `If-None-Match` would let two drivers write: find out before anything depends on it."""
    key = layout.record_key(mine.epoch)
    if store.put_if_absent(key, b"{}"):
        store.delete([key])
        raise StorageError(
            f"{store.uri} overwrites an object that was to be created only if absent.",
            "Use a service with conditional writes (AWS S3, MinIO, Ceph Squid or later, R2), or a local path.",
        )
