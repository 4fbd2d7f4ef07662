"""Host memory that is filled by one copy and written out in the background, and kept from one save to the next."""

from __future__ import annotations

import numpy as np

BLOCK_BYTES = 64 << 20
ALIGN_BYTES = 64  # a fragment starts aligned for every dtype, in memory and in a mapped file


class HostBuffer:
    """Bytes appended one after the other into blocks that are allocated once and never moved."""

    def __init__(self, block_bytes: int = BLOCK_BYTES) -> None:
        self._block_bytes = block_bytes
        self._blocks: list[np.ndarray] = []
        self.size = 0

    def clear(self) -> None:
        """Forget the content, keep the memory."""
        self.size = 0

    def reserve(self, size: int) -> None:
        """Allocate memory for `size` bytes and touch it: its first use costs many times what a copy does."""
        while len(self._blocks) * self._block_bytes < size:
            block = np.empty(self._block_bytes, np.uint8)
            block.fill(0)
            self._blocks.append(block)

    def append(self, data: np.ndarray) -> int:
        """Copy the bytes of a 1-D array to the next aligned position; returns that position in bytes."""
        padding = -self.size % ALIGN_BYTES
        self._copy(np.zeros(padding, np.uint8))
        start = self.size
        self._copy(data.view(np.uint8))
        return start

    def parts(self, start: int = 0, stop: int | None = None) -> list[memoryview]:
        """The bytes `start` to `stop` as views, without a copy."""
        stop = self.size if stop is None else stop
        views = []
        while start < stop:
            block, at = divmod(start, self._block_bytes)
            end = min(self._block_bytes, at + stop - start)
            views.append(self._blocks[block].data[at:end])
            start += end - at
        return views

    def _copy(self, data: np.ndarray) -> None:
        while data.size:
            block, at = divmod(self.size, self._block_bytes)
            if block == len(self._blocks):
                self._blocks.append(np.empty(self._block_bytes, np.uint8))
            count = min(data.size, self._block_bytes - at)
            self._blocks[block][at : at + count] = data[:count]
            self.size += count
            data = data[count:]
