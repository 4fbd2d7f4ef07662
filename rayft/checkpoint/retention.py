"""Retention: old checkpoints and the leftovers of dead writers go, the last good ones never."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rayft.checkpoint import layout
from rayft.checkpoint.manifest import Manifest
from rayft.checkpoint.records import check_epoch, newest_epoch
from rayft.checkpoint.survey import Survey, survey
from rayft.checkpoint.verified import VerifiedFiles
from rayft.storage import DamagedObject, Store


def retain(
    store: Store,
    keep: int,
    keep_steps: Iterable[int] = (),
    *,
    epoch: int | None = None,
    verify: bool | None = None,
) -> list[int]:
    """Delete all but the newest `keep` good checkpoints and `keep_steps`; returns the committed steps deleted.

    Also removed: what writers of dead epochs left uncommitted, commits outside the lineage, and saves of this
    epoch that failed before a later one was committed. Never touched: anything of this epoch that may still
    be in flight.

    epoch: the caller's own; `LeaseLost` if it is not the newest any more. None takes the newest (nobody is
    writing). verify: whether one kept checkpoint must first pass all its checksums; if none does, the
    deletion stops at the newest older one that passes. None verifies where the store is local (on S3 the
    service verified each upload).
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, not {keep}")
    epoch = newest_epoch(store) if epoch is None else epoch
    known = survey(store)
    # Checked after looking: whoever takes over from here on sees the newest commit too, so what is older may go.
    check_epoch(store, epoch)
    verify = store.local_path(layout.CHECKPOINTS) is not None if verify is None else verify
    kept = {*_survivors(store, known, keep, verify), *keep_steps}
    newest = max(known.good, default=-1)
    doomed: list[tuple[int, str]] = []
    for key in known.entries:
        item = layout.parse_object(key)
        if item is None:
            continue
        committed = item.step in known.good and known.good[item.step].epoch == item.epoch
        if item.epoch > epoch or (committed and item.step in kept):
            continue
        # A damaged commit ahead of all good ones stays: nothing replaces it yet, and somebody may restore its files.
        abandoned = item.epoch < epoch and (item.step, item.epoch) not in known.bad
        if committed or abandoned or item.step < newest:
            doomed.append((item.step, key))
    _delete(store, [key for _, key in doomed])
    store.discard_unfinished(layout.CHECKPOINTS, lambda key: _is_dead(key, epoch, newest))
    deleted = {step for step, _ in doomed if step in known.good and step not in kept}
    return sorted(deleted)


def _survivors(store: Store, known: Survey, keep: int, verify: bool) -> list[int]:
    """Newest `keep` good steps, and more until one of them is proven good."""
    steps = sorted(known.good, reverse=True)
    if not verify:
        return steps[:keep]
    for count, step in enumerate(steps, start=1):
        if _passes(store, known.good[step]):
            return steps[: max(keep, count)]
    return steps


def _passes(store: Store, manifest: Manifest) -> bool:
    try:
        VerifiedFiles(store, manifest).verify()
    except DamagedObject:
        return False
    return True


def _delete(store: Store, keys: Sequence[str]) -> None:
    """Manifests first: from then on no reader takes for a checkpoint what is losing its files."""
    manifests = {key for key in keys if (item := layout.parse_object(key)) and item.is_manifest}
    store.delete(manifests)
    store.delete(key for key in keys if key not in manifests)


def _is_dead(key: str, epoch: int, newest: int) -> bool:
    item = layout.parse_object(key)
    return item is not None and (item.epoch < epoch or (item.epoch == epoch and item.step < newest))
