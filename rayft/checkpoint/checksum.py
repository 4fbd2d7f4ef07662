"""Checksums of stored bytes: xxh3_64, which here runs at memory speed (crc32: a quarter of it)."""

from __future__ import annotations

from collections.abc import Iterable

import xxhash

ALGORITHM = "xxh3_64"
CHUNK_BYTES = 4 << 20  # 16 hex digits per 4 MiB: 400 KB of manifest for 100 GB of data


def checksum(parts: Iterable[bytes | memoryview]) -> str:
    """Checksum of the concatenation of `parts`, as 16 hex digits. Releases the GIL on large parts."""
    state = xxhash.xxh3_64()
    for part in parts:
        state.update(part)
    return state.hexdigest()
