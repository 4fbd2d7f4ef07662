"""A process that takes an object from the node cache: `python -m tests.cached STORE KEY CACHE`.

It prints the path, then a line for every key that it reads from its standard input, and keeps all of them in use until
that ends. `held` starts it.
"""

from __future__ import annotations

import logging
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
    """The process, started; the end of its standard input and a minute are its end."""
    command = [sys.executable, "-m", "tests.cached", store, key, str(cache)]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True, **options)  # type: ignore[call-overload]
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=60)


def main(uri: str, key: str, cache: str) -> None:
    """Take `key`, and then what the standard input names."""
    from rayft.errors import RayftError
    from rayft.storage import node_cache, open_store

    logging.basicConfig(format="%(message)s")
    store = open_store(uri)
    try:
        print(node_cache(store, key, cache), flush=True)
        for line in sys.stdin:
            print(node_cache(store, line.strip(), cache), flush=True)
    except RayftError as error:
        print(error, file=sys.stderr)
        sys.exit(error.code)


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


if __name__ == "__main__":
    main(*sys.argv[1:])
