"""Join a running Ray cluster from one of its nodes or through Ray's client, and say which addresses work."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from urllib.parse import urlsplit

from rayft.errors import JobError, ResourceError

WORKING = (
    "Use `auto` or HEAD:6379 on a node of the cluster (such as in a pod of it), ray://HEAD:10001 from elsewhere, "
    "or submit it: ray job submit --address http://HEAD:8265 -- rayft preflight."
)
REACH_TIMEOUT_S = 5.0


@contextlib.contextmanager
def connected(address: str) -> Iterator[None]:
    """Be a driver of the cluster meanwhile. Raises JobError for an address of another kind, ResourceError if nothing answers."""
    import ray

    refuse_unreachable(address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", configure_logging=True)
    except (ConnectionError, RuntimeError, TimeoutError, ValueError, OSError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        said = lines[0] if lines else type(error).__name__
        raise ResourceError(f"No Ray cluster could be joined at {address}: {said}", WORKING) from error
    try:
        yield
    finally:
        ray.shutdown()


def refuse_unreachable(address: str) -> None:
    """Look at once whether somebody listens there: Ray itself tries for minutes."""
    if address in ("auto", "local"):
        if address == "local":
            raise JobError("--address local would start a cluster of its own.", WORKING)
        return
    if address.startswith(("http://", "https://")):
        raise JobError(f"{address} is the address of a job server, which a driver cannot join.", WORKING)
    parts = urlsplit(address if "://" in address else f"//{address}")
    try:
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if parts.scheme not in ("", "ray") or not host or not port:
        raise JobError(f"{address!r} is no address of a Ray cluster.", WORKING)
    try:
        socket.create_connection((host, port), timeout=REACH_TIMEOUT_S).close()
    except OSError as error:
        raise ResourceError(f"Nothing answers at {address} ({error}).", WORKING) from None
