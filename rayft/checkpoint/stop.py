"""A wish that a run should save and end, left in its run folder by whoever cannot send its driver a signal.

An object beside the run's log, so it works wherever the storage can be written from; the driver looks for it every few
seconds. It belongs to one submission: what was asked of an earlier one must not end the next.
"""

from __future__ import annotations

import json
import time

from rayft.storage import ObjectNotFound, Store

STOP_KEY = "stop.json"
#: What Ray gives a driver between SIGTERM and SIGKILL when its submission is stopped; its own 3 s save nothing.
STOP_WAIT_S = 120


def request_stop(store: Store, reason: str, submission: str | None = None) -> None:
    """Ask the driver that runs `submission` (None: whichever runs now) to save and end. Raises StorageError."""
    wish = {"reason": reason, "submission": submission, "time": time.time()}
    store.put(STOP_KEY, json.dumps(wish).encode())


def requested_stop(store: Store, submission: str | None) -> str | None:
    """Why this driver should stop; None where nobody asked, or asked another submission. Raises StorageError."""
    if not store.exists(STOP_KEY):
        return None
    try:
        wish = json.loads(store.get(STOP_KEY))
        meant = wish["submission"]
        return str(wish["reason"]) if meant is None or meant == submission else None
    except (ObjectNotFound, ValueError, KeyError, TypeError):
        return None  # withdrawn meanwhile, or nothing that rayft wrote


def forget_old_requests(store: Store, submission: str | None) -> None:
    """Remove what was asked of others; a start that knows its submission keeps a wish for it. Raises StorageError."""
    try:
        wish = json.loads(store.get(STOP_KEY)) if store.exists(STOP_KEY) else {}
        mine = submission is not None and wish.get("submission") == submission
    except (ObjectNotFound, ValueError, AttributeError):
        mine = False
    if not mine:
        store.delete([STOP_KEY])
