"""Rows of text files (jsonl, csv), readable from the middle: every row has a mark, the byte and line it begins at."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayft.errors import DataError

#: A field of a csv file may hold a whole document; Python's own limit is 128 KiB.
_CSV_FIELD_BYTES = 1 << 30


@dataclass(frozen=True)
class Mark:
    """Where a row begins: byte offset and 1-based line."""

    offset: int
    line: int


#: A row, the line it begins at, and its columns.
Numbered = tuple[int, dict[str, Any]]


def jsonl_marks(path: Path) -> Iterator[Mark]:
    """The mark of every row; blank lines are no rows."""
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.isspace():
                yield Mark(offset, number)
            offset += len(line)


def jsonl_rows(path: Path, uri: str, start: Mark, skip: int, count: int) -> Iterator[Numbered]:
    """`count` rows from the row at `start` on, after `skip` of them. Raises DataError naming the line."""
    with path.open("rb") as file:
        file.seek(start.offset)
        lines = ((n, line) for n, line in enumerate(file, start.line) if not line.isspace())
        for number, line in itertools.islice(lines, skip, skip + count):
            yield number, _parse(line, f"{uri} line {number}")


def csv_marks(path: Path, uri: str) -> Iterator[Mark]:
    """The mark of every row below the header."""
    records = _records(path, uri, Mark(0, 1))
    next(records, None)
    return (mark for mark, _ in records)


def csv_rows(path: Path, uri: str, start: Mark, skip: int, count: int) -> Iterator[Numbered]:
    """As `jsonl_rows`, with the columns that the header names."""
    _, header = next(_records(path, uri, Mark(0, 1)))
    for mark, record in itertools.islice(_records(path, uri, start), skip, skip + count):
        if len(record) != len(header):
            raise DataError(
                f"{uri} line {mark.line} has {len(record)} fields, the header {len(header)}.",
                "Quote fields that hold the delimiter.",
            )
        yield mark.line, dict(zip(header, record, strict=True))


def delimiter(uri: str) -> str:
    """What separates the fields of a csv file."""
    return "\t" if uri.endswith(".tsv") else ","


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8-sig").rstrip("\r\n"))
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where} is not valid JSON: {error.msg} at column {error.colno}.",
            "A jsonl file has one JSON object per line.",
        ) from None
    except UnicodeDecodeError:
        raise DataError(f"{where} is not UTF-8 text.", "Save the file as UTF-8.") from None
    if not isinstance(row, dict):
        raise DataError(f"{where} is no JSON object.", "A row is an object of columns, {column: value}.")
    return row


def _records(path: Path, uri: str, start: Mark) -> Iterator[tuple[Mark, list[str]]]:
    """Records with their marks. A record may span lines, so the csv reader itself says where it ends: it takes no line
    before it needs it."""
    offset, line = start.offset, start.line

    def lines() -> Iterator[str]:
        nonlocal offset, line
        with path.open("rb") as file:
            file.seek(start.offset)
            for raw in file:
                text = raw.decode("utf-8-sig" if offset == 0 else "utf-8")
                offset, line = offset + len(raw), line + 1
                yield text

    csv.field_size_limit(_CSV_FIELD_BYTES)
    reader = csv.reader(lines(), delimiter=delimiter(uri), strict=True)
    while True:
        mark = Mark(offset, line)
        try:
            record = next(reader, None)
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(
                f"{uri} line {mark.line} is not valid CSV: {error}.", "Save it as UTF-8 with quoted fields."
            ) from None
        if record is None:
            return
        if record:
            yield mark, record
