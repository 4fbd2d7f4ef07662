"""The commit of a checkpoint, by rank 0: once the parts of all ranks are there and fit, the manifest is written."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rayft.checkpoint import layout
from rayft.checkpoint.manifest import from_json, merge, to_json
from rayft.checkpoint.records import check_epoch
from rayft.errors import StorageError
from rayft.storage import Entry, Store

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 2.0
_LEASE_CHECK_S = 10.0  # while waiting for other ranks
_INDEX_READERS = 16


def commit(
    store: Store, epoch: int, world_size: int, step: int, state: dict[str, Any], *, timeout_s: float
) -> None:
    """Wait for the indexes of all ranks, check that they make a whole checkpoint, and write its manifest.

    Raises `StorageError` if a rank's part does not come or is not what it wrote, `LeaseLost` if this epoch is
    over, `ValueError` if the fragments do not tile every tensor.
    """
    names = [layout.index_name(epoch, rank, world_size) for rank in range(world_size)]
    sizes = _wait_for_ranks(store, epoch, step, names, timeout_s)
    folder = store.child(layout.folder(step))
    with ThreadPoolExecutor(min(_INDEX_READERS, world_size), "rayft-index") as pool:
        indexes = list(pool.map(lambda name: from_json(folder.get(name), folder.where(name)), names))
    manifest = merge(indexes, state)
    for file in manifest.files:
        size = sizes.get(f"{layout.folder(step)}/{file.name}", 0)
        if size != file.size:
            raise StorageError(
                f"The checkpoint of step {step} is not committed: {folder.where(file.name)} has {size} bytes "
                f"instead of {file.size}.",
                "The storage confirmed a write that it did not keep: look at it; the checkpoints before are kept.",
            )
    encoded = to_json(manifest)
    check_epoch(store, epoch)
    store.put(layout.manifest_key(step, epoch), encoded)


def _wait_for_ranks(
    store: Store, epoch: int, step: int, names: Sequence[str], timeout_s: float
) -> dict[str, int]:
    """Wait until every rank's index is there; returns the sizes of all checkpoint objects by key."""
    began = checked = time.monotonic()
    pause_s = _FIRST_PAUSE_S
    while True:
        entries = store.list(layout.CHECKPOINTS)
        sizes = {entry.key: entry.size for entry in entries}
        missing = [rank for rank, name in enumerate(names) if f"{layout.folder(step)}/{name}" not in sizes]
        if not missing:
            return sizes
        gone_on = [rank for rank in missing if _published_later(entries, step, names[rank])]
        now = time.monotonic()
        if gone_on or now - began > timeout_s:
            raise StorageError(
                f"The checkpoint of step {step} in {store.uri} is not committed: "
                + (
                    f"rank {_listed(gone_on)} of {len(names)} failed to save its part and went on."
                    if gone_on
                    else f"after {timeout_s:.0f} s the part of rank {_listed(missing)} of {len(names)} is missing."
                ),
                "Look at the log of those ranks; the checkpoints before are kept.",
            )
        if now - checked > _LEASE_CHECK_S:
            check_epoch(store, epoch)
            checked = now
        time.sleep(pause_s)
        pause_s = min(_LONGEST_PAUSE_S, 1.5 * pause_s)


def _published_later(entries: Sequence[Entry], step: int, name: str) -> bool:
    """Whether that rank has published a later step: ranks save in order, so this step's part will not come."""
    return any(
        entry.key.endswith("/" + name)
        and (item := layout.parse_object(entry.key)) is not None
        and item.step > step
        for entry in entries
    )


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))
