"""From the rows of a run to the reports of a trial: when there is one, what is in it, and that none comes twice."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayft.report.log import Row, RunLog, read_log
from rayft.storage import open_store
from rayft.tune.reports import Reports


def step(at: int, loss: float | None = 1.0, **metrics: Any) -> Row:
    row = {"kind": "step", "step": at, "loss": loss, "grad_norm": 0.5, "tokens_per_s": 90.0, "rows": 4}
    return {**row, "learning_rate": 1e-4, "metrics": metrics}


def evaluation(at: int, loss: float | None = 2.0, **metrics: Any) -> Row:
    return {"kind": "eval", "step": at, "loss": loss, "tokens": 70, "metrics": metrics, "took_s": 0.1}


def gate(at: int) -> Row:
    return {"kind": "gate", "step": at}


def suites(when: str, at: int, **results: dict[str, Any]) -> Row:
    return {"kind": "suites", "when": when, "step": at, "results": results}


def given_by(reports: Reports) -> list[int]:
    """Steps of all reports that are ready."""
    return [found[0] for found in iter(reports.next, None)]


def of(*rows: Row) -> Reports:
    reports = Reports()
    reports.feed(rows)
    return reports


# -- when there is one -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_a_report_needs_its_evaluation_its_step_and_the_run_to_wait_at_it(order: tuple[int, ...]) -> None:
    reports = of(evaluation(0), step(1), step(2), step(3))
    rows = [evaluation(4, 1.5), step(4, 1.25), gate(4)]
    for index in order:
        assert reports.next() is None
        reports.feed([rows[index]])
    found = reports.next()
    assert found is not None
    assert found[0] == 4
    assert found[1] == {
        "train.loss": 1.25, "train.grad_norm": 0.5, "train.tokens_per_s": 90.0, "eval.loss": 1.5
    }  # fmt: skip
    assert reports.next() is None


def test_a_run_without_gates_reports_once_it_has_gone_on_and_holds_its_last_evaluation_back() -> None:
    """The measurement of the last step belongs into the report at the end, with the suites."""
    reports = of(*(step(at) for at in range(1, 9)), evaluation(4), evaluation(8, 0.25))
    assert given_by(reports) == [4]
    assert reports.last()[0] == 8
    assert reports.last()[1]["eval.loss"] == 0.25
    reports.feed([step(9)])
    assert given_by(reports) == [8]


def test_the_measurement_before_training_is_no_report() -> None:
    assert given_by(of(evaluation(0), step(1), step(2), gate(0))) == []


def test_reports_come_oldest_first_and_each_once() -> None:
    reports = of(*(step(at) for at in range(1, 14)), evaluation(12), evaluation(4), evaluation(8))
    assert given_by(reports) == [4, 8, 12]
    reports.feed([evaluation(8, 0.5), step(8), gate(8)])
    assert reports.next() is None


def test_reports_that_were_given_by_an_earlier_process_are_left_out() -> None:
    rows = [*(step(at) for at in range(1, 14)), evaluation(4), evaluation(8), evaluation(12)]
    reports = of(*rows)
    reports.skip(8)
    assert given_by(reports) == [12]
    # also where the log is read after that, or the run goes over them again
    reports = Reports()
    reports.skip(8)
    reports.feed([*rows, gate(8)])
    assert given_by(reports) == [12]


@settings(max_examples=200, deadline=None)
@given(st.permutations([row for at in (4, 8, 12) for row in (step(at), evaluation(at), gate(at))]), st.data())
def test_in_whatever_order_rows_come_no_report_is_early_late_or_twice(rows: list[Row], data: Any) -> None:
    reports, seen, found = Reports(), list[Row](), list[int]()
    while rows:
        count = data.draw(st.integers(1, len(rows)))
        reports.feed(rows[:count])
        seen, rows = seen + rows[:count], rows[count:]
        new = given_by(reports)
        assert new == sorted(new)
        found += new
        have = {
            kind: {row["step"] for row in seen if row["kind"] == kind} for kind in ("step", "eval", "gate")
        }
        newest = max(have["step"], default=0)
        expected = {at for at in have["step"] & have["eval"] if at in have["gate"] or at < newest}
        assert set(found) == expected
    assert sorted(found) == [4, 8, 12]


# -- after a resume --------------------------------------------------------------------------------------------------


def test_what_a_resumed_run_logs_again_takes_the_place_of_what_it_lost(tmp_path: Path) -> None:
    """It fell at step 9 with the checkpoint of 4: the evaluation of 8 and the steps beyond are another now."""
    store = open_store(tmp_path)
    log = RunLog(store, 1, lambda: True)
    log.begin_attempt(1, 1, None)
    live = [*(step(at, 9.0) for at in range(1, 9)), evaluation(4, 9.5), evaluation(8, 9.5)]
    for row in live:
        log.append(row)
    log.begin_attempt(2, 2, 4)
    again = [*(step(at, 3.0) for at in range(5, 9)), evaluation(8, 3.5)]
    for row in again:
        log.append(row)
    log.close()

    reports = of(*live)
    assert given_by(reports) == [4]
    reports.feed([*again, gate(8)])
    found = reports.next()
    assert found is not None
    assert (found[0], found[1]["eval.loss"], found[1]["train.loss"]) == (8, 3.5, 3.0)
    assert reports.next() is None

    read = of(*read_log(store))
    assert read.last() == reports.last()
    assert given_by(read) == [4]


# -- what is in it ---------------------------------------------------------------------------------------------------


def test_what_is_no_finite_number_is_nan_and_what_is_no_number_is_left_out(tmp_path: Path) -> None:
    """A loss that diverged goes through the log, which has no word for it."""
    store = open_store(tmp_path)
    log = RunLog(store, 1, lambda: True)
    log.append(step(4, math.nan, kl=math.inf, note="text", clipped=True))
    log.append(evaluation(4, -math.inf, accuracy=0))
    log.close()
    for rows in (
        read_log(store),
        [step(4, math.nan, kl=math.inf, note="t", clipped=True), evaluation(4, -math.inf, accuracy=0)],
    ):
        _, numbers = of(*rows).last()
        assert {name for name, value in numbers.items() if math.isnan(value)} == {
            "train.loss", "train.kl", "eval.loss"
        }  # fmt: skip
        assert numbers["eval.accuracy"] == 0.0
        assert set(numbers) == {
            "train.loss", "train.grad_norm", "train.tokens_per_s", "train.kl", "eval.loss", "eval.accuracy"
        }  # fmt: skip
        assert all(isinstance(value, float) for value in numbers.values())


def test_the_end_has_the_suites_and_how_far_they_moved() -> None:
    reports = of(
        evaluation(0),
        suites("before", 0, text={"bits_per_byte": 1.0, "rows": 8}, gone={"a": 1.0}, odd={"a": None, "b": 2}),
        step(1),
        step(2, 0.5),
        evaluation(1, 0.75),
    )
    assert reports.before == {"eval", "suites"}
    assert not any(name.startswith(("suite.", "change.")) for name in reports.last()[1])
    after = {"bits_per_byte": 1.25, "rows": 8, "model": "m", "kept": True, "nan": math.nan}
    reports.feed([suites("after", 2, text=after, new={"a": 3}, odd={"a": 1.0, "b": math.inf})])
    at, numbers = reports.last()
    assert at == 2
    assert {name: value for name, value in numbers.items() if name[:5] in ("suite", "chang")} == {
        "suite.text.bits_per_byte": 1.25,
        "change.text.bits_per_byte": 0.25,
        "suite.text.rows": 8.0,
        "change.text.rows": 0.0,
        "suite.new.a": 3.0,
        "suite.odd.a": 1.0,
    }
    assert (numbers["train.loss"], numbers["eval.loss"]) == (0.5, 0.75)


def test_only_the_measurement_before_training_is_one_to_share() -> None:
    assert not of(suites("after", 2, text={"a": 1.0}), evaluation(2)).before
    assert of(evaluation(0)).before == {"eval"}


def test_rows_of_a_run_that_learns_from_rewards_have_no_evaluation_loss() -> None:
    row = {"kind": "eval", "step": 4, "rows": 8, "metrics": {"score": 0.75, "kl": 0.1}, "took_s": 1.0}
    found = of(step(4, 0.2, **{"score/right": 0.5}), row, gate(4)).next()
    assert found is not None
    assert found[1]["eval.score"] == 0.75
    assert found[1]["train.score/right"] == 0.5
    assert "eval.loss" not in found[1]
    assert "eval.took_s" not in found[1]


def test_a_run_that_measured_nothing_ends_with_nothing() -> None:
    assert Reports().last() == (0, {})
    assert of(step(3, 0.5)).last()[0] == 3
