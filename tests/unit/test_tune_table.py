"""The table of a search's trials, on a terminal and without one."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from rayft.report.trials import trials_of
from rayft.tune.table import MAX_ROWS, SearchTable, trials_table
from tests.ledgers import LOSS, Ledger, asha_search


def text_of(*things: Any, width: int = 160) -> str:
    out = io.StringIO()
    console = Console(file=out, width=width)
    for thing in things:
        console.print(thing)
    return out.getvalue()


def test_table() -> None:
    shown = text_of(trials_table(trials_of(asha_search().rows), LOSS, 8))
    assert (
        "t0002   stopped      8            2.1000    0.08   learning_rate=7.197e-05 lora_r=16   asha: rung of step 8"
        in shown
    )
    assert "8 of 8 trials: 3 done, 4 stopped, 1 failed · 1.08 CPU-h" in shown
    assert len(shown.splitlines()) == 11
    for narrow in text_of(trials_table(trials_of(asha_search().rows), LOSS, 8), width=80).splitlines():
        assert len(narrow) <= 80


def test_a_long_table_shows_those_under_way_and_the_best() -> None:
    ledger = asha_search(40)
    ledger.begin("t0040", {"train.learning_rate": 1e-4})
    shown = text_of(trials_table(trials_of(ledger.rows), LOSS))
    assert shown.count("t00") == MAX_ROWS
    assert f"{41 - MAX_ROWS} not shown" in shown
    assert "t0040   running" in shown


def test_without_a_terminal_each_change_is_a_line() -> None:
    out, ledger = io.StringIO(), Ledger()
    with SearchTable(Console(file=out, width=80), LOSS, 8) as table:
        ledger.add("proposed", "t0000", values={"train.learning_rate": 1e-4})
        table.show(trials_of(ledger.rows))
        ledger.add("waiting", "t0000", reason="needs 2 CPUs; the cluster may grow [auto] to 4")
        for _ in range(3):
            table.show(trials_of(ledger.rows))
        ledger.segment("t0000", "sweep-t0000", {"train.learning_rate": 1e-4})
        table.show(trials_of(ledger.rows))
        for step in (4, 8):
            ledger.report("t0000", step, 1 / step)
            table.show(trials_of(ledger.rows))
        ledger.end("t0000", "stopped", "asha: rung of step 8", 8)
        table.show(trials_of(ledger.rows))
    assert out.getvalue().splitlines() == [
        "t0000 waiting  learning_rate=0.0001  needs 2 CPUs; the cluster may grow [auto] to 4",
        "t0000 running  learning_rate=0.0001",
        "t0000 running  step 4  eval.loss 0.2500  0.04 CPU-h",
        "t0000 running  step 8  eval.loss 0.1250  0.08 CPU-h",
        "t0000 stopped  step 8  eval.loss 0.1250  0.08 CPU-h  asha: rung of step 8",
    ]


def test_on_a_terminal_the_table_is_redrawn_and_left_standing_where_a_search_is_cut_off() -> None:
    out = io.StringIO()
    table = SearchTable(Console(file=out, width=120, force_terminal=True), LOSS, 8)
    table.__enter__()
    table.show(trials_of(Ledger().rows))
    table.show(trials_of(asha_search().rows))
    table.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert out.getvalue().count("1.08 CPU-h") == 1
    with table:
        pass
    assert out.getvalue().count("1.08 CPU-h") == 1
