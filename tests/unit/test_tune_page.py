"""The page of a search."""

from __future__ import annotations

from typing import Any

import pytest

from rayft.report.trials import trials_of
from rayft.spec.tune import Objective
from rayft.tune.charts import colours
from rayft.tune.choose import choose
from rayft.tune.page import render_page
from tests.ledgers import CHANGE, LOSS, Ledger, asha_search, pbt_search, planted, search_job
from tests.unit.test_report_page import Reader


def test_page_of_a_search() -> None:
    search = search_job(scheduler="asha", constraints={CHANGE: {"max": 0.04}})
    page = render_page(search, asha_search().rows)
    reader = Reader(page)
    assert reader.fetched == [f"trials/sweep-t000{number}/report.html" for number in range(8)]
    for told in (
        "sweep",
        "org/<model> · sft · random, asha · 2023-11-14 22:14 UTC",
        "64 steps (37%), about 0.64 CPU-hours",
        "asha: rung of step 8",
        "the loss is NaN at step 6",
        "training diverged",
        f"{CHANGE} is 0.05, 0.01 above its max 0.04",
        "at most 0.04",
        "rank correlation with eval.loss over 7 trials at step 8, each from 0 to 1",
    ):
        assert told in reader.words, told
    assert page.count('class="way best"') == 2


def test_page_of_a_population_shows_who_forked_whom() -> None:
    search = search_job(scheduler="pbt", space={"train.learning_rate": {"loguniform": [1e-5, 1e-2]}})
    reader = Reader(render_page(search, pbt_search().rows))
    assert "t0001 went on from t0000 at step 16" in reader.words
    assert "train.learning_rate 1e-05 → 0.0008" in reader.words
    assert "steps 9 to 16 (sweep-t0000-1): train.learning_rate 0.0008" in reader.words


@pytest.mark.parametrize("rows", [0, 1, 2, 3])
def test_page_of_a_search_that_just_began(rows: int) -> None:
    ledger = Ledger()
    ledger.add("open", began=0)
    ledger.add("proposed", "t0000", values={"train.learning_rate": 1e-4})
    ledger.segment("t0000", "sweep-t0000", {"train.learning_rate": 1e-4})
    reader = Reader(render_page(search_job(), ledger.rows[:rows]))
    assert "not ended" in reader.words


def test_hostile_values_are_text() -> None:
    ledger, nasty = Ledger(), "</title><script>alert(1)</script>"
    for name, modules in {"t0000": [nasty], "t0001": ["b"]}.items():
        ledger.begin(name, {"adapter.target_modules": modules, "train.learning_rate": 1e-4})
        ledger.curve(name, [1.0, 0.5])
        ledger.end(name, "failed" if name == "t0000" else "done", nasty, 8, code=9)
    space = {"adapter.target_modules": {"choice": [[nasty], ["b"]]}}
    page = render_page(search_job(space=space), ledger.rows)
    Reader(page)
    assert "<script" not in page


def test_conditional_keys_and_odd_values_are_drawn() -> None:
    """A key that is not sampled goes through its mark, a list is an option, a diverged value does not flatten the rest."""
    ledger = Ledger()
    for number in range(9):
        values: dict[str, Any] = {"adapter.target_modules": [["q_proj"], "all-linear"][number % 2]}
        if number % 2:
            values["adapter.lora_alpha"] = 8 * number
        ledger.begin(f"t{number:04d}", values)
        ledger.curve(f"t{number:04d}", [1.0 + number / 10, 1e12 if number == 8 else 0.5 + number / 100])
        ledger.end(f"t{number:04d}", step=8)
    space = {
        "adapter.target_modules": {"choice": [["q_proj"], "all-linear"]},
        "adapter.lora_alpha": {"choice": [8, 24, 40, 56], "when": {"adapter.target_modules": "all-linear"}},
    }
    words = Reader(render_page(search_job(space=space), ledger.rows)).words
    assert '["q_proj"]' in words
    assert "not set" in words
    assert "values beyond the picture, drawn at its edge: 1" in words


def test_colours_go_by_rank_and_mode() -> None:
    trials = trials_of(planted(8).rows)
    least, most = colours(trials, LOSS[0]), colours(trials, Objective(metric="eval.loss", mode="max"))
    best = choose(trials, LOSS, {}).trial.trial
    assert least[best] == "rgb(37, 99, 235)"
    assert most[best] == "rgb(234, 88, 12)"
