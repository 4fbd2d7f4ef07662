"""A search against the rest of its job: what no trial could be is refused, and the jobs that its trials are."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from rayft.errors import JobError
from rayft.spec import dump_job, load_job, parse_job
from rayft.spec.search import LONGEST_NAME, OF_THE_STATE, SAME_WITH_LAG, given, with_values
from tests.search_jobs import BASE, RATE, RL, A, R, refused, search
from tests.shared import ROOT


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({}, "tune.space = {}"),
        (
            {"train.lerning_rate": {"uniform": [0, 1]}},
            "unknown key 'train.lerning_rate' (did you mean 'learning_rate'?)",
        ),
        (
            {"learning_rate": {"uniform": [0.1, 1]}},
            "unknown key 'learning_rate' (did you mean 'train.learning_rate'?)",
        ),
        ({"trane.learning_rate": {"choice": [1]}}, "unknown key 'trane' (did you mean 'train'?)"),
        ({"seed.first": {"choice": [1]}}, "seed"),
        ({"data.train.3.limit": {"choice": [1]}}, "'3' is no index of a list of 1"),
        ({"adapter.lora_r": {"choice": [8, 0]}}, "adapter.lora_r = 0: should be greater than 0"),
        ({"adapter.lora_r": {"choice": [8, "big"]}}, "adapter.lora_r = 'big'"),
        ({"adapter.lora_r": {"uniform": [4, 16]}}, "use quniform or choice for whole numbers"),
        ({"adapter.lora_r": {"quniform": [4, 8, 0.5]}}, "adapter.lora_r = 4.5"),
        ({"train.learning_rate": {"uniform": [0, 1]}}, "train.learning_rate = 0"),
        ({"train.warmup_ratio": {"uniform": [0.5, 1.5]}}, "train.warmup_ratio = 1.5"),
        ({"train.lr_scheduler": {"grid": ["cosine", "poly"]}}, "train.lr_scheduler = 'poly'"),
        (
            {"train.warmup_steps": {"choice": [0, 200]}},
            "tune.space.train.warmup_steps: 200 is refused: train: warmup_steps 200",
        ),
        (
            {"train.warmup_steps": {"choice": [0, 50]}, "train.max_steps": {"choice": [20, 40]}},
            "tune.space.train.warmup_steps: 50 goes with no tried value of the others",
        ),
        ({"name": {"choice": ["a", "b"]}}, "name cannot be searched: the search names its runs"),
        ({"storage": {"choice": ["a", "b"]}}, "storage cannot be searched"),
        ({"tune.num_trials": {"choice": [1, 2]}}, "tune.num_trials cannot be searched"),
        ({"checkpoint.keep": {"choice": [1, 2]}}, "checkpoint.keep cannot be searched"),
        ({"eval.every_steps": {"choice": [5, 10]}}, "trials measured differently cannot be compared"),
        ({"data.eval.0.limit": {"choice": [5, 10]}}, "trials measured differently cannot be compared"),
        (
            {"adapter": {"choice": [{"type": "lora"}]}, "adapter.lora_r": {"choice": [4]}},
            "adapter.lora_r is a part of adapter; give one of them",
        ),
    ],
)
def test_spaces_over_what_no_job_takes(space: dict[str, Any], message: str) -> None:
    text = refused(space)
    assert message in text
    assert "tune.space" in text
    assert text.count(". ") == 0


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({R: {"choice": [4], "when": {"adapter.tipe": "lora"}}}, "did you mean 'adapter.type'?"),
        (
            {R: {"choice": [4], "when": {"zzzzzz": 1}}},
            "'zzzzzz', which is neither in the space nor in the job",
        ),
        ({R: {"choice": [4], "when": {"adapter.type": "none"}}}, "asks of adapter.type what it never is"),
        ({R: {"choice": [4], "when": {"adapter.use_dora": 0}}}, "asks of adapter.use_dora what it never is"),
        ({R: {"choice": [4, 8]}, A: {"choice": [8], "when": {R: 16}}}, f"asks of {R} what it never is"),
        (
            {
                "train.lr_scheduler": {"choice": ["wsd", "cosine"]},
                R: {"choice": [4, 8], "when": {"train.lr_scheduler": "wsd"}},
                A: {"choice": [8], "when": {R: 4, "train.lr_scheduler": "cosine"}},
            },
            f"tune.space.{A}: its `when` asks of train.lr_scheduler what it never is",
        ),
        (
            {R: {"choice": [4], "when": {A: 8}}, A: {"choice": [8], "when": {R: 4}}},
            f"in a circle: {R} -> {A} -> {R}",
        ),
        ({R: {"choice": [4], "when": {R: 4}}}, f"in a circle: {R} -> {R}"),
        ({R: {"choice": [4], "when": {"train.learning_rate": 1e-4}}, **RATE}, "which is drawn from a range"),
        (
            {R: {"choice": [4, 8]}, A: {"grid": [8, 16], "when": {R: 4}}},
            f"tune.space.{A}: a grid can only depend on another grid",
        ),
    ],
)
def test_conditions_that_cannot_be_met(space: dict[str, Any], message: str) -> None:
    text = refused(space)
    assert message in text
    assert text.startswith("the job: tune.space.adapter.lora_")


@pytest.mark.parametrize(
    ("metric", "groups", "message"),
    [
        ("loss", {}, "no run reports a metric 'loss' (did you mean 'eval.loss'?)"),
        ("eval", {}, "no run reports a metric 'eval'"),
        ("accuracy", {}, "there are eval.*, train.*"),
        ("gpu_hour", {}, "did you mean 'gpu_hours'?"),
        ("eval.loss", {"data": {"train": [{"path": "a"}]}, "eval": {}}, "eval.loss needs data.eval"),
        ("eval.loss", {"eval": {}}, "eval.loss is measured every eval.every_steps, which is not set"),
        ("eval.loss", RL, "method grpo measures rewards on data.eval and no eval.loss; use eval.score"),
        ("suite.general.bits_per_byte", {}, "did you mean suite.general text.METRIC?"),
        ("suite.zzz.f1", {"eval": {}}, "names no suite of eval.suites (eval.suites has none)"),
        (
            "change.general text.bits_per_byte",
            {"eval": {**BASE["eval"], "before": False}},
            "eval.before is false",
        ),
    ],
)
def test_metrics_that_no_run_reports(metric: str, groups: dict[str, Any], message: str) -> None:
    assert message in refused(None, groups, metric=metric)
    other = "train.loss"
    assert message in refused(None, groups, metric=other, constraints={metric: {"max": 1}})


@pytest.mark.parametrize(
    ("groups", "tune", "message"),
    [
        ({"eval": {}}, {"metric": "train.loss", "scheduler": "asha"}, "set eval.every_steps"),
        (
            {},
            {"metric": "suite.general text.bits_per_byte", "scheduler": "asha"},
            "is measured after training only",
        ),
        ({"train": {}}, {"scheduler": "hyperband"}, "set train.max_steps"),
        ({"name": "x" * 63}, {}, f"a search's name has at most {LONGEST_NAME} characters"),
        ({"name": "x" * (LONGEST_NAME + 1)}, {}, f"a search's name has at most {LONGEST_NAME} characters"),
    ],
)
def test_what_the_rest_of_the_job_decides(groups: dict[str, Any], tune: dict[str, Any], message: str) -> None:
    assert message in refused(None, groups, **tune)


@pytest.mark.parametrize(
    "key",
    [
        "model.attention", "adapter", "adapter.type", R, A, "adapter.target_modules", "adapter.use_dora", "adapter.use_rslora",
        "data.max_length", "rl.critic",
        "data.train.0.weight", "method", "seed", "cluster.num_workers", "zero.stage", "train", "train.max_steps",
        "train.precision", "rl.advantage_estimator", "rewards.0.path", "rewards", "reward.heads", "rollout.engine",
    ],
)  # fmt: skip
@pytest.mark.parametrize("scheduler", ["pbt", "pb2"])
def test_a_forked_trial_cannot_change_its_state(key: str, scheduler: str) -> None:
    assert f"tune.space: {key} cannot be changed by the scheduler {scheduler}" in refused(
        {key: {"uniform": [0.1, 0.2]}}, scheduler=scheduler
    )


@pytest.mark.parametrize(
    "key",
    [
        "train.learning_rate", "train.weight_decay", "train.adam_beta1", "train.global_batch_size", "adapter.lora_dropout",
        "rl.kl_coef", "rl.clip_low", "rewards.0.weight", "rollout.temperature", "rollout.engine_x", "dpo.beta",
        "reward.center_coef", "train.max_steps_x",
    ],
)  # fmt: skip
def test_what_a_forked_trial_may_change(key: str) -> None:
    assert not OF_THE_STATE.match(key)


def drawn(key: str, lag: int) -> dict[str, Any]:
    """A population over the key of a job that learns from rewards, with answers drawn ahead or not."""
    groups: dict[str, Any] = {
        **copy.deepcopy(RL),
        "rollout": {"engines": 1, "lag": lag},
        "placement": {"rollout": {"apart": True}},
    }
    values = {
        "rollout.temperature": [0.7, 1.0],
        "rewards.0.weight": [0.5, 1.0],
        "rollout.top_p": [0.8, 1.0],
        "rollout.stop": [["."], ["!"]],
        "rl.truncated": ["score", "mask"],
        "rl.truncated_penalty": [-2.0, -3.0],
        "rl.drop_uniform_groups": [False, True],
    }.get(key, [8, 16])
    needed = {
        "rl.truncated_penalty": {"truncated": "penalty"},
        "rl.max_refills": {"drop_uniform_groups": True},
    }
    groups["rl"] = {**groups.get("rl", {}), **needed.get(key, {})}
    return {"space": {key: {"choice": values}}, "groups": groups, "scheduler": "pbt"}


@pytest.mark.parametrize("key", [*SAME_WITH_LAG, "rewards.0.weight"])
def test_a_forked_trial_cannot_change_what_drew_the_answers_it_goes_on_with(key: str) -> None:
    search(**drawn(key, 0), metric="eval.score")
    assert f"{key} cannot be changed by the scheduler pbt under rollout.lag 1" in refused(
        **drawn(key, 1), metric="eval.score"
    )


@pytest.mark.parametrize("key", ["rewards.0.weight", "rollout.temperature", "rl.num_generations"])
@pytest.mark.parametrize(
    "tune",
    [
        {"metric": "eval.win_rate/right"},
        {"metric": "eval.score", "constraints": {"eval.win_rate/right": {"min": 0.5}}},
    ],
)
def test_a_forked_trial_is_not_measured_against_answers_that_it_has_not(
    key: str, tune: dict[str, Any]
) -> None:
    if key == "rl.num_generations":
        search(**drawn(key, 0), **tune)
        return
    assert f"leave {key} out of tune.space" in refused(**drawn(key, 0), **tune)


@pytest.mark.parametrize("path", sorted((ROOT / "jobs").glob("*.yaml")), ids=lambda path: path.stem)
def test_no_values_leave_a_job_as_it_is(path: Path) -> None:
    """Leaving out what is default changes nothing, resolved or as written."""
    job = load_job(path)
    alone = job.model_copy(update={"tune": None})
    assert dump_job(with_values(job, {})) == dump_job(alone)
    resolved = parse_job(yaml.safe_load(dump_job(job)))
    assert given(resolved) == given(job)


def test_values_make_a_trials_job() -> None:
    job = search({R: {"choice": [4, 8]}, **RATE})
    made = with_values(job, {R: 8, "train.learning_rate": 1e-4})
    assert (made.adapter.lora_r, made.train.learning_rate, made.tune) == (8, 1e-4, None)
    assert made.train.max_steps == job.train.max_steps
    assert job.adapter.lora_r == 16
    with pytest.raises(JobError, match=r"tune\.space: adapter\.lora_r = 0: should be greater than 0"):
        with_values(job, {R: 0})


def test_a_method_that_is_searched_brings_its_own_defaults() -> None:
    """Also from the resolved job, in which another method's stand."""
    job = parse_job(
        yaml.safe_load(dump_job(search({"method": {"choice": ["grpo", "rloo"]}}, RL, metric="eval.score")))
    )
    made = with_values(job, {"method": "rloo"})
    direct = parse_job({**copy.deepcopy(BASE), **RL, "method": "rloo"})
    assert made == direct
    assert made.rl.advantage_estimator == "leave_one_out"
    kept = with_values(with_values(job, {"rl.kl_coef": 0.3}), {"method": "rloo"})
    assert kept.rl.kl_coef == 0.3


def test_the_gpu_search_plans_within_its_gpus() -> None:
    from rayft.plan.architecture import read_architecture
    from rayft.plan.choose import choose, memory_limit
    from rayft.tune.space import Space, job_of, sample
    from tests.fleets import QWEN3_8B

    search_job = load_job(ROOT / "jobs" / "tune_hub_gpu.yaml")
    space = Space(search_job)
    model = read_architecture(QWEN3_8B)
    for number in range(4):
        job = job_of(search_job, sample(space, search_job.seed, number))
        choice = choose(job, model, memory_limit(job), {})
        assert choice.stage == 3
        assert choice.fits
