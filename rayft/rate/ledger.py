"""What was rated: `ratings.jsonl`, one line an event, appended and on disk before anybody is told so.

One process writes it, by a lock on the folder. A line that was cut by a crash was never acknowledged: it is moved to
`ratings.cut` when the ledger is opened, and the rater is asked again.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from rayft.errors import DataError, StorageError

RATINGS = "ratings.jsonl"
CUT = "ratings.cut"

Kind = Literal["rating", "skip", "undo"]


@dataclass(frozen=True)
class Event:
    """One thing a rater did.

    shown: the answers' numbers in the order in which the rater saw them. ranking: groups of answers' numbers, best
    first, equally good ones in one group (of a tie, one group); empty for a skip or an undo. seconds: from showing the
    item to the click. time: in seconds since 1970. request: the page's own name for the click, so that a click that
    is sent twice counts once.
    """

    kind: Kind
    item: str
    rater: str
    request: str
    shown: tuple[int, ...] = ()
    ranking: tuple[tuple[int, ...], ...] = ()
    comment: str = ""
    seconds: float = 0.0
    time: float = 0.0


class Ledger:
    """The ratings of a folder, open for writing. Raises StorageError if another process has it open."""

    def __init__(self, folder: Path) -> None:
        self._lock = FileLock(folder / ".lock")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout:
            raise StorageError(
                f"{folder} is open in another `rayft rate`.", "Stop that one first; ratings have one writer."
            ) from None
        except OSError as error:
            raise StorageError(
                f"{folder} cannot be written to: {error}.", "Give a folder that is yours."
            ) from None
        self.path = folder / RATINGS
        self.cut = _move_cut_line(self.path, folder / CUT)
        self.events = list(read_events(self.path))
        self._requests = {event.request for event in self.events}
        self._file = self.path.open("ab", buffering=0)
        _sync_folder(folder)  # so that the file itself survives a power cut
        self._thread_lock = threading.Lock()

    def append(self, event: Event) -> bool:
        """Write an event; it is on disk when this returns. False, and nothing is written, for a request seen before.

        Raises StorageError if the disk refuses.
        """
        with self._thread_lock:
            if event.request in self._requests:
                return False
            stamped = Event(**{**asdict(event), "time": event.time or time.time()})
            line = (json.dumps(asdict(stamped)) + "\n").encode()
            before = self.path.stat().st_size
            try:
                written = self._file.write(line)
                if written != len(line):
                    raise OSError(f"{written} of {len(line)} bytes were written")
                os.fsync(self._file.fileno())
            except OSError as error:
                os.truncate(self.path, before)  # so that the next line begins where a line begins
                raise StorageError(
                    f"The rating could not be written to {self.path}: {error}.", "Free some space; try again."
                ) from None
            self._requests.add(event.request)
            self.events.append(stamped)
            return True

    def close(self) -> None:
        """Close the file and let others write."""
        self._file.close()
        self._lock.release()


def read_events(path: Path) -> Iterator[Event]:
    """The events of a ratings file in their order. A last line without its end is left out; any other damage raises
    DataError naming the line."""
    if not path.exists():
        return
    raw = path.read_bytes()
    lines = raw.split(b"\n")[:-1]  # what follows the last line end is no whole line
    for number, line in enumerate(lines, 1):
        try:
            values: dict[str, Any] = json.loads(line)
            values["shown"] = tuple(values["shown"])
            values["ranking"] = tuple(map(tuple, values["ranking"]))
            event = Event(**values)
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(
                f"{path} line {number} is damaged: {type(error).__name__}: {error}.",
                "Correct or remove that line; the others are untouched.",
            ) from None
        yield event


def standing(events: Iterator[Event] | list[Event]) -> dict[tuple[str, str], Event]:
    """By (rater, item): the rating or skip that stands, after undos."""
    stands: dict[tuple[str, str], Event] = {}
    for event in events:
        if event.kind == "undo":
            stands.pop((event.rater, event.item), None)
        else:
            stands[event.rater, event.item] = event
    return stands


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _move_cut_line(path: Path, kept: Path) -> bool:
    """Move an unfinished last line to `kept`, and say whether there was one."""
    if not path.exists():
        return False
    raw = path.read_bytes()
    end = raw.rfind(b"\n") + 1
    if end == len(raw):
        return False
    with kept.open("ab") as file:
        file.write(raw[end:] + b"\n")
        file.flush()
        os.fsync(file.fileno())
    os.truncate(path, end)
    return True
