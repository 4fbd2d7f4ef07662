"""Build a model already sharded (ZeRO-3): no rank ever holds more of it than its own part and one tensor."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from rayft.learner.engine import start_communication
from rayft.learner.settings import deepspeed_config
from rayft.model.files import ModelFiles
from rayft.model.load import assign, build_empty, enable_gradient_checkpointing
from rayft.model.weights import stream_weights
from rayft.spec import Job


def build_sharded(job: Job, files: ModelFiles, *, dtype: torch.dtype) -> nn.Module:
    """The job's base model, each parameter partitioned as soon as its module is built, then filled tensor by tensor.

    Rank 0 of each tensor's read broadcasts it; the others only name it.
    """
    import deepspeed

    start_communication()
    config: dict[str, Any] = deepspeed_config(job, 3)
    # The dtype comes from the configuration: given here, DeepSpeed 0.19.8 takes bf16 on a CPU whatever it is.
    with deepspeed.zero.Init(config_dict_or_path=config):
        model = build_empty(files, job.model, dtype=dtype, attention=job.model.attention)
    reads = dist.get_rank() == 0
    persistent = dict(model.named_buffers())
    parameters = dict(model.named_parameters())
    for name, tensor in stream_weights(files, job.model, read=reads):
        parameter = parameters.get(name)
        if parameter is None:
            # Buffers are replicated, so every rank needs the value.
            value = tensor.to(persistent[name]) if reads else torch.empty_like(persistent[name])
            dist.broadcast(value, src=0)
            assign(model, name, value)
            continue
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            if reads:
                parameter.data.copy_(tensor)
    if job.train.gradient_checkpointing:
        enable_gradient_checkpointing(model, reentrant=True)
    return model
