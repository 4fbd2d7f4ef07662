"""The order of rows as a pure function of the position: `ids(position, count)`.

Nothing is remembered between calls, so a run resumes by starting at another position, on any number of ranks.

One stream of rows per source (or one over all sources where they have no weights) goes through its rows once per
epoch. In each epoch the shards are permuted, neighbours in that permutation form windows, and the rows of a window
are permuted: up to `WINDOW` shards that is a full shuffle, beyond it a step needs one window only, which is what lets
training start while later shards are still being tokenised.

Sources with weights are mixed in blocks of fixed shares: which source a position reads, and how many rows of it were
read before, follow from the position by arithmetic.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from math import lcm

import numpy as np

from rayft.data.cache import CacheSpec

#: Shards whose rows are shuffled among each other.
WINDOW = 16

#: Longest block of the mixture; weights that need a longer one are rounded to it.
MAX_BLOCK = 1000


class Order:
    """Which row is read at which position. Positions count all rows read, replay and dropped rows included."""

    def __init__(
        self,
        seed: int | None,
        shards: Sequence[Sequence[int]],
        *,
        weights: Sequence[float | None],
        replay: Sequence[bool] | None = None,
        window: int = WINDOW,
    ) -> None:
        """`shards[s]`: rows of each shard of source s; rows and shards are numbered through in that order.

        With `seed` None nothing is shuffled or mixed: every row comes once, in the order of the sources.
        """
        weighted = [w for w in weights if w is not None]
        if len(weighted) not in (0, len(shards)):
            raise ValueError("weights for all sources or for none")
        self._replay = list(replay or [False] * len(shards))
        mixed = len(weighted) > 1 and seed is not None
        self._shares = block_shares(weighted) if mixed else [1]
        sizes = np.array([rows for source in shards for rows in source], dtype=np.int64)
        source_of = np.repeat(np.arange(len(shards)), [len(source) for source in shards])
        self._seed = seed
        self._streams = [
            _Stream(
                (seed, s), sizes, np.flatnonzero(source_of == s) if mixed else np.arange(len(sizes)), window
            )
            for s in range(len(self._shares))
        ]
        self._block = lru_cache(maxsize=64)(self._make_block)

    @classmethod
    def of(cls, spec: CacheSpec, seed: int | None, *, window: int = WINDOW) -> Order:
        """The order of a cache's rows."""
        return cls(
            seed,
            [[x.rows for x in spec.shards if x.source == s] for s in range(len(spec.sources))],
            weights=[source.weight for source in spec.sources],
            replay=[source.replay for source in spec.sources],
            window=window,
        )

    def ids(self, position: int, count: int) -> np.ndarray:
        """Row ids int64[count] at positions position..position+count."""
        if len(self._streams) == 1:
            return self._streams[0].ids(position, count)
        sources = self._sources(position, count)
        ids = np.empty(count, dtype=np.int64)
        for s, stream in enumerate(self._streams):
            here = sources == s
            ids[here] = stream.ids(self._read_before(s, position), int(here.sum()))
        return ids

    def epoch_rows(self) -> int:
        """Positions in an epoch: as many rows of the sources that are not replay are read as they have (rounded up)."""
        if len(self._streams) == 1:
            return self._streams[0].rows
        counted = [s for s in range(len(self._streams)) if not self._replay[s]]
        rows = sum(self._streams[s].rows for s in counted)
        return -(-rows * sum(self._shares) // sum(self._shares[s] for s in counted))

    def first_shards(self) -> list[int]:
        """First row ids of all shards, in the order in which epoch 0 needs them."""
        block = sum(self._shares)
        needed = [
            (start * block / share, first)
            for stream, share in zip(self._streams, self._shares, strict=True)
            for start, first in stream.needed()
        ]
        return [first for _, first in sorted(needed, key=lambda entry: entry[0])]

    def _sources(self, position: int, count: int) -> np.ndarray:
        length = sum(self._shares)
        first, last = position // length, (position + count) // length + 1
        blocks = np.concatenate([self._block(number) for number in range(first, last)])
        return blocks[position - first * length :][:count]

    def _read_before(self, source: int, position: int) -> int:
        number, inside = divmod(position, sum(self._shares))
        return number * self._shares[source] + int((self._block(number)[:inside] == source).sum())

    def _make_block(self, number: int) -> np.ndarray:
        block = np.repeat(np.arange(len(self._shares)), self._shares)
        return block[permutation(len(block), self._seed, "mix", number)]


class _Stream:
    """The rows of some shards, again and again, each epoch in a new order."""

    def __init__(
        self, key: tuple[int | None, int], sizes: np.ndarray, shards: np.ndarray, window: int
    ) -> None:
        """`sizes`: rows of every shard there is; `shards`: indices of those that belong to the stream."""
        self._key = key
        self._sizes = sizes
        self._first_ids = np.cumsum(sizes) - sizes
        self._shards = shards
        self._window_shards = window
        self.rows = int(sizes[shards].sum())
        self._epoch = lru_cache(maxsize=4)(self._make_epoch)
        self._window = lru_cache(maxsize=4)(self._make_window)

    def ids(self, position: int, count: int) -> np.ndarray:
        parts = [np.empty(0, dtype=np.int64)]
        while count > 0:
            epoch, inside = divmod(position, self.rows)
            starts = self._epoch(epoch)[1]
            window = int(np.searchsorted(starts, inside, side="right")) - 1
            part = self._window(epoch, window)[inside - int(starts[window]) :][:count]
            parts.append(part)
            position += len(part)
            count -= len(part)
        return np.concatenate(parts)

    def needed(self) -> list[tuple[int, int]]:
        """(position in the stream at which epoch 0 first needs a shard, the shard's first row id)."""
        shards, starts = self._epoch(0)
        return [
            (int(starts[r // self._window_shards]), int(self._first_ids[s])) for r, s in enumerate(shards)
        ]

    def _make_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Shards in the epoch's order, and the position in the epoch at which each window starts."""
        shards = self._shards[permutation(len(self._shards), *self._key, epoch)]
        before = np.cumsum(self._sizes[shards]) - self._sizes[shards]
        return shards, before[:: self._window_shards]

    def _make_window(self, epoch: int, window: int) -> np.ndarray:
        shards = self._epoch(epoch)[0][window * self._window_shards :][: self._window_shards]
        ids = np.concatenate([np.arange(self._sizes[s]) + self._first_ids[s] for s in shards])
        return ids[permutation(len(ids), *self._key, epoch, window)]


def permutation(count: int, seed: int | None, *key: int | str) -> np.ndarray:
    """A permutation int64[count] that depends on nothing but the arguments; the identity where the seed is None.

    Sorts splitmix64 (Steele, Lea and Flood, OOPSLA 2014) of a counter instead of asking a random generator, whose
    streams change between versions of numpy.
    """
    if seed is None:
        return np.arange(count, dtype=np.int64)
    digest = hashlib.blake2b(repr((seed, *key)).encode(), digest_size=8).digest()
    with np.errstate(over="ignore"):
        z = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z += np.uint64(int.from_bytes(digest, "little"))
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return np.argsort(z, kind="stable").astype(np.int64)


def block_shares(weights: Sequence[float]) -> list[int]:
    """Rows of each source in a block: the smallest block that has the weights' exact ratio.

    Where that block is longer than MAX_BLOCK, one of MAX_BLOCK rows with the nearest shares, at least one row each.
    """
    exact = [Fraction(repr(float(w))) for w in weights]
    scale = lcm(*(w.denominator for w in exact))
    counts = [int(w * scale) for w in exact]
    divisor = int(np.gcd.reduce(np.array(counts, dtype=object)))
    counts = [count // divisor for count in counts]
    if sum(counts) <= MAX_BLOCK:
        return counts
    ideal = [float(w / sum(exact)) * MAX_BLOCK for w in exact]
    shares = [max(1, round(value)) for value in ideal]
    while (missing := MAX_BLOCK - sum(shares)) != 0:
        step = 1 if missing > 0 else -1
        able = [s for s in range(len(shares)) if shares[s] + step > 0]
        shares[max(able, key=lambda s: step * (ideal[s] - shares[s]))] += step
    return shares
