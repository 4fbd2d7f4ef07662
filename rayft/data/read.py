"""Rows of files, folders, hub data sets and S3 objects, by range and without reading everything into memory.

`open_tables` looks once at every byte of a source (count, digest, where every n-th row begins); `read_rows` then reads
any range alone, in any process.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from rayft.data.lines import Mark, csv_marks, csv_rows, delimiter, jsonl_marks, jsonl_rows
from rayft.data.locate import Kind, locate
from rayft.errors import DataError
from rayft.spec import Source
from rayft.storage import Held, hold_file

_READ_BYTES = 4 << 20


@dataclass(frozen=True)
class Table:
    """One file, or one split of a hub data set.

    `uri` is how people know it, `path` where any process of the cluster finds it. `size` is in bytes when it was looked
    at (0 for the hub), `digest` that of the content; `marks` has one entry per `every` rows of a text file.
    """

    uri: str
    path: str
    kind: Kind
    rows: int
    size: int
    digest: str
    every: int = 1
    marks: tuple[Mark, ...] = ()
    split: str = ""
    name: str | None = None

    @property
    def reading(self) -> list[str]:
        """What else than its bytes decides the rows of a table."""
        return [self.kind, delimiter(self.uri) if self.kind == "csv" else ""]


def open_tables(source: Source, *, every: int, node_dir: Path) -> list[Table]:
    """The tables of a source in a fixed order; S3 objects come through the node's cache under `node_dir`.

    Raises DataError if nothing is there, if it holds no rows, or if its kind is unknown.
    """
    tables = [
        _open_hub(uri, source) if kind == "hub" else _open_file(uri, kind, every, node_dir)
        for uri, kind in locate(source)
    ]
    if not any(table.rows for table in tables):
        raise DataError(f"{source.path} holds no rows.", "Give a source that has rows, or remove it.")
    return [table for table in tables if table.rows]


def read_rows(table: Table, first: int, count: int, node_dir: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows first..first+count of a table, each with the words that name it in an error.

    Raises DataError for rows that are no objects and for a file that has changed since it was looked at.
    """
    if table.kind == "hub":
        data = _hub(table.path, table.name, table.split)
        rows: Iterator[Any] = iter(data.select(range(first, first + count)).to_list())
    else:
        with hold_file(table.path, node_dir) as path:
            _refuse_changed(path, table)
            yield from _rows_of(path, table, first, count)
        return
    yield from _numbered(table, first, rows)


def _rows_of(path: Path, table: Table, first: int, count: int) -> Iterator[tuple[str, dict[str, Any]]]:
    if table.marks:
        number, skip = divmod(first, table.every)
        rows_of = jsonl_rows if table.kind == "jsonl" else csv_rows
        numbered = rows_of(path, table.uri, table.marks[number], skip, count)
        yield from ((f"{table.uri} line {line}", row) for line, row in numbered)
        return
    rows = (
        _parquet_rows(path, table.uri, first, count)
        if table.kind == "parquet"
        else iter(_json_array(str(path), table.uri)[first : first + count])
    )
    yield from _numbered(table, first, rows)


def _numbered(table: Table, first: int, rows: Iterator[Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, row in enumerate(rows, first + 1):
        where = f"{table.uri} row {number}"
        if not isinstance(row, dict):
            raise DataError(f"{where} is no JSON object.", "A row is an object of columns, {column: value}.")
        yield where, row if table.kind == "json" else _without_nulls(row)


def _open_file(uri: str, kind: Kind, every: int, node_dir: Path) -> Table:
    where = uri if uri.startswith("s3://") else str(Path(uri).expanduser().absolute())
    with hold_file(where, node_dir) as path:
        return _look_at(path, uri, where, kind, every)


def _look_at(path: Path, uri: str, where: str, kind: Kind, every: int) -> Table:
    marks: list[Mark] = []
    rows = 0
    if kind == "json" and not _is_array(path):
        kind = "jsonl"
    if kind in ("jsonl", "csv"):
        for mark in jsonl_marks(path) if kind == "jsonl" else csv_marks(path, uri):
            if rows % every == 0:
                marks.append(mark)
            rows += 1
    elif kind == "parquet":
        rows = _parquet(path, uri).metadata.num_rows
    else:
        rows = len(_json_array(str(path), uri))
    return Table(uri, where, kind, rows, path.stat().st_size, _digest([path]), every, tuple(marks))


def _digest(paths: list[Path]) -> str:
    import xxhash

    digest = xxhash.xxh3_128()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(_READ_BYTES):
                digest.update(block)
    return digest.hexdigest()


# json: one array, which has to be read as a whole


def _is_array(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"["


@lru_cache(maxsize=2)
def _json_array(path: str, uri: str) -> list[Any]:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(
            f"{uri} is not valid JSON: {error}.", "It must be one array of objects, or one object per line."
        ) from None


# parquet


def _parquet(path: Path, uri: str) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except pa.ArrowException as error:
        raise DataError(f"{uri} is no readable parquet file: {error}.", "Write it again.") from None


def read_row(table: Table, index: int, node_dir: Path) -> tuple[str, dict[str, Any]]:
    """One row as `read_rows` gives it, for those who read in any order: a Parquet file is decoded once and stays in memory."""
    if table.kind == "hub":
        return next(read_rows(table, index, 1, node_dir))
    if table.kind != "parquet":
        path = _kept_copy(table.path, table.digest, node_dir).path
        _refuse_changed(path, table)
        return next(_rows_of(path, table, index, 1))
    row = _whole_parquet(table, node_dir).slice(index, 1).to_pylist()[0]
    return f"{table.uri} row {index + 1}", _without_nulls(row)


@lru_cache(maxsize=1024)
def _kept_copy(path: str, _digest: str, node_dir: Path) -> Held:
    """The file of a table that is read row by row: looked for once, in use until other tables come."""
    return hold_file(path, node_dir)


@lru_cache(maxsize=1024)
def _whole_parquet(table: Table, node_dir: Path) -> Any:
    with hold_file(table.path, node_dir) as path:
        _refuse_changed(path, table)
        with _parquet(path, table.uri) as file:
            return file.read()


def _refuse_changed(path: Path, table: Table) -> None:
    if not path.is_file() or path.stat().st_size != table.size:
        raise DataError(
            f"{table.uri} is not the file it was when the run was planned.",
            "Every node must see the same file (a shared folder, s3:// or the hub); start again if it changed.",
        )


def _parquet_rows(path: Path, uri: str, first: int, count: int) -> Iterator[dict[str, Any]]:
    """Only the row groups that hold the range are read."""
    with _parquet(path, uri) as file:
        start = 0
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            low, high = max(first - start, 0), min(first + count - start, rows)
            if low < high:
                yield from file.read_row_group(group).slice(low, high - low).to_pylist()
            start += rows


def _without_nulls(value: Any) -> Any:
    """Arrow fills keys that a struct lacks with null, in messages as in tool arguments: take them away again."""
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value


# hub


@lru_cache(maxsize=4)
def _hub(path: str, name: str | None, split: str) -> Any:
    import datasets

    try:
        return datasets.load_dataset(path, name, split=split)
    except Exception as error:  # the hub's client raises dozens of kinds
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
        raise DataError(
            f"{path} is no local file or folder, and as a hub data set (split {split}) it cannot be loaded: {reason}.",
            "Correct the path, `split` or `name` of the source; gated data sets need HF_TOKEN.",
        ) from None


def _open_hub(path: str, source: Source) -> Table:
    data = _hub(path, source.name, source.split)
    digest = _digest([Path(file["filename"]) for file in data.cache_files])
    return Table(path, path, "hub", len(data), 0, digest, split=source.split, name=source.name)
