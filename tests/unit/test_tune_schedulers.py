"""Ray Tune's schedulers as a job asks for them, and values that stay inside their dimensions whatever moved them."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    HyperBandScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
)
from ray.tune.schedulers.pb2 import PB2
from ray.tune.schedulers.pbt import _explore

from rayft.spec import Dimension
from rayft.tune.schedulers import kept_within, make_scheduler
from tests.search_jobs import RATE, search

LEARNING = "train.learning_rate"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("none", FIFOScheduler),
        ("asha", AsyncHyperBandScheduler),
        ("hyperband", HyperBandScheduler),
        ("median", MedianStoppingRule),
        ("pbt", PopulationBasedTraining),
        ("pb2", PB2),
    ],
)
def test_a_job_gets_the_scheduler_that_it_names(name: str, kind: type) -> None:
    """Looking at its own metric and direction, by optimizer steps (HyperBand by reports)."""
    found = make_scheduler(search(scheduler=name, metric="train.loss", mode="max"))
    assert type(found) is kind
    if name != "none":
        assert (found.metric, found._mode) == ("train.loss", "max")
        assert found._time_attr == ("report" if name == "hyperband" else "step")


def rungs(**tune: Any) -> list[float]:
    [bracket] = make_scheduler(search(scheduler="asha", **tune))._brackets
    return sorted(step for step, _ in bracket._rungs)


def test_rungs_begin_at_the_first_evaluation_or_the_grace_and_end_before_the_last_step() -> None:
    """Of runs of 100 steps that are measured every 10."""
    assert rungs() == [10, 30, 90]
    assert rungs(reduction_factor=2) == [10, 20, 40, 80]
    assert rungs(grace_steps=40, reduction_factor=2) == [40, 80]


def test_where_epochs_are_counted_rungs_go_on_without_an_end() -> None:
    groups = {"train": {"num_train_epochs": 2}, "eval": {"every_steps": 10}}
    found = rungs(groups=groups)
    assert found[:4] == [10, 30, 90, 270]
    assert found[-1] > 100_000


@pytest.mark.parametrize("more", [{}, {"grace_steps": 60}], ids=["every_steps", "grace_steps"])
def test_a_first_rung_beyond_the_jobs_own_length_is_no_crash(more: dict[str, Any]) -> None:
    """Measured less often than the run is long; or steps that are searched and in most trials more than the job's own."""
    train = {"max_steps": 40}
    groups = {"train": train, "eval": {"every_steps": 10 if more else 50}}
    space = {"train.max_steps": {"choice": [40, 400]}} if more else None
    make_scheduler(search(space, groups, scheduler="asha", **more))


def test_no_trial_is_stopped_at_its_last_report() -> None:
    """A run ends by itself, with its suites and its model."""
    for name in ("asha", "hyperband"):
        assert make_scheduler(search(scheduler=name))._stop_last_trials is False


def test_hyperband_counts_reports() -> None:
    assert make_scheduler(search(scheduler="hyperband"))._max_t_attr == 10
    assert make_scheduler(search(scheduler="hyperband", reduction_factor=2))._eta == 2


def test_median_waits_for_the_grace_and_two_others() -> None:
    assert make_scheduler(search(scheduler="median"))._grace_period == 10
    found = make_scheduler(search(scheduler="median", grace_steps=30))
    assert (found._grace_period, found._min_samples_required) == (30, 2)


def test_populations_have_the_jobs_settings() -> None:
    found = make_scheduler(
        search(scheduler="pbt", perturb_steps=20, quantile=0.5, resample_probability=0.125)
    )
    assert found._perturbation_interval == 20
    assert (found._quantile_fraction, found._resample_probability) == (0.5, 0.125)
    assert make_scheduler(search(scheduler="pbt"))._perturbation_interval == 10
    assert make_scheduler(search(scheduler="pb2"))._hyperparam_bounds == {LEARNING: [1e-5, 1e-3]}


# -- values stay inside ----------------------------------------------------------------------------------------------

finite = st.floats(-1e6, 1e6, allow_subnormal=False)
numbers = st.one_of(finite, st.integers(-1000, 1000), st.sampled_from([float("inf"), float("-inf"), -0.0]))


@st.composite
def ranges(draw: st.DrawFn) -> Dimension:
    kind = draw(st.sampled_from(["uniform", "loguniform", "quniform"]))
    low = draw(
        st.floats(1e-6, 10) if kind == "loguniform" else st.one_of(st.integers(-5, 5), st.floats(-5, 5))
    )
    width = draw(st.one_of(st.integers(1, 9), st.floats(1e-3, 9)))
    if kind != "quniform":
        return Dimension.model_validate({kind: [low, low + width]})
    return Dimension.model_validate({kind: [low, low + width, width / draw(st.floats(1, 20))]})


@settings(max_examples=400, deadline=None)
@given(ranges(), numbers)
def test_a_number_that_was_moved_is_one_of_its_dimension(dimension: Dimension, value: float) -> None:
    kept = kept_within(dimension, value)
    assert dimension.has(kept)
    assert kept_within(dimension, kept) == kept
    if math.isfinite(value) and dimension.has(
        value
    ):  # what is inside stays, but for digits that no job file has
        assert kept == pytest.approx(value, rel=1e-5)


@settings(max_examples=200, deadline=None)
@given(ranges(), st.floats(0, 1), st.sampled_from([0.8, 1.2]))
def test_nothing_nearer_is_left_out(dimension: Dimension, part: float, factor: float) -> None:
    value = dimension.at(part) * factor
    kept = kept_within(dimension, value)
    if dimension.continuous:
        low, high = dimension.bounds
        assert kept == pytest.approx(min(max(value, low), high), rel=1e-5, abs=1e-9)
    else:
        nearest = min(abs(dimension.value(index) - value) for index in range(dimension.count))
        assert abs(kept - value) <= nearest + 1e-6


def test_whole_steps_stay_whole_numbers() -> None:
    dimension = Dimension(quniform=(1, 8, 3))
    found = [kept_within(dimension, np.float64(value)) for value in (-2, 0.8 * 4, 1.2 * 4, 6.9, 80)]
    assert found == [1, 4, 4, 7, 7]
    assert all(type(value) is int for value in found)


@pytest.mark.parametrize("value", ["none", True, None, ["q_proj"], 99, 0.5])
def test_a_lists_values_are_left_as_they_are(value: Any) -> None:
    """They move along the list; one that is a number is not made another."""
    assert kept_within(Dimension(choice=["none", True, None, ["q_proj"], 99, 0.5]), value) is value


SPACE = {
    LEARNING: {"loguniform": [1e-5, 1e-3]},
    "train.weight_decay": {"uniform": [0.0, 0.1]},
    "train.warmup_steps": {"quniform": [3, 24, 3]},
    "train.global_batch_size": {"choice": [16, 32, 64]},
}


@pytest.mark.parametrize("resample", [0.0, 0.5, 1.0])
def test_what_rays_own_explorer_makes_is_always_in_the_space(resample: float) -> None:
    """Five hundred moves in a row, each from the one before."""
    job = search(SPACE, scheduler="pbt", resample_probability=resample)
    assert job.tune is not None
    pbt = make_scheduler(job)
    values = {key: job.tune.space[key].at(0.5) for key in SPACE}
    seen: dict[str, set[Any]] = {key: set() for key in SPACE}
    for _ in range(500):
        values, _ = _explore(
            values, pbt._hyperparam_mutations, resample, pbt._perturbation_factors, pbt._custom_explore_fn
        )
        for key, value in values.items():
            assert job.tune.space[key].has(value), (key, value)
            seen[key].add(value)
    assert all(len(values) > 2 for values in seen.values()), seen


@pytest.mark.parametrize("steps", [[1, 22, 3], [0, 10, 3]])
def test_a_population_takes_steps_that_do_not_begin_at_a_multiple(steps: list[int]) -> None:
    """A job file may count from anywhere, and end between two steps."""
    make_scheduler(search({"train.warmup_steps": {"quniform": steps}}, scheduler="pbt"))


def test_a_population_draws_the_same_for_the_same_seed() -> None:
    def drawn(seed: int) -> tuple[float, float]:
        make_scheduler(search(scheduler="pbt", groups={"seed": seed}))
        return random.random(), float(np.random.random())

    assert drawn(3) == drawn(3)
    assert drawn(3) != drawn(4)
    random.seed(5)
    make_scheduler(search(RATE, scheduler="asha"))
    state = random.random()
    random.seed(5)
    assert random.random() == state, "schedulers that draw nothing leave the generators alone"
