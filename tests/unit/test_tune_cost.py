"""What a search cost, and what stopping trials saved."""

from __future__ import annotations

import pytest

from rayft.report.trials import trials_of
from rayft.tune.choose import value_of
from rayft.tune.cost import cost_of
from tests.ledgers import Ledger, asha_search


def test_cost_and_what_stopping_saved() -> None:
    """Four trials stopped at step 8 of 24 with 0.01 hours a step; the wait between two drivers is nobody's."""
    ledger = asha_search()
    cost = cost_of(trials_of(ledger.rows), ledger.rows, 24)
    assert (cost.unit, cost.steps, cost.saved_steps, cost.stopped) == ("CPU", 3 * 24 + 4 * 8 + 4, 4 * 16, 4)
    assert cost.hours == pytest.approx(1.08)
    assert cost.saved_hours == pytest.approx(0.64)
    assert cost_of(trials_of(ledger.rows), ledger.rows, None) == cost
    wall = cost.wall_s
    ledger.epoch, ledger._time = 2, ledger._time + 5000
    ledger.add("open", began=0)
    ledger.add("end", code=0)
    later = cost_of(trials_of(ledger.rows), ledger.rows, 24)
    assert (later.wall_s, later.drivers) == (wall + 1, 2)


def test_a_budget_that_ends_a_search_saves_nothing() -> None:
    ledger = Ledger()
    ledger.begin("t0000", {})
    ledger.curve("t0000", [0.5])
    ledger.add("waiting", "t0000", reason="budget of 60 s is spent")
    assert cost_of(trials_of(ledger.rows), ledger.rows, 24).saved_steps == 0


def test_gpus_are_counted_where_there_are_any() -> None:
    ledger = Ledger()
    ledger.begin("t0000", {})
    ledger.add(
        "report", "t0000", run="sweep-t0000", step=4, metrics={}, gpu_hours=2.5, cpu_hours=9.0, seconds=9
    )
    cost = cost_of(trials_of(ledger.rows), ledger.rows, 4)
    assert (cost.unit, cost.hours) == ("GPU", 2.5)
    assert value_of(trials_of(ledger.rows)["t0000"], "gpu_hours") == 2.5
    ledger.add("spent", "t0000", gpu_hours=3.5, cpu_hours=12.0, seconds=13)  # between two reports
    trial = trials_of(ledger.rows)["t0000"]
    assert (trial.gpu_hours, trial.step, trial.status) == (3.5, 4, "running")
