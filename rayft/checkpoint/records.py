"""The lease's history: numbered immutable records, and which commits count by them.

Each record is created by a conditional write under the number after the newest, so all writers agree on one
order, and nobody holds a lock that could outlive it. The number is the epoch. A record carries the whole
lineage (which step each attempt resumed from), so the newest alone tells which commits count.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Any, Literal

from rayft.checkpoint import layout
from rayft.errors import LeaseLost, StorageError
from rayft.storage import Store

Event = Literal["acquired", "fenced", "started", "released"]


@dataclass(frozen=True)
class Lineage:
    """Which commits count: those of the newest attempt, and of each earlier one up to where later ones resumed.

    attempts: (epoch, step it resumed from, or None for a start from nothing), oldest first.
    """

    attempts: tuple[tuple[int, int | None], ...] = ()

    def counts(self, epoch: int, step: int) -> bool:
        """Whether a commit of `step` by `epoch` is part of the run's one history.

        A stale writer that wakes up and commits step 44 in epoch 3 after epoch 4 resumed from step 40 is
        never seen.
        """
        return all(
            resumed is not None and step <= resumed for later, resumed in self.attempts if later > epoch
        )


@dataclass(frozen=True)
class Record:
    """One event of the lease. `owner` identifies the driver; `created` is for people, nothing is decided by it."""

    epoch: int
    event: Event
    owner: dict[str, Any]
    lineage: Lineage
    created: str


def newest_epoch(store: Store) -> int:
    """Number of the newest record; 0 where there is none."""
    epochs = (layout.parse_record(entry.key) for entry in store.list(layout.LEASE))
    return max((epoch for epoch in epochs if epoch is not None), default=0)


def newest_record(store: Store) -> Record | None:
    """The newest record, or None in a store that no lease was ever taken on."""
    epoch = newest_epoch(store)
    if epoch == 0:
        return None
    key = layout.record_key(epoch)
    try:
        body = json.loads(store.get(key))
        attempts = tuple((int(at), resumed) for at, resumed in body["attempts"])
        return Record(epoch, body["event"], body["owner"], Lineage(attempts), body["created"])
    except (ValueError, KeyError, TypeError) as error:
        raise StorageError(
            f"The lease record {store.where(key)} is corrupt.",
            "Restore it, or start the run under another name.",
        ) from error


def lineage(store: Store) -> Lineage:
    """The run's lineage; without a lease every commit counts."""
    newest = newest_record(store)
    return newest.lineage if newest else Lineage()


def append(
    store: Store, previous: Record | None, event: Event, owner: dict[str, Any], resumed: int | None = None
) -> Record | None:
    """Create the record after `previous`; None if somebody else just did. "started" adds an attempt to the lineage."""
    epoch = (previous.epoch if previous else 0) + 1
    attempts = previous.lineage.attempts if previous else ()
    if event == "started":
        attempts = (*attempts, (epoch, resumed))
    created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    body = {"epoch": epoch, "event": event, "owner": owner, "attempts": attempts, "created": created}
    if not store.put_if_absent(layout.record_key(epoch), json.dumps(body, indent=1).encode()):
        return None
    return Record(epoch, event, owner, Lineage(attempts), created)


def check_epoch(store: Store, epoch: int) -> None:
    """Raise `LeaseLost` unless `epoch` is the newest: nobody else, and no later attempt of our own, has begun."""
    newest = newest_epoch(store)
    if newest != epoch:
        raise LeaseLost(
            f"{store.uri} has moved on to epoch {newest}, so epoch {epoch} may write no more.",
            "A later start owns this run now; nothing is lost. Follow that one, or stop it and start again.",
        )
