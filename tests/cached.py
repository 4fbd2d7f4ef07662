"""What tests of the node cache share: processes that take from it, damage, objects as others upload them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from rayft.storage import cache_at
from tests.shared import ROOT


@pytest.fixture
def forget() -> Iterator[None]:
    """Every test begins as a new process: nothing verified, no marks."""
    cache_at.cache_clear()
    yield
    cache_at.cache_clear()


@contextmanager
def held(store: str, key: str, cache: Path, **options: object) -> Iterator[subprocess.Popen[str]]:
    """A process of `tests.take`, started; the end of its standard input and a minute are its end."""
    command = [sys.executable, "-m", "tests.take", store, key, str(cache)]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True, **options)  # type: ignore[call-overload]
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=60)


def names(cache: Path) -> str:
    return "".join(sorted(entry.what.rpartition("/")[2] for entry in cache_at(cache).folder.survey()))


def flip(path: Path) -> None:
    with path.open("r+b") as file:
        byte = file.read(1)[0]
        file.seek(0)
        file.write(bytes([byte ^ 1]))


def put_plain(bucket: str, key: str, data: bytes, **arguments: str) -> None:
    """Without the checksum that boto3 adds by itself."""
    client().put_object(Bucket=bucket, Key=key, Body=data, **arguments)


def put_in_parts(bucket: str, key: str, parts: list[bytes]) -> None:
    s3, at = client(), {"Bucket": bucket, "Key": key}
    upload = s3.create_multipart_upload(**at)["UploadId"]
    sent = [
        {
            "PartNumber": number,
            "ETag": s3.upload_part(**at, UploadId=upload, PartNumber=number, Body=part)["ETag"],
        }
        for number, part in enumerate(parts, 1)
    ]
    s3.complete_multipart_upload(**at, UploadId=upload, MultipartUpload={"Parts": sent})


def client() -> Any:
    import boto3
    from botocore.config import Config

    return boto3.session.Session().client("s3", config=Config(request_checksum_calculation="when_required"))


def cut(path: Path) -> None:
    os.truncate(path, 100)
