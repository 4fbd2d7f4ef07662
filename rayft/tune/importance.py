"""How much each hyper-parameter mattered, by the trials of a search.

With Optuna installed and trials enough: PED-ANOVA (arXiv:2304.10255), how much being among the best quarter narrows a
parameter down, as shares of 1. Else the strength of the rank correlation between parameter and metric: for numbers
Spearman's |rho|, for choices the correlation ratio of the ranks, sqrt(between-group / total sum of squares); each from 0 to 1
on its own, blind to interactions, and above 0 by chance where trials are few.

Trials that were stopped early would look worse only for having run less. So all are compared by their last report at or
before one step: the furthest that at least half of them have reached.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rayft.report.trials import TrialState
from rayft.spec.tune import Objective
from rayft.tune.scale import Scale

#: Below this many trials any order of importance is chance.
MIN_TRIALS = 4
#: PED-ANOVA wants five trials or more among the best.
MIN_OPTUNA = 20
BEST_SHARE = 0.25


@dataclass(frozen=True)
class Importance:
    """shares: key -> importance, the greatest first; method: how it was found, for people."""

    shares: dict[str, float] = field(default_factory=dict)
    method: str = ""


def importance_of(trials: Mapping[str, TrialState], scales: Sequence[Scale], aim: Objective) -> Importance:
    """Importance of each key of `scales` for one objective; none where too few trials have reported it."""
    found, step = comparable(list(trials.values()), aim.metric)
    if len(found) < MIN_TRIALS or not scales or len({value for _, value in found}) < 2:
        return Importance(method=f"{len(found)} trials with {aim.metric} are too few to tell")
    about = f"{len(found)} trials at step {step}"
    shares: dict[str, float] | None = None
    if len(found) >= MIN_OPTUNA and importlib.util.find_spec("optuna") is not None:
        shares = _ped_anova(found, scales, aim.mode)
        method = f"PED-ANOVA (Optuna) over {about}: shares of 1"
    if not shares:
        shares = {scale.key: _correlation(found, scale) for scale in scales}
        method = f"rank correlation with {aim.metric} over {about}, each from 0 to 1"
    return Importance(dict(sorted(shares.items(), key=lambda item: -item[1])), method)


def comparable(trials: Sequence[TrialState], metric: str) -> tuple[list[tuple[TrialState, float]], int]:
    """Trials with their value of a metric at a step that at least half of those which reported it reached, and that step.

    A trial that changed its hyper-parameters on the way is taken by those it had there.
    """
    curves = {trial.trial: trial.points(metric) for trial in trials}
    ends = sorted((points[-1][0] for points in curves.values() if points), reverse=True)
    if not ends:
        return [], 0
    step = ends[(len(ends) - 1) // 2]
    found = []
    for trial in trials:
        points = curves[trial.trial]
        if points and points[-1][0] >= step:
            found.append((trial, [value for at, value in points if at <= step][-1:] or [points[0][1]]))
    return [(trial, values[0]) for trial, values in found], step


def ranks(values: Sequence[float]) -> np.ndarray:
    """Ranks from 1, ties sharing the mean of theirs."""
    array = np.asarray(values, dtype=float)
    order = array.argsort(kind="stable")
    rank = np.empty(len(array))
    rank[order] = np.arange(1, len(array) + 1)
    _, group = np.unique(array, return_inverse=True)
    return (np.bincount(group, rank) / np.bincount(group))[group]


def _correlation(found: Sequence[tuple[TrialState, float]], scale: Scale) -> float:
    pairs = [(trial.values.get(scale.key), value) for trial, value in found]
    placed = [(place, value) for given, value in pairs if (place := scale.place(given)) is not None]
    if len(placed) < MIN_TRIALS:
        return 0.0
    x, y = ranks([place for place, _ in placed]), ranks([value for _, value in placed])
    total = float(((y - y.mean()) ** 2).sum())
    if x.std() == 0 or total == 0:
        return 0.0
    if not scale.options:
        return abs(float(np.corrcoef(x, y)[0, 1]))
    between = sum(
        float((x == group).sum()) * float(y[x == group].mean() - y.mean()) ** 2 for group in np.unique(x)
    )
    return float(np.sqrt(between / total))


def _ped_anova(
    found: Sequence[tuple[TrialState, float]], scales: Sequence[Scale], mode: str
) -> dict[str, float] | None:
    """Shares by Optuna; None where it cannot say (its interface moves, and this is only a picture)."""
    try:
        import optuna
        from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

        optuna.logging.set_verbosity(logging.WARNING)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            study = optuna.create_study(direction="maximize" if mode == "max" else "minimize")
            for trial, value in found:
                params: dict[str, Any] = {}
                ranges: dict[str, BaseDistribution] = {}
                for scale in scales:
                    given = trial.values.get(scale.key)
                    if given is None or scale.place(given) is None:
                        continue
                    if scale.options:
                        from rayft.tune.scale import label

                        params[scale.key] = label(given)
                        ranges[scale.key] = CategoricalDistribution(scale.options)
                    else:
                        params[scale.key] = float(given)
                        ranges[scale.key] = FloatDistribution(scale.low, scale.high, log=scale.log)
                study.add_trial(optuna.trial.create_trial(params=params, distributions=ranges, value=value))
            evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=BEST_SHARE)
            return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))
    except Exception:
        return None
