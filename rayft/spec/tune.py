"""The group `tune`: a search over keys of its job file. What contradicts itself inside the group is refused here, what the rest of
the job decides in `rayft.spec.search`.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from rayft.spec.groups import Group

KINDS = ("choice", "grid", "uniform", "loguniform", "quniform")
#: Schedulers that let a trial go on from another's state.
FORKING = ("pbt", "pb2")
#: Settings of schedulers: who uses them.
SCHEDULER_KEYS = {
    "grace_steps": ("asha", "median"),
    "reduction_factor": ("asha", "hyperband"),
    "perturb_steps": FORKING,
    "quantile": FORKING,
    "resample_probability": ("pbt",),
}
DEFAULT_TRIALS = 8
#: Digits of values that are drawn from a range: what a job file can be read with.
DIGITS = 6


def _absent(value: Any) -> bool:
    return value is None


def alike(one: Any, other: Any) -> bool:
    """Whether two values of a job file are the same: numbers by value, and true is not 1."""
    return one == other and isinstance(one, bool) == isinstance(other, bool)


class Dimension(Group):
    """Values of one key: a list, or a range with how values are drawn from it."""

    choice: list[Any] | None = Field(None, exclude_if=_absent, description="One of these, all as likely.")
    grid: list[Any] | None = Field(
        None, exclude_if=_absent, description="Each of these, crossed with the other grids of the space."
    )
    uniform: tuple[float, float] | None = Field(None, exclude_if=_absent, description="[low, high].")
    loguniform: tuple[float, float] | None = Field(
        None, exclude_if=_absent, description="[low, high], drawn evenly over the logarithm."
    )
    quniform: tuple[float, float, PositiveFloat] | None = Field(
        None,
        exclude_if=_absent,
        description="[low, high, step]: low, low + step, … up to high, all as likely.",
    )
    when: dict[str, Any] | None = Field(
        None,
        exclude_if=_absent,
        description="Only where these keys, sampled or the job's own, have this value, or one of a list; elsewhere the key "
        "keeps the job's value.",
    )

    @model_validator(mode="after")
    def _agrees(self) -> Dimension:
        given = [name for name in KINDS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give one of {', '.join(KINDS)}, not {' and '.join(given) or 'none'}")
        if self.when is not None and not self.when:
            raise ValueError("`when` names no key; leave it out")
        if self.is_list:
            values = self._listed()
            if not values:
                raise ValueError(f"{self.kind} is an empty list, so there is nothing to choose from")
            for number, value in enumerate(values):
                if any(alike(value, other) for other in values[:number]):
                    raise ValueError(f"{self.kind}: {value!r} stands twice")
            return self
        low, high = self.bounds
        if low >= high:
            raise ValueError(f"{self.kind}: the range from {low:g} to {high:g} is empty")
        if self.loguniform and low <= 0:
            raise ValueError(f"loguniform: a range over the logarithm begins above 0, not at {low:g}")
        if self.quniform and self.count == 1:
            raise ValueError(f"quniform: the step {self.step:g} is longer than the range")
        return self

    @property
    def kind(self) -> str:
        """choice, grid, uniform, loguniform or quniform."""
        return next(name for name in KINDS if getattr(self, name) is not None)

    @property
    def is_list(self) -> bool:
        """Whether the values are listed: choice or grid."""
        return self.kind in ("choice", "grid")

    @property
    def continuous(self) -> bool:
        """Whether the range has no steps: uniform or loguniform."""
        return self.kind in ("uniform", "loguniform")

    @property
    def bounds(self) -> tuple[float, float]:
        """Least and greatest value of a range."""
        low, high = getattr(self, self.kind)[:2]
        return low, high

    @property
    def step(self) -> float:
        """Distance of a quniform's values."""
        assert self.quniform is not None
        return self.quniform[2]

    @property
    def count(self) -> int:
        """How many values a dimension that is not continuous has."""
        if self.is_list:
            return len(self._listed())
        low, high = self.bounds
        return math.floor((high - low) / self.step + 1e-9) + 1

    def value(self, index: int) -> Any:
        """Value number `index` of a dimension that is not continuous."""
        if self.is_list:
            return self._listed()[index]
        low, step = self.bounds[0], self.step
        exact = low + index * step
        return int(exact) if low.is_integer() and step.is_integer() else float(f"{exact:.12g}")

    def at(self, part: float) -> Any:
        """The value at a part (0 to 1) of the dimension's probability."""
        if not self.continuous:
            return self.value(min(int(part * self.count), self.count - 1))
        low, high = self.bounds
        drawn = low + part * (high - low)
        if self.loguniform:
            drawn = math.exp(math.log(low) + part * (math.log(high) - math.log(low)))
        return self.rounded(drawn)

    def rounded(self, value: float) -> float:
        """A value of a continuous range in few digits, inside the range."""
        low, high = self.bounds
        return min(max(float(f"{value:.{DIGITS}g}"), low), high)

    def index(self, value: Any) -> int:
        """The number of a value of a dimension that is not continuous; raises ValueError for none of its own."""
        if not self.is_list and isinstance(value, int | float) and not isinstance(value, bool):
            nearest = round((value - self.bounds[0]) / self.step)
            if 0 <= nearest < self.count and math.isclose(
                value, self.value(nearest), rel_tol=1e-9, abs_tol=1e-12
            ):
                return nearest
        for number, one in enumerate(self._listed()):
            if alike(value, one):
                return number
        raise ValueError(f"{value!r} is no value of {self.kind}")

    def has(self, value: Any) -> bool:
        """Whether this is a value of the dimension."""
        if not self.continuous:
            try:
                return self.index(value) >= 0
            except ValueError:
                return False
        low, high = self.bounds
        return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high

    def _listed(self) -> list[Any]:
        return self.choice if self.choice is not None else self.grid or []


class Objective(Group):
    """What is to become small or large."""

    metric: Annotated[str, Field(min_length=1)] = Field(
        description="Such as eval.loss, train.loss, suite.NAME.METRIC, change.NAME.METRIC, gpu_hours or seconds."
    )
    mode: Literal["min", "max"] = Field("min", description="Whether less of it is better, or more.")


class Bound(Group):
    """What a metric must keep to for a trial to count."""

    min: float | None = Field(None, exclude_if=_absent, description="The least it may be.")
    max: float | None = Field(None, exclude_if=_absent, description="The most it may be.")

    @model_validator(mode="after")
    def _agrees(self) -> Bound:
        if self.min is None and self.max is None:
            raise ValueError("a constraint gives min, max or both")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min {self.min:g} is more than max {self.max:g}, so nothing would meet it")
        return self

    def violations(self, value: float) -> list[float]:
        """How far a value is beyond each bound that is given; at most 0 where it keeps to it."""
        low = [] if self.min is None else [self.min - value]
        return low + ([] if self.max is None else [value - self.max])


def _default_trials(data: dict[str, Any]) -> int:
    dimensions = data.get("space", {}).values()
    return (
        1
        if any(dimension.grid is not None for dimension in dimensions) or data.get("searcher") == "grid"
        else DEFAULT_TRIALS
    )


class Tune(Group):
    """A search over keys of the job: every trial is a run with values of its own."""

    space: dict[Annotated[str, Field(min_length=1)], Dimension] = Field(
        min_length=1, description="Keys of the job file, such as train.learning_rate, and their values."
    )
    metric: str | None = Field(
        None,
        description="What trials are compared by: eval.loss and other metrics of the held-out rows, train.loss and others of "
        "the last step, suite.NAME.METRIC after training, change.NAME.METRIC against before it, gpu_hours, cpu_hours, seconds.",
    )
    mode: Literal["min", "max"] = Field("min", description="Whether less of the metric is better, or more.")
    objectives: list[Objective] = Field(
        default_factory=list, description="Instead of metric: several that contradict each other (optuna)."
    )
    constraints: dict[str, Bound] = Field(
        default_factory=dict, description="Bounds of other metrics that the best trial must keep to."
    )
    searcher: Literal["random", "grid", "optuna"] = Field(
        "random",
        description="random; grid: every combination of the lists; optuna: learns from finished trials (TPE).",
    )
    num_trials: Annotated[int, Field(ge=1, le=10_000)] = Field(
        default_factory=_default_trials,
        description=f"Trials (default {DEFAULT_TRIALS}); with `grid` dimensions, trials of each of their combinations (default 1).",
    )
    scheduler: Literal["none", "asha", "hyperband", "median", "pbt", "pb2"] = Field(
        "none",
        description="Which trials go on: asha, hyperband and median stop or pause bad ones; pbt and pb2 let them go on from the "
        "state of good ones with changed values.",
    )
    grace_steps: PositiveInt | None = Field(
        None,
        description="asha, median: steps before a trial may be stopped (default: eval.every_steps).",
    )
    reduction_factor: Annotated[float, Field(gt=1)] = Field(
        3.0, description="asha, hyperband: one of so many trials goes on from each rung to the next."
    )
    perturb_steps: PositiveInt | None = Field(
        None, description="pbt, pb2: steps between comparisons (default: eval.every_steps)."
    )
    quantile: Annotated[float, Field(gt=0, le=0.5)] = Field(
        0.25, description="pbt, pb2: share of the trials that is replaced by as many of the best."
    )
    resample_probability: Annotated[float, Field(ge=0, le=1)] = Field(
        0.25, description="pbt: probability that a value is drawn anew and not moved."
    )
    max_concurrent: PositiveInt | None = Field(
        None, description="Trials at a time (default: as many as the cluster holds)."
    )
    share: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="Part of the cluster that the search may take."
    )
    time_budget_s: PositiveFloat | None = Field(
        None, description="Seconds after which no trial starts and running ones are stopped."
    )
    gpu_hours: PositiveFloat | None = Field(
        None, description="GPU-hours of all trials after which the search ends."
    )
    oom_retries: NonNegativeInt = Field(
        2, description="How often a trial that ran out of memory goes on with half the micro-batch."
    )

    @model_validator(mode="after")
    def _agrees(self) -> Tune:
        self._aims_agree()
        self._methods_agree()
        for name, users in SCHEDULER_KEYS.items():
            if self.scheduler not in users and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(
                    f"tune.{name} is for the scheduler {' or '.join(users)}, not {self.scheduler}"
                )
        return self

    def _aims_agree(self) -> None:
        if not self.objectives:
            if not self.metric:
                raise ValueError("tune.metric is missing: what trials are compared by, such as eval.loss")
            return
        if self.metric or self.mode != "min":
            raise ValueError("tune: give metric and mode, or objectives, not both")
        names = [objective.metric for objective in self.objectives]
        if len(names) == 1:
            raise ValueError("tune.objectives has one; give it as tune.metric and tune.mode")
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"tune.objectives: {twice[0]!r} stands twice")
        if self.searcher != "optuna":
            raise ValueError(
                f"tune.objectives: several objectives need tune.searcher optuna, not {self.searcher}"
            )
        if self.scheduler != "none":
            raise ValueError(
                f"tune.objectives: the scheduler {self.scheduler} ranks trials by one metric; with several objectives it "
                "must be none"
            )

    def _methods_agree(self) -> None:
        grids = [key for key, dimension in self.space.items() if dimension.grid is not None]
        ranges = [key for key, dimension in self.space.items() if not dimension.is_list]
        if self.scheduler in FORKING:
            if self.searcher != "random":
                raise ValueError(
                    f"tune.searcher {self.searcher} with tune.scheduler {self.scheduler}: the scheduler chooses the values "
                    "itself while trials run, so they begin at random"
                )
            if grids:
                raise ValueError(
                    f"tune.space.{grids[0]}: grid is not for tune.scheduler {self.scheduler}, which changes values while "
                    "trials run; use choice"
                )
            for key, dimension in self.space.items():
                if dimension.when:
                    raise ValueError(
                        f"tune.space.{key}: `when` is not for tune.scheduler {self.scheduler}, which changes each value on "
                        "its own"
                    )
                if self.scheduler == "pb2" and not dimension.continuous:
                    raise ValueError(
                        f"tune.space.{key}: pb2 models values as a range without steps; use uniform or loguniform, or the "
                        "scheduler pbt"
                    )
            if self.num_trials < 2:
                raise ValueError(
                    f"tune.num_trials 1: {self.scheduler} compares trials, so it needs 2 or more"
                )
        if self.scheduler == "hyperband" and self.searcher == "optuna":
            raise ValueError(
                "tune.searcher optuna with tune.scheduler hyperband: its brackets are filled before any trial has ended, so there "
                "is nothing to learn from; use asha, or the searcher random"
            )
        if self.searcher == "grid":
            if ranges:
                raise ValueError(
                    f"tune.space.{ranges[0]}: tune.searcher grid tries every value, and a range has no list of them; use "
                    "grid or choice"
                )
            if self.num_trials != 1:
                raise ValueError(
                    f"tune.num_trials {self.num_trials}: tune.searcher grid tries every combination once; leave it out"
                )
        if self.searcher == "optuna" and grids:
            raise ValueError(
                f"tune.space.{grids[0]}: grid is for tune.searcher random or grid; with optuna use choice"
            )

    @property
    def aims(self) -> list[Objective]:
        """The objectives, be there one or several."""
        return self.objectives or [Objective(metric=self.metric or "", mode=self.mode)]
