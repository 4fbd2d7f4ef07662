"""Small checkpoints for tests: tensors whose values follow from the step, split over any number of ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from rayft.checkpoint import CheckpointReader, CheckpointWriter, Fragment, storage_dtype
from rayft.storage import Store

SHAPES: dict[str, tuple[int, ...]] = {"embed": (31, 7), "block.weight": (12, 5), "bias": (3,), "scale": ()}
KINDS = {"param": "float32", "exp_avg": "bfloat16"}


def whole(step: int, name: str, kind: str) -> np.ndarray:
    """The flattened tensor at `step`."""
    values = np.arange(math.prod(SHAPES[name]), dtype=np.float32) + 1000 * step + len(name)
    return values.astype(storage_dtype(KINDS[kind]))


def cuts(total: int, world_size: int) -> list[int]:
    """Where `total` elements are cut for `world_size` ranks: unevenly, some ranks get nothing."""
    return [min(total, rank * -(-total // world_size)) for rank in range(world_size + 1)]


def fragments(step: int, rank: int, world_size: int) -> Iterator[Fragment]:
    """What `rank` owns of every tensor."""
    for kind, dtype in KINDS.items():
        for name, shape in SHAPES.items():
            start, stop = cuts(math.prod(shape), world_size)[rank : rank + 2]
            if start < stop:
                yield Fragment(name, kind, shape, dtype, start, whole(step, name, kind)[start:stop])


def state(step: int) -> dict[str, Any]:
    """What rank 0 saves with `step`."""
    return {"step": step, "position": 8 * step, "seed": 17}


def save(store: Store, step: int, *, epoch: int = 0, world_size: int = 2, timeout_s: float = 60.0) -> None:
    """Save one checkpoint from `world_size` ranks at once, in the foreground."""

    def rank_save(rank: int) -> None:
        writer = CheckpointWriter(store, epoch, rank, world_size, background=False, timeout_s=timeout_s)
        writer.save(step, fragments(step, rank, world_size), state(step))

    with ThreadPoolExecutor(world_size) as pool:
        list(pool.map(rank_save, range(world_size)))


def check(store: Store, step: int) -> None:
    """Assert that the checkpoint of `step` reads back as what was saved."""
    reader = CheckpointReader(store, step)
    assert reader.state == state(step)
    assert reader.kinds() == sorted(KINDS)
    for kind, dtype in KINDS.items():
        assert reader.names(kind) == sorted(SHAPES)
        for name, shape in SHAPES.items():
            assert (reader.shape(name, kind), reader.dtype(name, kind)) == (shape, dtype)
            np.testing.assert_array_equal(reader.read(name, kind), whole(step, name, kind))
