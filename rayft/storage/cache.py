"""The per-node cache of remote objects: one download per machine, however many processes want it."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from rayft.errors import StorageError
from rayft.storage.store import Entries, Store, checked_key, not_found

LOCK_TIMEOUT_S = 3600.0  # another process on this node may be downloading tens of gigabytes
_POLL_S = 0.2


def node_cache_dir() -> Path:
    """Folder for what every process of this node shares: converted models, downloads, copies of remote shards."""
    return Path(os.environ.get("RAYFT_CACHE", "~/.cache/rayft")).expanduser()


def node_cache(
    store: Store, key_or_prefix: str, cache_dir: Path | str, *, lock_timeout_s: float = LOCK_TIMEOUT_S
) -> Path:
    """A local file or folder with the content of the object or folder `key_or_prefix`.

    A local store answers with the original. Else the copy lies in `cache_dir`, under a name that depends on
    the source's versions (a changed source is fetched anew); one process of the node downloads while the
    others wait for it, at most `lock_timeout_s`. Raises `StorageError`.
    """
    original = store.local_path(key_or_prefix)
    if original is not None:
        if not original.exists():
            raise not_found(str(original))
        return original
    entries = _entries(store, key_or_prefix)
    digest = _digest(store.where(key_or_prefix), entries)
    home = Path(cache_dir).expanduser().absolute()
    ready = home / digest
    content = ready / Path(key_or_prefix).name
    if not ready.exists():
        home.mkdir(parents=True, exist_ok=True)
        with _lock(home / f"{digest}.lock", lock_timeout_s, f"the download of {store.where(key_or_prefix)}"):
            if not ready.exists():
                _fetch(store, key_or_prefix, entries, ready)
    return content


def _entries(store: Store, key_or_prefix: str) -> Entries:
    entry = store.stat(key_or_prefix)
    entries = [entry] if entry else store.list(key_or_prefix)
    if not entries:
        raise not_found(store.where(key_or_prefix))
    return entries


def _digest(where: str, entries: Entries) -> str:
    text = "\n".join([where, *(f"{entry.key} {entry.size} {entry.version}" for entry in entries)])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _fetch(store: Store, key_or_prefix: str, entries: Entries, ready: Path) -> None:
    """Download beside `ready` and rename. Only the holder of the lock is here, so leftovers are dead."""
    partial = ready.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    top = Path(key_or_prefix).parent
    for entry in entries:
        if entry.key.endswith("/"):  # a "folder" object made by a web console
            continue
        store.download(entry.key, partial / Path(checked_key(entry.key)).relative_to(top))
    os.replace(partial, ready)


@contextlib.contextmanager
def _lock(path: Path, timeout_s: float, what: str) -> Iterator[None]:
    """An exclusive file lock; the kernel frees it when its holder dies."""
    deadline = time.monotonic() + timeout_s
    with path.open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise StorageError(
                        f"Waited {timeout_s:.0f} s for another process on this node to finish {what} (lock {path}).",
                        "See whether that process is stuck and stop it, then start again.",
                    ) from None
            time.sleep(_POLL_S)
        yield
