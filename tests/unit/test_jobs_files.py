"""Every job file in `jobs/` is valid, and names data that is there or says where it comes from."""

from __future__ import annotations

from pathlib import Path

import pytest

from rayft.spec import load_job
from tests.fleets import QWEN3_8B
from tests.shared import ROOT

FILES = sorted((ROOT / "jobs").glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_job_file_is_valid(path: Path) -> None:
    job = load_job(path)
    local = [
        source.path for source in [*job.data.train, *job.data.eval] if source.path.startswith("jobs/triage")
    ]
    assert all((ROOT / name).exists() for name in local)


def test_run_names_differ() -> None:
    names = [load_job(path).name for path in FILES]
    assert len(set(names)) == len(names)


def test_arithmetic_is_rewritten_byte_for_byte(tmp_path: Path) -> None:
    from jobs.arithmetic.generate import main

    main(tmp_path)
    kept = ROOT / "jobs" / "arithmetic"
    for name in ("sft.jsonl", "train.jsonl", "test.jsonl"):
        assert (tmp_path / name).read_bytes() == (kept / name).read_bytes()
    rows = {name: set((tmp_path / name).read_text().splitlines()) for name in ("train.jsonl", "test.jsonl")}
    assert not rows["train.jsonl"] & rows["test.jsonl"]


@pytest.mark.parametrize(
    ("answer", "wanted", "score"),
    [
        ("12", "12", 1.0),
        ("It is 1,012.", "1012", 1.0),
        ("3 and 4", "3", 0.0),
        ("-5", "-5", 1.0),
        ("none", "5", 0.0),
        ("so 72", "48 + 24 = 72\n#### 72", 1.0),
    ],
)
def test_the_reward_of_arithmetic(answer: str, wanted: str, score: float) -> None:
    from jobs.arithmetic.reward import right

    assert right([""], [answer], [wanted]) == [score]


@pytest.mark.parametrize(
    ("answer", "fields", "exact"),
    [
        ('{"order": "A-1", "refund": 0}', 1.0, 1.0),
        ('{"refund": 0, "order": "B-1"}', 0.5, 0.0),
        ('{"refund": 0}', 0.5, 0.0),
        ('{"order": "A-1", "refund": 0, "more": 1}', 0.0, 0.0),
        ('{"order": "A-1", "refund": false}', 0.5, 0.0),
        ('{"order": "A-1", "refund": 0} as you asked', 0.0, 0.0),
        ("[]", 0.0, 0.0),
    ],
)
def test_the_rewards_of_triage(answer: str, fields: float, exact: float) -> None:
    from jobs.triage import reward

    right = ['{"order":"A-1","refund":0}']
    assert reward.fields([""], [answer], right) == [fields]
    assert reward.exact([""], [answer], right) == [exact]


@pytest.mark.parametrize("name", ["sft_hub_gpu", "grpo_hub_gpu", "ppo_hub_gpu", "tune_hub_gpu"])
def test_the_gpu_jobs_plan_within_their_gpus(name: str) -> None:
    """The multi-node jobs' memory plans fit the GPU they name, from a config alone."""
    from rayft.plan.architecture import read_architecture
    from rayft.plan.choose import choose, memory_limit

    job = load_job(ROOT / "jobs" / f"{name}.yaml")
    model = read_architecture(QWEN3_8B)
    choice = choose(job, model, memory_limit(job), {source.path: model for source in job.rewards})
    assert choice.stage == 3
    assert choice.fits


@pytest.mark.parametrize("name", ["ppo", "ppo_hub_gpu"])
def test_a_critic_can_be_made_of_the_ppo_jobs(name: str, tmp_path: Path) -> None:
    """Whatever they say of rewards, placement and the rest; here with functions for rewards, as no model is at hand."""
    from rayft.rlhf.plan import critic_job

    job = load_job(ROOT / "jobs" / f"{name}.yaml")
    functions = [
        s.model_copy(update={"type": "function", "path": "a.py:b", "retries": None}) for s in job.rewards
    ]
    made = critic_job(job.model_copy(update={"rewards": functions}), None, tmp_path, print)
    assert made.method == "reward"
    assert (made.cluster, made.zero, made.train) == (job.cluster, job.zero, job.train)
    as_policy = job.rl.model_copy(update={"critic_init": "policy"})  # no reward model is looked at, then
    made = critic_job(job.model_copy(update={"rl": as_policy}), None, tmp_path, print)
    assert made.model == job.model


@pytest.mark.parametrize(("name", "nodes"), [("grpo_hub_gpu", 3), ("ppo_hub_gpu", 3)])
def test_the_gpu_jobs_fill_their_nodes(name: str, nodes: int) -> None:
    """The nodes they speak of hold them, and one node less does not."""
    from rayft.errors import ResourceError
    from rayft.rlhf.placement import refuse_beyond, table_of

    job = load_job(ROOT / "jobs" / f"{name}.yaml")
    table = table_of(job, critic=job.rl.critic, reference=job.reference == "group")
    there = [(f"node{number}", {"CPU": 128.0, "GPU": 8.0}) for number in range(nodes)]
    refuse_beyond(table, there)
    with pytest.raises(ResourceError, match="GPU"):
        refuse_beyond(table, there[1:])


def test_a_trial_of_the_gpu_search_fills_a_node() -> None:
    """And half of a fleet holds half as many."""
    from rayft.tune.capacity import size_of
    from rayft.tune.share import Fleet

    job = load_job(ROOT / "jobs" / "tune_hub_gpu.yaml")
    assert job.tune is not None
    nodes = [{"CPU": 128.0, "GPU": 8.0}] * 4
    assert Fleet(nodes).room(size_of(job), 1.0) == 4
    assert Fleet(nodes).room(size_of(job), job.tune.share) == 2
