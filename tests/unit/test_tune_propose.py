"""Proposals: their distributions, that they are functions of seed, number and history, and that Optuna's are better ones."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from rayft.errors import JobError
from rayft.spec import Job, parse_job
from rayft.tune.propose import Finished, OptunaProposer, Proposer, proposer_of
from rayft.tune.space import Space, job_of, sample
from tests.shared import ROOT

X, Y, R, A = "train.learning_rate", "train.weight_decay", "adapter.lora_r", "adapter.lora_alpha"
SQUARE = {X: {"uniform": [0.01, 1]}, Y: {"uniform": [0.0, 1]}}
BRANCHED = {
    "adapter.type": {"choice": ["none", "lora"]},
    X: {"loguniform": [1e-5, 1e-2]},
    R: {"choice": [4, 8], "when": {"adapter.type": "lora"}},
    A: {"quniform": [4, 16, 4], "when": {R: 8}},
    "adapter.target_modules": {
        "choice": ["all-linear", ["q_proj", "v_proj"]],
        "when": {"adapter.type": ["lora"]},
    },
}


def search(space: dict[str, Any], seed: int = 0, **tune: Any) -> Job:
    return parse_job(
        {
            "name": "search",
            "seed": seed,
            "model": {"path": "m"},
            "adapter": {"type": "lora"},
            "data": {"train": [{"path": "a.jsonl"}], "eval": [{"path": "b.jsonl"}]},
            "eval": {"every_steps": 10},
            "tune": {"space": space, **tune} | ({} if "objectives" in tune else {"metric": "eval.loss"}),
        }
    )


Measure = Callable[[dict[str, Any]], tuple[float, ...] | None]


def run(
    job: Job,
    measure: Measure,
    trials: int,
    violations: Callable[[dict[str, Any]], tuple[float, ...]] = lambda _: (),
) -> list[Finished]:
    """A search one trial after the other."""
    proposer, history = proposer_of(job), list[Finished]()
    for number in range(trials):
        values = proposer.propose(number, history)
        if values is None:
            break
        history.append(Finished(f"t{number:04d}", values, measure(values), violations(values)))
    return history


def bowl(values: dict[str, Any]) -> tuple[float]:
    """Least at (0.3, 0.7)."""
    return ((values[X] - 0.3) ** 2 + (values[Y] - 0.7) ** 2,)


# -- draws -----------------------------------------------------------------------------------------------------------


def draws(dimension: dict[str, Any], count: int = 2000) -> list[Any]:
    key = X if "choice" not in dimension else R
    space = Space(search({key: dimension}))
    return [sample(space, 5, number)[key] for number in range(count)]


@pytest.mark.parametrize(
    ("dimension", "cumulative"),
    [
        ({"uniform": [2, 6]}, lambda x: (x - 2) / 4),
        ({"loguniform": [1e-5, 1e-1]}, lambda x: (math.log10(x) + 5) / 4),
    ],
)
def test_ranges_are_drawn_from_evenly(
    dimension: dict[str, Any], cumulative: Callable[[float], float]
) -> None:
    """Kolmogorov-Smirnov at 1 %."""
    drawn = sorted(map(cumulative, draws(dimension)))
    assert drawn[0] >= 0
    assert drawn[-1] <= 1
    even = np.arange(len(drawn)) / len(drawn)
    assert np.abs(np.array(drawn) - even).max() < 1.63 / math.sqrt(len(drawn))


@pytest.mark.parametrize(
    ("dimension", "values"),
    [
        ({"choice": [4, 8, 16]}, [4, 8, 16]),
        ({"quniform": [0.5, 2, 0.5]}, [0.5, 1.0, 1.5, 2.0]),
        ({"quniform": [1, 8, 3]}, [1, 4, 7]),
    ],
)
def test_steps_are_all_as_likely(dimension: dict[str, Any], values: list[float]) -> None:
    drawn = draws(dimension)
    assert sorted(set(drawn)) == values
    counts = [drawn.count(value) for value in values]
    expected = len(drawn) / len(values)
    assert all(abs(count - expected) < 4 * math.sqrt(expected) for count in counts)


def test_draws_have_few_digits_and_stay_inside() -> None:
    for value in draws({"loguniform": [1.23456789e-5, 1.3e-5]}, 200):
        assert 1.23456789e-5 <= value <= 1.3e-5
        assert len(f"{value!r}".replace(".", "").split("e")[0]) <= 9


def test_a_dimension_more_leaves_the_others_as_they_were() -> None:
    one, two = Space(search({X: SQUARE[X]})), Space(search({Y: SQUARE[Y], X: SQUARE[X]}))
    assert [sample(one, 0, n)[X] for n in range(5)] == [sample(two, 0, n)[X] for n in range(5)]
    assert sample(one, 0, 1) != sample(one, 1, 1)


def test_conditions_are_kept() -> None:
    job = search(BRANCHED)
    space = Space(job)
    seen = [sample(space, 0, number) for number in range(200)]
    for values in seen:
        assert (R in values) == (values["adapter.type"] == "lora")
        assert (A in values) == (values.get(R) == 8)
        assert space.has(values)
        assert job_of(job, values).adapter.lora_r == values.get(R, 16)
    assert {len(values) for values in seen} == {2, 4, 5}
    assert not space.has({**seen[0], "train.max_steps": 3})
    assert not space.has({X: 1e-4})


def test_an_inactive_dimension_meets_nobodys_condition() -> None:
    """Though the job's own lora_r is 16."""
    space = Space(
        search(
            {
                A: {"choice": [8, 32], "when": {R: 16}},
                R: {"choice": [8, 16], "when": {"adapter.type": "lora"}},
                "adapter.type": {"choice": ["none", "lora"]},
            }
        )
    )
    assert space.order == ["adapter.type", R, A]
    assert all(
        (A in values) == (values.get(R) == 16)
        for values in (sample(space, 0, number) for number in range(50))
    )


# -- grids and lists -------------------------------------------------------------------------------------------------


def all_of(proposer: Proposer, most: int = 500) -> list[dict[str, Any]]:
    found = itertools.takewhile(lambda v: v is not None, (proposer.propose(n, []) for n in range(most)))
    return [values for values in found if values is not None]


def keys(found: Sequence[dict[str, Any]]) -> list[str]:
    return [json.dumps(values, sort_keys=True) for values in found]


def test_a_grid_is_complete() -> None:
    job = search(
        {R: {"grid": [4, 8, 16]}, "seed": {"choice": [0, 1]}, Y: {"grid": [0.0, 0.1]}}, searcher="grid"
    )
    found = all_of(proposer_of(job))
    assert len(found) == len(set(keys(found))) == 12 == Space(job).trials
    assert found[0] == {R: 4, "seed": 0, Y: 0.0}
    assert found[1] == {R: 4, "seed": 0, Y: 0.1}


def test_a_grid_with_conditions_has_no_point_twice() -> None:
    space = {key: dimension for key, dimension in BRANCHED.items() if key not in (X, A)}
    found = all_of(proposer_of(search(space, searcher="grid")))
    assert len(found) == len(set(keys(found))) == 1 + 2 * 2
    assert {"adapter.type": "none"} in found


def test_grids_beside_draws_are_crossed() -> None:
    """num_trials counts draws of each point, and every point comes once before one comes again."""
    job = search({R: {"grid": [4, 8, 16]}, Y: {"grid": [0.0, 0.1]}, X: SQUARE[X]}, num_trials=3)
    assert Space(job).trials == 18
    found = [sample(Space(job), 0, number) for number in range(18)]
    points = [(values[R], values[Y]) for values in found]
    assert len(set(points[:6])) == 6
    assert points[6:12] == points[12:] == points[:6]
    assert len({values[X] for values in found}) == 18


def test_a_grid_that_is_too_large() -> None:
    job = search({key: {"grid": list(range(1, 31))} for key in (X, Y, R)}, searcher="grid")
    with pytest.raises(JobError, match="over 10000 combinations"):
        proposer_of(job).propose(0, [])


STEPS = {"train.warmup_steps": {"choice": [0, 10, 30]}, "train.max_steps": {"choice": [5, 20, 40]}}


def test_a_grid_leaves_out_what_no_job_can_be() -> None:
    """Warm-up longer than the run."""
    found = all_of(proposer_of(search(STEPS, searcher="grid")))
    assert len(found) == 3 + 2 + 1


@pytest.mark.parametrize("searcher", ["random", "optuna"])
@pytest.mark.parametrize("more", [{}, {Y: SQUARE[Y]}], ids=["listed", "endless"])
def test_no_proposal_is_what_no_job_can_be(searcher: str, more: dict[str, Any]) -> None:
    job = search(STEPS | more, searcher=searcher, num_trials=30)
    history = run(job, lambda v: (-v["train.warmup_steps"] + v["train.max_steps"],), 30)
    assert len(history) == (30 if more else 6) == Space(job).trials
    assert all(job_of(job, one.values).train.max_steps for one in history)


@pytest.mark.parametrize("searcher", ["random", "optuna"])
def test_no_setting_of_a_small_space_comes_twice(searcher: str) -> None:
    job = search(
        {R: {"choice": [4, 8, 16, 32]}, Y: {"quniform": [0, 0.2, 0.1]}}, searcher=searcher, num_trials=40
    )
    assert Space(job).trials == 12
    found = [dict(one.values) for one in run(job, lambda v: (abs(v[R] - 8) + v[Y],), 40)]
    assert len(found) == len(set(keys(found))) == 12


def test_a_population_may_hold_a_setting_twice() -> None:
    job = search({Y: {"choice": [0.0, 0.1]}}, scheduler="pbt", num_trials=6)
    assert len(all_of(proposer_of(job), 6)) == 6 == Space(job).trials


# -- determinism -----------------------------------------------------------------------------------------------------

PROGRAM = """
import json, sys
from rayft.tune.propose import Finished, proposer_of
from tests.unit.test_tune_propose import search
data = json.load(sys.stdin)
history = [Finished(*one) for one in data["history"]]
proposer = proposer_of(search(data["space"], data["seed"], **data["tune"]))
print(json.dumps([proposer.propose(n, history, data["running"]) for n in (12, 13, 14)]))
"""


@pytest.mark.parametrize("searcher", ["random", "optuna"])
def test_a_fresh_process_proposes_the_same(searcher: str) -> None:
    """From the ledger alone, whatever was proposed before and in whatever order trials ended."""
    job = search(BRANCHED, seed=3, searcher=searcher)
    history = run(job, lambda v: (math.log10(v[X]) ** 2 + v.get(R, 0),), 12)
    proposer, running = proposer_of(job), [sample(Space(job), 9, n) for n in range(2)]
    here = [proposer.propose(number, history, running) for number in (12, 13, 14)]
    assert [proposer.propose(n, history[::-1], running[::-1]) for n in (12, 13, 14)] == here
    told = [[one.trial, one.values, one.objectives] for one in history]
    text = json.dumps(
        {"space": BRANCHED, "seed": 3, "tune": {"searcher": searcher}, "history": told, "running": running}
    )
    for hash_seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM],
            input=text, capture_output=True, text=True, timeout=120, check=False, cwd=ROOT,
            env={"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": hash_seed, "PATH": ""},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) == here


def test_random_proposals_do_not_depend_on_history() -> None:
    job = search({R: {"choice": [4, 8, 16]}, Y: {"choice": [0.0, 0.1]}})
    alone = all_of(proposer_of(job))
    last_first = proposer_of(job)
    assert last_first.propose(5, []) == alone[5]
    assert [dict(one.values) for one in run(job, lambda _: (1.0,), 6)] == alone


# -- Optuna ----------------------------------------------------------------------------------------------------------


def test_optuna_finds_the_bowls_bottom_sooner_than_random() -> None:
    """Best of 30 trials, five seeds; the first trials are the same ones."""
    best: dict[str, list[float]] = {}
    for searcher in ("random", "optuna"):
        for seed in range(5):
            history = run(search(SQUARE, seed, searcher=searcher, num_trials=30), bowl, 30)
            best.setdefault(searcher, []).append(min(one.objectives[0] for one in history if one.objectives))
            print(f"{searcher:7} seed {seed}: least distance {math.sqrt(best[searcher][-1]):.3f}")
    medians = {searcher: math.sqrt(float(np.median(values))) for searcher, values in best.items()}
    print("medians:", {name: round(value, 3) for name, value in medians.items()})
    assert sum(o < r for o, r in zip(best["optuna"], best["random"], strict=True)) >= 4
    assert medians["optuna"] < medians["random"] / 2


def test_the_first_trials_are_those_of_random() -> None:
    one, other = (search(SQUARE, searcher=searcher) for searcher in ("random", "optuna"))
    assert proposer_of(one).propose(0, []) == proposer_of(other).propose(0, [])


def beyond(values: dict[str, Any]) -> tuple[float, float]:
    """By how far x + y is over 0.6, as it is at the bowl's bottom, and x under 0, where it never is."""
    return (values[X] + values[Y] - 0.6, -values[X])


def test_constraints_are_respected() -> None:
    """The best that is allowed lies on the bound, so of the trials about it one half is beyond; at random four in five are."""
    met, free, best = 0, 0, list[float]()
    for seed in range(5):
        job = search(SQUARE, seed, searcher="optuna", num_trials=40)
        history = run(job, bowl, 40, beyond)
        within = [one for one in history if max(one.violations) <= 0]
        met += sum(one in within for one in history[20:])
        free += sum(max(beyond(dict(one.values))) <= 0 for one in run(job, bowl, 40)[20:])
        best.append(math.sqrt(min(one.objectives[0] for one in within if one.objectives)))
    print(f"of 100 within the bound: {met}, {free} without it; best {max(best):.3f}, least possible 0.283")
    assert met > 40 > 2 * free
    assert max(best) < 0.35


def test_failed_trials_are_kept_away_from() -> None:
    """Every trial with a learning rate above 0.5 diverges, at random one half."""

    def failures(seed: int, told: bool) -> int:
        proposer, history = proposer_of(search(SQUARE, seed, searcher="optuna", num_trials=40)), []
        for number in range(40):
            values = proposer.propose(number, [one for one in history if told or one.objectives])
            assert values is not None
            history.append(Finished(f"t{number:04d}", values, None if values[X] > 0.5 else (values[Y],)))
        return sum(one.objectives is None for one in history[15:])

    of_those_told = sum(failures(seed, told=True) for seed in range(5))
    of_those_left_out = sum(failures(seed, told=False) for seed in range(5))
    print(f"failed of 125: {of_those_told}, and where failures are left out of the study {of_those_left_out}")
    assert of_those_told < 125 / 3
    assert of_those_left_out > 125 / 2


def group(first: int, at: float, count: int, *objectives: float, **other: Any) -> list[Finished]:
    """Trials side by side, upwards from a learning rate; without objectives they failed."""
    return [
        Finished(f"t{first + n:04d}", {X: at + 0.01 * n}, objectives or None, **other) for n in range(count)
    ]


@pytest.mark.parametrize(
    ("four", "eight", "low"),
    [
        (group(0, 0.2, 4, 1.0), group(4, 0.8, 8, 0.1), False),
        (group(0, 0.2, 4, 1.0), group(4, 0.8, 8, 0.1, violations=(0.5, -1.0)), True),
        (group(0, 0.2, 4, 1.0, violations=(0.1,)), group(4, 0.8, 8, 0.1, violations=(0.5,)), True),
        (group(0, 0.2, 4, 1.0, violations=(0.5,)), group(4, 0.8, 8, 0.1, violations=(0.1,)), False),
        (group(0, 0.2, 4, 1.0), group(4, 0.8, 8), True),
        (group(0, 0.2, 4, 1.0, violations=(0.5,)), group(4, 0.8, 8), True),
        (group(0, 0.2, 4, 1.0), group(4, 0.8, 8, 0.1, curve=[(10, 0.1)], stopped=True), True),
        (group(0, 0.2, 4, 1.0, curve=[(20, 1.0)], stopped=True), group(4, 0.8, 8, 0.1, curve=[(10, 0.1)], stopped=True), True),
        (group(0, 0.2, 4, 1.0, curve=[(10, 1.0)], stopped=True), group(4, 0.8, 8), True),
    ],
    ids=[
        "better", "beyond a bound", "further beyond", "less beyond", "failed", "failed, not beyond a bound", "stopped",
        "stopped sooner", "failed, not stopped",
    ],
)  # fmt: skip
def test_ranks(four: list[Finished], eight: list[Finished], low: bool) -> None:
    """Proposals go to where the better group lies, at low rates four trials and at high ones eight, and away from the other."""
    proposer = proposer_of(search({X: SQUARE[X]}, searcher="optuna", num_trials=40))
    proposed = [proposer.propose(number, [*four, *eight]) for number in range(12, 32)]
    near = sum((values is not None and values[X] < 0.5) == low for values in proposed)
    assert near > 15, proposed


def test_a_loss_that_is_no_number_is_a_failure() -> None:
    proposer = proposer_of(search(SQUARE, searcher="optuna"))
    values = [sample(Space(search(SQUARE)), 0, number) for number in range(6)]

    def proposed(objectives: tuple[float, ...] | None) -> list[Any]:
        told = [Finished(f"t{n}", v, objectives if n < 3 else (1.0 * n,)) for n, v in enumerate(values)]
        return [proposer.propose(number, told) for number in range(6, 16)]

    assert proposed((math.nan,)) == proposed((math.inf,)) == proposed(None)
    assert proposed((0.0,)) != proposed(None)


def test_trials_at_the_same_time_differ() -> None:
    """What runs is kept away from: the same proposal is not made beside itself."""
    proposer = proposer_of(search(SQUARE, searcher="optuna", num_trials=30))
    history = run(search(SQUARE, searcher="optuna", num_trials=30), bowl, 15)
    first = proposer.propose(15, history)
    assert first is not None
    crowd = [{X: min(1, first[X] + d), Y: min(1, first[Y] + d)} for d in np.linspace(-0.02, 0.02, 9)]
    beside = proposer.propose(15, history, crowd)
    assert beside is not None
    assert math.dist((first[X], first[Y]), (beside[X], beside[Y])) > 0.02
    running: list[dict[str, Any]] = []
    for number in range(15, 19):
        values = proposer.propose(number, history, running)
        assert values is not None
        running.append(values)
    assert len(set(keys(running))) == 4


def test_several_objectives() -> None:
    """x^2 and (x - 0.2)^2 contradict each other only between 0 and 0.2."""
    objectives = [{"metric": "eval.loss"}, {"metric": "seconds", "mode": "max"}]
    space = {Y: {"uniform": [0.0, 1.0]}, "train.adam_beta1": {"uniform": [0.1, 0.9]}}
    job = search(space, searcher="optuna", objectives=objectives, num_trials=50)
    history = run(job, lambda v: (v[Y] ** 2, -((v[Y] - 0.2) ** 2)), 50)
    between = sum(one.values[Y] <= 0.2 for one in history[20:])
    print(f"on the front: {between} of 30, at random one in five")
    assert between > 15


def test_a_smaller_micro_batch_leaves_a_trial_in_the_study() -> None:
    job = search(SQUARE, searcher="optuna")
    history = run(job, bowl, 6)
    halved = [
        Finished(one.trial, {**one.values, "train.micro_batch_size": 2}, one.objectives) for one in history
    ]
    assert proposer_of(job).propose(6, halved) == proposer_of(job).propose(6, history)


def test_trials_of_another_space_are_left_out() -> None:
    job = search(SQUARE, searcher="optuna")
    history = run(job, bowl, 6)
    other = [Finished("t0900", {X: 5.0, Y: 0.5}, (0.0,)), Finished("t0901", {R: 4}, (0.0,))]
    assert proposer_of(job).propose(6, [*history, *other]) == proposer_of(job).propose(6, history)


@pytest.mark.parametrize(
    ("tune", "module", "package"),
    [({"searcher": "optuna"}, "optuna", "optuna"), ({"scheduler": "pb2"}, "sklearn", "scikit-learn")],
)
def test_a_missing_package_is_one_sentence(
    tune: dict[str, Any], module: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(JobError) as caught:
        proposer_of(search(SQUARE, **tune))
    assert package in caught.value.message
    assert caught.value.remedy == "Install rayft[tune]."


def test_nothing_heavy_is_imported() -> None:
    program = (
        "import sys; from rayft.tune.propose import proposer_of; from tests.unit.test_tune_propose import *\n"
        "p = proposer_of(search(SQUARE)); p.propose(0, [])\n"
        "print(*sorted({'torch', 'ray', 'transformers', 'optuna', 'sklearn', 'pandas'} & set(sys.modules)))\n"
        "p = proposer_of(search(SQUARE, searcher='optuna')); run(p.space and search(SQUARE, searcher='optuna'), bowl, 8)\n"
        "print(*sorted({'torch', 'ray', 'transformers', 'sklearn'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_the_state_of_a_proposer_is_of_no_account() -> None:
    job = search(SQUARE, searcher="optuna", num_trials=30)
    history = run(job, bowl, 14)
    fresh = OptunaProposer(Space(job), 0).propose(14, history)
    used = OptunaProposer(Space(job), 0)
    for number in range(6, 14):
        used.propose(number, history[:number])
    assert used.propose(14, history) == fresh
