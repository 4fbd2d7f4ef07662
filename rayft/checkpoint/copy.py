"""A committed checkpoint of one run becomes a checkpoint of another, which then needs the first no more."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from rayft.checkpoint import layout
from rayft.checkpoint.manifest import Manifest, to_json
from rayft.checkpoint.records import check_epoch
from rayft.checkpoint.verified import VerifiedFiles
from rayft.storage import Store

_COPIES = 4


def copy_checkpoint(
    source: Store, manifest: Manifest, target: Store, epoch: int, state: dict[str, Any] | None = None
) -> Manifest:
    """Copy what a manifest of `source` names into `target` and commit it there, for `epoch` of its lease.

    state: the JSON object of the copy (None: the same). The copy's checksums are verified before the manifest is written, which
    is the commit: whoever is killed before leaves nothing that counts. Returns the copy's manifest. Raises `CorruptCheckpoint`
    where the source is damaged, `StorageError` where an object is gone, `LeaseLost` if the epoch is over.
    """
    step = manifest.step
    names = {file.name: layout.renamed(file.name, epoch) for file in manifest.files}
    copied = replace(
        manifest,
        epoch=epoch,
        state=manifest.state if state is None else state,
        files=tuple(replace(file, name=names[file.name]) for file in manifest.files),
        tensors=tuple(
            replace(
                tensor,
                fragments=tuple(replace(piece, file=names[piece.file]) for piece in tensor.fragments),
            )
            for tensor in manifest.tensors
        ),
    )
    there, here = source.child(layout.folder(step)), target.child(layout.folder(step))
    with ThreadPoolExecutor(_COPIES, "rayft-copy") as pool:
        try:
            for _ in pool.map(lambda name: here.copy_from(there, name, names[name]), names):
                pass
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    VerifiedFiles(target, copied).verify()
    encoded = to_json(copied)
    check_epoch(target, epoch)
    target.put(layout.manifest_key(step, epoch), encoded)
    return copied
