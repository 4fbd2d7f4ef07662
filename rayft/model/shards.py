"""Write safetensors files one tensor at a time (the format: https://github.com/huggingface/safetensors#format).

The library's own writer wants all tensors of a file in memory; here a file's header is written from shapes first.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of a file before it exists."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_shards(
    folder: Path, specs: list[TensorSpec], tensors: Iterator[tuple[str, torch.Tensor]], max_shard_bytes: int
) -> list[Path]:
    """Write `tensors`, which come in the order of `specs`, to `folder` as Hugging Face shards; returns the files.

    Each tensor is cast to its spec's dtype. A shard holds at most `max_shard_bytes`, or one larger tensor. Several shards
    come with `model.safetensors.index.json`.
    """
    shards = _split(specs, max_shard_bytes)
    names = [
        "model.safetensors" if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        for i in range(1, len(shards) + 1)
    ]
    for file, shard in zip(names, shards, strict=True):
        _write(folder / file, shard, tensors)
    written = [folder / file for file in names]
    if len(shards) > 1:
        weight_map = {spec.name: file for file, shard in zip(names, shards, strict=True) for spec in shard}
        metadata = {
            "total_parameters": sum(math.prod(spec.shape) for spec in specs),
            "total_size": sum(spec.nbytes for spec in specs),
        }
        index = folder / "model.safetensors.index.json"
        index.write_text(
            json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2, sort_keys=True)
        )
        written.append(index)
    return written


def _split(specs: list[TensorSpec], max_shard_bytes: int) -> list[list[TensorSpec]]:
    shards: list[list[TensorSpec]] = [[]]
    filled = 0
    for spec in specs:
        if shards[-1] and filled + spec.nbytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(spec)
        filled += spec.nbytes
    return shards


def _write(path: Path, shard: list[TensorSpec], tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in shard:
        header[spec.name] = {
            "dtype": _DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.nbytes],
        }
        offset += spec.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data start aligned
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for spec in shard:
            name, tensor = next(tensors)
            assert (name, tuple(tensor.shape)) == (spec.name, spec.shape), f"{name} is not {spec}"
            data = tensor.detach().to("cpu", spec.dtype).contiguous()
            file.write(data.view(-1).view(torch.uint8).numpy().data)
