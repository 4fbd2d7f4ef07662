"""The ledger of a search: rows of kind `trial` in the search folder's run log, and the trials that they describe.

    {"kind": "trial", "event", "trial", ...}, and by event
    proposed  values                                       written before the trial starts
    segment   run, values, forked_from, reason             a run of the trial begins; forked_from: {trial, run, step} or null
    waiting   reason                                       for room, to be compared, or for more of a budget that is spent
    running
    report    run, step, metrics, gpu_hours, cpu_hours, seconds      one evaluation; cumulative for the trial
    ended     status, code, reason, step                   status: done, stopped or failed
    again     reason                                       what the machines failed is tried once more

A trial is a line of segments, each a run of its own. A segment begins at the step it was forked at (0 without a fork),
and from there on what earlier segments reported is void: the line goes another way. Of several reports of one segment and
step the last counts, so a run that went back to a checkpoint, or a second driver, may report a step again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rayft.report.log import Row

TRIAL = "trial"
#: What a trial can be. The last three are ends.
STATUSES = ("proposed", "waiting", "running", "done", "stopped", "failed")
ENDS = frozenset({"done", "stopped", "failed"})

#: Step -> flat metrics; a value that the log could not hold (NaN, infinity) is None.
Metrics = dict[str, float | None]
Curve = list[tuple[int, Metrics]]


@dataclass(frozen=True)
class Fork:
    """A committed checkpoint of a trial's run, from which another run began."""

    trial: str
    run: str
    step: int


@dataclass
class Segment:
    """One run of a trial. reason: why it began (`exploit`, out of memory), empty for the first."""

    run: str
    values: dict[str, Any]
    forked_from: Fork | None = None
    reason: str = ""
    reports: dict[int, Metrics] = field(default_factory=dict)

    @property
    def start(self) -> int:
        """The step it began at."""
        return self.forked_from.step if self.forked_from else 0


@dataclass
class TrialState:
    """A trial as the ledger knows it.

    values: the sampled ones of its newest segment. curve: reports that count, by step. step: the furthest one reported.
    gpu_hours, cpu_hours, seconds: all that was spent on it while it held workers, void reports included. code: exit code of its end, or None.
    spent: step -> (GPU-hours, CPU-hours) at its report. places: step -> where in the ledger its report stands, to put those of
    several trials in order. began, changed: seconds since 1970 of its first and last row.
    """

    trial: str
    values: dict[str, Any] = field(default_factory=dict)
    segments: list[Segment] = field(default_factory=list)
    status: str = "proposed"
    reason: str = ""
    curve: Curve = field(default_factory=list)
    step: int = 0
    gpu_hours: float = 0.0
    cpu_hours: float = 0.0
    seconds: float = 0.0
    code: int | None = None
    spent: dict[int, tuple[float, float]] = field(default_factory=dict)
    places: dict[int, int] = field(default_factory=dict)
    began: float = 0.0
    changed: float = 0.0

    @property
    def ended(self) -> bool:
        return self.status in ENDS

    @property
    def run(self) -> str | None:
        """Name of its newest run."""
        return self.segments[-1].run if self.segments else None

    @property
    def last(self) -> Metrics:
        """Metrics of its last report; the one of a finished trial has everything, suites included."""
        return self.curve[-1][1] if self.curve else {}

    @property
    def forks(self) -> list[Segment]:
        """Segments that began from another trial's checkpoint."""
        return [s for s in self.segments if s.forked_from and s.forked_from.trial != self.trial]

    def points(self, metric: str) -> list[tuple[int, float]]:
        """(step, value) of one metric where it is a number."""
        return [(step, v) for step, metrics in self.curve if (v := number(metrics.get(metric))) is not None]


def trials_of(rows: Iterable[Row]) -> dict[str, TrialState]:
    """The trials of a ledger, by id in the order of their proposal. rows: as `read_all` gives them.

    Rows of several drivers are taken in the order of their epochs: what a replaced driver still wrote stands before what
    its successor did.
    """
    trials: dict[str, TrialState] = {}
    for place, row in enumerate(sorted(rows, key=lambda row: row.get("epoch", 0))):
        if row.get("kind") != TRIAL or "trial" not in row:
            continue
        name = row["trial"]
        if name not in trials:
            trials[name] = TrialState(name, began=row.get("time", 0.0))
        _take(trials[name], row)
        if row.get("event") == "report":
            trials[name].places[row["step"]] = place
    for trial in trials.values():
        _settle(trial)
    return dict(sorted(trials.items()))


def lineage(trials: Mapping[str, TrialState], name: str) -> list[tuple[Segment, int]]:
    """The segments whose weights a trial's model went through, each with the last step that it gave, oldest first.

    The last one's is the trial's own last step. Forks of trials that the ledger does not have end the line.
    """
    trial = trials[name]
    if not trial.segments:
        return []
    line = [(trial.segments[-1], trial.step)]
    seen = {line[0][0].run}
    while fork := line[0][0].forked_from:
        donor = trials.get(fork.trial)
        found = next((s for s in donor.segments if s.run == fork.run), None) if donor else None
        if found is None or found.run in seen:
            break
        seen.add(found.run)
        line.insert(0, (found, fork.step))
    return line


def number(value: Any) -> float | None:
    """`value` as a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _take(trial: TrialState, row: Row) -> None:
    event = row.get("event")
    if trial.ended and event in ("segment", "waiting", "running"):
        return  # a process that had not heard of the end
    trial.changed = row.get("time", trial.changed)
    if event == "proposed":
        trial.values = dict(row["values"])
    elif event == "segment":
        _begin(trial, row)
        _go(trial, "running")
    elif event in ("waiting", "running"):
        _go(trial, event, row.get("reason", ""))
    elif event == "report":
        _report(trial, row)
        if not trial.ended:
            _go(trial, "running")
    elif event == "again":
        _go(trial, "waiting", row.get("reason", ""))
    elif event == "ended":
        _go(trial, row["status"], row.get("reason", ""))
        trial.code = row.get("code")
        trial.step = max(trial.step, row.get("step") or 0)
    for key in ("gpu_hours", "cpu_hours", "seconds"):
        # A driver that goes on after another begins from what its predecessor had last written.
        setattr(trial, key, max(getattr(trial, key), number(row.get(key)) or 0.0))


def _go(trial: TrialState, status: str, reason: str = "") -> None:
    trial.status, trial.reason = status, reason
    if not trial.ended:
        trial.code = None


def _begin(trial: TrialState, row: Row) -> None:
    fork = row.get("forked_from")
    segment = Segment(
        row["run"],
        {**trial.values, **(row.get("values") or {})},
        Fork(fork["trial"], fork["run"], fork["step"]) if fork else None,
        row.get("reason") or "",
    )
    for number_, known in enumerate(trial.segments):
        if known.run == segment.run:  # a driver that went on wrote it again
            segment.reports = known.reports
            trial.segments[number_] = segment
            return
    trial.segments.append(segment)


def _report(trial: TrialState, row: Row) -> None:
    segment = next((s for s in trial.segments if s.run == row.get("run")), None)
    if segment is None:
        segment = Segment(row.get("run") or "", dict(trial.values))
        trial.segments.append(segment)
    segment.reports[row["step"]] = dict(row.get("metrics") or {})
    trial.spent[row["step"]] = (number(row.get("gpu_hours")) or 0.0, number(row.get("cpu_hours")) or 0.0)


def _settle(trial: TrialState) -> None:
    """Reports that count, once every segment is known."""
    counted: dict[int, Metrics] = {}
    for segment in trial.segments:
        if counted and segment is not trial.segments[0]:
            counted = {step: metrics for step, metrics in counted.items() if step <= segment.start}
        counted.update(segment.reports)
    trial.curve = sorted(counted.items())
    if trial.segments:
        trial.values = dict(trial.segments[-1].values)
    if trial.curve:
        ended_at = trial.step if trial.ended else 0
        trial.step = max(trial.curve[-1][0], ended_at)
