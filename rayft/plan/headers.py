"""Shapes of a model's parameters from the headers of its safetensors files, without reading a weight.

Layout of a file: 8 bytes little-endian length, then that many bytes of JSON, name to dtype, shape and offsets.
"""

from __future__ import annotations

import json
from pathlib import Path

from rayft.errors import JobError
from rayft.plan.architecture import Shape

MAX_HEADER = 100_000_000


def weight_shapes(folder: Path) -> dict[str, Shape] | None:
    """Every tensor in the folder's safetensors files; None where there are none. Raises JobError for a torn file."""
    files = sorted(folder.glob("*.safetensors"))
    shapes: dict[str, Shape] = {}
    for file in files:
        shapes |= _header(file)
    return shapes or None


def _header(file: Path) -> dict[str, Shape]:
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 0 < length <= MAX_HEADER:
                raise ValueError(f"header of {length} bytes")
            header = json.loads(stream.read(length))
    except ValueError as error:
        raise JobError(
            f"The weights {file} are damaged: {error}.",
            "Fetch the model again; it may be a partial download.",
        ) from None
    return {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
