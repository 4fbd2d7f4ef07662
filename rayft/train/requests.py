"""The driver's ear for wishes to stop that come through the run's storage instead of as a signal."""

from __future__ import annotations

import contextlib
import threading
from typing import Any

from rayft.checkpoint.stop import STOP_KEY, forget_old_requests, requested_stop
from rayft.errors import StorageError
from rayft.storage import Store
from rayft.train.signals import StopSignals
from rayft.train.submitted import SUBMISSION, metadata_of_submission

#: Seconds between two looks.
LOOK_EVERY_S = 2.0


class StopRequests:
    """For the length of a run: a wish found in the run folder is treated as the first SIGTERM.

    At the start what was asked of earlier submissions is removed. The caller holds the lease.
    """

    def __init__(self, store: Store, signals: StopSignals) -> None:
        self._store, self._signals = store, signals
        self._submission = metadata_of_submission().get(SUBMISSION)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="rayft-stop-requests", daemon=True)

    def __enter__(self) -> StopRequests:
        forget_old_requests(self._store, self._submission)
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._closed.set()
        self._thread.join(timeout=60)

    def _listen(self) -> None:
        while not self._closed.wait(LOOK_EVERY_S):
            try:
                reason = requested_stop(self._store, self._submission)
            except StorageError:
                continue  # a storage that is away for a while says nothing
            if reason and not self._closed.is_set():
                self._signals.request(reason)
                # Another cluster numbers its submissions from one again: what is heard must not be there for its first.
                with contextlib.suppress(StorageError):
                    self._store.delete([STOP_KEY])
                return
