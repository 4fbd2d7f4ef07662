"""Fragments: the pieces of flattened tensors that ranks own, and the proof that together they tile every tensor."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

#: numpy has no bfloat16 or float8: their bits travel as unsigned integers of the same width.
_STORAGE_DTYPES = {"bfloat16": "uint16", "float8_e4m3fn": "uint8", "float8_e5m2": "uint8"}


def storage_dtype(dtype: str) -> np.dtype:
    """The numpy dtype in which elements of `dtype` are held ("bfloat16" -> uint16, "float32" -> float32)."""
    return np.dtype(_STORAGE_DTYPES.get(dtype, dtype))


@dataclass(frozen=True, eq=False)
class Fragment:
    """A contiguous piece of one flattened tensor.

    kind: "param" (fp32 master weights), "exp_avg", "exp_avg_sq" or any other optimizer slot, "frozen", ...
    shape, dtype: of the whole tensor; offset: of the piece, in elements of the flattened whole.
    data: 1-D, contiguous, of `storage_dtype(dtype)`.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    offset: int
    data: np.ndarray

    def __post_init__(self) -> None:
        what = f"fragment of {self.kind} {self.name!r}"
        if self.data.ndim != 1 or not self.data.flags.c_contiguous:
            raise ValueError(f"{what}: the data must be 1-D and contiguous, not of shape {self.data.shape}")
        if self.data.dtype != storage_dtype(self.dtype):
            raise ValueError(
                f"{what}: {self.dtype} is held as {storage_dtype(self.dtype)}, not {self.data.dtype}"
            )
        if self.offset < 0 or self.offset + self.data.size > math.prod(self.shape):
            raise ValueError(
                f"{what}: {self.data.size} elements at {self.offset} do not fit into the shape {self.shape}"
            )


def tiling_error(total: int, ranges: Iterable[tuple[int, int]]) -> str | None:
    """What is wrong where `ranges` (offset, length) do not cover `total` elements exactly once; None if they do."""
    end = 0
    for offset, length in sorted(ranges):
        if offset > end:
            return f"elements {end} to {offset} are missing"
        if offset < end:
            return f"elements {offset} to {min(end, offset + length)} are there twice"
        end += length
    return None if end == total else f"elements {end} to {total} are missing"
