"""Which keys of a search mattered, and the scales they are drawn on."""

from __future__ import annotations

import pytest

from rayft.report.trials import trials_of
from rayft.tune.importance import MIN_OPTUNA, comparable, importance_of
from rayft.tune.scale import Scale, scales_of
from tests.ledgers import LOSS, asha_search, planted, search_job


@pytest.mark.parametrize("count", [8, 2 * MIN_OPTUNA])
def test_importance_finds_what_matters(count: int) -> None:
    trials = trials_of(planted(count).rows)
    scales = scales_of(search_job().tune.space, list(trials.values()))  # type: ignore[union-attr]
    found = importance_of(trials, scales, LOSS[0])
    assert next(iter(found.shares)) == "train.learning_rate"
    assert found.shares["train.learning_rate"] > 2 * found.shares["adapter.lora_r"]
    assert f"{count} trials at step 8" in found.method


def test_importance_by_optuna_where_it_is_installed() -> None:
    pytest.importorskip("optuna")
    trials = trials_of(planted(2 * MIN_OPTUNA).rows)
    scales = scales_of(search_job().tune.space, list(trials.values()))  # type: ignore[union-attr]
    found = importance_of(trials, scales, LOSS[0])
    assert found.method.startswith("PED-ANOVA")
    assert sum(found.shares.values()) == pytest.approx(1.0)


def test_trials_are_compared_where_at_least_half_of_them_came() -> None:
    trials = trials_of(asha_search().rows)
    found, step = comparable(list(trials.values()), "eval.loss")
    assert (step, len(found)) == (8, 7)
    assert {trial.trial: value for trial, value in found}["t0005"] == trials["t0005"].points("eval.loss")[1][
        1
    ]
    assert comparable([], "eval.loss") == ([], 0)
    few = importance_of({}, [Scale("a")], LOSS[0])
    assert (few.shares, few.method) == ({}, "0 trials with eval.loss are too few to tell")


def test_scales() -> None:
    log = Scale("lr", 1e-5, 1e-3, log=True)
    assert [log.place(v) for v in (1e-5, 1e-4, 1e-3, None)] == [0.0, pytest.approx(0.5), 1.0, None]
    options = Scale("r", options=("4", "8", "16"))
    assert [options.place(v) for v in (4, 8, 16, 32, None)] == [0.0, 0.5, 1.0, None, None]
    trials = trials_of(asha_search().rows)
    rate, rank = scales_of(search_job().tune.space, list(trials.values()))  # type: ignore[union-attr]
    assert (rate.low, rate.log) == (1e-5, True)
    assert rate.high == pytest.approx(1e-2)
    assert rank.options == ("4", "8", "16")
