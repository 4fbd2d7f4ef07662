"""What a run held of the cluster, by the rows of its log: a search is charged for that, and not for what the run waited for."""

from __future__ import annotations

from collections.abc import Iterable

from rayft.report.log import Row


class Held:
    """Devices of one start of a run, times the time for which they were its own.

    They are from the moment at which an attempt's workers had their room (the end of its `waited`, else its first row) to the
    end of the run, less what it waited for room in between. Preparing and downloading come before, and hold nothing.
    """

    def __init__(self) -> None:
        self._hours: dict[str, float] = {}
        self._seconds = 0.0
        self._devices: dict[str, float] = {}
        #: Since when they are held, in seconds since 1970; None while nothing is.
        self._since: float | None = None
        self._had_room = 0.0

    def feed(self, rows: Iterable[Row]) -> None:
        """Take rows in the order of writing."""
        for row in rows:
            if row["kind"] == "event":
                self._take(row)

    def close(self, now: float) -> None:
        """Nothing is held from `now` on (seconds since 1970)."""
        self._seconds, self._hours = self._until(now)
        self._since = None

    def spent(self, now: float) -> dict[str, float]:
        """`gpu_hours`, `cpu_hours` and `seconds` up to `now`."""
        seconds, hours = self._until(now)
        return {"gpu_hours": hours.get("GPU", 0.0), "cpu_hours": hours.get("CPU", 0.0), "seconds": seconds}

    def _take(self, row: Row) -> None:
        waited = row.get("waited")
        if row["event"] in ("start", "resume"):
            asked, placed = waited or (row["time"], self._had_room or row["time"])
            self.close(asked)
            self._devices, self._since, self._had_room = row.get("devices") or {}, placed, 0.0
        elif waited and self._since is None:
            self._had_room = waited[1]  # its attempt begins later
        elif waited:
            self.close(waited[0])
            self._since = waited[1]
        elif row["event"] == "end":
            self.close(row["time"])

    def _until(self, now: float) -> tuple[float, dict[str, float]]:
        seconds = 0.0 if self._since is None else max(0.0, now - self._since)
        names = {*self._hours, *self._devices}
        hours = {
            name: self._hours.get(name, 0.0) + self._devices.get(name, 0.0) * seconds / 3600 for name in names
        }
        return self._seconds + seconds, hours
