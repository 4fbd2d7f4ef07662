"""What a rank builds before it trains: model, learner, corpus, evaluation engine."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from rayft.data.cache import CacheSpec
from rayft.data.corpus import Corpus
from rayft.data.order import Order
from rayft.learner.learner import Learner
from rayft.learner.sharded import build_sharded
from rayft.model.adapters import add_adapter
from rayft.model.files import ModelFiles
from rayft.objectives.base import Objective
from rayft.objectives.kto import KtoObjective
from rayft.objectives.preference import PreferenceObjective
from rayft.objectives.reference import References
from rayft.objectives.reward import RewardObjective
from rayft.objectives.sft import SftObjective
from rayft.spec import Job
from rayft.storage import node_cache_dir, open_store
from rayft.train.group import RunPlan


def use_threads(job: Job) -> None:
    """Fix the thread count, on which sums and so results depend; Ray sets it from the CPUs a worker asked for."""
    torch.set_num_threads(job.cluster.threads)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed every generator from the step and rank, so that resuming needs no generator state (dropout included)."""
    mixed = int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0])
    random.seed(mixed)
    np.random.seed(mixed % 2**32)
    torch.manual_seed(mixed % 2**63)


def compute_dtype(job: Job) -> torch.dtype:
    """The dtype of weights in forward and backward passes."""
    return torch.float32 if job.train.precision == "fp32" else torch.bfloat16


def device_of(job: Job) -> str:
    """This rank's device; Ray Train has chosen the GPU."""
    if job.cluster.gpus_per_worker == 0:
        return "cpu"
    import ray.train.torch

    return str(ray.train.torch.get_device())


def build_learner(plan: RunPlan, files: ModelFiles, pad_id: int) -> Learner[Objective]:
    """Model, adapter and engine of this rank, freshly initialised."""
    job, device = plan.job, device_of(plan.job)
    module = build_module(job, files, plan.stage, device)
    return Learner(job, module, objective_of(plan, files, pad_id), stage=plan.stage, device=device)


def build_module(job: Job, files: ModelFiles, stage: int, device: str) -> torch.nn.Module:
    """The job's model with its adapter, freshly initialised, and the head that its method needs."""
    from rayft.model.fused import install_fused
    from rayft.model.head import install_nll_head
    from rayft.model.score import install_score_head

    dtype = compute_dtype(job)
    model = _base_model(job, files, dtype, stage, device)
    model = add_adapter(model, job.adapter, job.seed, zero_stage=stage)
    if job.adapter.type != "none" and dtype != torch.float32:
        # The engine keeps fp32 master weights; adapters compute in the dtype of their base.
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
    if job.method == "reward":
        install_score_head(model)
    else:
        install_nll_head(model, job.train.logits_chunk)
    install_fused(model)
    if job.method != "sft":
        switch_dropout_off(model)
    return model


def objective_of(plan: RunPlan, files: ModelFiles, pad_id: int) -> Objective:
    """The objective of the job's method."""
    job, packed = plan.job, plan.packed
    if job.method == "sft":
        return SftObjective(packed=packed, pad_id=pad_id)
    if job.method == "reward":
        return RewardObjective(job.reward, packed=packed, pad_id=pad_id)
    quantized = job.adapter.type == "qlora"  # then the reference is what is left of the model in 4 bits
    references = References(
        open_store(plan.cache_uri), open_store(plan.run_uri), files.identity, job.train.precision, quantized
    )
    if job.dpo.loss == "kto":
        return KtoObjective(job, packed=packed, pad_id=pad_id, references=references)
    return PreferenceObjective(job.dpo, packed=packed, pad_id=pad_id, references=references)


def switch_dropout_off(model: torch.nn.Module) -> None:
    """Two passes over the same answer must agree, so a model's own dropout is left out of preference methods."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():  # some models call the function with a number of their own
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def _base_model(job: Job, files: ModelFiles, dtype: torch.dtype, stage: int, device: str) -> Any:
    from rayft.model.load import build_model, build_quantized

    if stage == 3:
        return build_sharded(job, files, dtype=dtype)
    if job.adapter.type == "qlora":
        return build_quantized(files, job.model, dtype=dtype, attention=job.model.attention, device=device)
    return build_model(
        files,
        job.model,
        dtype=dtype,
        attention=job.model.attention,
        gradient_checkpointing=job.train.gradient_checkpointing,
        device=device,
    )


def open_corpus(plan: RunPlan, spec: CacheSpec, on_wait: Callable[[], bool] | None = None) -> Corpus:
    """The tokenised rows as this node sees them."""
    return Corpus(spec, open_store(plan.cache_uri), node_dir=node_cache_dir(), on_wait=on_wait)


def order_of(plan: RunPlan) -> Order:
    """The order of the training rows."""
    return Order.of(plan.train_spec, plan.job.seed)


def agree(flag: bool, device: torch.device, group: Any = None) -> bool:
    """Whether any rank raised the flag; a collective (of `group`, by default of all ranks on their usual backend)."""
    value = torch.tensor(float(flag), device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX, group=group)
    return bool(value)


def share(value: Any) -> Any:
    """Rank 0's value on every rank; a collective."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather(value: Any) -> list[Any]:
    """Every rank's value, in rank order, on every rank; a collective."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def sync_largest(device: torch.device) -> Callable[[int], int]:
    """The largest of all ranks' numbers; what keeps the ranks of a sharded model in step while they evaluate."""

    def largest(number: int) -> int:
        value = torch.tensor(number, dtype=torch.int64, device=device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return int(value)

    return largest


def pad_id_of(tokenizer: Any) -> int:
    """An id to fill padding with. Any will do: padding is known by the mask, never by its id."""
    return next(
        int(token) for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if token is not None
    )
