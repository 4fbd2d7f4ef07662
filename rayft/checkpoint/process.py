"""Who a process is, precisely enough to know later that it is gone."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import psutil


def identity() -> dict[str, Any]:
    """This process: host, pid, and what tells it from a later process with the same pid."""
    return {
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
    }


def is_gone(owner: dict[str, Any]) -> bool:
    """Whether the process in `owner` (an `identity`) certainly ended. Of another machine nothing is certain."""
    if owner.get("host") != socket.gethostname() or owner.get("machine") != _machine():
        return False
    return _started(int(owner["pid"])) != owner["started"]


def _machine() -> str:
    """What must agree for pids to be comparable: the boot of this machine and the pid namespace (container)."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux: pids are the host's
        return f"booted {psutil.boot_time():.0f}"


def _started(pid: int) -> str | None:
    """When the process started, as the kernel says it; None if it is not there or a zombie."""
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
    except psutil.NoSuchProcess:
        return None
    try:
        # Field 22 in clock ticks since boot: unlike a time of day it never shifts when the clock is set.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return f"{process.create_time():.2f}" if process.is_running() else None
