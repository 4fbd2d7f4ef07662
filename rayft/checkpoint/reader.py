"""Reading a committed checkpoint: any range of any tensor, whatever the number of ranks that wrote it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rayft.checkpoint import layout
from rayft.checkpoint.fragments import storage_dtype
from rayft.checkpoint.manifest import CorruptCheckpoint, Manifest, StoredTensor
from rayft.checkpoint.survey import survey
from rayft.checkpoint.verified import VerifiedFiles
from rayft.errors import StorageError
from rayft.storage import Store

_READ_AHEAD = 8


class Range(NamedTuple):
    """A request for elements of one flattened tensor; `length` None means up to its end."""

    name: str
    kind: str
    offset: int = 0
    length: int | None = None


class CheckpointReader:
    """The committed checkpoint of `step`. Every byte it returns has passed its checksum.

    store: the run's folder. cache_dir: where a remote checkpoint's files are kept once per node, for ranks
    that read much of it; without it each read fetches its own ranges. Raises `StorageError` if the step is
    not committed, and `CorruptCheckpoint` if it is damaged.
    """

    def __init__(self, store: Store, step: int, *, cache_dir: Path | str | None = None) -> None:
        self.manifest = _manifest(store, step)
        remote = store.local_path(layout.folder(step)) is None
        self._mapped = cache_dir is not None or not remote
        self._files = VerifiedFiles(store, self.manifest, Path(cache_dir) if cache_dir and remote else None)
        self._tensors = {(tensor.name, tensor.kind): tensor for tensor in self.manifest.tensors}

    def discard_copies(self) -> None:
        """The node's copies of a remote checkpoint go, as soon as none of its processes uses them."""
        self._files.discard()

    @property
    def state(self) -> dict[str, Any]:
        """The JSON object that rank 0 saved with the fragments."""
        return self.manifest.state

    def kinds(self) -> list[str]:
        """Kinds of tensors that the checkpoint holds."""
        return sorted({tensor.kind for tensor in self.manifest.tensors})

    def names(self, kind: str) -> list[str]:
        """Names of the tensors of one kind."""
        return [tensor.name for tensor in self.manifest.tensors if tensor.kind == kind]

    def shape(self, name: str, kind: str = "param") -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return self._tensor(name, kind).shape

    def dtype(self, name: str, kind: str = "param") -> str:
        """Dtype of the tensor, by its name in torch ("bfloat16", ...)."""
        return self._tensor(name, kind).dtype

    def read(self, name: str, kind: str = "param", offset: int = 0, length: int | None = None) -> np.ndarray:
        """Elements `offset` to `offset + length` of the flattened tensor, 1-D, in `storage_dtype(dtype)`."""
        tensor = self._tensor(name, kind)
        length = tensor.size - offset if length is None else length
        if offset < 0 or length < 0 or offset + length > tensor.size:
            raise ValueError(f"{kind} {name!r} has {tensor.size} elements: no {length} at {offset}")
        out = np.empty(length, storage_dtype(tensor.dtype))
        target, item = out.view(np.uint8), tensor.itemsize
        for piece in tensor.fragments:
            low, high = max(offset, piece.offset), min(offset + length, piece.offset + piece.length)
            if low < high:
                start, stop = (low - piece.offset) * item, (high - piece.offset) * item
                self._files.read(
                    tensor, piece, start, stop, target[(low - offset) * item : (high - offset) * item]
                )
        return out

    def read_many(self, requests: Iterable[Range]) -> Iterator[np.ndarray]:
        """`read` for each request, in order; from a remote store the next few are already under way."""
        if self._mapped:  # threads would only cost
            yield from (self.read(*one) for one in requests)
            return
        todo = iter(requests)
        with ThreadPoolExecutor(_READ_AHEAD, "rayft-read") as pool:
            running: list[Future[np.ndarray]] = [
                pool.submit(self.read, *one) for one in islice(todo, _READ_AHEAD)
            ]
            try:
                while running:
                    yield running.pop(0).result()
                    running += [pool.submit(self.read, *one) for one in islice(todo, 1)]
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def verify(self) -> None:
        """Verify every checksum of the checkpoint; raises `CorruptCheckpoint`."""
        self._files.verify()

    def _tensor(self, name: str, kind: str) -> StoredTensor:
        try:
            return self._tensors[name, kind]
        except KeyError:
            raise StorageError(
                f"step-{self.manifest.step} holds no {kind} {name!r} (it has {', '.join(self.kinds())}).",
                "The checkpoint is of another model or method; check the run name and what changed in the job.",
            ) from None


def _manifest(store: Store, step: int) -> Manifest:
    known = survey(store, layout.folder(step))
    if step in known.good:
        return known.good[step]
    for (at, _), reason in known.bad.items():
        if at == step:
            raise CorruptCheckpoint(reason, "Use an earlier checkpoint.")
    raise StorageError(
        f"{store.uri} holds no committed checkpoint of step {step}.", "Choose a step that is listed there."
    )
