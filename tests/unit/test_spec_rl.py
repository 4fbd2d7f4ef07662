"""Jobs that learn from rewards: what each method chooses, and what contradicts itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from rayft.errors import JobError
from rayft.spec import METHODS, Job, dump_job, parse_job

REWARDS = [{"name": "r", "type": "function", "path": "r.py:f"}]


def job(method: str = "grpo", **groups: Any) -> Job:
    values = {
        "name": "run",
        "model": {"path": "m"},
        "data": {"train": [{"path": "a.jsonl"}]},
        "rewards": REWARDS,
    }
    return parse_job({**values, "method": method, **groups})


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_complete_and_reads_back_as_itself(method: str) -> None:
    made = job(method)
    optional = {"clip_dual", "kl_target", "critic_learning_rate", "overlong_buffer"}
    if method in ("ppo", "rloo", "reinforce++"):
        optional.add("advantage_scale")
    missing = {name for name, value in made.rl.model_dump().items() if value is None}
    assert missing == optional
    assert parse_job(yaml.safe_load(dump_job(made))) == made


def test_what_the_methods_choose() -> None:
    assert job("ppo").rl.critic
    assert not job("grpo").rl.critic
    assert (job("dapo").rl.clip_low, job("dapo").rl.clip_high) == (0.2, 0.28)
    assert job("dr_grpo").rl.advantage_scale == "none"
    assert job("gspo").rl.ratio == "sequence_mean"
    assert job("rloo").rl.advantage_estimator == "leave_one_out"
    assert job("grpo").rl.kl_weighted
    assert not job("grpo", rl={"kl_estimator": "k2"}).rl.kl_weighted
    assert job("grpo", rl={"clip_high": 0.5}).rl.clip_high == 0.5


@pytest.mark.parametrize(
    ("method", "groups", "message"),
    [
        ("grpo", {"rl": {"num_generations": 1}}, "rl.num_generations 1"),
        ("rloo", {"rl": {"num_generations": 1}}, "rl.num_generations 1"),
        ("ppo", {"rl": {"drop_uniform_groups": True}}, "rl.drop_uniform_groups does nothing"),
        ("gspo", {"rl": {"loss_aggregation": "token_mean"}}, "rl.ratio sequence_mean"),
        ("grpo", {"rl": {"kl_estimator": "k1", "kl_weighted": False}}, "its gradient is 0 on average"),
        (
            "grpo",
            {"rl": {"kl_estimator": "k2", "kl_weighted": True}},
            "rl.kl_weighted with rl.kl_estimator k2",
        ),
        ("dapo", {"rl": {"kl_target": 1.0}}, "rl.kl_target moves rl.kl_coef"),
        ("grpo", {"rl": {"gae_lambda": 0.9}}, "rl.gae_lambda is for the advantage estimator gae"),
        ("rloo", {"rl": {"advantage_scale": "group"}}, "rl.advantage_scale is for"),
        ("grpo", {"rl": {"truncated_penalty": -2.0}}, "needs rl.truncated penalty"),
        ("grpo", {"rl": {"clip_dual": 0.5}}, "rl.clip_dual"),
        ("grpo", {"rl": {"gamma": 0.9}}, "rl.gamma is for rewards of tokens"),
        ("grpo", {"rl": {"kl_horizon": 5}}, "rl.kl_horizon does nothing without rl.kl_target"),
        ("grpo", {"rl": {"kl_horizon": 5, "kl_target": 1.0}}, "rl.kl_horizon 5 is too short"),
        ("grpo", {"rl": {"max_refills": 5}}, "rl.max_refills does nothing without rl.drop_uniform_groups"),
        ("ppo", {"rl": {"kl_estimator": "k3"}}, "only k1 gives the divergence's gradient there"),
        ("ppo", {"rl": {"ratio": "sequence", "loss_aggregation": "sequence_mean"}}, "under gae every token"),
        ("ppo", {"rl": {"critic_warmup_steps": 5}, "train": {"max_steps": 5}}, "leaves none of the 5 steps"),
        ("grpo", {"rl": {"clip_low": 1.5}}, "rl.clip_low 1.5"),
        ("dapo", {"rl": {"overlong_buffer": 999}}, "rl.overlong_buffer 999 is more than"),
        ("grpo", {"rl": {"importance_cap": 0.5}}, "rl.importance_cap = 0.5"),
        ("grpo", {"rewards": [{**REWARDS[0], "weight": 0}]}, "every weight is 0"),
        ("grpo", {"rollout": {"lag": 1}}, "rollout.lag 1 needs rollout.engines"),
        ("grpo", {"placement": {"critic": {"apart": True}}}, "has no critic"),
        ("dapo", {"placement": {"reference": {"apart": True}}}, "there is no reference"),
        (
            "grpo",
            {"placement": {"reference": {"apart": True}}, "adapter": {"type": "lora"}},
            "the policy with its adapter off",
        ),
        ("dapo", {"rl": {"kl_in": "reward"}}, "rl.kl_in does nothing while rl.kl_coef is 0"),
        ("ppo", {"rl": {"kl_coef": 0, "kl_in": "loss"}}, "rl.kl_in does nothing while rl.kl_coef is 0"),
        ("gspo", {"rl": {"kl_estimator": "k2"}}, "rl.kl_estimator does nothing while"),
        ("dr_grpo", {"rl": {"kl_weighted": False}}, "rl.kl_weighted does nothing while"),
        ("grpo", {"eval": {"answers": 2}}, "eval.answers needs data.eval"),
        (
            "grpo",
            {"rollout": {"engine": "vllm", "engines": 1, "vllm": {"logprobs_mode": "raw_logprobs"}}},
            "rollout.vllm.logprobs_mode contradicts what rayft sets",
        ),
        (
            "grpo",
            {"rollout": {"engine": "vllm", "engines": 1, "vllm": {"tensor_parallel_size": 2}}},
            "an engine has one GPU",
        ),
        ("grpo", {"cluster": {"gpus_per_worker": 2}}, "a worker computes on one GPU"),
        ("grpo", {"cluster": {"gpus_per_worker": 0.5, "num_workers": 2}}, "NCCL makes no connection"),
        (
            "grpo",
            {
                "cluster": {"gpus_per_worker": 1},
                "rollout": {"engines": 1},
                "placement": {"rollout": {"apart": True, "gpus": 2}},
            },
            "placement.rollout.gpus 2: a process computes on one GPU",
        ),
        ("grpo", {"placement": {"rollout": {"apart": True}}}, "without rollout.engines"),
        ("ppo", {"placement": {"critic": {"apart": True, "cpus": 2}}}, "what a rank of the policy has"),
        ("grpo", {"placement": {"rewards": {"cpus": 2}}}, "placement.rewards.cpus is for bundles"),
        (
            "grpo",
            {"placement": {"reference": {"gpus": 1}}, "cluster": {"gpus_per_worker": 1}},
            "something must be left to the policy",
        ),
        (
            "grpo",
            {
                "rewards": [{"name": name, "type": "model", "path": "m"} for name in "abcd"],
                "placement": {"rewards": {"gpus": 0.5}},
                "cluster": {"gpus_per_worker": 1, "num_workers": 2},
            },
            "ask for 1 GPUs a rank",
        ),
        (
            "grpo",
            {
                "rewards": [{"name": "m", "type": "model", "path": "m", "workers": 2}],
                "placement": {"rewards": {"gpus": 0.5}},
                "cluster": {"gpus_per_worker": 1},
            },
            "ask for 1 GPUs a rank",
        ),
        ("grpo", {"placement": {"reference": {"gpus": 0.5}}}, "cluster.gpus_per_worker is 0"),
        (
            "grpo",
            {"placement": {"rewards": {"gpus": 0.5}}, "cluster": {"gpus_per_worker": 1}},
            "is for rewards that are models",
        ),
        (
            "grpo",
            {
                "train": {"early_stopping_patience": 2},
                "eval": {"every_steps": 2},
                "data": {"train": [{"path": "a"}], "eval": [{"path": "b"}]},
            },
            "train.early_stopping_patience goes by a loss",
        ),
        (
            "grpo",
            {"rollout": {"engine": "vllm", "engines": 1}, "adapter": {"type": "lora", "lora_r": 600}},
            "up to adapter.lora_r 512",
        ),
        (
            "grpo",
            {"checkpoint": {"on_failure": "continue"}},
            "checkpoint.on_failure continue is not there yet",
        ),
        ("grpo", {"data": {"train": [{"path": "a"}], "too_long": "truncate"}}, "data.too_long truncate"),
        (
            "grpo",
            {"data": {"train": [{"path": "a", "format": "messages"}]}},
            "format messages is for given answers",
        ),
        ("grpo", {"rewards": []}, "needs `rewards`"),
        (
            "grpo",
            {"rewards": [{**REWARDS[0], "workers": 2}]},
            "workers is for type model; a function has one process",
        ),
        ("grpo", {"rewards": [{**REWARDS[0], "path": "r.py"}]}, "`file.py:name`"),
        ("grpo", {"rewards": [REWARDS[0], REWARDS[0]]}, "two rewards are named 'r'"),
        ("grpo", {"train": {"tokens_per_step": 100}}, "use global_batch_size"),
        ("grpo", {"train": {"global_batch_size": 1}, "rl": {"num_mini_batches": 9}}, "rl.num_mini_batches 9"),
        ("grpo", {"rollout": {"max_new_tokens": 2048}}, "leaves no room for a prompt"),
        ("grpo", {"rollout": {"engine": "vllm"}}, "rollout.engine"),
        ("grpo", {"cluster": {"num_workers": [1, 2]}}, "give one number"),
        ("grpo", {"adapter": {"type": "lora", "lora_dropout": 0.1}}, "adapter.lora_dropout must be 0"),
        ("grpo", {"eval": {"every_steps": 2}}, "eval.every_steps"),
        ("sft", {"rl": {"num_generations": 2}}, "rl: this group does nothing under method sft"),
        ("sft", {}, "rewards: this group does nothing under method sft"),
        ("sft", {"rewards": [], "eval": {"answers": 2}}, "eval.answers does nothing under method sft"),
    ],
)
def test_refused(method: str, groups: dict[str, Any], message: str) -> None:
    with pytest.raises(JobError) as caught:
        job(method, **groups)
    assert message in str(caught.value)


def test_the_choices_are_those_of_the_method_given_later(tmp_path: Path) -> None:
    """A dumped job is complete: what a method chooses is written down, and no later version's choice slips in."""
    text = dump_job(job("dapo"))
    assert yaml.safe_load(text)["rl"]["clip_high"] == 0.28
