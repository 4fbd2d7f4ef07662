"""Memory of what lives beside a rank of the policy where a model learns from rewards, and of drawing answers inside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from rayft.plan.activations import layer_bytes_per_token, logits_bytes, micro_batch_tokens
from rayft.plan.architecture import Architecture
from rayft.plan.memory import (
    OVERHEAD_CPU,
    OVERHEAD_GPU,
    MemoryPlan,
    element_bytes,
    plan_memory,
    with_score_heads,
)
from rayft.spec import Job


def plan_with_roles(
    job: Job, architecture: Architecture, stage: int, scorers: Mapping[str, Architecture]
) -> MemoryPlan:
    """`plan_memory` of a rank of the policy, with the terms `generation` (what drawing answers needs above a training step)
    and one for each role that shares the rank's device in a process of its own.

    scorers: the architectures of reward models, by the path in `rewards`; one that is missing counts as a process alone.
    """
    plan = plan_memory(job, architecture, stage)
    working, _ = element_bytes(job.train.precision)
    on_gpu = job.cluster.gpus_per_worker > 0
    overhead = OVERHEAD_GPU if on_gpu else OVERHEAD_CPU
    beside: dict[str, int] = {}
    if job.rl.critic and not job.placement.critic.apart:
        first = scorers.get(job.critic_beginning or "")  # if it reads the same tokens
        body = first if first and first.vocabulary == architecture.vocabulary else architecture
        critic = plan_memory(job, with_score_heads(body, 1), stage)
        beside["critic"] = replace(critic, logits=0).device
    if job.reference == "group" and not job.placement.reference.apart:
        beside["reference"] = _looking(job, architecture, working) + overhead
    ranks = job.cluster.max_workers
    if job.rollout.engines and not job.placement.rollout.apart:
        held = architecture.total * working + overhead
        cache = _vllm_cache if job.rollout.engine == "vllm" else drawing_bytes
        beside["engines"] = -(-job.rollout.engines // ranks) * (held + cache(job, architecture))
    if not job.placement.rewards.apart:
        each = []
        for source in job.rewards:
            model = scorers.get(source.path) if source.type == "model" else None
            # A function or an endpoint touches no GPU.
            idle = 0 if on_gpu and source.type != "model" else overhead
            looking = _looking(job, with_score_heads(model, 1), working, head=False) if model else 0
            each += [idle + looking] * source.workers
        beside["rewards"] = max(sum(each[rank::ranks]) for rank in range(ranks))
    generation = 0
    if not job.rollout.engines:
        gathered = architecture.total * working if stage == 3 else 0
        generation = gathered + drawing_bytes(job, architecture)
        generation = max(0, generation - plan.activations - plan.logits)
    return replace(plan, generation=generation, beside=beside)


def drawing_bytes(job: Job, architecture: Architecture) -> int:
    """Keys and values of the answers that an engine works on at a time, at their full length, and their logits."""
    working, _ = element_bytes(job.train.precision)
    answers = min(job.rollout.batch_size, job.unit_answers)
    token = 2 * architecture.layers * architecture.kv_heads * architecture.head_dim * working
    # The logits of one token each, and what `rayft.generate.decode.sampling` makes of them: log-probabilities, probabilities,
    # their sums in fp64; sorted, with their places, for a nucleus.
    sorts = job.rollout.top_p < 1 or job.rollout.top_k is not None
    logits = architecture.vocabulary * (working + (40 if sorts else 16))
    return answers * (job.data.max_length * token + logits)


def _vllm_cache(job: Job, architecture: Architecture) -> int:
    """As `rayft.generate.vllm.kv_cache_gib` sizes it."""
    token = 2 * architecture.layers * architecture.kv_heads * architecture.head_dim * 4
    return (job.data.max_length + 128) * job.rollout.batch_size * token


def _looking(job: Job, architecture: Architecture, working: int, *, head: bool = True) -> int:
    """A model that is only asked: its weights, one layer of a micro-batch, a chunk of logits."""
    tokens = micro_batch_tokens(job)
    layer = tokens * layer_bytes_per_token(architecture, working, norms_trained=False)
    frozen = job.model_copy(update={"adapter": job.adapter.model_copy(update={"type": "lora"})})
    return architecture.total * working + layer + (logits_bytes(frozen, architecture, working) if head else 0)
