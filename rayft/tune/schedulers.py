"""Ray Tune's schedulers, as the group `tune` asks for them."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
from ray import tune as ray_tune
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    HyperBandScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)

from rayft.errors import JobError
from rayft.spec import Job
from rayft.spec.tune import Dimension, Tune

#: Schedulers that compare a population: all of it is proposed at once.
POPULATIONS = ("hyperband", "pbt", "pb2")
#: Where a job counts epochs, nobody knows the last step before the data is read; rungs far beyond it do nothing.
NO_LAST_STEP = 1_000_000


def make_scheduler(job: Job) -> TrialScheduler:
    """The scheduler of a search. Time is counted in optimizer steps; for HyperBand in reports, since its brackets hold as many
    trials as there are units of time."""
    tune = job.tune
    assert tune is not None
    aim, every = tune.aims[0], job.eval.every_steps or 1
    last = last_step(job)
    seen: dict[str, Any] = {"metric": aim.metric, "mode": aim.mode}
    if tune.scheduler == "asha":
        return AsyncHyperBandScheduler(
            time_attr="step",
            **seen,
            max_t=last,
            grace_period=min(tune.grace_steps or every, last),
            reduction_factor=tune.reduction_factor,
            stop_last_trials=False,  # the last report comes from a run that ends by itself
        )
    if tune.scheduler == "hyperband":
        reports = max(1, last // every) if last != NO_LAST_STEP else 81
        return HyperBandScheduler(
            time_attr="report",
            **seen,
            max_t=reports,
            reduction_factor=tune.reduction_factor,
            stop_last_trials=False,
        )
    if tune.scheduler == "median":
        return MedianStoppingRule(
            time_attr="step", **seen, grace_period=tune.grace_steps or every, min_samples_required=2
        )
    if tune.scheduler in ("pbt", "pb2"):
        return _population(job, tune, seen, tune.perturb_steps or every)
    return FIFOScheduler()


def turn_of(job: Job) -> int | None:
    """Steps after which a trial gives way to one that waits; None where it need not. A population of PBT or PB2 must move on
    together, so where there is no room for all of it trials take turns, as long as those between two comparisons. HyperBand
    pauses trials itself."""
    assert job.tune is not None
    if job.tune.scheduler not in ("pbt", "pb2"):
        return None
    return job.tune.perturb_steps or job.eval.every_steps or 1


def last_step(job: Job) -> int:
    """The furthest step that a trial of the search may come to."""
    assert job.tune is not None
    searched = job.tune.space.get("train.max_steps")
    if searched is None:
        return job.train.max_steps or NO_LAST_STEP
    if not searched.is_list:
        return int(searched.bounds[1])
    return max(searched.value(index) or NO_LAST_STEP for index in range(searched.count))


def _population(job: Job, tune: Tune, seen: dict[str, Any], every: int) -> TrialScheduler:
    # Both draw from these generators; Ray's own actor manager does so too, so draws are seeded and not repeatable.
    random.seed(job.seed)
    np.random.seed(job.seed)

    def within(values: dict[str, Any]) -> dict[str, Any]:
        return {
            key: kept_within(tune.space[key], value) if key in tune.space else value
            for key, value in values.items()
        }

    common: dict[str, Any] = {
        "time_attr": "step",
        **seen,
        "perturbation_interval": every,
        "quantile_fraction": tune.quantile,
        "custom_explore_fn": within,
        "log_config": False,
        "require_attrs": False,
    }
    if tune.scheduler == "pbt":
        return PopulationBasedTraining(
            hyperparam_mutations={key: _drawn(dimension) for key, dimension in tune.space.items()},
            resample_probability=tune.resample_probability,
            **common,
        )
    try:
        from ray.tune.schedulers.pb2 import PB2

        return PB2(hyperparam_bounds={key: list(one.bounds) for key, one in tune.space.items()}, **common)
    except (ImportError, RuntimeError) as error:
        raise JobError(
            "tune.scheduler pb2 models values by Gaussian processes and needs scikit-learn, which is not installed.",
            "Install rayft[tune], or use pbt.",
        ) from error


def kept_within(dimension: Dimension, value: Any) -> Any:
    """A value that a scheduler moved (by a factor, or along a list), put back to what the dimension holds."""
    if dimension.is_list or isinstance(value, bool) or not isinstance(value, (int, float)):
        return value
    low, high = dimension.bounds
    inside = min(max(float(value), low), high)
    if dimension.continuous:
        return dimension.rounded(inside)
    nearest = round((inside - low) / dimension.step)
    return dimension.value(min(nearest, dimension.count - 1))


def _drawn(dimension: Dimension) -> Any:
    """A dimension as Ray Tune draws from it; a list has its order, and values move along it."""
    if dimension.is_list:
        return [dimension.value(index) for index in range(dimension.count)]
    low, high = dimension.bounds
    if dimension.loguniform:
        return ray_tune.loguniform(low, high)
    if dimension.uniform:
        return ray_tune.uniform(low, high)
    # Ray's own quniform counts from zero.
    return lambda: dimension.at(random.random())
