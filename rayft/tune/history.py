"""Finished trials as a search algorithm and a scheduler learn from them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rayft.report.trials import TrialState, number
from rayft.spec import Job
from rayft.tune.choose import NOT_ITS_OWN, value_of
from rayft.tune.propose import Finished


def history_of(job: Job, states: Iterable[TrialState]) -> list[Finished]:
    """The trials that have ended, as a search algorithm learns from them; without those that the machines failed."""
    ended = (state for state in states if state.ended)
    return [finished(job, one) for one in ended if one.status != "failed" or one.code not in NOT_ITS_OWN]


def finished(job: Job, state: TrialState) -> Finished:
    """What a trial came to. A trial that was stopped counts by its last report, a failed one has no objectives."""
    tune = job.tune
    assert tune is not None
    values = [value_of(state, aim.metric) for aim in tune.aims]
    known = [value for value in values if value is not None]
    objectives = tuple(known) if state.status != "failed" and len(known) == len(values) else None
    violations: list[float] = []
    for metric, bound in tune.constraints.items():
        value = value_of(state, metric)
        # What was not measured (suites come at the end) is neither kept to nor broken.
        violations += [0.0] if value is None else bound.violations(value)
    curve = [(step, value) for step, value in state.points(tune.aims[0].metric)]
    return Finished(
        state.trial, state.values, objectives, tuple(violations), curve, stopped=state.status == "stopped"
    )


def results_of(state: TrialState) -> list[dict[str, Any]]:
    """The reports of a trial as its scheduler saw them."""
    found = []
    for count, (step, metrics) in enumerate(state.curve, start=1):
        numbers = {name: value for name, value in metrics.items() if number(value) is not None}
        found.append({"step": step, "report": count, "training_iteration": count, **numbers})
    return found


def results_in_order(states: Iterable[TrialState]) -> list[tuple[TrialState, dict[str, Any]]]:
    """The reports of all trials, each with its trial, in the order in which they came."""
    found = [(state, result) for state in states for result in results_of(state)]
    return sorted(found, key=lambda one: one[0].places.get(one[1]["step"], 0))
