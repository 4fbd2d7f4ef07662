"""What values the next trial has: a function of the seed, the trial's number and what is known of earlier trials.

Nothing is kept between proposals that could not be made again from the ledger, so a search that was killed goes on as it would
have. Optuna's study too is built anew for each one, on Optuna's own interface (`ask`), whose sampler is seeded by seed and number.
"""

from __future__ import annotations

import importlib.util
import json
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from rayft.errors import JobError
from rayft.spec import Job
from rayft.spec.tune import FORKING, Dimension
from rayft.tune.space import STREAM, Space, drawn, sample

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

Values = dict[str, Any]
#: How often Optuna is asked for values that a job can have together.
MOST_ASKED = 20


@dataclass(frozen=True)
class Finished:
    """A trial that has ended.

    values: as proposed. objectives: of its last report, in the order of `tune.aims`; None: it failed for what its values are
    (diverged, out of memory), which a search keeps away from. violations: of each bound of the constraints that was measured, at
    most 0 where it is kept to. curve: (step, first objective) of its reports. stopped: by the scheduler, before its end.
    """

    trial: str
    values: Mapping[str, Any]
    objectives: tuple[float, ...] | None
    violations: tuple[float, ...] = ()
    curve: Sequence[tuple[int, float]] = ()
    stopped: bool = False


class Proposer(Protocol):
    """Makes the values of trials."""

    def propose(
        self, number: int, history: Sequence[Finished], running: Sequence[Mapping[str, Any]] = ()
    ) -> Values | None:
        """Values of trial `number` (from 0); None: the space is exhausted. running: values of trials that have not ended."""
        ...


def proposer_of(job: Job) -> Proposer:
    """The proposer of the job's search. Raises JobError where a package that it needs is not installed."""
    assert job.tune is not None
    refuse_missing_packages(job)
    space = Space(job)
    if job.tune.searcher == "grid":
        return GridProposer(space)
    if job.tune.searcher == "optuna":
        return OptunaProposer(space, job.seed)
    return RandomProposer(space, job.seed)


def refuse_missing_packages(job: Job) -> None:
    """Raise JobError where what the searcher or the scheduler needs is not installed."""
    assert job.tune is not None
    wanted = {
        "tune.searcher optuna": ("optuna", "optuna", job.tune.searcher == "optuna"),
        "tune.scheduler pb2": ("sklearn", "scikit-learn", job.tune.scheduler == "pb2"),
    }
    for who, (module, package, used) in wanted.items():
        if used and importlib.util.find_spec(module) is None:
            raise JobError(f"{who} needs {package}, which is not installed.", "Install rayft[tune].")


class GridProposer:
    """Every combination of the lists, once."""

    def __init__(self, space: Space) -> None:
        self.space = space

    def propose(
        self, number: int, history: Sequence[Finished] = (), running: Sequence[Mapping[str, Any]] = ()
    ) -> Values | None:
        """Combination `number`."""
        points = self.space.all_points
        return dict(points[number]) if number < len(points) else None


class RandomProposer:
    """Draws at random, by the trial's number alone: history changes nothing.

    In a space of listed values no setting comes twice, except in a population whose trials exchange their states.
    """

    def __init__(self, space: Space, seed: int) -> None:
        self.space, self.seed = space, seed
        self._made: list[Values | None] = []

    def propose(
        self, number: int, history: Sequence[Finished] = (), running: Sequence[Mapping[str, Any]] = ()
    ) -> Values | None:
        """The draw of that number."""
        if self.space.everything is None or self.space.tune.scheduler in FORKING:
            return sample(self.space, self.seed, number)
        while len(self._made) <= number:
            values = sample(self.space, self.seed, len(self._made))
            before = [made for made in self._made if made is not None]
            self._made.append(_unseen(self.space, self.seed, len(self._made), values, before))
        found = self._made[number]
        return None if found is None else dict(found)


class OptunaProposer:
    """Optuna's TPE, for one objective (arXiv:2304.11127) and for several (MOTPE, doi:10.1613/jair.1.13188).

    For several NSGA-II would be the other choice; it breeds from generations of some fifty finished trials, more than most
    searches have in all, while TPE learns from a handful and takes trials in any order.

    The first trials are those of a random search by the same seed. A trial that was stopped is told with its curve, so it ranks
    behind those that got further; one that breaks a constraint ranks behind all that do not, by how far; one that failed ranks
    behind those too; one that still runs counts as bad (constant liar), so that trials at the same time differ.
    """

    def __init__(self, space: Space, seed: int) -> None:
        self.space, self.seed = space, seed
        self.startup = min(10, max(4, math.ceil(space.trials / 5)))

    def propose(
        self, number: int, history: Sequence[Finished], running: Sequence[Mapping[str, Any]] = ()
    ) -> Values | None:
        """Values of trial `number`; the order of history and running is of no account."""
        ours = (replace(one, values=self._ours(one.values)) for one in history)
        told = sorted((one for one in ours if self.space.has(one.values)), key=lambda one: one.trial)
        others = sorted((v for v in map(self._ours, running) if self.space.has(v)), key=_key)
        if len(told) < self.startup:
            values = sample(self.space, self.seed, number)
        else:
            values = self._asked(number, told, others)
        if self.space.everything is None:
            return values
        return _unseen(self.space, self.seed, number, values, [*(one.values for one in told), *others])

    def _ours(self, values: Mapping[str, Any]) -> Values:
        """Without what is not of the space, such as a micro-batch that was made smaller."""
        return {key: values[key] for key in self.space.order if key in values}

    def _asked(self, number: int, told: Sequence[Finished], running: Sequence[Values]) -> Values:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        state = optuna.trial.TrialState
        stream = np.random.SeedSequence([STREAM, self.seed, number])
        conditional = any(self.space[key].when for key in self.space.order)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            sampler = optuna.samplers.TPESampler(
                seed=int(stream.generate_state(1)[0]),
                n_startup_trials=self.startup,
                multivariate=conditional or len(self.space.tune.aims) == 1,
                group=conditional,
                constant_liar=True,
            )
        study = optuna.create_study(
            sampler=sampler,
            directions=["minimize" if aim.mode == "min" else "maximize" for aim in self.space.tune.aims],
        )
        for one in told:
            study.add_trial(self._frozen(one))
        for values in running:
            study.add_trial(optuna.trial.create_trial(state=state.RUNNING, **self._parameters(values)))
        for _ in range(MOST_ASKED):
            values = self._suggested(study)
            if self.space.refusal(values) is None:
                return values
            # No job can have these together: told as failed, so that the next one is another.
            study.add_trial(self._frozen(Finished("", values, None)))
        return sample(self.space, self.seed, number)

    def _suggested(self, study: Study) -> Values:
        trial = study.ask()
        values: Values = {}
        for key in self.space.order:
            if self.space.active(key, values):
                values[key] = _suggest(trial, key, self.space[key])
        return values

    def _frozen(self, one: Finished) -> FrozenTrial:
        """The trial as Optuna keeps it."""
        from optuna.trial import TrialState, create_trial

        known = self._parameters(one.values)
        if one.objectives is None or not all(map(math.isfinite, one.objectives)):
            # Optuna ranks a trial without a value before those that break a constraint; an endless violation is behind both.
            return create_trial(state=TrialState.PRUNED, constraints={"failed": math.inf}, **known)
        known["constraints"] = {
            str(index): value for index, value in enumerate(one.violations) if not math.isnan(value)
        }
        if one.stopped and len(one.objectives) == 1:
            curve = {step: value for step, value in one.curve if math.isfinite(value)}
            return create_trial(state=TrialState.PRUNED, intermediate_values=curve, **known)
        return create_trial(state=TrialState.COMPLETE, values=list(one.objectives), **known)

    def _parameters(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Optuna's `params` and `distributions` of a trial's values."""
        return {
            "params": {key: _number(self.space[key], value) for key, value in values.items()},
            "distributions": {key: _distribution(self.space[key]) for key in values},
        }


def _distribution(dimension: Dimension) -> BaseDistribution:
    """Listed values by their number, as they may be lists; ranges as numbers, a quniform's by the number of its step."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if dimension.is_list:
        return CategoricalDistribution(range(dimension.count))
    if dimension.quniform:
        return IntDistribution(0, dimension.count - 1)
    low, high = dimension.bounds
    return FloatDistribution(low, high, log=dimension.loguniform is not None)


def _number(dimension: Dimension, value: Any) -> Any:
    """What Optuna knows a value by."""
    return float(value) if dimension.continuous else dimension.index(value)


def _suggest(trial: Trial, key: str, dimension: Dimension) -> Any:
    if dimension.is_list:
        return dimension.value(trial.suggest_categorical(key, range(dimension.count)))
    if dimension.quniform:
        return dimension.value(trial.suggest_int(key, 0, dimension.count - 1))
    low, high = dimension.bounds
    return dimension.rounded(trial.suggest_float(key, low, high, log=dimension.loguniform is not None))


def _unseen(
    space: Space, seed: int, number: int, values: Values, before: Iterable[Mapping[str, Any]]
) -> Values | None:
    """These values if no trial has had them, else others that none has had, at random; None: there are none left."""
    seen = {_key(one) for one in before}
    if _key(values) not in seen:
        return values
    left = [one for one in space.everything or [] if _key(one) not in seen]
    same = [one for one in left if all(one.get(key) == values.get(key) for key in space.crossed)]
    left = same or left
    return dict(left[int(drawn(seed, number, "") * len(left))]) if left else None


def _key(values: Mapping[str, Any]) -> str:
    return json.dumps(values, sort_keys=True)
