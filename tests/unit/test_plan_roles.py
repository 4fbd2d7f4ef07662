"""The memory plan of jobs that learn from rewards: what lives beside the policy counts, what lives apart does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rayft.plan.choose import choose, scorer_architectures
from rayft.plan.memory import OVERHEAD_GPU, plan_memory, with_score_heads
from rayft.plan.roles import drawing_bytes, plan_with_roles
from rayft.spec import Job, parse_job
from tests.unit.test_plan_choose import GIB, MODEL

BODY = with_score_heads(MODEL, 1)


def job(method: str = "ppo", **groups: Any) -> Job:
    values: dict[str, Any] = {
        "name": "plan",
        "method": method,
        "model": {"path": "any"},
        "data": {"train": [{"path": "rows.jsonl"}], "max_length": 1024},
        "train": {"global_batch_size": 64, "max_steps": 10},
        "rewards": [{"name": "liked", "type": "model", "path": "scorer"}],
        "cluster": {"num_workers": 8, "gpus_per_worker": 1, "gpu": "H100-80GB"},
    }
    for name, group in groups.items():
        values[name] = {**values[name], **group} if isinstance(values.get(name), dict) else group
    return parse_job(values)


def beside(planned: Job, stage: int = 2) -> dict[str, int]:
    return dict(plan_with_roles(planned, MODEL, stage, {"scorer": BODY}).beside)


def test_every_role_beside_the_policy_counts() -> None:
    plan = plan_with_roles(job(), MODEL, 2, {"scorer": BODY})
    alone = plan_memory(job(), MODEL, 2)
    assert list(plan.beside) == ["critic", "reference", "rewards"]
    assert plan.own == alone.device + plan.generation
    assert plan.device == sum(plan.terms().values()) == plan.own + sum(plan.beside.values())
    # A critic is trained like the policy, with a score in place of the head: 2 bytes an element, and 16 split over 8 ranks.
    head = MODEL.vocabulary * MODEL.hidden
    assert alone.device - alone.logits - plan.beside["critic"] == pytest.approx(4 * head, rel=0.01)
    # A reference and a reward model are weights in bf16 and little more.
    for role in ("reference", "rewards"):
        assert 2 * BODY.total + OVERHEAD_GPU < plan.beside[role] < 2 * MODEL.total + OVERHEAD_GPU + 2 * GIB


@pytest.mark.parametrize(
    ("groups", "roles"),
    [
        ({"placement": {"critic": {"apart": True}, "reference": {"apart": True, "gpus": 1}}}, ["rewards"]),
        ({"placement": {"rewards": {"apart": True, "gpus": 1}}}, ["critic", "reference"]),
        ({"rollout": {"engines": 8}}, ["critic", "reference", "engines", "rewards"]),
        ({"rl": {"kl_coef": 0.0}}, ["critic", "rewards"]),
        ({"adapter": {"type": "lora"}}, ["critic", "rewards"]),
        (
            {"rewards": [{"name": "f", "type": "function", "path": "f.py:f"}]},
            ["critic", "reference", "rewards"],
        ),
    ],
)
def test_roles_apart_or_not_there_do_not(groups: dict[str, Any], roles: list[str]) -> None:
    assert list(beside(job(**groups))) == roles


def test_a_function_takes_no_gpu() -> None:
    assert beside(job(rewards=[{"name": "f", "type": "function", "path": "f.py:f"}]))["rewards"] == 0


def test_two_reward_models_are_on_two_ranks() -> None:
    two = [{"name": name, "type": "model", "path": "scorer"} for name in ("a", "b")]
    assert beside(job(rewards=two))["rewards"] == beside(job())["rewards"]
    assert beside(job(rewards=two, cluster={"num_workers": 1}))["rewards"] == 2 * beside(job())["rewards"]


def test_stage_3_gathers_the_weights_to_draw_answers() -> None:
    """Where that is more than a training step keeps in its activations."""
    little = job("grpo", rl={"kl_coef": 0.0}, train={"gradient_checkpointing": True, "logits_chunk": 64})
    plan, alone = plan_with_roles(little, MODEL, 3, {}), plan_memory(little, MODEL, 3)
    drawn = 2 * MODEL.total + drawing_bytes(little, MODEL)
    assert plan.generation == drawn - alone.activations - alone.logits > 0
    assert plan_with_roles(little, MODEL, 2, {}).generation < plan.generation


def test_the_stage_is_chosen_with_all_roles() -> None:
    for limit in range(20, 200, 4):
        alone = choose(job("grpo", rl={"kl_coef": 0.0}), MODEL, limit * GIB, {"scorer": BODY})
        full = choose(job(), MODEL, limit * GIB, {"scorer": BODY})
        assert full.stage >= alone.stage
        if alone.fits and not full.fits:
            break
    else:
        raise AssertionError("roles beside the policy never made the difference")


def test_reward_models_that_are_at_hand_are_read(tmp_path: Path) -> None:
    config = {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 300,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = scorer_architectures([("here", tmp_path), ("gone", None), ("broken", tmp_path / "nothing")])
    assert list(found) == ["here"]
    assert found["here"].layers == 2
