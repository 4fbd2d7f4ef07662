"""The group `tune` by itself: every one that is refused, in one sentence that names the key, and its neighbours."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
import yaml

from rayft.spec import Bound, Dimension, changed_keys, dump_job, job_schema, parse_job
from rayft.spec.search import LONGEST_NAME
from tests.search_jobs import BASE, RATE, RL, A, R, refused, search

TWO = [{"metric": "eval.loss"}, {"metric": "gpu_hours"}]


@pytest.mark.parametrize(
    ("dimension", "message"),
    [
        ({}, "give one of choice, grid, uniform, loguniform, quniform, not none"),
        ({"choice": [1], "uniform": [0, 1]}, "not choice and uniform"),
        ({"choice": []}, "choice is an empty list"),
        ({"grid": []}, "grid is an empty list"),
        ({"choice": [1, 2, 1.0]}, "1.0 stands twice"),
        ({"uniform": [1, 1]}, "the range from 1 to 1 is empty"),
        ({"uniform": [2, 1]}, "the range from 2 to 1 is empty"),
        ({"loguniform": [1e-3, 1e-5]}, "the range from 0.001 to 1e-05 is empty"),
        ({"loguniform": [0, 1]}, "begins above 0, not at 0"),
        ({"loguniform": [-1, 1]}, "begins above 0, not at -1"),
        ({"quniform": [4, 2, 1]}, "the range from 4 to 2 is empty"),
        ({"quniform": [0, 1, 2]}, "the step 2 is longer than the range"),
        ({"quniform": [0, 1, 0]}, "quniform.2 = 0: should be greater than 0"),
        ({"uniform": [0]}, "uniform"),
        ({"uniform": [0, float("inf")]}, "should be a finite number"),
        ({"normal": [0, 1]}, "unknown key 'tune.space.train.learning_rate.normal'"),
        ({"choice": [1], "when": {}}, "`when` names no key"),
    ],
)
def test_dimensions_that_are_none(dimension: dict[str, Any], message: str) -> None:
    text = refused({"train.learning_rate": dimension})
    assert message in text
    assert "tune.space.train.learning_rate" in text
    assert text.count(". ") == 0


@pytest.mark.parametrize(
    ("space", "tune", "message"),
    [
        (None, {"metric": None}, "tune.metric is missing"),
        (
            None,
            {"objectives": TWO, "metric": "eval.loss", "searcher": "optuna"},
            "metric and mode, or objectives, not both",
        ),
        (
            None,
            {"objectives": TWO, "mode": "max", "searcher": "optuna"},
            "metric and mode, or objectives, not both",
        ),
        (None, {"objectives": TWO[:1], "searcher": "optuna"}, "tune.objectives has one"),
        (
            None,
            {"objectives": TWO[:1] * 2, "searcher": "optuna"},
            "tune.objectives: 'eval.loss' stands twice",
        ),
        (
            None,
            {"objectives": TWO},
            "tune.objectives: several objectives need tune.searcher optuna, not random",
        ),
        (
            None,
            {"objectives": TWO, "searcher": "optuna", "scheduler": "asha"},
            "the scheduler asha ranks trials by one metric",
        ),
        (None, {"searcher": "optuna", "scheduler": "pbt"}, "tune.searcher optuna with tune.scheduler pbt"),
        (None, {"searcher": "optuna", "scheduler": "hyperband"}, "nothing to learn from"),
        (None, {"searcher": "optuna", "scheduler": "pb2"}, "tune.searcher optuna with tune.scheduler pb2"),
        (
            {R: {"grid": [4]}},
            {"searcher": "grid", "scheduler": "pbt"},
            "tune.searcher grid with tune.scheduler pbt",
        ),
        ({A: {"grid": [4, 8]}}, {"scheduler": "pbt"}, "grid is not for tune.scheduler pbt"),
        ({A: {"choice": [4, 8]}}, {"scheduler": "pb2"}, "pb2 models values as a range without steps"),
        ({A: {"quniform": [4, 8, 1]}}, {"scheduler": "pb2"}, "pb2 models values as a range without steps"),
        (
            {A: {"choice": [4, 8], "when": {"adapter.type": "lora"}}},
            {"scheduler": "pbt"},
            "`when` is not for tune.scheduler pbt",
        ),
        (None, {"scheduler": "pbt", "num_trials": 1}, "tune.num_trials 1: pbt compares trials"),
        (None, {"searcher": "grid"}, "tune.searcher grid tries every value, and a range has no list"),
        (
            {R: {"choice": [4, 8]}},
            {"searcher": "grid", "num_trials": 2},
            "tries every combination once; leave it out",
        ),
        ({R: {"grid": [4, 8]}}, {"searcher": "optuna"}, "with optuna use choice"),
        (
            None,
            {"scheduler": "asha", "perturb_steps": 10},
            "tune.perturb_steps is for the scheduler pbt or pb2, not asha",
        ),
        (
            None,
            {"scheduler": "pb2", "resample_probability": 0.5},
            "tune.resample_probability is for the scheduler pbt, not pb2",
        ),
        (None, {"quantile": 0.3}, "tune.quantile is for the scheduler pbt or pb2, not none"),
        (
            None,
            {"scheduler": "pbt", "grace_steps": 10},
            "tune.grace_steps is for the scheduler asha or median, not pbt",
        ),
        (
            None,
            {"scheduler": "hyperband", "grace_steps": 10},
            "tune.grace_steps is for the scheduler asha or median",
        ),
        (
            None,
            {"scheduler": "median", "reduction_factor": 4},
            "tune.reduction_factor is for the scheduler asha or hyperband",
        ),
        (None, {"reduction_factor": 1}, "tune.reduction_factor = 1: should be greater than 1"),
        (None, {"num_trials": 0}, "tune.num_trials = 0"),
        (None, {"share": 0}, "tune.share = 0"),
        (None, {"share": 1.5}, "tune.share = 1.5"),
        (None, {"quantile": 0.6, "scheduler": "pbt"}, "tune.quantile = 0.6"),
        (None, {"time_budget_s": 0}, "tune.time_budget_s = 0"),
        (None, {"gpu_hours": -1}, "tune.gpu_hours = -1"),
        (
            None,
            {"constraints": {"seconds": {}}},
            "tune.constraints.seconds: a constraint gives min, max or both",
        ),
        (None, {"constraints": {"seconds": {"min": 2, "max": 1}}}, "min 2 is more than max 1"),
        (None, {"searcher": "tpe"}, "tune.searcher = 'tpe'"),
        (
            None,
            {"scheduler": "asha", "grace_steps": 5},
            "tune.grace_steps 5 is less than eval.every_steps 10",
        ),
        (
            None,
            {"scheduler": "pbt", "perturb_steps": 5},
            "tune.perturb_steps 5 is less than eval.every_steps 10",
        ),
        (None, {"scheduler": "asha", "grace_steps": 100}, "leaves nothing of the run's train.max_steps 100"),
        (None, {"num_samples": 3}, "unknown key 'tune.num_samples' (did you mean 'tune.num_trials'?)"),
        (None, {"num_trails": 3}, "unknown key 'tune.num_trails' (did you mean 'num_trials'?)"),
    ],
)
def test_methods_that_do_not_go_together(
    space: dict[str, Any] | None, tune: dict[str, Any], message: str
) -> None:
    text = refused(space, **tune)
    assert message in text
    assert "tune" in text
    assert text.count(". ") == 0


@pytest.mark.parametrize(
    ("space", "groups", "tune"),
    [
        (None, {}, {}),
        (None, {}, {"searcher": "optuna", "objectives": TWO}),
        (None, {}, {"searcher": "random", "scheduler": "hyperband", "reduction_factor": 4}),
        (None, {}, {"scheduler": "pbt", "perturb_steps": 20, "quantile": 0.5, "resample_probability": 0}),
        (None, {}, {"scheduler": "pb2", "quantile": 0.5}),
        (None, {}, {"metric": "suite.general text.bits_per_byte"}),
        (None, {"eval": {}}, {"metric": "train.loss"}),
        (None, {"name": "x" * LONGEST_NAME}, {}),
        ({R: {"choice": [4, 8]}, **RATE}, {}, {"constraints": {"change.general text.bits_per_byte": {"max": 0.1}}}),
        ({R: {"grid": [4, 8]}, "seed": {"choice": [0, 1]}}, {}, {"searcher": "grid"}),
        ({R: {"grid": [4, 8]}, **RATE}, {}, {"num_trials": 3}),
        ({"adapter.target_modules": {"choice": ["all-linear", ["q_proj"]]}}, {}, {}),
        ({"adapter": {"choice": [{"type": "none"}, {"type": "lora", "lora_r": 8}]}}, {}, {}),
        ({"train.global_batch_size": {"quniform": [4, 16, 4]}}, {}, {}),
        ({"train.tokens_per_step": {"choice": [1024, 2048]}}, {}, {}),
        ({"train.max_loss": {"choice": [None, 5.0]}}, {}, {}),
        ({"rewards.1.weight": {"uniform": [0, 1]}, "rl.kl_coef": {"loguniform": [1e-3, 0.1]}}, RL, {"metric": "eval.score"}),
        ({"method": {"choice": ["grpo", "rloo", "reinforce++"]}}, RL, {"metric": "eval.score"}),
        ({"train.warmup_steps": {"choice": [0, 30]}, "train.max_steps": {"choice": [20, 40]}}, {}, {}),
        ({R: {"choice": [4], "when": {"adapter.type": ["lora", "qlora"]}}}, {}, {}),
        (
            {
                "adapter.type": {"choice": ["none", "lora"]},
                R: {"choice": [4, 8], "when": {"adapter.type": "lora"}},
                A: {"choice": [8], "when": {R: 8}},
            },
            {"adapter": {}},
            {},
        ),
    ],
)  # fmt: skip
def test_their_neighbours_are_fine(
    space: dict[str, Any] | None, groups: dict[str, Any], tune: dict[str, Any]
) -> None:
    """And each is the same search after it is written down resolved, as `rayft submit` sends it."""
    job = search(space, groups, **tune)
    again = parse_job(yaml.safe_load(dump_job(job)))
    assert again == job
    assert dump_job(again) == dump_job(job)
    assert changed_keys(job, again) == []
    jsonschema.validate(json.loads(job.model_dump_json()), job_schema())


def test_a_job_without_a_search_is_written_as_before() -> None:
    job = parse_job(BASE)
    assert job.tune is None
    assert "tune" not in dump_job(job)
    assert "tune" not in job.model_dump()
    assert "tune" in job_schema()["properties"]


def test_the_default_of_num_trials() -> None:
    assert search().tune.num_trials == 8
    assert search({R: {"grid": [4, 8]}}).tune.num_trials == 1
    assert search({R: {"choice": [4, 8]}}, searcher="grid").tune.num_trials == 1


def test_what_makes_it_another_search() -> None:
    """Budgets may be raised under the same name; a space may not."""
    job = search()
    for tune in (
        {"num_trials": 20},
        {"gpu_hours": 5},
        {"time_budget_s": 60},
        {"max_concurrent": 2},
        {"share": 0.5},
    ):
        assert changed_keys(job, search(**tune)) == []
    assert changed_keys(job, search({"train.learning_rate": {"loguniform": [1e-5, 1e-2]}})) == [
        "tune.space.train.learning_rate.loguniform.1: 0.001 -> 0.01"
    ]
    assert changed_keys(job, search(searcher="optuna")) == ["tune.searcher: 'random' -> 'optuna'"]


def test_a_bound_says_how_far() -> None:
    assert Bound(max=2).violations(3) == [1]
    assert Bound(min=1, max=2).violations(1.5) == [-0.5, -0.5]


@pytest.mark.parametrize(
    ("dimension", "inside", "outside"),
    [
        (
            {"choice": [1, True, "a", [1, 2], None]},
            [1, 1.0, True, "a", [1, 2], None],
            [2, "b", [2, 1], False],
        ),
        ({"quniform": [0, 1, 0.25]}, [0, 0.25, 0.75, 1], [0.1, 1.25, -0.25, True, "a", None]),
        ({"quniform": [4, 15, 4]}, [4, 8, 12], [16, 15]),
        ({"uniform": [0, 1]}, [0, 0.5, 1], [-0.1, 1.1, True, "a", None]),
        ({"loguniform": [0.1, 1]}, [0.1, 1], [0.09]),
    ],
)
def test_the_values_of_a_dimension(dimension: dict[str, Any], inside: list[Any], outside: list[Any]) -> None:
    made = Dimension(**dimension)
    assert all(made.has(value) for value in inside)
    assert not any(made.has(value) for value in outside)
    assert made.has(made.at(0.0))
    assert made.has(made.at(1.0))
