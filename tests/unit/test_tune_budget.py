"""What a search learns from trials that have ended, and what it has spent, earlier drivers included."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rayft.errors import (
    DivergedError,
    MemoryExceededError,
    PreemptedError,
    ResourceError,
    StorageError,
    WorkerError,
)
from rayft.report.trials import TrialState, trials_of
from rayft.spec import Job
from rayft.storage import open_store
from rayft.tune.algorithm import Proposals
from rayft.tune.book import Book
from rayft.tune.budget import Spending
from rayft.tune.history import finished, history_of, results_of
from rayft.tune.propose import Finished, proposer_of
from rayft.tune.run import Search
from tests.ledgers import CHANGE, Ledger, search_job

RATE = {"train.learning_rate": 1e-3}


def state_of(ledger: Ledger, name: str = "t0000") -> TrialState:
    return trials_of(ledger.rows)[name]


def trial(*losses: float | None, status: str = "done", code: int = 0, **last: Any) -> TrialState:
    """A trial that has ended."""
    ledger = Ledger()
    ledger.begin("t0000", RATE)
    ledger.curve("t0000", losses, **last)
    ledger.end("t0000", status, step=4 * len(losses), code=code)
    return state_of(ledger)


def learnt(state: TrialState, **tune: Any) -> Finished:
    return finished(search_job(**tune), state)


# -- history ---------------------------------------------------------------------------------------------------------


def test_a_trial_counts_by_its_last_report() -> None:
    found = learnt(trial(3.0, 1.0, 2.0))
    assert (found.trial, dict(found.values), found.objectives) == ("t0000", RATE, (2.0,))
    assert (list(found.curve), found.stopped) == ([(4, 3.0), (8, 1.0), (12, 2.0)], False)


def test_a_trial_that_was_stopped_counts_by_what_it_had_and_is_known_as_stopped() -> None:
    found = learnt(trial(3.0, 1.5, status="stopped"))
    assert (found.objectives, found.stopped) == ((1.5,), True)


def test_a_failed_trial_has_no_objectives_though_it_reported() -> None:
    found = learnt(trial(3.0, 0.1, status="failed", code=DivergedError.code))
    assert (found.objectives, found.stopped, len(found.curve)) == (None, False, 2)


@pytest.mark.parametrize("losses", [(), (3.0, None)], ids=["no report", "NaN at the end"])
def test_a_trial_without_a_number_has_no_objectives(losses: tuple[float | None, ...]) -> None:
    found = learnt(trial(*losses))
    assert found.objectives is None
    assert list(found.curve) == [(4 * n, loss) for n, loss in enumerate(losses, 1) if loss is not None]


def test_several_objectives_come_in_their_order_or_not_at_all() -> None:
    aims = [{"metric": "seconds"}, {"metric": "eval.loss"}]
    job = search_job(metric=None, objectives=aims, searcher="optuna")
    assert finished(job, trial(3.0, 2.0)).objectives == (24.0, 2.0)
    assert finished(job, trial(3.0, None)).objectives is None


@pytest.mark.parametrize(
    ("bound", "value", "violations"),
    [
        ({"max": 0.05}, 0.25, [0.2]),
        ({"max": 0.05}, -0.25, [-0.3]),
        ({"min": 0.5}, 0.25, [0.25]),
        ({"min": -1.0, "max": 0.05}, 0.25, [-1.25, 0.2]),
    ],
)
def test_violations_say_how_far_beyond_each_bound(
    bound: dict[str, float], value: float, violations: list[float]
) -> None:
    state = trial(3.0, 2.0, change__general__bits_per_byte=value)
    assert learnt(state, constraints={CHANGE: bound}).violations == pytest.approx(violations)


def test_what_was_not_measured_breaks_no_bound() -> None:
    """Suites are measured at the end, which a trial that was stopped never reached."""
    found = learnt(trial(3.0, status="stopped"), constraints={CHANGE: {"max": -1.0}})
    assert max(found.violations) == 0
    assert found.objectives == (3.0,)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (DivergedError, True),
        (MemoryExceededError, True),
        (ResourceError, False),
        (StorageError, False),
        (WorkerError, False),
    ],
)
def test_what_the_machines_failed_says_nothing_of_a_trials_values(error: type[Any], told: bool) -> None:
    job = search_job()
    assert bool(history_of(job, [trial(3.0, status="failed", code=error.code)])) is told
    # the code alone leaves nothing out: a trial that was done has none
    assert len(history_of(job, [trial(3.0, code=error.code)])) == 1


def test_trials_that_go_on_are_no_history() -> None:
    ledger = Ledger()
    for name in ("t0000", "t0001", "t0002"):
        ledger.begin(name, RATE)
        ledger.report(name, 4, 1.0)
    ledger.end("t0001", "stopped", step=4)
    ledger.add("waiting", "t0002", reason="room")
    assert [one.trial for one in history_of(search_job(), trials_of(ledger.rows).values())] == ["t0001"]


def test_results_are_the_reports_as_ray_tune_gave_them() -> None:
    found = results_of(trial(3.0, None, 2.0, train__loss=1.0))
    assert found == [
        {"step": 4, "report": 1, "training_iteration": 1, "eval.loss": 3.0},
        {"step": 8, "report": 2, "training_iteration": 2},
        {"step": 12, "report": 3, "training_iteration": 3, "eval.loss": 2.0, "train.loss": 1.0},
    ]


# -- what was spent --------------------------------------------------------------------------------------------------


def spending(job: Job, before_s: float = 0.0, gpu_hours: tuple[float, ...] = ()) -> Spending:
    assert job.tune is not None
    states = {str(number): TrialState(str(number), gpu_hours=used) for number, used in enumerate(gpu_hours)}
    return Spending(job.tune, before_s, lambda: states)


def test_without_a_budget_nothing_is_ever_spent() -> None:
    assert spending(search_job(), 1e9, (1e9,)).over() == ""


def test_time_of_earlier_drivers_counts() -> None:
    job = search_job(time_budget_s=3600)
    assert spending(job, 3590).over() == ""
    assert spending(job, 3600).over() == "budget of 3600 s is spent"
    assert 100 <= spending(job, 100).seconds() < 130


def test_time_goes_on() -> None:
    budget = spending(search_job(time_budget_s=100.05), 100)
    before = budget.seconds()
    time.sleep(0.1)
    assert budget.seconds() >= before + 0.1
    assert budget.over() == "budget of 100.05 s is spent"


def test_gpu_hours_of_all_trials_count_together() -> None:
    job = search_job(gpu_hours=2)
    assert spending(job, gpu_hours=(0.5, 1.4)).over() == ""
    assert spending(job, gpu_hours=(0.5, 1.4, 0.125)).over() == "budget of 2 GPU-hours is spent (2.02 used)"


def test_what_a_spent_budget_left_unfinished_goes_on_with_more_of_it() -> None:
    """One trial is over, one stood at a report, one never ran: the search ends well, and the next one begins with these two."""
    ledger = Ledger()
    ledger.begin("t0000", RATE)
    ledger.end("t0000")
    ledger.begin("t0001", RATE)
    ledger.report("t0001", 4, 1.0)
    ledger.add("proposed", "t0002", values=RATE)

    def tell(row: dict[str, Any]) -> None:
        ledger.add(**row)

    ended = Search.__new__(Search)
    ended.book = SimpleNamespace(states=lambda: trials_of(ledger.rows), tell=tell)  # type: ignore[assignment]
    ended.kept = SimpleNamespace(fatal=None)  # type: ignore[assignment]
    ended._spent = ended._leaving = "budget of 60 s is spent"
    ended._conclude(None)
    states = trials_of(ledger.rows)
    waiting = ("waiting", "budget of 60 s is spent")
    assert [(one.status, one.reason) for one in states.values()] == [("done", ""), waiting, waiting]
    job = search_job(time_budget_s=120, num_trials=3)
    more = Proposals(job, proposer_of(job), None, lambda: states, tell, spending(job), at_once=True)
    assert not more.is_finished()
    assert [state.trial for state in more._again] == ["t0001", "t0002"]
    ended._spent = ""
    with pytest.raises(PreemptedError, match="1 of its 3 trials have ended"):
        ended._conclude(None)


def test_gpu_hours_are_asked_of_the_ledger_each_time() -> None:
    job = search_job(gpu_hours=1)
    assert job.tune is not None
    states: dict[str, TrialState] = {}
    budget = Spending(job.tune, 0.0, lambda: states)
    assert budget.over() == ""
    states["t0000"] = TrialState("t0000", gpu_hours=1.0)
    assert budget.over()


def test_seconds_of_earlier_drivers_leave_out_the_time_between_them(tmp_path: Path) -> None:
    """Two drivers of three and of two rows, a second apart, with an hour between; the third one's own do not count."""
    store, ledger = open_store(tmp_path), Ledger()
    ledger.add("open")
    ledger.begin("t0000", RATE)
    late = Ledger(began=1.7e9 + 3600)
    late.epoch = 2
    late.report("t0000", 4, 1.0)
    late.end("t0000", step=4)
    own = Ledger(began=1.7e9 + 7200)
    own.epoch = 3
    own.add("open")
    own.add("end", code=0)
    ledger.rows += late.rows + own.rows
    ledger.write(store)
    assert Book(store, None, 3).seconds_before() == pytest.approx(2 + 1)
    assert Book(store, None, 2).seconds_before() == pytest.approx(2)
    assert Book(store, None, 1).seconds_before() == 0
    # a row that a replaced driver wrote late is of its own time
    late.rows.clear()
    ledger.epoch = 1
    ledger.add("waiting", "t0000", reason="late")
    other = open_store(tmp_path / "other")
    ledger.write(other)
    assert Book(other, None, 3).seconds_before() == pytest.approx(3 + 1)
