"""What a rank builds before it trains: model, learner, corpus, evaluation engine."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
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
from rayft.objectives.sft import SftObjective
from rayft.spec import Job
from rayft.storage import node_cache_dir, open_store


@dataclass(frozen=True)
class RunPlan:
    """All a worker needs to know, decided once by the driver and the same on every rank.

    owner: identity of the driver in the lease. stage: ZeRO stage. packed: whether documents share a row.
    train_spec, eval_spec: the tokenised cache. total_steps: optimizer steps of the run; end: position it ends at.
    """

    job: Job
    run_uri: str
    owner: dict[str, Any]
    stage: int
    packed: bool
    train_spec: CacheSpec
    eval_spec: CacheSpec | None
    cache_uri: str
    total_steps: int
    end: int | None
    checkpoint_every: int


def worker_environment(job: Job, stage: int) -> dict[str, str]:
    """Environment variables that a rank's process starts with.

    On a CPU, glibc is told to keep what was freed. Buckets, gradients and activations otherwise get new mappings at
    every step, and the kernel clears each page again: 1.9 GB a step for 135M parameters under ZeRO-2. One arena, since
    Ray Train trains in a thread, and only the main arena can hold large blocks. The price is memory between the blocks:
    a fifth more at the peak. ZeRO-3 is chosen where memory is short, so there large blocks are given back at once.
    """
    environment = {
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": str(job.cluster.threads),
        # A group that lost a rank is torn down by Ray; its collectives need not be waited for any longer.
        "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",
    }
    if job.cluster.gpus_per_worker:
        return environment
    environment["DS_ACCELERATOR"] = "cpu"
    if stage < 3:
        environment |= {
            "MALLOC_ARENA_MAX": "1",
            "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
            "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
        }
    else:  # a fixed threshold; by default it rises with what is freed, and blocks of up to 32 MB stay
        environment["MALLOC_TRIM_THRESHOLD_"] = str(1 << 20)
    return environment


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


def build_learner(plan: RunPlan, files: ModelFiles, pad_id: int) -> Learner:
    """Model, adapter and engine of this rank, freshly initialised."""
    from rayft.model.fused import install_fused
    from rayft.model.head import install_nll_head

    job, dtype = plan.job, compute_dtype(plan.job)
    model = _base_model(job, files, dtype, plan.stage)
    model = add_adapter(model, job.adapter, job.seed, zero_stage=plan.stage)
    if job.adapter.type != "none" and dtype != torch.float32:
        # The engine keeps fp32 master weights; adapters compute in the dtype of their base.
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
    install_nll_head(model, job.train.logits_chunk)
    install_fused(model)
    objective = SftObjective(packed=plan.packed, pad_id=pad_id)
    return Learner(job, model, objective, stage=plan.stage, device=device_of(job))


def _base_model(job: Job, files: ModelFiles, dtype: torch.dtype, stage: int) -> Any:
    from rayft.model.load import build_model, build_quantized

    if stage == 3:
        return build_sharded(job, files, dtype=dtype)
    if job.adapter.type == "qlora":
        return build_quantized(
            files, job.model, dtype=dtype, attention=job.model.attention, device=device_of(job)
        )
    return build_model(
        files,
        job.model,
        dtype=dtype,
        attention=job.model.attention,
        gradient_checkpointing=job.train.gradient_checkpointing,
        device=device_of(job),
    )


def open_corpus(plan: RunPlan, spec: CacheSpec) -> Corpus:
    """The tokenised rows as this node sees them."""
    return Corpus(spec, open_store(plan.cache_uri), node_dir=node_cache_dir() / "data")


def order_of(plan: RunPlan) -> Order:
    """The order of the training rows."""
    return Order.of(plan.train_spec, plan.job.seed)


def agree(flag: bool, device: torch.device) -> bool:
    """Whether any rank raised the flag; a collective."""
    value = torch.tensor(float(flag), device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
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
