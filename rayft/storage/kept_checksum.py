"""Checksums that S3 keeps with an object: those it was told at the upload, and the ETag where that is an MD5.

https://docs.aws.amazon.com/AmazonS3/latest/userguide/checking-object-integrity.html
"""

from __future__ import annotations

import base64
import hashlib
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_READ_BYTES = 4 << 20
#: By field of an answer, best first. CRC32C and CRC64NVME want code that is not in Python's library.
_FIELDS = {"ChecksumCRC32": "CRC32", "ChecksumSHA256": "SHA256", "ChecksumSHA1": "SHA1"}


@dataclass(frozen=True)
class KeptChecksum:
    """kind: CRC32, SHA256, SHA1 (value in base64), MD5 (hex), or MD5 of the MD5s of parts of `part_bytes` (hex-N)."""

    kind: str
    value: str
    part_bytes: int = 0

    @property
    def certain(self) -> bool:
        """Whether a mismatch proves damage. An ETag that looks like an MD5 need not be one on every service."""
        return self.kind != "MD5"

    def matches(self, path: Path) -> bool:
        """Whether the file has this checksum."""
        if self.part_bytes:
            digests = list(_part_digests(path, self.part_bytes))
            return (
                f"{hashlib.md5(b''.join(digests), usedforsecurity=False).hexdigest()}-{len(digests)}"
                == self.value
            )
        if self.kind == "CRC32":
            crc = 0
            for block in _blocks(path):
                crc = zlib.crc32(block, crc)
            return base64.b64encode(crc.to_bytes(4, "big")).decode() == self.value
        whole = hashlib.new(self.kind.lower(), usedforsecurity=False)
        for block in _blocks(path):
            whole.update(block)
        found = whole.hexdigest() if self.kind == "MD5" else base64.b64encode(whole.digest()).decode()
        return found == self.value


def of_answer(head: dict[str, Any], etag: str) -> KeptChecksum | None:
    """The checksum in the answer to a HEAD with ChecksumMode; None if there is none that is known to fit the content.

    That of an upload in parts comes without its `part_bytes`: the caller asks for part 1.
    """
    for name, kind in _FIELDS.items():
        value = head.get(name)
        if value and "-" not in value and head.get("ChecksumType", "FULL_OBJECT") == "FULL_OBJECT":
            return KeptChecksum(kind, value)
    if head.get("SSECustomerAlgorithm") or str(head.get("ServerSideEncryption", "")).startswith("aws:kms"):
        return None  # then the ETag is no MD5
    return KeptChecksum("MD5", etag) if re.fullmatch(r"[0-9a-f]{32}(-\d+)?", etag) else None


def _blocks(path: Path) -> Any:
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            yield block


def _part_digests(path: Path, part_bytes: int) -> Any:
    with path.open("rb") as file:
        while first := file.read(min(_READ_BYTES, part_bytes)):
            digest, left = hashlib.md5(first, usedforsecurity=False), part_bytes - len(first)
            while left and (block := file.read(min(_READ_BYTES, left))):
                digest.update(block)
                left -= len(block)
            yield digest.digest()
