"""Log-probabilities under the reference model, computed once and kept in the cache.

The reference is the model that training starts from. Before the first step, with or without an adapter, the model *is*
the reference, and a resumed run starts from it too before it takes in its checkpoint: whatever the run will need is
computed then, so no second model is ever held.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from rayft.data.corpus import Corpus
from rayft.storage import Store

#: Log-probabilities per object in the cache: what is lost at most when a run dies while it computes them.
CHUNK = 4096


class ReferenceLogprobs:
    """log p(answer | prompt) under the reference of sequences, each named by one document id, or two: the prompt of the
    first with the answer of the second. Held in memory, about 200 bytes each.

    They are kept twice: in the cache, for any run of the same model and data, and in the run's own folder. What the run
    itself has used comes first, so that a resumed run goes on with the same bits whatever others have put into the cache
    (where another layout of micro-batches may have rounded otherwise).
    """

    def __init__(self, cache: Store, own: Store, key: str) -> None:
        """`key`: names the model, the data with its tokenizer and template, and the precision."""
        self._cache, self._own, self._prefix = cache, own, f"reference/{key}"
        self._values: dict[tuple[int, ...], float] = {}
        self._kept: set[tuple[int, ...]] = set()
        self._new: list[tuple[int, ...]] = []
        self.agreed = False

    def __len__(self) -> int:
        return len(self._values)

    def load(self) -> dict[tuple[int, ...], float]:
        """What the run's folder and the cache hold; for one rank, which tells the others (`agree`)."""
        values: dict[tuple[int, ...], float] = {}
        for store in (self._own, self._cache):
            for entry in sorted(store.list(self._prefix), key=lambda entry: entry.key):
                arrays = np.load(io.BytesIO(store.get(entry.key)))
                for names, value in zip(arrays["names"].tolist(), arrays["values"].tolist(), strict=True):
                    values.setdefault(tuple(n for n in names if n >= 0), value)
            if store is self._own:
                self._kept = set(values)
        return values

    def agree(self, values: dict[tuple[int, ...], float]) -> None:
        """Begin with these values: those that one rank has loaded, since the cache may grow between two looks at it."""
        self._values, self.agreed = dict(values), True

    def has(self, sequences: Iterable[tuple[int, ...]]) -> bool:
        """Whether all are known."""
        return all(sequence in self._values for sequence in sequences)

    def get(self, sequences: Sequence[tuple[int, ...]]) -> torch.Tensor:
        """Their log-probabilities, float32[len(sequences)]. KeyError for one that was not computed."""
        return torch.tensor([self._values[sequence] for sequence in sequences], dtype=torch.float32)

    def add(self, sequences: Sequence[tuple[int, ...]], values: Sequence[float]) -> None:
        """Take in what was computed; what is known stays as it is."""
        for sequence, value in zip(sequences, values, strict=True):
            if sequence not in self._values:
                self._values[sequence] = value
                self._new.append(sequence)

    def save(self, *, last: bool = False) -> None:
        """Write full chunks of what is new to the cache; with `last` the rest too, and all of it to the run's folder.

        Raises StorageError.
        """
        while len(self._new) >= (1 if last else CHUNK):
            own, self._new = self._new[:CHUNK], self._new[CHUNK:]
            self._put(self._cache, own)
        if last:
            unkept = [sequence for sequence in self._values if sequence not in self._kept]
            for start in range(0, len(unkept), CHUNK):
                self._put(self._own, unkept[start : start + CHUNK])
            self._kept = set(self._values)

    def _put(self, store: Store, sequences: Sequence[tuple[int, ...]]) -> None:
        names = np.array([[*sequence, -1][:2] for sequence in sequences], dtype=np.int64)
        values = np.array([self._values[sequence] for sequence in sequences], dtype=np.float64)
        data = io.BytesIO()
        np.savez(data, names=names, values=values)
        digest = hashlib.blake2b(data.getvalue(), digest_size=16).hexdigest()
        store.put(f"{self._prefix}/{digest}.npz", data.getvalue())


class References:
    """The reference log-probabilities of each corpus of a run (what it trains on, what it evaluates on)."""

    def __init__(self, cache: Store, own: Store, *parts: Any) -> None:
        """`cache`: shared with other runs; `own`: the run's folder. `parts`: what a log-probability depends on beside the
        data: the model's identity, the precision."""
        self._cache, self._own, self._parts = cache, own, parts
        self._of: dict[str, ReferenceLogprobs] = {}

    def of(self, corpus: Corpus) -> ReferenceLogprobs:
        """Those of one corpus; empty until the ranks have agreed on what is known."""
        key = corpus.spec.key
        if key not in self._of:
            digest = hashlib.blake2b(repr((*self._parts, key)).encode(), digest_size=16).hexdigest()
            self._of[key] = ReferenceLogprobs(self._cache, self._own, digest)
        return self._of[key]
