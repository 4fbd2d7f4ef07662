"""What a search cost, and what stopping trials early saved, from the ledger alone.

    saved steps  = sum over trials that were stopped of (steps of a whole trial - steps it ran)
    saved hours  = sum over the same of saved steps x the hours a step took: of the trial itself between its first and last
                   report (its start is not in it), where it has two; else of all trials together
    wall-clock   = sum over drivers of (last row - first row): what lay between two of them is nobody's time

A trial that failed saved nothing, for it gave no answer, and neither did one that a spent budget left unfinished: it may go on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from rayft.report.log import Row
from rayft.report.trials import TrialState


@dataclass(frozen=True)
class Cost:
    """Of a whole search. unit: `GPU`, or `CPU` where no trial held a GPU. hours, saved_hours: in that unit."""

    unit: str
    hours: float
    wall_s: float
    steps: int
    saved_steps: int
    saved_hours: float
    stopped: int
    drivers: int

    @property
    def saved_share(self) -> float:
        """Saved steps as a share of what all trials that gave an answer would have run."""
        whole = self.steps + self.saved_steps
        return self.saved_steps / whole if whole else 0.0


def unit_of(trials: Iterable[TrialState]) -> str:
    """`GPU` or `CPU`: what a search is counted in."""
    return "GPU" if any(trial.gpu_hours for trial in trials) else "CPU"


def hours_of(trial: TrialState, unit: str) -> float:
    """GPU-hours or CPU-hours of a trial."""
    return trial.gpu_hours if unit == "GPU" else trial.cpu_hours


def cost_of(trials: Mapping[str, TrialState], rows: Sequence[Row], max_steps: int | None) -> Cost:
    """max_steps: steps of a whole trial; None: as far as the furthest finished one came."""
    every = list(trials.values())
    unit = unit_of(every)
    hours, steps = sum(hours_of(trial, unit) for trial in every), sum(trial.step for trial in every)
    whole = max_steps or max((trial.step for trial in every if trial.status == "done"), default=0)
    stopped = [trial for trial in every if trial.status == "stopped"]
    saved = {trial.trial: max(0, whole - trial.step) for trial in stopped}
    average = hours / steps if steps else 0.0
    return Cost(
        unit,
        hours,
        _wall(rows),
        steps,
        saved_steps=sum(saved.values()),
        saved_hours=sum(saved[trial.trial] * (_pace(trial, unit) or average) for trial in stopped),
        stopped=len(stopped),
        drivers=len({row.get("epoch", 0) for row in rows}),
    )


def _pace(trial: TrialState, unit: str) -> float | None:
    """Hours a step took between the first and the last report of a trial; None where that says nothing."""
    spent = [(step, hours[0] if unit == "GPU" else hours[1]) for step, hours in sorted(trial.spent.items())]
    if len(spent) < 2:
        return None
    (first, before), (last, after) = spent[0], spent[-1]
    return (after - before) / (last - first) if after > before else None


def _wall(rows: Sequence[Row]) -> float:
    """Seconds in which a driver of the search wrote."""
    spans: dict[int, list[float]] = {}
    for row in rows:
        if "time" in row:
            spans.setdefault(row.get("epoch", 0), []).append(row["time"])
    return sum(max(times) - min(times) for times in spans.values())
