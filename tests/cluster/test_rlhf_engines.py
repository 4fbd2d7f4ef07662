"""Engines of their own: the same answers as inside the policy, from any ZeRO stage, and one step behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray

from rayft.cli import main
from rayft.report.log import read_log
from rayft.rlhf.browse import read_rows
from rayft.rlhf.kept import key_of
from rayft.rlhf.loop import Loop
from rayft.rlhf.step import Step
from rayft.spec import Job
from rayft.storage import open_store
from tests.cluster.rewards import prepare_folder, rl_job
from tests.runs import assert_same_state, events, write_job

pytestmark = pytest.mark.slow

LORA = {"type": "lora", "lora_r": 4, "target_modules": "all-linear"}
APART = {"engines": 2, "bucket_mb": 0.004}  # several buckets of even a tiny model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_folder(tmp_path_factory.mktemp("engines"))


def run(job: Job, folder: Path) -> list[dict[str, Any]]:
    """Run a job; its steps as the log has them."""
    assert main(["run", str(write_job(job, folder / f"{job.name}.yaml"))]) == 0
    return [row for row in read_log(open_store(folder / "runs" / job.name)) if row["kind"] == "step"]


def job_of(folder: Path, name: str, method: str, **groups: Any) -> Job:
    rollout = {"max_new_tokens": 12, "unit_prompts": 2, **groups.pop("rollout", {})}
    train = {
        "max_steps": 4,
        "global_batch_size": 6,
        "learning_rate": 1e-2,
        "warmup_steps": 0,
        **groups.pop("train", {}),
    }
    return rl_job(folder, method, name=name, rollout=rollout, train=train, **groups)


@pytest.mark.parametrize(
    ("method", "groups"),
    [
        ("grpo", {"adapter": LORA, "zero": {"stage": 2}}),
        pytest.param("ppo", {"zero": {"stage": 1}, "train": {"precision": "bf16"}}, marks=pytest.mark.full),
        pytest.param("dapo", {"zero": {"stage": 0}}, marks=pytest.mark.full),
        pytest.param("grpo", {"zero": {"stage": 3}}, marks=pytest.mark.full),
    ],
)
def test_where_engines_are_changes_nothing(
    method: str, groups: dict[str, Any], folder: Path, local_ray: None
) -> None:
    """Inside the policy's processes and apart: the same run to the last bit."""
    name = f"{method}-{groups['zero']['stage']}"
    inside = run(job_of(folder, f"{name}-inside", method, **groups), folder)
    apart = run(job_of(folder, f"{name}-apart", method, rollout=APART, **groups), folder)
    assert [row["metrics"] for row in inside] == [row["metrics"] for row in apart]
    assert_same_state(folder / "runs" / f"{name}-inside", folder / "runs" / f"{name}-apart")
    assert all(row["sync"] == {} for row in inside)
    for row in apart:
        assert row["sync"]["bytes"] > 0
        assert 1 < row["sync"]["buckets"] < 40, "weights do not travel in buckets"


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        ("inside", {"adapter": LORA}),
        *(
            pytest.param(name, groups, marks=pytest.mark.full)
            for name, groups in (
                ("inside-full", {}),
                ("apart", {"adapter": LORA, "rollout": APART}),
                ("apart-full", {"rollout": APART}),
            )
        ),
    ],
)
def test_weights_that_are_sharded_reach_the_engine(
    name: str, groups: dict[str, Any], folder: Path, local_ray: None
) -> None:
    """ZeRO-3: every token's probability in the engine is the trainer's, before and after the weights have moved."""
    steps = run(job_of(folder, f"sharded-{name}", "grpo", zero={"stage": 3}, **groups), folder)
    assert all(row["metrics"]["engine_gap_max"] < 1e-5 for row in steps)
    assert steps[-1]["metrics"]["kl"] != 0
    if "apart" in name:
        trained = {row["sync"]["bytes"] for row in steps}
        assert len(trained) == 1
        if "full" not in name:
            [whole] = {
                row["sync"]["bytes"] for row in run(job_of(folder, "all", "dr_grpo", rollout=APART), folder)
            }
            assert trained.pop() < whole / 2, "more than the adapter is sent"


@pytest.mark.full
@pytest.mark.parametrize("adapter", [LORA, {"type": "none"}], ids=["adapter", "full"])
def test_ranks_stages_and_places_change_nothing_but_rounding(
    adapter: dict[str, Any], folder: Path, local_ray: None
) -> None:
    """PPO: one process for each role on the policy's bundle; and two ranks under ZeRO-3 for policy and critic, every role in bundles
    of its own, two of the reward. With an adapter the reference is the policy without it; else it is a role too."""
    scorer = {"name": "model", "type": "model", "path": str(folder / "scorer")}
    groups: dict[str, Any] = {
        "adapter": adapter,
        "rl": {"critic_learning_rate": 1e-2, "num_mini_batches": 2},
        "rollout": {"engines": 1},
        "eval": {"every_steps": 2},
    }
    data = {"train": [{"path": str(folder / "prompts.jsonl")}], "max_length": 96}
    groups["data"] = {**data, "eval": [{"path": str(folder / "prompts.jsonl"), "limit": 4}]}
    part = {"apart": True, "cpus": 0.2}
    places = {"critic": {"apart": True}, "rollout": part, "rewards": part}
    kind = adapter["type"]
    if kind == "none":
        places["reference"] = part
    together = job_of(
        folder,
        f"together-{kind}",
        "ppo",
        rewards=[scorer],
        cluster={"num_workers": 1},
        zero={"stage": 0},
        **groups,
    )
    spread = job_of(
        folder,
        f"spread-{kind}",
        "ppo",
        rewards=[{**scorer, "workers": 2}],
        cluster={"num_workers": 2, "cpus_per_worker": 0.2},
        zero={"stage": 3},
        placement=places,
        **groups,
    )
    one, other = run(together, folder), run(spread, folder)
    assert len(one) == len(other) == 4
    for mine, theirs in zip(one, other, strict=True):
        assert theirs["loss"] == pytest.approx(mine["loss"], rel=1e-3, abs=1e-5)
        assert theirs["grad_norm"] == pytest.approx(mine["grad_norm"], rel=1e-3)
        for name, value in mine["metrics"].items():
            assert theirs["metrics"][name] == pytest.approx(value, rel=1e-3, abs=1e-5), name
    assert one[-1]["metrics"]["kl"] != 0
    assert one[0]["metrics"]["value_loss"] != one[-1]["metrics"]["value_loss"]


def test_an_engine_is_lost_before_it_draws_ahead_for_the_first_time(
    folder: Path, local_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When it has drawn for step 1 and is about to for step 2, by the same weights: the next process has them too."""
    rollout = {**APART, "lag": 1}
    run(job_of(folder, "never-lost", "dr_grpo", rollout=rollout), folder)
    ahead, lost = Loop._last_answers, []

    def losing(self: Loop, number: int, position: int) -> Step:
        if not lost:
            lost.append(number)
            assert self.roles.engines is not None
            ray.kill(self.roles.engines._group.actors[0])
        return ahead(self, number, position)

    monkeypatch.setattr(Loop, "_last_answers", losing)
    run(job_of(folder, "lost", "dr_grpo", rollout=rollout), folder)
    assert lost == [2]
    store = open_store(folder / "runs" / "lost")
    assert "rollout" in events(store, "recovery")[0]["message"]
    assert_same_state(folder / "runs" / "lost", folder / "runs" / "never-lost")


def test_one_step_behind(folder: Path, local_ray: None) -> None:
    """Answers of step n by the weights before step n - 1, weighted by how far the policy has moved since."""
    job = job_of(folder, "behind", "dr_grpo", rollout={**APART, "lag": 1})
    steps = run(job, folder)
    gaps = [row["metrics"]["engine_gap"] for row in steps]
    assert gaps[0] < 1e-5
    assert min(gaps[1:]) > 1e-4, "answers are not one step behind"
    store = open_store(folder / "runs" / "behind")
    for step, version in enumerate([0, 0, 1, 2], 1):
        rows = read_rows(store, key_of("step", step))
        assert {row["version"] for row in rows} == {version}
        weights = [weight for row in rows for weight in row["importance"]]
        assert (max(abs(weight - 1) for weight in weights) > 1e-3) is (step > 1)
    ledger = [row for row in read_log(store) if row["kind"] == "ledger"]
    assert sorted(row for entry in ledger for row in entry["trained"]) == list(range(24))
