"""SIGTERM and SIGINT for the length of a run: save and stop while it trains, stop at once before and after."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from rayft.errors import PreemptedError

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def interrupted(name: str) -> PreemptedError:
    """The error for a signal while nothing can be saved."""
    return PreemptedError(
        f"The run was interrupted ({name}).",
        "Start it again under the same name to go on from its last checkpoint.",
    )


class StopSignals:
    """Handlers of the main thread, put back at the end; elsewhere nothing is handled.

    While `asking` the first signal is handed on as a wish to stop; every other one raises PreemptedError in the main
    thread.
    """

    def __init__(self) -> None:
        self._ask: Callable[[str], Any] | None = None
        self._before: dict[int, Any] = {}
        self._requested = ""
        self._unheard = ""
        #: Between a wish from another thread and the start of training; a signal's handler never takes it.
        self._lock = threading.Lock()

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
            self.install()
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def install(self) -> None:
        """Take the signals."""
        for number in self._before:
            signal.signal(number, self._handle)

    @contextlib.contextmanager
    def lent_to_ray(self) -> Iterator[None]:
        """For `ray.init`, which takes SIGTERM for itself and answers it with SystemExit."""
        try:
            yield
        except SystemExit:
            raise interrupted(signal.SIGTERM.name) from None
        finally:
            self.install()

    @contextlib.contextmanager
    def asking(self, ask: Callable[[str], Any]) -> Iterator[None]:
        """While inside, the first signal calls `ask` with its name, in a thread of its own. Raises PreemptedError where a wish
        came before, to a run that is not in the main thread."""
        with self._lock:
            if self._unheard:
                raise interrupted(self._unheard)
            self._ask = ask
        try:
            yield
        finally:
            self._ask = None

    def request(self, reason: str) -> None:
        """As the first SIGTERM, from another thread and with a reason of its own."""
        self._requested = reason
        if self._before:
            os.kill(os.getpid(), signal.SIGTERM)
            return
        with self._lock:
            ask, self._ask = self._ask, None
            self._unheard = "" if ask else reason
        if ask:
            ask(reason)

    def _handle(self, number: int, _: FrameType | None) -> None:
        ask, self._ask = self._ask, None
        name, self._requested = self._requested or signal.Signals(number).name, ""
        if ask is None:
            raise interrupted(name)
        threading.Thread(target=ask, args=(name,), daemon=True).start()
