"""Where the ranks of a process group meet."""

from __future__ import annotations

import socket

import ray


def free_address() -> str:
    """Where the ranks of a group can meet on this node."""
    host = ray.util.get_node_ip_address()
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"
