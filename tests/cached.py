"""A process that takes an object from the node cache: `python -m tests.cached STORE KEY CACHE`.

It prints the path, then a line for every key that it reads from its standard input, and keeps all of them in use until
that ends. `held` starts it.
"""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.shared import ROOT


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


if __name__ == "__main__":
    main(*sys.argv[1:])
