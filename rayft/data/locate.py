"""Which files a source's `path` means: a file, the files of a folder or S3 prefix, or a hub data set."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from rayft.errors import DataError
from rayft.spec import Source
from rayft.storage import open_store

Kind = Literal["jsonl", "json", "parquet", "csv", "hub"]

SUFFIXES: dict[str, Kind] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
}

#: Words in file or folder names that say which split a file belongs to, as the hub reads them.
SPLITS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
}

_HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")


def locate(source: Source) -> list[tuple[str, Kind]]:
    """Files of a source in a fixed order, or the hub id, with their kinds.

    A folder whose file names speak of splits gives only those of `source.split`. Raises DataError naming what is
    there where nothing fits.
    """
    if source.path.startswith("s3://"):
        return _locate_s3(source)
    path = Path(source.path).expanduser()
    if path.is_file():
        return [(source.path, _kind(source.path))]
    if path.is_dir():
        names = [f.relative_to(path) for f in path.rglob("*") if f.is_file()]
        visible = sorted(name.as_posix() for name in names if not any(p.startswith(".") for p in name.parts))
        return [(str(path / name), _kind(name)) for name in _of_split(visible, source)]
    if path.suffix in SUFFIXES or not _HUB_ID.fullmatch(source.path):
        raise DataError(
            f"There is no file or folder {source.path}.",
            "Correct `path` of the source; it is relative to where the command runs.",
        )
    return [(source.path, "hub")]


def _locate_s3(source: Source) -> list[tuple[str, Kind]]:
    folder, _, name = source.path.rpartition("/")
    if Path(name).suffix in SUFFIXES:
        if not open_store(folder).exists(name):
            raise DataError(f"There is no object {source.path}.", "Correct `path` of the source.")
        return [(source.path, _kind(name))]
    root = source.path.rstrip("/")
    names = [entry.key for entry in open_store(root).list()]
    return [(f"{root}/{name}", _kind(name)) for name in _of_split(names, source)]


def _kind(name: str) -> Kind:
    kind = SUFFIXES.get(Path(name).suffix)
    if kind is None:
        raise DataError(
            f"{name} is no kind of file that rayft reads.", f"Known endings are: {', '.join(SUFFIXES)}."
        )
    return kind


def _of_split(names: list[str], source: Source) -> list[str]:
    """Data files that belong to the source's split; all of them where no name speaks of a split."""
    data = [name for name in names if Path(name).suffix in SUFFIXES]
    if not data:
        raise DataError(f"{source.path} holds no data file.", f"Known endings are: {', '.join(SUFFIXES)}.")
    splits = {name: _split_of(name) for name in data}
    if not any(splits.values()):
        return data
    unclear = [name for name in data if splits[name] is None]
    if unclear:
        raise DataError(
            f"{source.path} holds files of splits and also {unclear[0]}.",
            "Name the files that are meant, each as a source of its own.",
        )
    wanted = SPLITS.get(source.split, source.split)
    chosen = [name for name in data if splits[name] == wanted]
    if not chosen:
        there = ", ".join(sorted({str(split) for split in splits.values()}))
        raise DataError(
            f"{source.path} has no split {source.split!r}.", f"Set `split` of the source to one of: {there}."
        )
    return chosen


def _split_of(name: str) -> str | None:
    """The file's own name speaks before the folders it lies in."""
    parts = reversed(Path(name).with_suffix("").parts)
    words = [word for part in parts for word in re.split(r"[^a-z]+", part.lower())]
    return next((SPLITS[word] for word in words if word in SPLITS), None)
