"""Reading the tokenised cache: memory-mapped shards, opened when first needed, waited for while they are being made."""

from __future__ import annotations

import json
import time
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from rayft.data.cache import CacheSpec
from rayft.data.template import Sample
from rayft.errors import StorageError, WorkerError
from rayft.storage import Held, Store, hold

#: Shards kept mapped by a process; more are opened again when needed.
OPEN_SHARDS = 1024

_DTYPES: dict[str, np.dtype[Any]] = {
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
    "U8": np.dtype("u1"),
    "F64": np.dtype("<f8"),
}


@dataclass(frozen=True)
class _Shard:
    """The arrays of a shard, as `rayft.data.cache` describes them."""

    tokens: np.ndarray
    trained: np.ndarray
    offsets: np.ndarray
    targets: np.ndarray
    row_documents: np.ndarray
    values: np.ndarray | None = None
    digests: np.ndarray | None = None
    held: Held | None = None  # the node's copy is in use as long as the arrays are


class NoMoreShards(Exception):
    """The shard that is waited for will not come; whoever makes the shards says why."""


class Corpus:
    """The documents of a `CacheSpec`. Rows have ids 0..spec.rows; a document's id is shard << 32 | number in it."""

    def __init__(
        self,
        spec: CacheSpec,
        cache: Store,
        *,
        node_dir: Path,
        wait_timeout_s: float = 600.0,
        on_wait: Callable[[], bool] | None = None,
    ) -> None:
        """`cache`: where `prepare_shard` puts shards; `node_dir`: this node's copies where that is not a folder.

        on_wait: called about once a second while a shard is waited for; true when no more shards will be made.
        """
        self.spec = spec
        self._cache = cache
        self._node_dir = node_dir
        self._wait_timeout_s = wait_timeout_s
        self._on_wait = on_wait
        self._first_ids = [shard.first_id for shard in spec.shards]
        self._shard = lru_cache(maxsize=OPEN_SHARDS)(self._open)

    def documents(self, row: int) -> range:
        """Ids of the documents of a row; empty where it was dropped. Waits for the row's shard.

        Raises WorkerError, naming the shard, when it is not there in time.
        """
        index = bisect_right(self._first_ids, row) - 1
        start, end = self._shard(index).row_documents[row - self._first_ids[index] :][:2]
        return range((index << 32) + int(start), (index << 32) + int(end))

    def document_count(self) -> int:
        """Documents of all shards; waits for them."""
        return sum(len(self._shard(shard.index).targets) for shard in self.spec.shards)

    def length(self, document: int) -> int:
        """Tokens of a document."""
        start, end = self._span(document)
        return end - start

    def trained_count(self, document: int) -> int:
        """Trained tokens of a document."""
        return int(self._shard(document >> 32).targets[document & 0xFFFFFFFF])

    def sample(self, document: int) -> Sample:
        """Ids and mask of a document (a view of the mapped file, and a copy)."""
        start, end = self._span(document)
        shard = self._shard(document >> 32)
        bits = np.unpackbits(shard.trained[start // 8 : (end + 7) // 8])
        return Sample(shard.tokens[start:end], bits[start % 8 :][: end - start].astype(np.bool_))

    def answers(self, document: int) -> tuple[range, float]:
        """All documents of the row that holds `document`, and the row's value; for rows that compare answers."""
        shard = self._shard(document >> 32)
        row = int(np.searchsorted(shard.row_documents, document & 0xFFFFFFFF, side="right")) - 1
        start, end = shard.row_documents[row : row + 2]
        base = document >> 32 << 32
        assert shard.values is not None
        return range(base + int(start), base + int(end)), float(shard.values[row])

    def prompt_length(self, document: int) -> int:
        """Tokens before the first trained one."""
        return int(np.flatnonzero(self.sample(document).trained)[0])

    def digests(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of shard `index`: `digests` int64[documents], `row_documents` and `values` as `rayft.data.cache` has them."""
        shard = self._shard(index)
        assert shard.digests is not None
        assert shard.values is not None
        return shard.digests, shard.row_documents, shard.values

    def _span(self, document: int) -> tuple[int, int]:
        start, end = self._shard(document >> 32).offsets[document & 0xFFFFFFFF :][:2]
        return int(start), int(end)

    def _open(self, index: int) -> _Shard:
        shard = self.spec.shards[index]
        self._wait(index)
        held = hold(self._cache, shard.key, self._node_dir)
        path = held.path
        try:
            return _Shard(**_map(path), held=held)
        except (ValueError, KeyError, TypeError) as error:
            raise StorageError(
                f"The cache shard {path} is damaged: {error}.", "Delete it; it will be made again."
            ) from None

    def _wait(self, index: int) -> None:
        shard = self.spec.shards[index]
        deadline = time.monotonic() + self._wait_timeout_s
        pause = 0.02
        while not self._cache.exists(shard.key):
            if time.monotonic() > deadline:
                raise WorkerError(
                    f"Waited {self._wait_timeout_s:.0f} s for shard {index} of the tokenised cache "
                    f"({self.spec.where(shard)}, {self._cache.where(shard.key)}).",
                    "Look in the run log for why it is not being made: no CPU left for the tokenising tasks, or one failed.",
                )
            # Looked at once more after the last one was made, so that all ranks come to the same answer.
            if self._on_wait is not None and self._on_wait() and not self._cache.exists(shard.key):
                raise NoMoreShards(self.spec.where(shard))
            time.sleep(pause)
            pause = min(2 * pause, 1.0)


def _map(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file, memory-mapped."""
    whole = np.memmap(path, dtype=np.uint8, mode="r")
    begin = 8 + int.from_bytes(whole[:8].tobytes(), "little")
    header = json.loads(whole[8:begin].tobytes())
    header.pop("__metadata__", None)
    size = begin + max(entry["data_offsets"][1] for entry in header.values())
    if len(whole) != size:
        raise ValueError(f"{len(whole)} bytes instead of {size}")
    arrays = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        arrays[name] = whole[begin + start : begin + end].view(_DTYPES[entry["dtype"]])
    return arrays
