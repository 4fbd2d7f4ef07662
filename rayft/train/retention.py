"""Old checkpoints are deleted beside training, on rank 0, after a newer one is committed."""

from __future__ import annotations

import threading
from collections.abc import Callable

from rayft.checkpoint import CheckpointWriter, retain
from rayft.storage import Store


class Retention:
    """Runs `retain` in a thread whenever the writer has committed something new; failures go to `on_failure`."""

    def __init__(
        self,
        store: Store,
        writer: CheckpointWriter,
        keep: int,
        epoch: int,
        on_failure: Callable[[Exception], None],
    ) -> None:
        self.store, self.writer, self.keep, self.epoch = store, writer, keep, epoch
        self.on_failure = on_failure
        self._done_for: int | None = None
        self._thread: threading.Thread | None = None

    def look(self) -> int | None:
        """Start a clean-up if there is a new commit; returns the step of a commit not seen before."""
        committed = self.writer.last_committed
        if committed is None or committed == self._done_for or (self._thread and self._thread.is_alive()):
            return None
        self._done_for = committed
        self._thread = threading.Thread(target=self._clean, name="rayft-retention", daemon=True)
        self._thread.start()
        return committed

    def wait(self, timeout_s: float = 600.0) -> None:
        """Wait for a clean-up under way."""
        if self._thread:
            self._thread.join(timeout_s)

    def _clean(self) -> None:
        try:
            retain(self.store, self.keep, epoch=self.epoch)
        except Exception as error:
            self.on_failure(error)
