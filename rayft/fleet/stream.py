"""What a job's driver prints, shown while it comes. A convenience: nothing is decided by it, and its loss is no error."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable

from rayft.fleet.attempts import attempt_of
from rayft.fleet.client import Client

_LOG = logging.getLogger(__name__)
#: Tries that bring nothing before the stream is given up, and the pause between them in seconds.
TRIES = 3
PAUSE_S = 2.0


class LogStream:
    """Follows the log of a submission in a thread of its own and hands new text to `write`. lost: it has given up."""

    def __init__(self, client: Client, submission: str, write: Callable[[str], None]) -> None:
        self.lost = False
        self._client, self._submission, self._write = client, submission, write
        self._shown = 0
        self._closed = False
        self._thread = threading.Thread(target=self._follow, name="rayft-logs", daemon=True)
        self._thread.start()

    def close(self, timeout_s: float) -> None:
        """Wait for what is still to come of an ended job, and show no more."""
        self._thread.join(timeout=timeout_s)
        self._closed = True

    def _follow(self) -> None:
        tries = 0
        while tries < TRIES and not self._closed:
            before = self._shown
            try:
                asyncio.run(self._tail())
                if not self._live():
                    return
            except Exception as error:
                _LOG.debug("the log stream broke: %s", error)
            tries = 1 if self._shown > before else tries + 1
            time.sleep(PAUSE_S)
        self.lost = True

    def _live(self) -> bool:
        """Whether there is more to come: what lies between here and the cluster also ends streams as if all were said."""
        attempt = attempt_of(self._client.info(self._submission))
        return attempt is not None and attempt.live

    async def _tail(self) -> None:
        """The stream always begins at the beginning; what was shown before a break is left out."""
        passed = 0
        async for text in self._client.tail(self._submission):
            if self._closed:
                return
            new = text[max(0, self._shown - passed) :]
            passed += len(text)
            if new:
                self._write(new)
                self._shown += len(new)
