"""A search whose driver died after any row of its ledger comes to what it would have come to: Ray's own schedulers, replayed."""

from __future__ import annotations

from typing import Any

import pytest

from rayft.report.log import Row
from tests.decisions import (
    FAILS,
    METRIC,
    Driver,
    Killed,
    Order,
    Plan,
    at_random,
    in_turns,
    interrupted,
    outcome,
    some_plan,
    uninterrupted,
)  # fmt: skip
from tests.ledgers import search_job

ASHA: dict[str, Any] = {"scheduler": "asha", "reduction_factor": 2}
MEDIAN: dict[str, Any] = {"scheduler": "median"}
PBT: dict[str, Any] = {
    "scheduler": "pbt",
    "space": {"train.learning_rate": {"loguniform": [1e-5, 1e-2]}},
    "num_trials": 4,
    "perturb_steps": 8,
}


def at_its_end(rows: list[Row], at: int) -> bool:
    """Whether a driver that died after `at` rows had a report in the ledger by which the trial was stopped, and not its end."""
    row, after = rows[at - 1], rows[at]
    return row["event"] == "report" and after.get("status") == "stopped" and row["trial"] == after["trial"]


def differences(tune: dict[str, Any], plan: Plan, order: Order, *, at_ends: bool = False) -> dict[int, Any]:
    """Rows after which a driver may not die, and what the search came to then; at_ends: only those of `at_its_end`."""
    job = search_job(**tune)
    rows = uninterrupted(job, plan, order)
    expected, found = outcome(rows), {}
    assert {"stopped", "done"} <= {status for status, *_ in expected.values()}, "nothing is decided here"
    for at in range(1, len(rows)):
        if (
            at_its_end(rows, at) is at_ends
            and (came_to := outcome(interrupted(job, plan, order, at))) != expected
        ):
            found[at] = came_to
    return found


def orders(plan: Plan, seed: int) -> list[Order]:
    return [in_turns(plan), in_turns(plan, at_once=6), at_random(plan, seed)]


@pytest.mark.parametrize("seed", range(4))
def test_asha_decides_as_one_that_was_never_interrupted(seed: int) -> None:
    plan = some_plan(seed)
    for order in orders(plan, seed):
        assert differences(ASHA, plan, order) == {}


@pytest.mark.parametrize("seed", range(2))
def test_a_second_interruption_changes_nothing_either(seed: int) -> None:
    plan, job = some_plan(seed), search_job(**ASHA)
    order = in_turns(plan)
    expected = uninterrupted(job, plan, order)
    # not between a report and the end that follows from it, which the new driver may write in another place
    cuts = [n for n in range(1, len(expected)) if expected[n]["event"] != "ended"]
    for first in cuts[::3]:
        for second in cuts[cuts.index(first) + 1 :: 5]:
            rows: list[Row] = []
            for dies_after in (first, second):
                with pytest.raises(Killed):
                    Driver(job, rows, dies_after=dies_after).play(plan, order)
            Driver(job, rows).play(plan, order)
            assert outcome(rows) == outcome(expected), (first, second)


def test_the_past_is_what_the_median_is_made_of() -> None:
    """Three good trials are over; after a restart the fourth is stopped by them, and the fifth is not."""
    plan = {f"t{number:04d}": [1.5 - 0.01 * number] * 6 for number in range(3)}
    plan |= {"t0003": [2.0] * 6, "t0004": [1.0] * 6}
    order = in_turns(plan, at_once=1)
    job = search_job(**MEDIAN)
    rows = uninterrupted(job, plan, order)
    assert [status for status, *_ in outcome(rows).values()] == ["done"] * 3 + ["stopped", "done"]
    ended = [number for number, row in enumerate(rows, 1) if row["event"] == "ended"]
    assert all(outcome(interrupted(job, plan, order, at)) == outcome(rows) for at in ended)


def test_a_new_driver_tells_of_no_report_twice() -> None:
    plan = some_plan(0)
    order = in_turns(plan)
    job = search_job(**ASHA)
    for at in range(1, len(uninterrupted(job, plan, order)), 5):
        rows = interrupted(job, plan, order, at)
        reports = [
            (row["trial"], row["step"]) for row in rows if row["event"] == "report" and row["step"] < 24
        ]
        assert len(reports) == len(set(reports))
        ends = [row["trial"] for row in rows if row["event"] == "ended"]
        assert len(ends) == len(set(ends)) == len(plan)


@pytest.mark.parametrize("tune", [ASHA, MEDIAN], ids=lambda tune: tune["scheduler"])
def test_a_decision_that_was_not_written_is_made_again(tune: dict[str, Any]) -> None:
    """The driver died between a trial's report and its end."""
    good = {f"t{number:04d}": [1.0 + 0.01 * number] * 6 for number in range(3)}
    plan = {**good, "t0003": [3.0, *[0.5] * 5], "t0004": [0.5] * 6}
    assert differences(tune, plan, in_turns(plan, at_once=1), at_ends=True) == {}


@pytest.mark.parametrize("seed", range(3))
def test_median_decides_as_one_that_was_never_interrupted(seed: int) -> None:
    plan = some_plan(seed)
    for order in orders(plan, seed):
        assert differences(MEDIAN, plan, order) == {}


def test_a_failed_trial_stays_a_measure_for_the_others() -> None:
    """Diverged after its first report, which the next trial is compared with."""
    plan = {"t0000": [1.0, FAILS], "t0001": [2.0] * 6, "t0002": [0.5] * 6}
    assert differences(ASHA, plan, in_turns(plan, at_once=1)) == {}


def test_median_counts_a_shorter_trials_last_report_once() -> None:
    """Two trials of three reports have a mean of 2; counted double, their last one makes it 1.5."""
    plan = {"t0000": [3.0, 3.0, 0.0], "t0001": [3.0, 3.0, 0.0], "t0002": [2.5, 2.5, 1.8, 1.8, 1.8, 1.8]}
    order, job = in_turns(plan, at_once=1), search_job(**MEDIAN)
    rows = uninterrupted(job, plan, order)
    [at] = [
        n
        for n, row in enumerate(rows, 1)
        if row["event"] == "report" and (row["trial"], row["step"]) == ("t0002", 8)
    ]
    assert outcome(interrupted(job, plan, order, at)) == outcome(rows)


def test_median_knows_a_trial_whose_process_died_as_it_was() -> None:
    """Two trials are better at step 12; one of them has just been started again."""

    def decided(*, restart: bool) -> str:
        one, first = Driver(job := search_job(**MEDIAN), []), [("t0000", 2.0), ("t0001", 1.0), ("t0002", 1.0)]
        for name, loss in first:
            one.add(name)
            for step in (4, 8):
                one.report(name, step, loss)
        if restart:
            one = Driver(job, one.rows)
            for name, _ in first:
                one.add(name)
        for name, loss in first[1:]:
            one.report(name, 12, loss)
        one.dies("t0001")
        return one.report("t0000", 12, 2.0)

    assert decided(restart=False) == "STOP"
    assert decided(restart=True) == "STOP"


def population(rows: list[Row], *reports: tuple[str, int, float]) -> Driver:
    one = Driver(search_job(**PBT), rows)
    for number in range(4):
        one.add(f"t{number:04d}", {"train.learning_rate": 1e-3})
    for name, step, loss in reports:
        one.report(name, step, loss)
    return one


LOSSES = {"t0001": 3.0, "t0002": 2.0, "t0000": 1.0, "t0003": 2.5}


def test_a_population_is_compared_every_perturb_steps() -> None:
    """Every eight; a driver that begins after step 8 compares at step 16, not at 12."""
    before = [(name, 8, loss) for name, loss in LOSSES.items()]
    at_12 = [(name, 12, loss) for name, loss in {**LOSSES, "t0003": 9.0}.items()]
    assert {decision for *_, decision in population([], *before, *at_12).decisions[4:]} == {"CONTINUE"}
    went_on = population(population([], *before).rows, *at_12)
    assert {decision for *_, decision in went_on.decisions} == {"CONTINUE"}
    assert METRIC in went_on.rows[-1]["metrics"]
