"""Packing: documents of different lengths into bins of a capacity, deterministically."""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: few bins, each a list of indices into `lengths` with at most `capacity` in total.

    At most 11/9 of the optimal number of bins, plus one (Johnson, 1974). Raises ValueError for a length over capacity.
    """
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free capacity, bin), sorted
    for i in _decreasing(lengths):
        if lengths[i] > capacity:
            raise ValueError(f"length {lengths[i]} over capacity {capacity}")
        at = bisect_left(room, (lengths[i], -1))
        if at == len(room):
            bins.append([])
            free, target = capacity, len(bins) - 1
        else:
            free, target = room.pop(at)
        bins[target].append(i)
        insort(room, (free - lengths[i], target))
    return bins


def spread(lengths: Sequence[int], count: int, capacity: int) -> list[list[int]] | None:
    """Exactly `count` bins as equally full as possible (longest first, into the emptiest); None if one overflows.

    The fullest bin holds at most 4/3 of the optimum (Graham, 1969).
    """
    bins: list[list[int]] = [[] for _ in range(count)]
    heap = [(0, number) for number in range(count)]
    for i in _decreasing(lengths):
        used, target = heap[0]
        if used + lengths[i] > capacity:
            return None
        bins[target].append(i)
        heapq.heapreplace(heap, (used + lengths[i], target))
    return bins


def efficiency(lengths: Sequence[int], bins: Sequence[Sequence[int]], capacity: int) -> float:
    """Share of the bins' capacity that holds tokens."""
    return sum(lengths) / (len(bins) * capacity) if bins else 1.0


def _decreasing(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
