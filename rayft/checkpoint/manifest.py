"""What a checkpoint consists of, as JSON: the manifest, and each rank's index, which is a manifest of one file."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rayft.checkpoint.checksum import ALGORITHM, CHUNK_BYTES, checksum
from rayft.checkpoint.fragments import storage_dtype, tiling_error
from rayft.errors import StorageError
from rayft.storage import DamagedObject

FORMAT = "rayft-checkpoint/1"
_SELF = "manifest_checksum"


class CorruptCheckpoint(DamagedObject):
    """What is stored is not what was written: the storage answers, but a file is missing, too short or altered."""


@dataclass(frozen=True)
class StoredFile:
    """One object of the checkpoint: its name in the step's folder and its size in bytes."""

    name: str
    size: int


@dataclass(frozen=True)
class StoredFragment:
    """Where a fragment lies: `offset` and `length` in elements of the flattened tensor, `byte_offset` in the file.

    checksums: one per chunk of `CHUNK_BYTES`, so that a part of a huge fragment can be read and verified
    alone.
    """

    offset: int
    length: int
    file: str
    byte_offset: int
    checksums: tuple[str, ...]


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of one kind, with its fragments ordered by offset."""

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    fragments: tuple[StoredFragment, ...]

    @property
    def size(self) -> int:
        """Elements of the whole tensor."""
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return storage_dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Manifest:
    """Everything about one checkpoint but the data. `state` is the JSON object that rank 0 gave."""

    step: int
    epoch: int
    world_size: int
    state: dict[str, Any]
    files: tuple[StoredFile, ...]
    tensors: tuple[StoredTensor, ...]

    @property
    def data_bytes(self) -> int:
        """Size of the data in bytes."""
        return sum(file.size for file in self.files)


def merge(indexes: Sequence[Manifest], state: dict[str, Any]) -> Manifest:
    """The manifest of a checkpoint from the indexes of all its ranks.

    Raises `ValueError` where the fragments of all ranks do not tile every tensor exactly: a bug in whoever
    made them.
    """
    tensors: dict[tuple[str, str], list[StoredTensor]] = {}
    for index in indexes:
        for tensor in index.tensors:
            tensors.setdefault((tensor.kind, tensor.name), []).append(tensor)
    first = indexes[0]
    return Manifest(
        step=first.step,
        epoch=first.epoch,
        world_size=first.world_size,
        state=state,
        files=tuple(file for index in indexes for file in index.files),
        tensors=tuple(_merge_tensor(parts) for _, parts in sorted(tensors.items())),
    )


def to_json(manifest: Manifest) -> bytes:
    """The manifest as JSON, with a checksum of itself."""
    numbers = {file.name: number for number, file in enumerate(manifest.files)}
    body = {
        "format": FORMAT,
        "step": manifest.step,
        "epoch": manifest.epoch,
        "world_size": manifest.world_size,
        "state": manifest.state,
        "checksum": ALGORITHM,
        "chunk_bytes": CHUNK_BYTES,
        "files": [{"name": file.name, "size": file.size} for file in manifest.files],
        "tensors": [_tensor_to_json(tensor, numbers) for tensor in manifest.tensors],
    }
    return _dump({**body, _SELF: checksum([_dump(body)])})


def from_json(data: bytes, where: str) -> Manifest:
    """The manifest in `data`, which was read from `where`. Raises `CorruptCheckpoint` if it is damaged."""
    try:
        body = json.loads(data)
        claimed = body.pop(_SELF)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise _corrupt(where) from error
    if claimed != checksum([_dump(body)]):
        raise _corrupt(where)
    if (body["format"], body["checksum"], body["chunk_bytes"]) != (FORMAT, ALGORITHM, CHUNK_BYTES):
        raise StorageError(
            f"{where} has the format {body['format']} ({body['checksum']} over {body['chunk_bytes']} bytes).",
            f"This version of rayft reads {FORMAT} ({ALGORITHM} over {CHUNK_BYTES} bytes); use the one that wrote it.",
        )
    names = [file["name"] for file in body["files"]]
    return Manifest(
        step=body["step"],
        epoch=body["epoch"],
        world_size=body["world_size"],
        state=body["state"],
        files=tuple(StoredFile(file["name"], file["size"]) for file in body["files"]),
        tensors=tuple(_tensor_from_json(tensor, names) for tensor in body["tensors"]),
    )


def _merge_tensor(parts: Sequence[StoredTensor]) -> StoredTensor:
    first = parts[0]
    for part in parts:
        if (part.shape, part.dtype) != (first.shape, first.dtype):
            raise ValueError(
                f"{first.kind} {first.name!r} is {first.dtype}{first.shape} on one rank "
                f"and {part.dtype}{part.shape} on another"
            )
    fragments = sorted((piece for part in parts for piece in part.fragments), key=lambda piece: piece.offset)
    problem = tiling_error(first.size, ((piece.offset, piece.length) for piece in fragments))
    if problem:
        raise ValueError(f"the fragments of {first.kind} {first.name!r} do not tile it: {problem}")
    return StoredTensor(first.name, first.kind, first.shape, first.dtype, tuple(fragments))


def _tensor_to_json(tensor: StoredTensor, numbers: dict[str, int]) -> dict[str, Any]:
    return {
        "name": tensor.name,
        "kind": tensor.kind,
        "shape": list(tensor.shape),
        "dtype": tensor.dtype,
        "fragments": [
            {
                "offset": piece.offset,
                "length": piece.length,
                "file": numbers[piece.file],
                "byte_offset": piece.byte_offset,
                "checksums": list(piece.checksums),
            }
            for piece in tensor.fragments
        ],
    }


def _tensor_from_json(tensor: dict[str, Any], names: Sequence[str]) -> StoredTensor:
    fragments: Iterable[dict[str, Any]] = tensor["fragments"]
    return StoredTensor(
        tensor["name"],
        tensor["kind"],
        tuple(tensor["shape"]),
        tensor["dtype"],
        tuple(
            StoredFragment(
                piece["offset"],
                piece["length"],
                names[piece["file"]],
                piece["byte_offset"],
                tuple(piece["checksums"]),
            )
            for piece in fragments
        ),
    )


def _dump(body: dict[str, Any]) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _corrupt(where: str) -> CorruptCheckpoint:
    return CorruptCheckpoint(
        f"{where} is corrupt: it does not match its own checksum.", "Use an earlier checkpoint."
    )
