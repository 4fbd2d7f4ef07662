"""GPU-hours and goodput of runs from their logs alone, long after the clusters are gone.

    hours of a part = sum over the part's spans of (length x devices), see `spans` for what belongs to which part
    total           = the sum of all parts = sum over all starts of (their length x the devices in force)
    goodput         = useful / total
    held            = total - waiting: while a run waits it is counted with the devices it waits for, since on a cluster
                      of its own (a RayJob) it pays for the nodes meanwhile; on a shared cluster others use them

What a job waited in a queue before it had a cluster is in no log. Devices are GPUs (all roles of a run together); runs without any are counted in CPUs, and never added to the others. Everything is
computed in whole milliseconds times ten-thousandths of a device, so the parts add up exactly.
"""

from __future__ import annotations

import posixpath
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import yaml

from rayft.report.log import LOG_KEY, read_lines
from rayft.report.sinks import SEGMENTS
from rayft.report.spans import PARTS, SHARE, Devices, Start, starts_of, usable

if TYPE_CHECKING:
    from rayft.storage import Store

#: A run without an end whose log grew within this many seconds is taken to be going on.
GOING_S = 900.0
#: Devices x milliseconds in ten-thousandths, in an hour of one device.
HOUR = 3_600_000 * SHARE

_SEGMENT = re.compile(rf"(?:^|/){SEGMENTS}/[^/]+\.jsonl$")


@dataclass
class Usage:
    """What one run used. parts: ten-thousandths of a device times milliseconds. unit: GPU or CPU."""

    run: str
    unit: str
    parts: dict[str, int]
    by_owner: dict[tuple[str, str], dict[str, int]]
    wall_ms: int
    starts: int
    attempts: int
    steps: int
    state: str
    notes: list[str] = field(default_factory=list)


@dataclass
class Line:
    """One line of the table: usage of one run, user or team in one unit."""

    name: str
    unit: str
    parts: dict[str, int]
    runs: int
    detail: dict[str, Any] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def goodput(self) -> float | None:
        return self.parts["useful"] / self.total if self.total else None

    def as_json(self) -> dict[str, Any]:
        """Hours as numbers, and what they are made from as whole ones."""
        return {
            "name": self.name,
            "unit": self.unit,
            "runs": self.runs,
            "hours": self.total / HOUR,
            "held_hours": (self.total - self.parts["waiting"]) / HOUR,
            "goodput": self.goodput,
            "hours_by_part": {part: self.parts[part] / HOUR for part in PARTS},
            "exact": {"per_hour": HOUR, "total": self.total, "parts": self.parts},
            **self.detail,
        }


def find_runs(store: Store) -> Iterator[tuple[str, Store]]:
    """Name and store of every run folder at or below `store`."""
    folders = set()
    for entry in store.list():
        if posixpath.basename(entry.key) == LOG_KEY:
            folders.add(posixpath.dirname(entry.key))
        elif _SEGMENT.search(entry.key):
            folders.add(posixpath.dirname(posixpath.dirname(entry.key)))
    for folder in sorted(folders):
        if folder:
            yield folder, store.child(*folder.split("/"))
        else:
            yield posixpath.basename(store.uri.rstrip("/")), store


def usage_of(
    name: str,
    store: Store,
    *,
    since: float | None = None,
    until: float | None = None,
    now: float | None = None,
) -> Usage | None:
    """What a run used between two moments (seconds since 1970); None where there is no row of a run log."""
    lines, torn = read_lines(store)
    rows = usable(lines)
    torn += len(lines) - len(rows)
    if not rows:
        return None
    per_worker, method = _job_of(store)
    starts = starts_of(rows, per_worker)
    used = measure(name, starts, since=since, until=until, now=time.time() if now is None else now)
    if torn:
        used.notes.append(f"{torn} torn line{'s' if torn > 1 else ''} of its log skipped")
    told = [row for start in starts for row in start.rows if row.get("event") in ("start", "resume")]
    if any("devices" not in row for row in told):
        beside = "" if method == "trained" else "; roles beside the policy are not in it"
        used.notes.append(f"an older log that does not say what was held: taken from job.yaml{beside}")
    return used


def measure(
    name: str, starts: Sequence[Start], *, since: float | None, until: float | None, now: float
) -> Usage:
    """Add up the spans of a run's starts between two moments."""
    unit = "GPU" if any(span.devices.gpus for start in starts for span in start.spans) else "CPU"
    low = round(since * 1000) if since is not None else None
    high = round(until * 1000) if until is not None else None
    by_owner: dict[tuple[str, str], dict[str, int]] = {}
    wall = 0
    for start in starts:
        parts = by_owner.setdefault((start.user, start.team), dict.fromkeys(PARTS, 0))
        for span in start.spans:
            begin = span.start if low is None else max(span.start, low)
            end = span.end if high is None else min(span.end, high)
            if begin < end:
                parts[span.part] += (end - begin) * (
                    span.devices.gpus if unit == "GPU" else span.devices.cpus
                )
                wall += end - begin
    together = {part: sum(parts[part] for parts in by_owner.values()) for part in PARTS}
    last = starts[-1]
    silent_s = max(0.0, now - last.ended / 1000)
    cut_off = sum(start.code is None for start in starts[:-1])
    notes = []
    if last.code is not None:
        state = "done" if last.code == 0 else f"ended with {last.code}"
    elif silent_s < GOING_S:
        state = "going"
        notes.append("still going: counted up to the last row of its log")
    else:
        state = "no end"
        cut_off += 1
    if cut_off:
        times = "once" if cut_off == 1 else f"{cut_off} times"
        notes.append(f"ended without a word {times} (killed): counted up to the last row written before")
    steps = max((row["step"] for start in starts for row in start.rows if row["kind"] == "step"), default=0)
    attempts = sum(start.attempts for start in starts)
    return Usage(name, unit, together, by_owner, wall, len(starts), attempts, steps, state, notes)


def lines_by(runs: Sequence[Usage], by: str) -> list[Line]:
    """A line for each run, user or team (a run that several people started is split), the biggest first."""
    lines = [_run_line(used) for used in runs] if by == "run" else _owner_lines(runs, by)
    return sorted(lines, key=lambda line: (line.unit != "GPU", -line.total, line.name))


def sums(runs: Sequence[Usage]) -> list[Line]:
    """A line for each unit, of all runs counted in it."""
    lines = []
    for unit in ("GPU", "CPU"):
        if mine := [used for used in runs if used.unit == unit]:
            parts = {part: sum(used.parts[part] for used in mine) for part in PARTS}
            lines.append(Line("all", unit, parts, len(mine)))
    return lines


def _run_line(used: Usage) -> Line:
    detail = {
        "state": used.state,
        "users": sorted({user for user, _ in used.by_owner if user}),
        "teams": sorted({team for _, team in used.by_owner if team}),
        "starts": used.starts,
        "attempts": used.attempts,
        "step": used.steps,
        "wall_seconds": used.wall_ms / 1000,
        "notes": used.notes,
    }
    return Line(used.run, used.unit, used.parts, 1, detail)


def _owner_lines(runs: Sequence[Usage], by: str) -> list[Line]:
    found: dict[tuple[str, str], Line] = {}
    for used in runs:
        counted = set()
        for (user, team), parts in used.by_owner.items():
            name = (user if by == "user" else team) or "-"
            line = found.setdefault((name, used.unit), Line(name, used.unit, dict.fromkeys(PARTS, 0), 0))
            line.runs += name not in counted
            counted.add(name)
            for part in PARTS:
                line.parts[part] += parts[part]
    return list(found.values())


def _job_of(store: Store) -> tuple[Devices, str]:
    """Devices of a worker by the run's job file, and whether it is trained or learns from rewards."""
    try:
        job = yaml.safe_load(store.get("job.yaml"))
        cluster = job.get("cluster") or {}
        gpus, cpus = cluster.get("gpus_per_worker", 0), cluster.get("cpus_per_worker", 1)
        method = "reinforced" if job.get("rewards") else "trained"
        return Devices(round(gpus * SHARE), round(cpus * SHARE)), method
    except Exception:  # an old run without one, or with one that this version cannot read
        return Devices(0, SHARE), "trained"
