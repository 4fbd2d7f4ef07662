"""Rows that rate the same answers to the same prompt both ways."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np

from rayft.data.cache import CacheSpec
from rayft.data.corpus import Corpus
from rayft.data.read import read_rows
from rayft.errors import DataError


def refuse_contradictions(spec: CacheSpec, corpus: Corpus, *, node_dir: Path) -> None:
    """Raise DataError naming two rows that contradict each other. Waits for all shards.

    Two rows do where one prefers answer a to b and the other b to a, or where one calls an answer good and the other
    bad. Answers are the same where prompt and answer have the same tokens.
    """
    rated: dict[tuple[int, int], int] = {}
    for row, pair in _ratings(spec, corpus):
        opposite = rated.get((pair[1], pair[0]))
        if opposite is not None:
            raise DataError(
                f"{_where(spec, row, node_dir)} contradicts {_where(spec, opposite, node_dir)}: they rate the same answers to "
                "the same prompt the other way round.",
                "Decide which is right and drop the other, or set data.contradictions to keep (learning then balances them).",
            )
        rated.setdefault(pair, row)


def _ratings(spec: CacheSpec, corpus: Corpus) -> Iterator[tuple[int, tuple[int, int]]]:
    """Row id and (better, worse) of every pair that a row rates; a good answer is better than nothing, 0, a bad one worse."""
    for shard in spec.shards:
        digests, row_documents, values = corpus.digests(shard.index)
        for number, (start, end) in enumerate(pairwise(row_documents.tolist())):
            own = digests[start:end].tolist()
            row = shard.first_id + number
            if len(own) == 1:
                yield row, (own[0], 0) if values[number] else (0, own[0])
            for i, better in enumerate(own):
                yield from ((row, (better, worse)) for worse in own[i + 1 :])


def _where(spec: CacheSpec, row: int, node_dir: Path) -> str:
    """The words that name a row."""
    starts = [shard.first_id for shard in spec.shards]
    shard = spec.shards[int(np.searchsorted(starts, row, side="right")) - 1]
    table = spec.tables[shard.source][shard.table]
    (where, _), *_ = read_rows(table, shard.first + row - shard.first_id, 1, node_dir)
    return where
