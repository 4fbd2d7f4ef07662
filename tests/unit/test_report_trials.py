"""What a search's ledger says of its trials: states, reports, forks and lines."""

from __future__ import annotations

import pytest

from rayft.report.trials import lineage, trials_of
from tests.ledgers import Ledger, pbt_search


def test_states_follow_the_rows() -> None:
    ledger = Ledger()
    ledger.add("proposed", "t0001", values={"a": 1})
    ledger.add("proposed", "t0000", values={"a": 2})
    trials = trials_of(ledger.rows)
    assert [(t.trial, t.status, t.step, t.run) for t in trials.values()] == [
        ("t0000", "proposed", 0, None),
        ("t0001", "proposed", 0, None),
    ]
    ledger.add("waiting", "t0000", reason="needs 2 CPUs, 1 is free")
    state = trials_of(ledger.rows)["t0000"]
    assert (state.status, state.reason) == ("waiting", "needs 2 CPUs, 1 is free")
    ledger.segment("t0000", "sweep-t0000", {"a": 2})
    ledger.report("t0000", 4, 0.5)
    state = trials_of(ledger.rows)["t0000"]
    assert (state.status, state.reason, state.step, state.last) == ("running", "", 4, {"eval.loss": 0.5})
    ledger.end("t0000", "failed", "out of memory", step=7, code=7)
    state = trials_of(ledger.rows)["t0000"]
    assert (state.status, state.reason, state.step, state.code) == ("failed", "out of memory", 7, 7)
    assert state.cpu_hours == pytest.approx(0.04)


def test_a_report_written_again_counts_once_and_the_last_one_wins() -> None:
    ledger = Ledger()
    ledger.begin("t0000", {})
    for step, loss in ((4, 0.9), (8, 0.8), (8, 0.7), (4, 0.6)):
        ledger.report("t0000", step, loss)
    assert trials_of(ledger.rows)["t0000"].points("eval.loss") == [(4, 0.6), (8, 0.7)]


def test_rows_of_a_replaced_driver_stand_before_its_successors() -> None:
    """What it still wrote late, wherever the line lies in the file, does not override what came after."""
    ledger = Ledger()
    ledger.begin("t0000", {})
    ledger.epoch = 2
    ledger.segment("t0000", "sweep-t0000", {})
    ledger.report("t0000", 4, 0.6)
    ledger.end("t0000", step=4)
    ledger.epoch = 1
    ledger.report("t0000", 4, 0.9)
    ledger.add("waiting", "t0000", reason="late")
    state = trials_of(ledger.rows)["t0000"]
    assert (state.status, state.points("eval.loss"), len(state.segments)) == ("done", [(4, 0.6)], 1)


def test_a_fork_voids_what_lies_beyond_it() -> None:
    """Out of memory at step 10, back to the checkpoint of 4; a late report of the old run changes nothing."""
    ledger = Ledger()
    ledger.begin("t0000", {"train.learning_rate": 1e-3})
    ledger.report("t0000", 4, 0.9)
    ledger.report("t0000", 8, 0.8)
    again = {"train.learning_rate": 1e-3, "train.micro_batch_size": 2}
    reason = "out of memory: micro_batch_size 4 -> 2"
    ledger.segment("t0000", "sweep-t0000-1", again, ("t0000", "sweep-t0000", 4), reason)
    ledger.report("t0000", 12, 0.1)
    state = trials_of(ledger.rows)["t0000"]
    assert state.points("eval.loss") == [(4, 0.9)]
    assert state.step == 4
    assert state.cpu_hours == pytest.approx(0.12)
    ledger.report("t0000", 8, 0.7, run="sweep-t0000-1")
    state = trials_of(ledger.rows)["t0000"]
    assert state.points("eval.loss") == [(4, 0.9), (8, 0.7)]
    assert (state.values["train.micro_batch_size"], state.run, state.forks) == (2, "sweep-t0000-1", [])


def test_a_second_try_without_a_checkpoint_begins_at_nothing() -> None:
    ledger = Ledger()
    ledger.begin("t0000", {})
    ledger.report("t0000", 4, 0.9)
    ledger.segment("t0000", "sweep-t0000-1", {}, None, "out of memory: micro_batch_size 4 -> 2")
    assert trials_of(ledger.rows)["t0000"].curve == []


def test_lineage_of_a_trial_that_forked_twice() -> None:
    trials = trials_of(pbt_search().rows)
    found = [(segment.run, last) for segment, last in lineage(trials, "t0001")]
    assert found == [("sweep-t0002", 8), ("sweep-t0000-1", 16), ("sweep-t0001-1", 24)]
    assert [(segment.run, last) for segment, last in lineage(trials, "t0003")] == [("sweep-t0003", 24)]
    # what the donor did after the fork is no part of the line
    assert trials["t0000"].points("eval.loss")[1:3] == [(8, 2.0), (12, pytest.approx(0.9))]
