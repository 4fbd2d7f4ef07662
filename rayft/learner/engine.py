"""Start DeepSpeed: its communication, the optimizer for each stage, the engine and the layout of its state."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from rayft.learner.replicated import ReplicatedAdamW
from rayft.learner.settings import deepspeed_config
from rayft.learner.shards import Layout, PartitionedLayout, ReplicatedLayout, ShardedLayout
from rayft.model.load import restore_buffers
from rayft.spec import Job


def start_communication() -> None:
    """Let DeepSpeed adopt the existing torch process group.

    Its shared-memory collective serves inference only, yet is compiled at start-up (seconds, a compiler, and a lock
    that a killed process leaves behind), so it is switched off.
    """
    assert dist.is_initialized(), "a process group must exist before the learner"
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)


def initialize(job: Job, model: nn.Module, stage: int) -> tuple[Any, Layout]:
    """The DeepSpeed engine of this rank and the layout of its training state.

    The process group must exist. `model` is the trained model as the child `model` of an outermost module, whose
    prefix does not show in parameter names; what has `requires_grad` is trained.
    """
    import deepspeed

    start_communication()

    names = {p: name.removeprefix("model.") for name, p in model.named_parameters() if p.requires_grad}
    groups = _parameter_groups(job, names)
    train = job.train
    adam: dict[str, Any] = {
        "lr": train.learning_rate,
        "betas": (train.adam_beta1, train.adam_beta2),
        "eps": train.adam_epsilon,
    }
    optimizer: torch.optim.Optimizer
    if stage == 0:
        dtype = torch.bfloat16 if train.precision == "pure_bf16" else torch.float32
        optimizer = ReplicatedAdamW(groups, **adam, max_grad_norm=train.max_grad_norm, master_dtype=dtype)
    elif job.zero.offload_optimizer and job.cluster.gpus_per_worker > 0:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        optimizer = DeepSpeedCPUAdam(groups, **adam, adamw_mode=True)
    else:
        optimizer = torch.optim.AdamW(groups, **adam, fused=True)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=deepspeed_config(job, stage), dist_init_required=False
    )
    # DeepSpeed casts the whole module, rotary frequencies included, which do not survive bf16.
    restore_buffers(model)
    if stage == 0:
        engine.enable_backward_allreduce = False
        return engine, ReplicatedLayout(optimizer, names)  # type: ignore[arg-type]
    if stage == 3:
        return engine, ShardedLayout(engine.optimizer, names)
    return engine, PartitionedLayout(engine.optimizer, names)


def _parameter_groups(job: Job, names: dict[Any, str]) -> list[dict[str, Any]]:
    """Weight decay on matrices only; biases, norms and other vectors go without."""
    decay = job.train.weight_decay
    matrices = [p for p in names if len(getattr(p, "ds_shape", p.shape)) >= 2]
    vectors = [p for p in names if len(getattr(p, "ds_shape", p.shape)) < 2]
    if decay == 0:
        return [{"params": list(names), "weight_decay": 0.0}]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    return [g for g in groups if g["params"]]
