"""Memory by term: the arithmetic of ZeRO by hand, and its monotonicity over stages and workers."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayft.plan.architecture import read_architecture
from rayft.plan.memory import OVERHEAD_GPU, STAGES, bucket_defaults, plan_memory
from rayft.spec import Job, parse_job

CONFIG = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
MODEL = read_architecture(CONFIG)
P = 8_030_261_248


def job(workers: Any = 4, **groups: Any) -> Job:
    groups.setdefault("cluster", {"num_workers": workers, "gpus_per_worker": 1})
    return parse_job({"name": "x", "model": {"path": "m"}, "data": {"train": [{"path": "a"}]}, **groups})


def state(job: Job, stage: int) -> tuple[int, int, int]:
    plan = plan_memory(job, MODEL, stage)
    return plan.weights, plan.gradients, plan.optimizer


def test_full_fine_tuning_in_bf16() -> None:
    """2 bytes of weights, 4 of gradients, 12 of master weights and moments; split over 4 ranks stage by stage."""
    assert state(job(), 0) == (2 * P, 4 * P, 12 * P)
    assert state(job(), 1) == (2 * P, 4 * P, 3 * P)
    assert state(job(), 2) == (2 * P, P, 3 * P)
    assert state(job(), 3) == (P // 2, P, 3 * P)


def test_fp32_and_pure_bf16() -> None:
    fp32, pure = job(train={"precision": "fp32"}), job(train={"precision": "pure_bf16"})
    assert state(fp32, 0) == (4 * P, 4 * P, 8 * P)  # no second copy of the weights
    assert state(fp32, 3) == (P, P, 3 * P)
    assert state(pure, 0) == (2 * P, 2 * P, 4 * P)


def test_lora_freezes_the_base() -> None:
    lora = 41_943_040  # 16 x (inputs + outputs) of seven projections in 32 layers
    weights, gradients, optimizer = state(job(adapter={"type": "lora"}), 0)
    assert (weights, gradients, optimizer) == (2 * (P + lora), 4 * lora, 12 * lora)


def test_qlora_holds_the_base_in_four_bits() -> None:
    plan = plan_memory(job(adapter={"type": "qlora"}), MODEL, 0)
    assert 0.5 * P < plan.weights < 0.6 * P


def test_offload_moves_the_optimizer_to_the_host() -> None:
    plan = plan_memory(job(zero={"offload_optimizer": True}), MODEL, 2)
    assert (plan.optimizer, plan.host) == (0, 3 * P + P)
    on_cpu = plan_memory(job(zero={"offload_optimizer": True}, cluster={"num_workers": 4}), MODEL, 2)
    assert (on_cpu.optimizer, on_cpu.host) == (3 * P, 0)


def test_elastic_runs_are_planned_for_their_fewest_workers() -> None:
    assert plan_memory(job([2, 8]), MODEL, 3).world_size == 2
    assert plan_memory(job([2, 8]), MODEL, 3, world_size=8).weights == P // 4


def test_buckets_follow_the_jobs_options() -> None:
    usual = plan_memory(job(), MODEL, 2).buckets
    assert usual == 50_000_000 * 6
    assert (
        plan_memory(job(deepspeed={"zero_optimization": {"reduce_bucket_size": 1e8}}), MODEL, 2).buckets
        == 2 * usual
    )
    assert plan_memory(job(), MODEL, 3).buckets == usual + 2 * 1_000_000_000  # what is gathered may stay
    layer = 128_256 * 4096  # the embedding is the largest block
    lean = job(deepspeed={"zero_optimization": {"stage3_max_live_parameters": 1}})
    assert plan_memory(lean, MODEL, 3).buckets == usual + 2 * (20_000_000 + layer)


def test_totals() -> None:
    plan = plan_memory(job(), MODEL, 2)
    assert plan.device == sum(plan.terms().values())
    assert list(plan.terms()) == [
        "weights",
        "gradients",
        "optimizer",
        "activations",
        "logits",
        "buckets",
        "overhead",
    ]
    assert plan.overhead == OVERHEAD_GPU


@given(
    st.integers(1, 64),
    st.sampled_from(["bf16", "fp32", "pure_bf16"]),
    st.sampled_from([{}, {"type": "lora"}, {"type": "lora", "target_modules": ["q_proj"], "use_dora": True}]),
)
def test_each_stage_holds_no_more_state_than_the_one_before(
    workers: int, precision: str, adapter: Any
) -> None:
    planned = job(workers, train={"precision": precision}, adapter=adapter)
    plans = [plan_memory(planned, MODEL, stage) for stage in STAGES]
    sums = [plan.weights + plan.gradients + plan.optimizer for plan in plans]
    first = 0 if precision == "bf16" else 1  # else stage 0 alone has no second copy of the weights
    assert sums[first:] == sorted(sums[first:], reverse=True)
    assert len({plan.activations for plan in plans}) == 1


def test_bucket_sizes_are_those_deepspeed_gets() -> None:
    pytest.importorskip("deepspeed")
    from rayft.learner.settings import deepspeed_config

    options = deepspeed_config(job(), 3)["zero_optimization"]
    assert {name: options[name] for name in bucket_defaults(job())} == bucket_defaults(job())


def test_a_reward_model_has_no_language_head_and_no_logits() -> None:
    head = 128256 * 4096
    reward = plan_memory(job(method="reward", reward={"heads": 4}), MODEL, 0)
    assert reward.weights == 2 * (P - head + 4 * 4096)
    assert reward.logits == 0


def test_answers_that_stay_together_need_room_for_two() -> None:
    """A pack holds a pair at least; unpacked, every row of a micro-batch is one. KTO's answers are single."""
    one = plan_memory(job(), MODEL, 2).activations
    pair = plan_memory(job(method="dpo"), MODEL, 2).activations
    assert pair == 2 * one
    four = {"micro_batch_size": 4}
    packed = plan_memory(job(method="dpo", train=four), MODEL, 2).activations
    assert packed == plan_memory(job(train=four), MODEL, 2).activations
    apart = {"train": [{"path": "a"}], "packing": False}
    values = {
        "name": "x",
        "model": {"path": "m"},
        "cluster": {"num_workers": 4, "gpus_per_worker": 1},
        "train": four,
    }
    unpacked = parse_job({**values, "data": apart, "method": "dpo"})
    assert plan_memory(unpacked, MODEL, 2).activations == 2 * packed
    assert plan_memory(job(method="dpo", dpo={"loss": "kto"}), MODEL, 2).activations == one
