"""Which trial is the best, and why the others are not."""

from __future__ import annotations

import pytest

from rayft.errors import JobError, RayftError, ResourceError, StorageError, WorkerError
from rayft.report.trials import trials_of
from rayft.spec.tune import Bound, Objective
from rayft.tune.choose import choose
from tests.ledgers import CHANGE, LOSS, Ledger, asha_search


def test_the_best_is_a_finished_one_by_its_last_report() -> None:
    ledger = Ledger()
    for name, losses in {"t0000": [0.5, 0.9], "t0001": [0.9, 0.8]}.items():
        ledger.begin(name, {})
        ledger.curve(name, losses)
        ledger.end(name, step=8)
    ledger.begin("t0002", {})
    ledger.curve("t0002", [0.1])
    ledger.end("t0002", "stopped", "asha: rung of step 4", 4)
    choice = choose(trials_of(ledger.rows), LOSS, {})
    assert (choice.trial.trial, choice.values, choice.finished) == ("t0001", {"eval.loss": 0.8}, True)
    assert choice.out == {"t0002": "stopped at step 4: asha: rung of step 4"}
    worst = choose(trials_of(ledger.rows), [Objective(metric="eval.loss", mode="max")], {})
    assert worst.trial.trial == "t0000"


def test_a_search_without_finished_trials_takes_what_there_is() -> None:
    ledger = Ledger()
    ledger.begin("t0000", {})
    ledger.curve("t0000", [0.5])
    ledger.begin("t0001", {})
    ledger.curve("t0001", [0.4])
    ledger.end("t0001", "stopped", "budget of 9 s is spent", 4)
    ledger.begin("t0002", {})
    ledger.curve("t0002", [0.1])
    ledger.end("t0002", "failed", "out of memory", 4, code=7)
    choice = choose(trials_of(ledger.rows), LOSS, {})
    assert (choice.trial.trial, choice.finished) == ("t0001", False)
    assert "none finished" in choice.how


@pytest.mark.parametrize("odd", [None, float("nan"), float("inf")])
def test_a_trial_whose_last_value_is_no_number_is_not_the_best(odd: float | None) -> None:
    ledger = Ledger()
    for name, losses in {"t0000": [0.1, odd], "t0001": [0.9, 0.8]}.items():
        ledger.begin(name, {})
        ledger.curve(name, losses)
        ledger.end(name, step=8)
    choice = choose(trials_of(ledger.rows), LOSS, {})
    assert choice.trial.trial == "t0001"
    assert choice.out == {"t0000": "eval.loss was no number at step 8"}


def test_a_metric_that_nobody_reported_is_refused_with_those_that_were() -> None:
    trials = trials_of(asha_search().rows)
    with pytest.raises(
        JobError,
        match=r"No trial of 8 reported 'eval.los'; they reported .*eval.loss.* Did you mean 'eval.loss'\?",
    ):
        choose(trials, [Objective(metric="eval.los")], {})
    with pytest.raises(JobError, match=r"reported 'suite\.other\.f1'"):
        choose(trials, LOSS, {"suite.other.f1": Bound(max=1)})


def test_a_search_without_a_report_is_refused_with_the_reason() -> None:
    ledger = Ledger()
    ledger.begin("t0000", {})
    ledger.end("t0000", "failed", "the data is gone", 0, code=3)
    for trials in (trials_of(ledger.rows), {}):
        with pytest.raises(
            JobError, match=r"has a value of 'eval.loss'.*" + ("the data is gone" if trials else "")
        ):
            choose(trials, LOSS, {})


@pytest.mark.parametrize("error", [ResourceError, StorageError, WorkerError])
def test_a_search_whose_trials_the_machines_failed_ends_with_their_code(error: type[RayftError]) -> None:
    ledger = Ledger()
    for name in ("t0000", "t0001"):
        ledger.begin(name, {})
        ledger.curve(name, [0.5])
        ledger.end(name, "failed", "no node would have it.", 4, code=error.code)
    with pytest.raises(
        error,
        match=r"All 2 trials were lost to the machines, and none to its values; t0000: no node would have it\. ",
    ) as caught:
        choose(trials_of(ledger.rows), LOSS, {})
    assert "tried once more" in caught.value.remedy
    ledger.begin("t0002", {})
    ledger.end("t0002", "failed", "the loss is NaN", 4, code=6)
    with pytest.raises(JobError):
        choose(trials_of(ledger.rows), LOSS, {})


def test_constraints() -> None:
    """t0005 leads by the loss, but forgets 0.05; nothing below 0.005 is left, and t0001 comes closest."""
    trials = trials_of(asha_search().rows)
    assert choose(trials, LOSS, {}).trial.trial == "t0005"
    choice = choose(trials, LOSS, {CHANGE: Bound(max=0.04)})
    assert choice.trial.trial == "t0003"
    assert choice.out["t0005"] == f"{CHANGE} is 0.05, 0.01 above its max 0.04"
    with pytest.raises(
        JobError,
        match=rf"No trial of 3 meets .*; the closest is t0001: {CHANGE} is 0.01, 0.005 above its max 0.005",
    ):
        choose(trials, LOSS, {CHANGE: Bound(max=0.005)})
    with pytest.raises(JobError, match=r"closest is t0005: .*below its min 1"):
        choose(trials, LOSS, {CHANGE: Bound(min=1.0)})


def test_where_only_trials_that_were_stopped_keep_to_the_constraints_that_is_said() -> None:
    ledger = Ledger()
    for name, loss, f1, status in (("t0000", 0.2, 0.1, "done"), ("t0001", 0.5, 0.9, "stopped")):
        ledger.begin(name, {})
        ledger.curve(name, [loss], suite__x__f1=f1)
        ledger.end(name, status, "", 4)
    trials = trials_of(ledger.rows)
    choice = choose(trials, LOSS, {"suite.x.f1": Bound(min=0.5)})
    assert (choice.trial.trial, choice.finished) == ("t0001", False)
    assert (
        choice.how
        == "by the last report of unfinished trials, since all that finished (1) break a constraint"
    )
    assert choose(trials, LOSS, {}).how == "by the last report of finished trials"


def test_several_objectives_have_a_front_and_the_first_leads() -> None:
    ledger = Ledger()
    points = {"t0000": (0.5, 0.9), "t0001": (0.6, 0.95), "t0002": (0.7, 0.95), "t0003": (0.4, 0.2)}
    for name, (loss, f1) in points.items():
        ledger.begin(name, {})
        ledger.curve(name, [loss], suite__x__f1=f1)
        ledger.end(name, step=4)
    aims = [Objective(metric="eval.loss"), Objective(metric="suite.x.f1", mode="max")]
    choice = choose(trials_of(ledger.rows), aims, {})
    assert choice.front == ["t0003", "t0000", "t0001"]
    assert choice.trial.trial == "t0003"
    assert choose(trials_of(ledger.rows), aims[::-1], {}).trial.trial == "t0001"
    by_cost = choose(trials_of(ledger.rows), [Objective(metric="cpu_hours"), LOSS[0]], {})
    assert by_cost.front == ["t0003"]
