"""The node cache against a single stream, on a moto server: `python -m tests.bench.node_cache [MB]`.

Prints a JSON line for each of two servers: moto as it is, and behind a proxy that gives every request 50 MB/s, about what
S3 gives one stream. A single stream is `get_object` read to a file; the cache's time includes its checksums, and `again_s` is
what the next process needs to find the copy, look at every byte of it and use it.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rayft.storage import RetryPolicy
from rayft.storage.cache import NodeCache, fetching
from rayft.storage.s3 import S3Store
from tests.s3 import FaultyProxy, proxied
from tests.shared import ROOT

_STREAM_MB_S = 50
_ROUNDS = 3


@contextmanager
def server() -> Iterator[str]:
    """A moto server in a process of its own; the AWS variables point at it."""
    command, pipe = [sys.executable, "-m", "tests.s3"], subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdin
        assert process.stdout
        os.environ |= {
            "AWS_ENDPOINT_URL": process.stdout.readline().strip(),
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_REGION": "us-east-1",
        }
        yield os.environ["AWS_ENDPOINT_URL"]
        process.stdin.close()


def median_s(call: Callable[[], object]) -> float:
    """Seconds of a call, the median of some."""
    seconds = []
    for _ in range(_ROUNDS):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return round(statistics.median(seconds), 2)


def measure(folder: Path, megabytes: int) -> dict[str, float]:
    """The object `weights` of the bucket `bench`, by one stream and by the cache."""
    store = S3Store("bench", retry=RetryPolicy())
    target, root = folder / "stream", folder / "cache"

    def stream() -> None:
        with target.open("wb") as file:
            shutil.copyfileobj(store.client.get_object(Bucket="bench", Key="weights")["Body"], file, 1 << 20)

    def cache() -> None:
        NodeCache(root).take(fetching(store, "weights")).release()

    def anew() -> None:
        shutil.rmtree(root, ignore_errors=True)
        cache()

    single_s, cached_s, again_s = median_s(stream), median_s(anew), median_s(cache)
    return {
        "single_s": single_s,
        "cache_s": cached_s,
        "single_mb_s": round(megabytes / single_s),
        "cache_mb_s": round(megabytes / cached_s),
        "ratio": round(single_s / cached_s, 1),
        "again_s": again_s,
    }


def main(megabytes: int = 256) -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as name, server() as endpoint:
        store = S3Store("bench")
        store.client.create_bucket(Bucket="bench")
        store.put("weights", os.urandom(megabytes * 1_000_000))
        print(json.dumps({"server": "moto", **measure(Path(name), megabytes)}), flush=True)
        proxy = FaultyProxy(endpoint)
        proxy.add("throttled", "GET", seconds=1 / _STREAM_MB_S)
        with proxied(proxy):
            os.environ["AWS_ENDPOINT_URL"] = proxy.endpoint
            print(
                json.dumps({"server": f"{_STREAM_MB_S} MB/s a stream", **measure(Path(name), megabytes)}),
                flush=True,
            )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
