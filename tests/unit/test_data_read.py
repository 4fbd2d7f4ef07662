"""Rows of every kind of source, by range, and what is said about sources that cannot be read."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayft.data.read import Table, open_tables, read_rows
from rayft.errors import DataError
from rayft.spec import Source
from tests.shared import ROOT
from tests.tiny_data import write_jsonl

ROWS = [{"text": f"row {i}\nwith a second, longer line {'x' * (i % 5)} é", "n": str(i)} for i in range(23)]


def write(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    if path.suffix in (".jsonl", ".ndjson"):
        return write_jsonl(path, rows)
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=7)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys(), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


def tables_of(path: Path | str, tmp_path: Path, *, every: int = 5, **source: Any) -> list[Table]:
    return open_tables(Source(path=str(path), **source), every=every, node_dir=tmp_path / "node")


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json", "a.parquet", "a.csv", "a.tsv"])
def test_any_range_of_any_kind_of_file(name: str, tmp_path: Path) -> None:
    (table,) = tables_of(write(tmp_path / name), tmp_path)
    assert table.rows == len(ROWS)
    for first in range(0, len(ROWS), 4):
        for count in (1, 5, 11):
            rows = [row for _, row in read_rows(table, first, count, tmp_path)]
            assert rows == ROWS[first : first + count]


def test_rows_are_named_by_the_line_they_begin_at(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('\ufeff{"text": "one"}\n\n  \n{"text": "four"}\n{"text": "five"}')
    (table,) = tables_of(path, tmp_path, every=1)
    assert [where for where, _ in read_rows(table, 0, 9, tmp_path)] == [f"{path} line {n}" for n in (1, 4, 5)]
    (table,) = tables_of(write(tmp_path / "a.csv"), tmp_path)
    assert (
        next(read_rows(table, 5, 1, tmp_path))[0] == f"{tmp_path / 'a.csv'} line 12"
    )  # records of two lines
    (table,) = tables_of(write(tmp_path / "a.parquet"), tmp_path)
    assert next(read_rows(table, 5, 1, tmp_path))[0] == f"{tmp_path / 'a.parquet'} row 6"


def test_a_json_file_may_hold_one_object_per_line(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.json", ROWS)
    (table,) = tables_of(tmp_path / "a.json", tmp_path)
    assert (table.kind, table.rows) == ("jsonl", len(ROWS))


def test_nulls_that_arrow_puts_into_structs_are_taken_away(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "train": False}]
    (table,) = tables_of(write(tmp_path / "a.parquet", [{"messages": messages}]), tmp_path)
    assert next(read_rows(table, 0, 1, tmp_path))[1] == {"messages": messages}


def test_the_digest_is_that_of_the_content(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    first, second = write(tmp_path / "a.jsonl"), write(tmp_path / "x" / "b.jsonl")
    other = write(tmp_path / "c.jsonl", ROWS[:-1])
    digests = [tables_of(path, tmp_path)[0].digest for path in (first, second, other)]
    assert digests[0] == digests[1] != digests[2]


def test_a_folder_gives_the_files_of_the_split(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    (folder / "test").mkdir(parents=True)
    for name in ("train-00001.jsonl", "train-00000.parquet", "test/part.jsonl", "validation.csv"):
        write(folder / name)
    (folder / "README.md").write_text("not data")
    (folder / ".hidden.jsonl").write_text("not data")

    def names(split: str) -> list[str]:
        return [Path(t.uri).name for t in tables_of(folder, tmp_path, split=split)]

    assert names("train") == ["train-00000.parquet", "train-00001.jsonl"]
    assert names("test") == ["part.jsonl"]
    assert names("dev") == ["validation.csv"]
    with pytest.raises(DataError, match=r"has no split 'extra'.*test, train, validation"):
        names("extra")
    write(folder / "more.jsonl")
    with pytest.raises(DataError, match=r"files of splits and also more\.jsonl"):
        names("train")


def test_a_folder_without_split_names_gives_all_its_files(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "b.jsonl")
    write(tmp_path / "data" / "a.jsonl")
    assert [Path(t.uri).name for t in tables_of(tmp_path / "data", tmp_path)] == ["a.jsonl", "b.jsonl"]


def test_a_data_set_of_the_datasets_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A local data set folder, loaded by the call that loads hub ids."""
    from rayft.data import read

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))
    (tmp_path / "set").mkdir()
    write(tmp_path / "set" / "train.jsonl")
    table = read._open_hub(str(tmp_path / "set"), Source(path="org/set"))
    assert (table.kind, table.rows) == ("hub", len(ROWS))
    assert [row for _, row in read_rows(table, 20, 3, tmp_path)] == ROWS[20:]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", '{"text": "x"}\n{"text": \n', r"line 2 is not valid JSON: .* at column 10"),
        ("a.jsonl", "[1, 2]\n", "line 1 is no JSON object"),
        ("a.jsonl", b'{"text": "\xff"}\n', "line 1 is not UTF-8"),
        ("a.json", "[1, 2]", "row 1 is no JSON object"),
        ("a.json", "[{]", "is not valid JSON"),
        ("a.csv", "a,b\n1,2\n3\n", "line 3 has 1 fields, the header 2"),
        ("a.csv", 'a,b\n1,"2\n', "line 2 is not valid CSV"),
        ("a.parquet", "PAR?", "no readable parquet file"),
        ("a.jsonl", "", "holds no rows"),
        ("a.csv", "a,b\n", "holds no rows"),
        ("a.xlsx", "x", "no kind of file that rayft reads.*jsonl"),
    ],
)
def test_what_cannot_be_read_is_named(name: str, content: str | bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DataError, match=f"{name}.*{words}"):
        list(read_rows(tables_of(path, tmp_path)[0], 0, 9, tmp_path))


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"There is no file or folder missing\.jsonl"):
        tables_of("missing.jsonl", tmp_path)
    with pytest.raises(DataError, match=r"There is no file or folder \./missing"):
        tables_of("./missing", tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no data file"):
        tables_of(tmp_path / "empty", tmp_path)


def test_a_file_that_changes_after_it_was_looked_at_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl")
    (table,) = tables_of(path, tmp_path)
    write(path, ROWS[:-1])
    with pytest.raises(DataError, match="is not the file it was"):
        next(read_rows(table, 0, 1, tmp_path))


def test_a_hub_data_set_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    """In a process of its own: the hub's client reads its settings when it is imported."""
    script = (
        "from pathlib import Path; from rayft.spec import Source; from rayft.data.read import open_tables\n"
        "open_tables(Source(path='org/nothing', split='extra'), every=1, node_dir=Path('x'))"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (
        "DataError: org/nothing is no local file or folder, and as a hub data set (split extra)"
        in ended.stderr
    )
