"""Weights on their way from the policy to engines of their own: buckets in the object store, with version and checksum.

A tensor is copied twice: into the object store (the learner's process writes its own memory there) and out of it into the
engine's tensor. A bucket of many tensors is one object, of buffers that Ray copies one by one.

Memory of the object store that a process writes for the first time costs several times the copy itself (269 MB: 66,000 page faults,
0.18 s of 0.2 s). So a version is given up once its answers are drawn, and the next comes to lie where it lay.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray
import torch
from torch import nn

from rayft.checkpoint.checksum import checksum
from rayft.rlhf.group import RoleDied

Bucket = list[tuple[str, torch.Tensor]]

#: Ray copies a buffer of more bytes with threads that it starts for it: for those of a few MB, the usual matrices of a small model,
#: that takes more than twice as long as copying them piece by piece (269 MB in buffers of 1.1 MB: 73 ms, of 1 MB: 27 ms, in one: 19 ms).
PIECE = 1 << 20
#: Buffers from this size on are worth the threads.
WHOLE = 16 << 20


@dataclass(frozen=True)
class Shipment:
    """One bucket: names, dtypes and shapes of its tensors, where their bytes lie, how many, and their checksum.

    ref: of a list of uint8 arrays, the pieces of the tensors. In a list, so that Ray hands it on as it is.
    """

    names: list[str]
    dtypes: list[torch.dtype]
    shapes: list[tuple[int, ...]]
    ref: list[Any]
    size: int
    checksum: str


@dataclass
class Shipped:
    """What a rank sent. seconds: by what they were spent on."""

    shipments: list[Shipment] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def spend(self, on: str, began: float) -> float:
        """Add the time since `began`; returns now."""
        now = time.perf_counter()
        self.seconds[on] = self.seconds.get(on, 0.0) + now - began
        return now


def ship(buckets: Iterable[Bucket], rank: int, world_size: int) -> Shipped:
    """Put this rank's share of the buckets into the object store. All ranks walk through all of them: gathering takes all."""
    shipped = Shipped()
    began = time.perf_counter()
    for number, bucket in enumerate(buckets):
        began = shipped.spend("gather", began)
        if number % world_size == rank:
            arrays = [bytes_of(tensor) for _, tensor in bucket]
            # From a GPU a tensor has just been copied; on a CPU these are its own bytes.
            began = shipped.spend("to_host", began)
            ref = ray.put([piece for array in arrays for piece in pieces_of(array)])
            began = shipped.spend("put", began)
            found = checksum(array.data for array in arrays)
            began = shipped.spend("checksum", began)
            size = sum(array.nbytes for array in arrays)
            shipped.shipments.append(
                Shipment(
                    [name for name, _ in bucket],
                    [tensor.dtype for _, tensor in bucket],
                    [tuple(tensor.shape) for _, tensor in bucket],
                    [ref],
                    size,
                    found,
                )
            )
    shipped.spend("gather", began)
    return shipped


@torch.no_grad()
def receive(module: nn.Module, shipments: Sequence[Shipment]) -> tuple[list[str], dict[str, float]]:
    """Copy the buckets into the module's parameters; returns the checksum of what it holds then, and times."""
    parameters = dict(module.named_parameters())
    shipped = Shipped()
    found = []
    for shipment in shipments:
        began = time.perf_counter()
        pieces = _fetch(shipment)
        began = shipped.spend("get", began)
        held = [parameters[name] for name in shipment.names]
        for parameter, own in zip(held, _by_tensor(shipment, pieces), strict=True):
            _fill(parameter.data, own)
        began = shipped.spend("copy", began)
        found.append(checksum(bytes_of(parameter.data).data for parameter in held))
        shipped.spend("checksum", began)
    return found, shipped.seconds


def unpack(shipments: Sequence[Shipment]) -> tuple[Bucket, list[str], dict[str, float]]:
    """All tensors of the buckets, as they lie in the object store where they do in one piece, the checksum of each bucket, and times."""
    shipped = Shipped()
    named: Bucket = []
    found = []
    for shipment in shipments:
        began = time.perf_counter()
        pieces = _fetch(shipment)
        began = shipped.spend("get", began)
        arrays = [whole(own) for own in _by_tensor(shipment, pieces)]
        began = shipped.spend("copy", began)
        parts = zip(shipment.names, arrays, shipment.dtypes, shipment.shapes, strict=True)
        named += [(name, tensor_of(array, dtype, shape)) for name, array, dtype, shape in parts]
        found.append(checksum(array.data for array in arrays))
        shipped.spend("checksum", began)
    return named, found, shipped.seconds


def pieces_of(array: np.ndarray) -> list[np.ndarray]:
    """The bytes of a tensor as the buffers that they are copied in."""
    if not PIECE < array.nbytes < WHOLE:
        return [array]
    return [array[start : start + PIECE] for start in range(0, array.nbytes, PIECE)]


def whole(pieces: Sequence[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    """The pieces as one array: without a copy where they lie one after the other in memory, as in the object store, which keeps an
    object for as long as any of its pieces is held."""
    starts = [piece.__array_interface__["data"][0] for piece in pieces]
    ends = [start + piece.nbytes for start, piece in zip(starts, pieces, strict=True)]
    if starts[1:] != ends[:-1]:
        return np.concatenate(pieces)
    return np.lib.stride_tricks.as_strided(pieces[0], (ends[-1] - starts[0],), (1,), writeable=False)


def _by_tensor(
    shipment: Shipment, pieces: Sequence[np.ndarray[Any, Any]]
) -> Iterator[list[np.ndarray[Any, Any]]]:
    """The pieces of each tensor of the bucket."""
    left = iter(pieces)
    for dtype, shape in zip(shipment.dtypes, shipment.shapes, strict=True):
        own: list[np.ndarray[Any, Any]] = []
        missing = dtype.itemsize * math.prod(shape)
        while missing or not own:
            own.append(next(left))
            missing -= own[-1].nbytes
        yield own


def _fill(held: torch.Tensor, pieces: Sequence[np.ndarray[Any, Any]]) -> None:
    assert held.is_contiguous()
    flat, at = held.view(-1).view(torch.uint8), 0
    # numpy's slices cost a tenth of torch's, which counts where pieces are many.
    there = flat.numpy() if held.device.type == "cpu" else None
    for piece in pieces:
        if there is not None:
            np.copyto(there[at : at + piece.nbytes], piece)
        else:
            flat[at : at + piece.nbytes].copy_(tensor_of(piece, torch.uint8, piece.shape))
        at += piece.nbytes


def bytes_of(tensor: torch.Tensor) -> np.ndarray:
    """The bytes of a tensor, uint8; its own memory where that lies on the CPU in one piece."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def tensor_of(array: np.ndarray, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
    """A tensor over the same bytes, not to be written to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable.*")
        return torch.from_numpy(array).view(dtype).view(tuple(shape))


def _fetch(shipment: Shipment) -> list[np.ndarray[Any, Any]]:
    try:
        arrays: list[np.ndarray[Any, Any]] = ray.get(shipment.ref, timeout=600)[0]
    except ray.exceptions.ObjectLostError as error:
        raise RoleDied(
            "policy", "A process of the role policy died while engines took its weights."
        ) from error
    return arrays
