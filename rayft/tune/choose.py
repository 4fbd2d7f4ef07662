"""The best trial of a search, and why the others are not it.

A trial counts by its last report, and finished trials come before all others: only their model has been trained and measured
to the end, suites are measured only there, and the best of all reports of a noisy metric would look better than any model
that is left (its checkpoint may be pruned by then). Only where no trial finished with what is asked for do trials that were
stopped or are still going count. Failed ones never do.

With several objectives the front holds the trials that none other beats in one objective without losing in another; the best
is the one on the front that leads in the objective named first, ties broken by the next.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rayft.errors import JobError, RayftError, ResourceError, StorageError, WorkerError
from rayft.report.trials import TrialState, number
from rayft.spec.tune import Bound, Objective

#: Metrics that every trial has, by what it used.
USED = ("gpu_hours", "cpu_hours", "seconds")
#: Failures that say nothing of a trial's values, the machines' own: code -> error.
NOT_ITS_OWN: dict[int, type[RayftError]] = {
    error.code: error for error in (ResourceError, StorageError, WorkerError)
}


@dataclass(frozen=True)
class Choice:
    """The best trial. values: of the objectives. front: ids that no other beats in everything, the best first.

    out: id of a trial that did not count -> why. finished: whether the ones that counted were trained to the end; if not, broke is how
    many were that break a constraint.
    """

    trial: TrialState
    values: dict[str, float]
    front: list[str]
    out: dict[str, str] = field(default_factory=dict)
    finished: bool = True
    broke: int = 0

    @property
    def how(self) -> str:
        """One sentence on how it was chosen."""
        why = "none finished with a value"
        if self.broke:
            why = f"all that finished ({self.broke}) break a constraint"
        which = "finished trials" if self.finished else f"unfinished trials, since {why},"
        of = (
            f"of {len(self.front)} on the Pareto front, by the first objective"
            if len(self.values) > 1
            else ""
        )
        return " ".join(part for part in (f"by the last report of {which}", of) if part).rstrip(",")


def choose(
    trials: Mapping[str, TrialState], objectives: Sequence[Objective], constraints: Mapping[str, Bound]
) -> Choice:
    """The best of the trials. Raises JobError where no trial has the metrics, or none meets the constraints, and the machines' error
    where they failed all of them."""
    wanted = [*(aim.metric for aim in objectives), *constraints]
    out = {name: why for name, trial in trials.items() if (why := _cannot_count(trial, wanted))}
    counted = [trial for name, trial in trials.items() if name not in out]
    if not counted:
        raise _nothing_reported(trials, wanted, out)
    for trial in counted:
        if broken := _broken(trial, constraints):
            out[trial.trial] = broken[0].text
    kept = [trial for trial in counted if trial.trial not in out]
    if not kept:
        raise _nothing_meets(counted, constraints)
    finished = [trial for trial in kept if trial.status == "done"]
    for trial in kept if finished else ():
        if trial.status != "done":
            out[trial.trial] = f"{trial.status} at step {trial.step}" + (
                f": {trial.reason}" if trial.reason else ""
            )
    kept = finished or kept
    points = {trial.trial: [_cost(trial, aim) for aim in objectives] for trial in kept}
    front = sorted(
        (name for name in points if not any(_dominates(other, points[name]) for other in points.values())),
        key=lambda name: (points[name], name),
    )
    best = trials[front[0]]
    values = {aim.metric: _needed(best, aim.metric) for aim in objectives}
    broke = 0 if finished else sum(trial.status == "done" for trial in counted)
    return Choice(best, values, front, out, bool(finished), broke)


def value_of(trial: TrialState, metric: str) -> float | None:
    """A metric in a trial's last report; None where it is not there, or no number (what diverged at the end has none)."""
    last = trial.last
    if metric not in last and metric in USED:
        return float(getattr(trial, metric))
    return number(last.get(metric))


def metrics_reported(trials: Mapping[str, TrialState]) -> list[str]:
    """Names of all metrics that any trial has reported."""
    return sorted({name for trial in trials.values() for _, metrics in trial.curve for name in metrics})


@dataclass(frozen=True)
class _Broken:
    """A constraint that a trial does not meet. by: how far relative to the limit, to compare trials."""

    by: float
    text: str


def _broken(trial: TrialState, constraints: Mapping[str, Bound]) -> list[_Broken]:
    """Constraints that a trial breaks, the worst first."""
    found = []
    for metric, limits in constraints.items():
        value = _needed(trial, metric)
        for limit, beyond, side in ((limits.max, 1, "above its max"), (limits.min, -1, "below its min")):
            if limit is not None and (over := beyond * (value - limit)) > 0:
                text = f"{metric} is {value:.4g}, {over:.3g} {side} {limit:g}"
                found.append(_Broken(over / (abs(limit) or 1.0), text))
    return sorted(found, key=lambda broken: -broken.by)


def _cannot_count(trial: TrialState, wanted: Sequence[str]) -> str:
    """Why a trial has no value to compare; empty where it has."""
    if trial.status == "failed":
        return f"failed: {trial.reason}" if trial.reason else "failed"
    for metric in wanted:
        if value_of(trial, metric) is None:
            if any(metric in metrics for _, metrics in trial.curve):
                return f"{metric} was no number at step {trial.step}"
            told = f": {trial.reason}" if trial.reason else ""
            return f"{trial.status}{told}; did not report {metric}"
    return ""


def _nothing_reported(
    trials: Mapping[str, TrialState], wanted: Sequence[str], out: Mapping[str, str]
) -> RayftError:
    if trials and all(trial.status == "failed" and trial.code in NOT_ITS_OWN for trial in trials.values()):
        name, trial = next(iter(trials.items()))
        return NOT_ITS_OWN[trial.code or 0](
            f"All {len(trials)} trials were lost to the machines, and none to its values; {name}: {trial.reason.rstrip('.')}.",
            "See to that, and start the search again under the same name: they are tried once more.",
        )
    names = metrics_reported(trials)
    missing = [metric for metric in wanted if metric not in names and metric not in USED]
    if missing and names:
        near = difflib.get_close_matches(missing[0], names, n=1)
        return JobError(
            f"No trial of {len(trials)} reported {missing[0]!r}; they reported {', '.join(names)}.",
            f"Did you mean {near[0]!r}?" if near else "Name one of these in tune.metric or tune.constraints.",
        )
    first = next(iter(out.items()), None)
    about = f"; {first[0]}: {first[1]}" if first else ""
    return JobError(
        f"No trial of {len(trials)} has a value of {', '.join(repr(metric) for metric in wanted)} to choose by{about}.",
        "Look at the trials' reasons; a search of the same name tries on.",
    )


def _nothing_meets(counted: Sequence[TrialState], constraints: Mapping[str, Bound]) -> JobError:
    worst = {trial.trial: _broken(trial, constraints)[0] for trial in counted}
    name = min(worst, key=lambda name: (worst[name].by, name))
    which = " and ".join(constraints) if len(constraints) < 3 else f"the {len(constraints)} constraints"
    return JobError(
        f"No trial of {len(counted)} meets the constraints on {which}; the closest is {name}: {worst[name].text}.",
        "Widen tune.constraints, or the search space.",
    )


def _needed(trial: TrialState, metric: str) -> float:
    value = value_of(trial, metric)
    assert value is not None, f"{trial.trial} was taken to have {metric}"
    return value


def _cost(trial: TrialState, aim: Objective) -> float:
    """The value turned so that less is better."""
    value = _needed(trial, aim.metric)
    return -value if aim.mode == "max" else value


def _dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))
