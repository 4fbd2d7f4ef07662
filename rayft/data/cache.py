"""The tokenised cache: each row is tokenised once, for all ranks, restarts, jobs and searches.

A shard holds the documents of a few thousand consecutive rows of one table. Its name is a digest of all that decides
its content (the table's bytes, the range, the layout, the tokenizer with its template, the length rule), so whoever
needs the same tokens finds the same object, and nothing is ever stale. It is a safetensors file, published atomically:

- `tokens` int32[T_total], `trained` uint8 bits of the same length, packed
- `offsets` int64[documents + 1]: where each document begins in `tokens`
- `targets` int32[documents]: trained tokens of each document
- `row_documents` int64[rows + 1]: the documents of each row; none where it was dropped, several where a chat template
  needs that (`rayft.data.template`), and one per answer, best first, of rows that compare answers
- of those rows also `values` float64[rows], a pair's margin or a single answer's label (`rayft.data.comparisons`), and
  `digests` int64[documents], equal where documents are
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from rayft.data.comparisons import Comparison, read_row
from rayft.data.formats import COMPARISONS, EXAMPLES, Format, Row, detect_format, rename
from rayft.data.read import Table, open_tables, read_rows
from rayft.data.template import ChatTokenizer, Sample
from rayft.errors import DataError
from rayft.spec import Data, Source
from rayft.storage import ObjectNotFound, Store

#: Part of every shard's name; raise it when tokens, masks or the file layout come out differently.
CACHE_VERSION = 1

#: Rows normalised and tokenised at a time: bounds the memory a shard needs beside its result.
BATCH_ROWS = 500


@dataclass(frozen=True)
class ShardTask:
    """Rows first..first+rows of a table; `first_id` is the row id of the first, `key` the object's name in the cache."""

    index: int
    source: int
    table: int
    first: int
    rows: int
    first_id: int
    key: str


@dataclass(frozen=True)
class ShardInfo:
    """What a shard holds: rows, documents, tokens and trained tokens; documents that were too long.

    `too_long`: dropped for their length; `truncated`: cut; `answer_cut`: dropped since nothing trained was left.
    """

    rows: int
    documents: int
    tokens: int
    trained_tokens: int
    too_long: int
    truncated: int
    answer_cut: int


@dataclass(frozen=True)
class CacheSpec:
    """What is to be tokenised and how; goes to other processes as it is."""

    sources: tuple[Source, ...]
    layouts: tuple[Format, ...]
    tables: tuple[tuple[Table, ...], ...]
    tokenizer: ChatTokenizer
    max_length: int
    too_long: str
    shards: tuple[ShardTask, ...]

    @cached_property
    def key(self) -> str:
        """Digest of all shards: the identity of the whole data set."""
        return _digest([shard.key for shard in self.shards])

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.shards)

    @property
    def compares(self) -> bool:
        """Whether the rows compare answers; a method's layouts all do, or none."""
        return self.layouts[0] in COMPARISONS

    def where(self, shard: ShardTask) -> str:
        """The rows of a shard, for messages."""
        table = self.tables[shard.source][shard.table]
        return f"{table.uri} rows {shard.first + 1} to {shard.first + shard.rows}"


def plan_cache(
    sources: Iterable[Source],
    data: Data,
    tokenizer: ChatTokenizer,
    *,
    node_dir: Path,
    allowed: Sequence[Format] = EXAMPLES,
) -> CacheSpec:
    """Look at all sources and divide them into shards. Reads every byte once and tokenises nothing.

    `node_dir`: where this node keeps S3 objects. `allowed`: layouts that the method can learn from. Raises DataError for
    sources without rows or with unclear columns.
    """
    sources = tuple(sources)
    layouts: list[Format] = []
    tables: list[tuple[Table, ...]] = []
    shards: list[ShardTask] = []
    first_id = 0
    rules = [CACHE_VERSION, tokenizer.identity, data.max_length, data.too_long]
    for number, source in enumerate(sources):
        own = open_tables(source, every=data.shard_rows, node_dir=node_dir)
        layouts.append(_layout(source, own[0], node_dir, allowed))
        tables.append(tuple(own))
        for table, first, rows in _ranges(own, data.shard_rows, source.limit):
            meaning = [layouts[-1], sorted(source.columns.items()), source.system]
            key = _shard_key([*rules, *meaning, own[table].digest, own[table].reading, first, rows])
            shards.append(ShardTask(len(shards), number, table, first, rows, first_id, key))
            first_id += rows
    return CacheSpec(
        sources, tuple(layouts), tuple(tables), tokenizer, data.max_length, data.too_long, tuple(shards)
    )


def prepare_shard(spec: CacheSpec, index: int, cache: Store, *, node_dir: Path) -> ShardInfo:
    """Make sure that shard `index` is in the cache, and say what it holds. Idempotent; safe to run anywhere at once.

    Raises DataError for the first row that is wrong.
    """
    from safetensors.numpy import save

    shard = spec.shards[index]
    try:
        return shard_info(cache, shard.key)
    except ObjectNotFound:
        pass
    count: Counter[str] = Counter()
    kept: list[list[Sample]] = []
    values: list[float] = []
    for where, samples, value in encode_rows(spec, shard, node_dir=node_dir):
        rule = fit if value is None else fit_answers
        kept.append(rule(samples, spec.max_length, spec.too_long, where, count))
        values += [] if value is None else [value]
    documents = [sample for row in kept for sample in row]
    ids = [sample.ids for sample in documents]
    trained = [sample.trained for sample in documents]
    targets = np.array([mask.sum() for mask in trained], dtype=np.int32)
    info = ShardInfo(
        rows=shard.rows,
        documents=len(documents),
        tokens=sum(map(len, ids)),
        trained_tokens=int(targets.sum()),
        too_long=count["too_long"],
        truncated=count["truncated"],
        answer_cut=count["answer_cut"],
    )
    arrays = {
        "tokens": np.concatenate([np.empty(0, np.int32), *ids]),
        "trained": np.packbits(np.concatenate([np.empty(0, np.bool_), *trained])),
        "offsets": np.cumsum([0, *map(len, ids)], dtype=np.int64),
        "targets": targets,
        "row_documents": np.cumsum([0, *map(len, kept)], dtype=np.int64),
    }
    if spec.compares:
        arrays["values"] = np.array(values, dtype=np.float64)
        arrays["digests"] = np.array([_document_digest(one) for one in ids], dtype=np.int64)
    metadata = {"info": json.dumps(asdict(info)), "rows": spec.where(shard)}
    cache.put(shard.key, save(arrays, metadata))
    return info


def shard_info(cache: Store, key: str) -> ShardInfo:
    """What the header of a shard says. Raises ObjectNotFound where it is not there (yet)."""
    length = int.from_bytes(cache.get_range(key, 0, 8), "little")
    header = json.loads(cache.get_range(key, 8, length))
    return ShardInfo(**json.loads(header["__metadata__"]["info"]))


def refuse_empty(spec: CacheSpec, infos: Iterable[ShardInfo]) -> None:
    """Raise DataError for a source none of whose rows is left. `infos`: those of all shards, in their order."""
    left: Counter[int] = Counter()
    for shard, info in zip(spec.shards, infos, strict=True):
        left[shard.source] += info.documents
    for number, source in enumerate(spec.sources):
        if not left[number]:
            raise DataError(
                f"No row of {source.path} fits into data.max_length {spec.max_length}.",
                "Raise data.max_length, or set data.too_long to truncate.",
            )


def encode_rows(
    spec: CacheSpec, shard: ShardTask, *, node_dir: Path
) -> Iterator[tuple[str, list[Sample], float | None]]:
    """Each row of a shard: the words that name it in an error, its documents of any length, its value if it compares."""
    table = spec.tables[shard.source][shard.table]
    source, layout = spec.sources[shard.source], spec.layouts[shard.source]
    wheres: list[str] = []
    rows: list[Row | Comparison] = []

    def flush() -> Iterator[tuple[str, list[Sample], float | None]]:
        results = spec.tokenizer.encode_batch(rows, wheres)
        for where, row, result in zip(wheres, rows, results, strict=True):
            if isinstance(result, DataError):
                raise result
            yield where, result, row.value if isinstance(row, Comparison) else None
        wheres.clear()
        rows.clear()

    for where, row in read_rows(table, shard.first, shard.rows, node_dir):
        wheres.append(where)
        rows.append(read_row(row, layout, source, where))
        if len(rows) == BATCH_ROWS:
            yield from flush()
    yield from flush()


def fit(
    samples: list[Sample], max_length: int, too_long: str, where: str, count: Counter[str]
) -> list[Sample]:
    """The documents of a row that are short enough, by the rule `too_long`; `count` counts what happened to the rest.

    Raises DataError where the rule is `error`.
    """
    kept = []
    for sample in samples:
        if len(sample.ids) <= max_length:
            kept.append(sample)
        elif too_long == "error":
            raise DataError(
                f"{where} has {len(sample.ids)} tokens, more than data.max_length {max_length}.",
                "Raise data.max_length, or set data.too_long to drop or truncate.",
            )
        elif too_long == "drop":
            count["too_long"] += 1
        elif not sample.trained[:max_length].any():
            count["answer_cut"] += 1
        else:
            count["truncated"] += 1
            kept.append(Sample(sample.ids[:max_length], sample.trained[:max_length]))
    return kept


def fit_answers(
    samples: list[Sample], max_length: int, too_long: str, where: str, count: Counter[str]
) -> list[Sample]:
    """All answers of a row, or none: what is cut is the beginning of the prompt, of all answers alike.

    A begin token stays. Raises DataError where the rule is `error`.
    """
    excess = max(len(sample.ids) for sample in samples) - max_length
    if excess <= 0:
        return samples
    if too_long == "error":
        raise DataError(
            f"{where} has an answer that makes {excess + max_length} tokens, more than data.max_length {max_length}.",
            "Raise data.max_length, or set data.too_long to drop or truncate.",
        )
    if too_long == "drop":
        count["too_long"] += 1
        return []
    # The first token of a prompt may be one that every text begins with; one more of the prompt must be left.
    if excess + 2 > min(int(np.flatnonzero(sample.trained)[0]) for sample in samples):
        count["answer_cut"] += 1
        return []
    count["truncated"] += 1
    left = np.r_[0, 1 + excess : max(len(sample.ids) for sample in samples)]
    return [
        Sample(sample.ids[left[left < len(sample.ids)]], sample.trained[left[left < len(sample.ids)]])
        for sample in samples
    ]


def _document_digest(ids: np.ndarray) -> int:
    return int.from_bytes(hashlib.blake2b(ids.tobytes(), digest_size=8).digest(), "little", signed=True)


def _layout(source: Source, table: Table, node_dir: Path, allowed: Sequence[Format]) -> Format:
    if source.format == "auto":
        where, row = next(read_rows(table, 0, 1, node_dir))
        return detect_format(rename(row, source, where), where, allowed)
    if source.format not in allowed:
        raise DataError(
            f"The source {source.path} is of the format {source.format}, which this method cannot learn from.",
            f"It takes {', '.join(allowed)} rows.",
        )
    return source.format


def _ranges(tables: list[Table], shard_rows: int, limit: int | None) -> Iterator[tuple[int, int, int]]:
    """(table, first row, rows) of each shard; no shard spans two tables."""
    left = limit or sum(table.rows for table in tables)
    for number, table in enumerate(tables):
        end = min(table.rows, left)
        for first in range(0, end, shard_rows):
            yield number, first, min(shard_rows, end - first)
        left -= end


def _shard_key(parts: list[Any]) -> str:
    digest = _digest(parts)
    return f"{digest[:2]}/{digest}.safetensors"


def _digest(value: list[Any]) -> str:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=20).hexdigest()
