"""What the node cache of this machine holds: `rayft cache`."""

from __future__ import annotations

import time

from rich.console import Console
from rich.table import Table

from rayft.errors import StorageError
from rayft.storage import cache_at, node_cache_dir


def show(console: Console, *, verify: bool = False, clear: bool = False) -> int:
    """Print the entries with their sizes, last uses and users; first look at every byte, or remove what is not in use.

    Raises `StorageError` (code 5) after a `verify` that found damage.
    """
    cache = cache_at(node_cache_dir())
    damage = cache.verify() if verify else []
    removed = cache.folder.remove() if clear else []
    entries = cache.folder.survey()
    used, bound = sum(entry.bytes for entry in entries), cache.folder.bound()
    if entries:
        table = Table(box=None, pad_edge=False)
        for name in ("what", "size", "last use", "in use"):
            table.add_column(name, justify="right" if name == "size" else "left", overflow="fold")
        for entry in entries:
            users = f"by {entry.users} process{'es' if entry.users > 1 else ''}" if entry.users else "no"
            half = (
                ("being made" if entry.users else "half made by a process that died")
                if entry.partial
                else users
            )
            table.add_row(entry.what, _size(entry.bytes), _ago(time.time() - entry.last_use), half)
        console.print(table)
    console.print(
        f"{len(entries)} entries, {_size(used)} of at most {_size(bound)} (RAYFT_CACHE_GB), in {cache.folder.root}",
        soft_wrap=True,
    )
    if clear:
        freed = sum(entry.bytes for entry in removed)
        console.print(f"Removed {len(removed)} that nobody uses, {_size(freed)}.")
    for entry, files in damage:
        there = "in use, it stays until it is next fetched" if entry.users else "removed"
        console.print(f"damaged: {entry.what} ({', '.join(files)}): {there}", soft_wrap=True)
    if damage:
        raise StorageError(
            f"{len(damage)} of the entries of {cache.folder.root} were damaged.",
            "They are fetched anew when they are wanted; look at the disk (dmesg, smartctl) if it happens again.",
        )
    return 0


def _size(size: int) -> str:
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size} B"


def _ago(seconds: float) -> str:
    for unit, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= unit:
            return f"{seconds / unit:.0f} {name} ago"
    return "just now"
