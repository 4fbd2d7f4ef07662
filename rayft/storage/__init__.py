"""Bytes at a URI: local folders and S3, with atomic publish, bounded retries and a per-node cache.

`open_store(uri)` gives a `Store`; the rooms above talk to that one interface and never to boto3. What every
store promises:

- `put`, `put_parts` and `upload` are atomic and durable when they return: a reader sees the old object or the
  new one, never a half (local: temporary file, fsync, rename, fsync of the folder; S3: one PUT, or a
  completed multipart upload).
- `put_if_absent` lets exactly one of several writers win (local: a hard link; S3: `If-None-Match: *`).
- What can pass (503, slow down, resets, time-outs, truncated bodies) is retried within `RetryPolicy`; what
  cannot (denied, full, missing bucket) fails at once. Either way the `StorageError` names the URI, the
  operation and a remedy.
- Prefixes are folders: `list("step-4")` never returns `step-40/…`.

The node cache (`cache`) keeps one copy per machine of what a remote store has, within a bound in bytes; `cache_folder` says
what lies in it and what may go, `cache_marks` who uses what, `cache_fetch` how it is downloaded, `cache_record` how damage
is found.
"""

from rayft.storage.cache import Held, cache_at, hold, hold_file, made, node_cache, node_cache_dir
from rayft.storage.local import LocalStore
from rayft.storage.retry import RetryPolicy
from rayft.storage.store import DamagedObject, Data, Entry, ObjectNotFound, Store, open_store

__all__ = [
    "DamagedObject",
    "Data",
    "Entry",
    "Held",
    "LocalStore",
    "ObjectNotFound",
    "RetryPolicy",
    "Store",
    "cache_at",
    "hold",
    "hold_file",
    "made",
    "node_cache",
    "node_cache_dir",
    "open_store",
]
