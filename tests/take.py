"""A process that takes objects from the node cache: `python -m tests.take STORE KEY CACHE`; `tests.cached.held` starts it.

It prints the path, then one for every key that it reads from its standard input, and keeps all of them in use until that
ends.
"""

from __future__ import annotations

import logging
import sys

from rayft.errors import RayftError
from rayft.storage import node_cache, open_store


def main(uri: str, key: str, cache: str) -> None:
    """Take `key`, and then what the standard input names."""
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
