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
    first with the answer of the second. Held in memory, about 200 bytes each; `save` adds to what the cache holds."""

    def __init__(self, store: Store, key: str) -> None:
        """`key`: names the model, the data with its tokenizer and template, and the precision."""
        self._store, self._prefix = store, f"reference/{key}"
        self._values: dict[tuple[int, ...], float] = {}
        self._unsaved: list[tuple[int, ...]] = []

    def load(self) -> None:
        """Read what the cache holds."""
        for entry in self._store.list(self._prefix):
            arrays = np.load(io.BytesIO(self._store.get(entry.key)))
            for names, value in zip(arrays["names"].tolist(), arrays["values"].tolist(), strict=True):
                self._values[tuple(n for n in names if n >= 0)] = value

    def has(self, sequences: Iterable[tuple[int, ...]]) -> bool:
        """Whether all are known."""
        return all(sequence in self._values for sequence in sequences)

    def get(self, sequences: Sequence[tuple[int, ...]]) -> torch.Tensor:
        """Their log-probabilities, float32[len(sequences)]. KeyError for one that was not computed."""
        return torch.tensor([self._values[sequence] for sequence in sequences], dtype=torch.float32)

    def add(self, sequences: Sequence[tuple[int, ...]], values: Sequence[float]) -> None:
        """Take in what was computed."""
        for sequence, value in zip(sequences, values, strict=True):
            if sequence not in self._values:
                self._unsaved.append(sequence)
            self._values[sequence] = value

    def save(self, *, all_: bool = False) -> None:
        """Write full chunks of what is new (with `all_` the rest too) to the cache. Raises StorageError."""
        while len(self._unsaved) >= (1 if all_ else CHUNK):
            own, self._unsaved = self._unsaved[:CHUNK], self._unsaved[CHUNK:]
            names = np.array([[*sequence, -1][:2] for sequence in own], dtype=np.int64)
            values = np.array([self._values[sequence] for sequence in own], dtype=np.float64)
            data = io.BytesIO()
            np.savez(data, names=names, values=values)
            digest = hashlib.blake2b(data.getvalue(), digest_size=16).hexdigest()
            self._store.put(f"{self._prefix}/{digest}.npz", data.getvalue())


class References:
    """The reference log-probabilities of each corpus of a run (what it trains on, what it evaluates on)."""

    def __init__(self, store: Store, *parts: Any) -> None:
        """`parts`: what a log-probability depends on beside the data: the model's identity, the precision."""
        self._store, self._parts = store, parts
        self._of: dict[str, ReferenceLogprobs] = {}

    def of(self, corpus: Corpus) -> ReferenceLogprobs:
        """Those of one corpus, read from the cache when first asked for."""
        key = corpus.spec.key
        if key not in self._of:
            digest = hashlib.blake2b(repr((*self._parts, key)).encode(), digest_size=16).hexdigest()
            self._of[key] = ReferenceLogprobs(self._store, digest)
            self._of[key].load()
        return self._of[key]
