"""Ray's own schedulers, kept: rows before decisions, and a search whose driver died goes on as one whose driver lived."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
from ray.tune.experiment import Trial

from rayft.errors import WorkerError
from rayft.report.log import Row
from rayft.report.trials import trials_of
from tests.decisions import METRIC, Driver, Killed
from tests.ledgers import CHANGE, search_job
from tests.search_jobs import RL, search

ASHA: dict[str, Any] = {"scheduler": "asha", "reduction_factor": 2}
MEDIAN = {"scheduler": "median"}
RATE = {"train.learning_rate": {"loguniform": [1e-5, 1e-2]}}
PBT: dict[str, Any] = {"scheduler": "pbt", "space": RATE, "num_trials": 4, "resample_probability": 0}
STOP, CONTINUE = "STOP", "CONTINUE"


def driver(rows: list[Row] | None = None, **more: Any) -> Driver:
    tune = more.pop("tune", ASHA)
    return Driver(search_job(**tune), [] if rows is None else rows, **more)


# -- rows before decisions -------------------------------------------------------------------------------------------


def test_a_report_is_in_the_ledger_before_anything_follows_from_it() -> None:
    """A driver that dies while it writes the row has decided nothing; what it was to decide is not lost with it."""
    lost = driver(dies_after=2)
    lost.add("t0000")
    with pytest.raises(Killed):
        lost.report("t0000", 4, 1.0)
    assert lost.written("report") == [("t0000", "report", 4)]
    assert lost.decisions == []
    assert not any(recorded for _, recorded in lost.inner._brackets[0]._rungs)


def test_an_end_is_in_the_ledger_before_the_trial_is_stopped() -> None:
    lost = driver(dies_after=5)
    for name in ("t0000", "t0001"):
        lost.add(name)
    lost.report("t0000", 4, 1.0)
    with pytest.raises(Killed):
        lost.report("t0001", 4, 2.0)
    assert lost.written("ended") == [("t0001", "ended", "stopped")]
    assert [one[0] for one in lost.decisions] == ["t0000"]


def test_rows_say_what_was_measured_and_what_was_spent() -> None:
    one = driver()
    one.add("t0000")
    one.report("t0000", 4, 1.0, **{"train.loss": math.nan, "time_this_iter_s": 3.0, "note": "text"})
    row = one.rows[-1]
    assert (row["run"], row["step"], row["cpu_hours"], row["seconds"]) == ("sweep-t0000", 4, 0.04, 12.0)
    assert set(row["metrics"]) == {METRIC, "train.loss"}


def test_a_metric_of_one_source_of_rewards_is_kept() -> None:
    """As a run that learns from several logs it: eval.score/NAME, eval.win_rate/NAME, train.score/NAME."""
    job = {"metric": "eval.win_rate/right", "mode": "max"}
    one = driver(tune=job)
    one.add("t0000")
    one.report("t0000", 4, None, **{"eval.win_rate/right": 0.75})
    assert one.kept.fatal is None
    assert one.rows[-1]["metrics"] == {"eval.win_rate/right": 0.75}


def test_the_last_report_is_the_trials_end() -> None:
    one = driver()
    one.add("t0000")
    assert one.kept.under_way()
    one.complete("t0000", one.result("t0000", 24, 0.5))
    assert one.written("report", "ended") == [("t0000", "report", 24), ("t0000", "ended", "done")]
    assert not one.kept.under_way()


def test_a_trial_that_leaves_is_not_over() -> None:
    one = driver()
    one.add("t0000")
    one.report("t0000", 4, 1.0)
    count = len(one.rows)
    one.complete("t0000", {"left": "the search ends for now", "done": True})
    assert (len(one.rows), one.kept.under_way()) == (count, False)


def test_a_trial_that_failed_ends_with_its_code_and_what_it_spent() -> None:
    one = driver()
    one.add("t0000")
    failed = {"failed_code": 7, "failed_reason": "out of memory"}
    one.complete("t0000", one.result("t0000", 6, None, **failed))
    state = trials_of(one.rows)["t0000"]
    assert (state.status, state.code, state.reason, state.step) == ("failed", 7, "out of memory", 6)
    assert (state.seconds, state.curve, one.kept.fatal) == (18.0, [], None)


def test_a_spent_budget_stops_a_trial_at_its_next_report_and_does_not_end_it() -> None:
    """The report is kept, and nothing is decided by it: that is for the search that is given more."""
    spent = ""
    one = driver(over=lambda: spent)
    one.add("t0000")
    assert one.report("t0000", 4, 1.0) == CONTINUE
    spent = "budget of 60 s is spent"
    assert one.report("t0000", 8, 1.0) == STOP
    assert not trials_of(one.rows)["t0000"].ended
    assert (one.written("report")[-1], one.written("ended")) == (("t0000", "report", 8), [])
    assert not one.kept.under_way()
    again = driver(one.rows)
    again.add("t0000")
    assert again.report("t0000", 12, 1.0) == CONTINUE


# -- metrics that are not there --------------------------------------------------------------------------------------


@pytest.mark.parametrize("tune", [ASHA, MEDIAN, PBT, {}], ids=lambda tune: tune.get("scheduler", "none"))
def test_a_metric_that_no_report_has_ends_the_search_with_those_that_there_are(tune: dict[str, Any]) -> None:
    one = driver(tune={**tune, "metric": "eval.accuracy"})
    one.add("t0000")
    assert one.report("t0000", 4, 1.0) == CONTINUE
    assert one.kept.fatal is not None
    assert one.kept.fatal.code == 2
    assert one.kept.fatal.message == (
        "tune: no report has the metric 'eval.accuracy'; the first one has eval.loss, train.loss."
    )


def test_a_bound_on_what_no_report_has_ends_the_search_at_the_first_one() -> None:
    one = driver(tune={**ASHA, "constraints": {"eval.kl": {"max": 1.0}, CHANGE: {"max": 1.0}}})
    one.add("t0000")
    assert one.report("t0000", 4, 1.0) == CONTINUE
    assert one.kept.fatal is not None
    assert "no report has the metric 'eval.kl'" in one.kept.fatal.message


@pytest.mark.parametrize("last", [False, True])
def test_a_trial_alone_without_the_metric_has_failed_and_the_search_goes_on(last: bool) -> None:
    """Another trial has reported it, in this driver's time or before it."""
    one = driver(tune={**ASHA, "metric": "eval.kl"})
    one.add("t0000")
    one.report("t0000", 4, 1.0, **{"eval.kl": 0.5})
    for name, now in (("t0001", one), ("t0002", driver(one.rows, tune={**ASHA, "metric": "eval.kl"}))):
        now.add(name)
        if last:
            now.complete(name, now.result(name, 24, 1.0))
        else:
            assert now.report(name, 4, 1.0) == STOP
        state = trials_of(now.rows)[name]
        assert (state.status, state.code, state.reason) == ("failed", 2, "it reports no eval.kl")
        assert now.kept.fatal is None


def test_where_the_space_decides_what_is_measured_the_first_trial_may_lack_it() -> None:
    space = {"rl.kl_coef": {"choice": [0.0, 0.01]}}
    one = Driver(search(space, copy.deepcopy(RL), metric="eval.kl"), [])
    one.add("t0000", {"rl.kl_coef": 0.0})
    assert one.report("t0000", 4, 1.0) == STOP
    assert one.kept.fatal is None
    one.add("t0001", {"rl.kl_coef": 0.01})
    assert one.report("t0001", 4, 1.0, **{"eval.kl": 0.5}) == CONTINUE
    assert [state.status for state in trials_of(one.rows).values()] == ["failed", "running"]


def test_a_metric_of_suites_is_asked_for_at_the_end_only() -> None:
    one = driver(tune={"metric": "suite.general.bits_per_byte"})
    one.add("t0000")
    one.report("t0000", 4, 1.0)
    assert one.kept.fatal is None
    one.complete("t0000", one.result("t0000", 24, 1.0, **{"suite.general.bits_per_byt": 1.0}))
    assert one.kept.fatal is not None
    assert "has eval.loss, suite.general.bits_per_byt, train.loss." in one.kept.fatal.message


@pytest.mark.parametrize("tune", [ASHA, MEDIAN, PBT], ids=lambda tune: tune["scheduler"])
def test_nan_decides_nothing(tune: dict[str, Any]) -> None:
    """It is in the ledger, stops nobody, is nobody's measure, and does not end the search."""
    one = driver(tune={**tune, "metric": METRIC})
    for number in range(3):
        one.add(f"t{number:04d}", {"train.learning_rate": 1e-3})
        assert one.report(f"t{number:04d}", 4, math.nan) == CONTINUE
    assert one.report("t0000", 8, 9.0) == CONTINUE
    one.complete("t0001", one.result("t0001", 24, math.nan))
    assert len(one.written("report")) == 5
    assert one.written("ended") == [("t0001", "ended", "done")]
    assert one.kept.fatal is None


# -- a trial's own process -------------------------------------------------------------------------------------------


def test_a_trial_whose_process_died_waits_and_goes_on_with_what_it_was() -> None:
    one = driver()
    for name in ("t0000", "t0001"):
        one.add(name)
        one.report(name, 4, 1.0)
    one.dies("t0000")
    assert one.written("waiting") == [("t0000", "waiting", "its process died and is started again")]
    assert one.written("ended") == []
    state = trials_of(one.rows)["t0000"]
    assert (state.status, state.step) == ("waiting", 4)
    # what it gives again counts for nothing, and its next report is compared
    assert one.report("t0000", 4, 99.0) == CONTINUE
    assert len(one.written("report")) == 2
    assert one.report("t0001", 8, 1.0) == CONTINUE
    assert one.report("t0000", 8, 2.0) == STOP
    assert one.written("ended") == [("t0000", "ended", "stopped")]


def test_a_trial_whose_process_died_once_too_often_has_failed() -> None:
    one = driver()
    trial = one.add("t0000")
    one.report("t0000", 4, 1.0)
    one.kept.on_trial_error(one, trial)
    state = trials_of(one.rows)["t0000"]
    assert (state.status, state.code, state.step) == ("failed", WorkerError.code, 4)
    assert state.reason
    assert not one.kept.under_way()


# -- paused trials ---------------------------------------------------------------------------------------------------


def test_a_trial_that_is_stopped_while_it_waits_to_be_compared_ends_where_it_waited() -> None:
    """Hyperband, two reports long: the first bracket holds two trials that are not compared, the second two that are."""
    tune = {"scheduler": "hyperband", "reduction_factor": 2}
    job = search_job(**tune)
    job = job.model_copy(update={"train": job.train.model_copy(update={"max_steps": 8})})
    one = Driver(job, [])
    for number in range(4):
        one.add(f"t{number:04d}")
    assert [one.report(f"t{number:04d}", 4, 9.0 - number) for number in range(3)] == [
        CONTINUE,
        CONTINUE,
        "PAUSE",
    ]
    assert one.written("waiting") == [("t0002", "waiting", "hyperband to compare it")]
    assert one.report("t0003", 4, 1.0) == CONTINUE
    state = trials_of(one.rows)["t0002"]
    assert (state.status, state.step, state.reason) == ("stopped", 4, "hyperband: step 4")
    assert one.trials["t0002"].status == Trial.TERMINATED


def test_the_worst_of_a_population_goes_on_from_the_best_ones_checkpoint_with_moved_values() -> None:
    one = driver(tune=PBT)
    for number in range(4):
        one.add(f"t{number:04d}", {"train.learning_rate": 1e-5 * 10**number})
    for number, loss in ((1, 3.0), (2, 2.0), (0, 1.0), (3, 4.0)):
        one.report(f"t{number:04d}", 4, loss)
    worst = one.trials["t0003"]
    pointer = worst.run_metadata.checkpoint_manager.latest_checkpoint_result.checkpoint
    assert (worst.status, pointer.path) == (Trial.PAUSED, "t0000/4")
    # 1e-5 times 0.8 is below the range
    assert worst.config["train.learning_rate"] in (1e-5, pytest.approx(1.2e-5))
    assert one.rows[-1]["event"] == "report"
    assert one.kept.choose_trial_to_run(one) is worst
