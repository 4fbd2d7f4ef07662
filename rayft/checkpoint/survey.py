"""Which checkpoints of a run are committed, and the newest good one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from rayft.checkpoint import layout
from rayft.checkpoint.manifest import CorruptCheckpoint, Manifest, from_json
from rayft.checkpoint.records import Lineage, lineage
from rayft.checkpoint.verified import VerifiedFiles
from rayft.storage import DamagedObject, Entry, ObjectNotFound, Store

OnSkip = Callable[[int, str], None]


@dataclass
class Survey:
    """One look at the checkpoints folder.

    good: the manifest of every committed step: in the lineage, readable, all files there with the right size.
    bad: (step, epoch) -> why a manifest in the lineage is not good. entries: every object of a checkpoint.
    """

    lineage: Lineage
    entries: dict[str, Entry]
    good: dict[int, Manifest] = field(default_factory=dict)
    bad: dict[tuple[int, int], str] = field(default_factory=dict)


def survey(store: Store, folder: str = layout.CHECKPOINTS) -> Survey:
    """Look at all checkpoints, or at one step's folder: one listing, and the manifests."""
    # The lineage is read first: a commit that lands in between is judged by it or not seen, both consistent.
    known = Survey(lineage(store), {entry.key: entry for entry in store.list(folder)})
    for key in known.entries:
        item = layout.parse_object(key)
        if item is None or not item.is_manifest or not known.lineage.counts(item.epoch, item.step):
            continue
        try:
            manifest = _checked_manifest(store, key, known.entries)
        except ObjectNotFound:
            continue  # retention took it since the listing
        except DamagedObject as error:
            known.bad[item.step, item.epoch] = error.message
            continue
        other = known.good.get(item.step)
        if other is None or other.epoch < item.epoch:
            known.good[item.step] = manifest
    return known


def committed_steps(store: Store) -> list[int]:
    """Steps with a checkpoint that is committed, in the lineage and complete (sizes, not checksums), ascending."""
    return sorted(survey(store).good)


def latest(store: Store, *, verify: bool = True, on_skip: OnSkip | None = None) -> int | None:
    """The newest good step, or None; damaged ones are walked back over and told to `on_skip(step, reason)`.

    With `verify` the checksums of all its data are verified. Raises `StorageError` if the storage does not
    answer: only what is there and wrong is skipped.
    """
    known = survey(store)
    tell = on_skip or (lambda step, reason: None)
    steps = sorted({*known.good, *(step for step, _ in known.bad)}, reverse=True)
    for step in steps:
        if step not in known.good:
            tell(step, next(reason for (at, _), reason in known.bad.items() if at == step))
            continue
        try:
            if verify:
                VerifiedFiles(store, known.good[step]).verify()
        except DamagedObject as error:
            tell(step, error.message)
            continue
        return step
    return None


def _checked_manifest(store: Store, key: str, entries: dict[str, Entry]) -> Manifest:
    manifest = from_json(store.get(key), store.where(key))
    folder = key.rpartition("/")[0]
    for file in manifest.files:
        entry = entries.get(f"{folder}/{file.name}")
        if entry is None:
            raise CorruptCheckpoint(f"step-{manifest.step} is corrupt: {file.name} is missing.")
        if entry.size != file.size:
            raise CorruptCheckpoint(
                f"step-{manifest.step} is corrupt: {file.name} has {entry.size} bytes instead of {file.size}."
            )
    return manifest
