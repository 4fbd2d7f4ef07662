"""What a run's time went to, from the rows of its log: every moment of every start belongs to exactly one part.

A start is one driver's life: it begins at `began` of its `open` event (else at its first row) and ends at its last row. Times are
those of the rows, in whole milliseconds, and never run backwards within a start. A start is cut at its step rows and at its
`start` and `resume` events; each piece, from cut a to cut b, is divided in this order, what is taken once is not taken again:

    waiting     where an event's `waited: [from, to]` lies: no room on the cluster yet
    evaluation  `took_s` before each eval and suites row, up to the row
    checkpoint  the step row's `seconds.checkpoint`, from a on (training stood still for the checkpoint of the step before);
                after the last step of a start that ended with code 0 or 8: up to its last `checkpoint` event
    useful      of a piece that ends with a step row: all the rest; of an attempt's first step only the sum of the row's other
                `seconds`, up to b
    repeated    the same of a step that does not count (see `current_rows`): it was computed again, or its log was left behind
    load        all the rest before the run's first step row
    restart     all the rest after it that is followed by another attempt, by an end with another code than 0 and 8, or by the
                first step of an attempt: what was under way when something failed, noticing it, placing and loading again
    other       all the rest: after the last step of a start (export, closing), or of a run that is still going

A piece is charged with the devices of the attempt of the row that ends it; before the first attempt of a start, with those of that
attempt, or with what the run asked for if none came.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rayft.report.log import Row, current_rows

PARTS = ("useful", "load", "checkpoint", "restart", "repeated", "waiting", "evaluation", "other")

#: Ends at which the run had saved what it had.
SAVED = (0, 8)
#: Ray counts devices in ten-thousandths.
SHARE = 10_000


@dataclass(frozen=True)
class Devices:
    """What a run held, in ten-thousandths of a device."""

    gpus: int = 0
    cpus: int = 0


@dataclass(frozen=True)
class Span:
    """A stretch of time from `start` to `end`, in milliseconds since 1970, that went to one part."""

    start: int
    end: int
    part: str
    devices: Devices


@dataclass
class Start:
    """One driver's life, from `began` to `ended` (milliseconds).

    code: of its `end`, None where there is none. attempts: worker groups it began.
    """

    rows: list[Row]
    user: str = ""
    team: str = ""
    code: int | None = None
    attempts: int = 0
    spans: list[Span] = field(default_factory=list)
    began: int = 0
    ended: int = 0


def usable(rows: Iterable[Any]) -> list[Row]:
    """The rows that are rows of a run log; a line may be whole JSON and yet nothing of ours."""
    return [row for row in rows if isinstance(row, dict) and _is_row(row)]


def starts_of(rows: Sequence[Row], per_worker: Devices) -> list[Start]:
    """Every start with its spans, which cover it without gap or overlap. rows: all that were ever written, of `usable`.

    per_worker: devices of a worker, for attempts of a log that does not say what they held.
    """
    ordered = sorted(rows, key=lambda row: row["epoch"])
    counting = {id(row) for row in current_rows(ordered)}
    starts = _split(ordered)
    stepped = False
    for number, start in enumerate(starts):
        _describe(start)
        last = number == len(starts) - 1
        start.spans = list(_spans(start, counting, per_worker, stepped=stepped, last=last))
        stepped = stepped or any(row["kind"] == "step" for row in start.rows)
    return starts


def _is_row(row: Row) -> bool:
    """Whether it has what every row has, and what is read of its kind."""
    if not all(_is_number(row.get(name)) for name in ("time", "epoch")) or not isinstance(
        row.get("kind"), str
    ):
        return False
    whole = ["attempt", *(["step"] if row["kind"] == "step" else [])]
    if not all(isinstance(row.get(name, 0), int) for name in whole):
        return False
    if row["kind"] == "event":
        optional = [row[name] for name in ("resumed_step", "code", "workers") if row.get(name) is not None]
        return isinstance(row.get("event"), str) and all(map(_is_number, optional))
    return row["kind"] != "step" or "step" in row


def _split(ordered: Sequence[Row]) -> list[Start]:
    """Every driver opens an epoch of its own before its first attempt, and counts its attempts from 1."""
    starts: list[Start] = []
    for row in ordered:
        before = starts[-1].rows[-1] if starts else None
        if before is None or (
            row["epoch"] != before["epoch"]
            and (not row.get("attempt") or starts[-1].code is not None or _restarted(row, before))
        ):
            starts.append(Start([]))
        starts[-1].rows.append(row)
        if _event(row) == "end":
            starts[-1].code = int(1 if row.get("code") is None else row["code"])
    return starts


def _restarted(row: Row, before: Row) -> bool:
    return bool(row.get("attempt", 0) < before.get("attempt", 0))


def _describe(start: Start) -> None:
    for row in start.rows:
        if _event(row) == "open":
            start.user, start.team = str(row.get("user") or ""), str(row.get("team") or "")
        if _event(row) in ("start", "resume"):
            start.attempts += 1


def _spans(
    start: Start, counting: set[int], per_worker: Devices, *, stepped: bool, last: bool
) -> Iterable[Span]:
    rows = start.rows
    times: list[int] = []
    for row in rows:
        times.append(max(_ms(row["time"]), times[-1] if times else 0))
    opened = [_ms(row["began"]) for row in rows if _event(row) == "open" and _is_number(row.get("began"))]
    start.began, start.ended = min([times[0], *opened]), times[-1]
    devices = _devices(rows, per_worker)
    piece, first_of_attempt, last_step = Piece(start.began), True, False
    for row, at in zip(rows, times, strict=True):
        piece.take(row, at)
        kind, lost = row["kind"], "restart" if stepped else "load"
        if kind == "step":
            part = "useful" if id(row) in counting else "repeated"
            seconds = row["seconds"] if isinstance(row.get("seconds"), dict) else {}
            piece.first("checkpoint", _length(seconds.get("checkpoint")))
            if first_of_attempt:
                piece.last(
                    part, sum(_length(value) for name, value in seconds.items() if name != "checkpoint")
                )
            piece.rest(lost if first_of_attempt else part)
            stepped, first_of_attempt, last_step = True, False, True
        elif _event(row) in ("start", "resume"):
            piece.rest(lost)
            first_of_attempt = True
        else:
            continue
        yield from piece.spans(devices[row.get("attempt", 0)])
        piece = Piece(at)
    failed = start.code not in (*SAVED, None) or (start.code is None and not last)
    if start.code in SAVED and last_step and not first_of_attempt:
        piece.until("checkpoint", piece.committed)
    ended_stepping = last_step and not first_of_attempt
    piece.rest(("restart" if failed else "other") if ended_stepping else "restart" if stepped else "load")
    yield from piece.spans(devices[rows[-1].get("attempt", 0)])


def _devices(rows: Sequence[Row], per_worker: Devices) -> dict[int, Devices]:
    """By attempt."""
    found: dict[int, Devices] = {}
    asked = Devices()
    for row in rows:
        attempt = row.get("attempt", 0)
        given = row.get("devices")
        if isinstance(given, dict):
            asked = Devices(_shares(given.get("GPU")), _shares(given.get("CPU")))
        if _event(row) in ("start", "resume"):
            if not isinstance(given, dict):
                workers = int(row.get("workers") or 1)
                asked = Devices(per_worker.gpus * workers, per_worker.cpus * workers)
            found[attempt] = asked
    # A piece that ends before the first attempt is there only where none came.
    return {row.get("attempt", 0): asked for row in rows} | found


class Piece:
    """A stretch of time that is divided among parts; what is taken once is not taken again."""

    def __init__(self, start: int) -> None:
        self.start = self.end = start
        self.committed = start
        self._free: list[tuple[int, int]] | None = None
        self._claims: list[tuple[int, int, str]] = []
        self._taken: list[tuple[int, int, str]] = []

    def take(self, row: Row, at: int) -> None:
        """Extend the piece to this row, and note what the row says of the time before it."""
        self.end = at
        if row["kind"] in ("eval", "suites"):
            self._claims.append((at - _length(row.get("took_s")), at, "evaluation"))
        waited = row.get("waited")
        if isinstance(waited, list) and len(waited) == 2 and all(_is_number(time) for time in waited):
            self._claims.insert(0, (_ms(waited[0]), _ms(waited[1]), "waiting"))
        if _event(row) == "checkpoint":
            self.committed = at

    def first(self, part: str, length: int) -> None:
        """Give the first so many milliseconds that are free."""
        for begin, end in self._open():
            taken = min(length, end - begin)
            self._give(begin, begin + taken, part)
            length -= taken

    def last(self, part: str, length: int) -> None:
        """Give the last so many milliseconds that are free."""
        for begin, end in reversed(self._open()):
            taken = min(length, end - begin)
            self._give(end - taken, end, part)
            length -= taken

    def until(self, part: str, moment: int) -> None:
        """Give what is free up to a moment."""
        self._give(self.start, moment, part)

    def rest(self, part: str) -> None:
        """Give all that is free."""
        self._give(self.start, self.end, part)

    def spans(self, devices: Devices) -> list[Span]:
        """In their order; together they are the whole piece once the rest is given."""
        return [Span(begin, end, part, devices) for begin, end, part in sorted(self._taken)]

    def _open(self) -> list[tuple[int, int]]:
        if self._free is None:
            self._free = [(self.start, self.end)] if self.end > self.start else []
            for begin, end, part in self._claims:
                self._give(begin, end, part)
        return list(self._free)

    def _give(self, begin: int, end: int, part: str) -> None:
        left = []
        for free_begin, free_end in self._open():
            low, high = max(begin, free_begin), min(end, free_end)
            if low >= high:
                left.append((free_begin, free_end))
                continue
            self._taken.append((low, high, part))
            left += [piece for piece in ((free_begin, low), (high, free_end)) if piece[0] < piece[1]]
        self._free = left


def _event(row: Row) -> str:
    return str(row["event"]) if row["kind"] == "event" else ""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _ms(seconds: float) -> int:
    return round(seconds * 1000)


def _length(seconds: Any) -> int:
    return max(0, _ms(seconds)) if _is_number(seconds) else 0


def _shares(amount: Any) -> int:
    return max(0, round(amount * SHARE)) if _is_number(amount) else 0
