"""Memory of one rank by term, for every ZeRO stage, from sizes alone.

The model of training state follows ZeRO (arXiv:1910.02054) with rayft's choices: working weights in the compute
dtype; master weights, both Adam moments and the accumulated gradient in fp32 (`precision: pure_bf16`: all in bf16).
Activations follow the accounting of arXiv:2205.05198, redone for gated feed-forwards, grouped-query attention without
a score matrix, and norms that keep an fp32 copy of their input.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from rayft.plan.activations import activation_bytes, logits_bytes
from rayft.plan.architecture import Architecture
from rayft.plan.trainable import trainable_parameters
from rayft.spec import Job

STAGES = (0, 1, 2, 3)

#: Python, torch, Ray and their libraries in a process (measured: 0.64 GB); on a GPU its context, cuBLAS workspaces and NCCL's buffers.
OVERHEAD_CPU = 650_000_000
OVERHEAD_GPU = 1_800_000_000


@dataclass(frozen=True)
class MemoryPlan:
    """Peak memory of one rank in bytes, by term.

    generation, beside: where a model learns from rewards, see `rayft.plan.roles`.
    `device` is the memory training runs in (the GPU's, or the host's where there is none), `host` what
    `zero.offload_optimizer` keeps beside a GPU.
    """

    stage: int
    world_size: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    buckets: int
    overhead: int
    host: int = 0
    generation: int = 0
    beside: Mapping[str, int] = field(default_factory=dict)

    @property
    def device(self) -> int:
        return self.own + sum(self.beside.values())

    @property
    def own(self) -> int:
        """The part of `device` that the rank's own process takes."""
        return sum(self.terms().values()) - sum(self.beside.values())

    def terms(self) -> dict[str, int]:
        """Term to bytes, in the order people look at them."""
        names = ("weights", "gradients", "optimizer", "activations", "logits", "buckets", "overhead")
        terms = {name: int(getattr(self, name)) for name in names}
        if self.generation or self.beside:
            terms["generation"] = self.generation
        return terms | {f"{role}, beside": size for role, size in self.beside.items()}


def plan_memory(
    job: Job, architecture: Architecture, stage: int, world_size: int | None = None
) -> MemoryPlan:
    """Memory of one rank of `world_size` (default: the fewest workers the job allows) under a ZeRO stage."""
    architecture = of_method(job, architecture)
    ranks = world_size or job.cluster.min_workers
    trained = trainable_parameters(job.adapter, architecture)
    frozen = architecture.total if job.adapter.type != "none" else 0
    working, state = element_bytes(job.train.precision)
    frozen_bytes = (
        0.5 + 4 / 64 if job.adapter.type == "qlora" else working
    )  # NF4: a 4-bit code and block scales
    parts = _partitions(stage, ranks)
    on_gpu = job.cluster.gpus_per_worker > 0
    offload = job.zero.offload_optimizer and stage > 0

    in_state = trained * state / parts["optimizer"]
    # In fp32 stage 0 trains the working weights themselves; every other case has a master copy.
    copies = 2 if stage == 0 and working == state else 3
    optimizer = copies * in_state
    host = optimizer + in_state if offload and on_gpu else 0  # with the gradient the step reads
    return MemoryPlan(
        stage=stage,
        world_size=ranks,
        weights=math.ceil((trained * working + frozen * frozen_bytes) / parts["weights"]),
        gradients=math.ceil(trained * state / parts["gradients"]),
        optimizer=0 if host else math.ceil(optimizer),
        activations=activation_bytes(job, architecture, working),
        logits=logits_bytes(job, architecture, working),
        buckets=_buckets(job, architecture, stage, trained, working),
        overhead=OVERHEAD_GPU if on_gpu else OVERHEAD_CPU,
        host=math.ceil(host),
    )


def of_method(job: Job, architecture: Architecture) -> Architecture:
    """The model that is trained: a reward model has score heads in place of the language model's."""
    return with_score_heads(architecture, job.reward.heads) if job.method == "reward" else architecture


def with_score_heads(architecture: Architecture, count: int) -> Architecture:
    """The same model with score heads in place of the language model's."""
    heads = ("lm_head.weight", "embed_out.weight")
    body = {name: shape for name, shape in architecture.parameters.items() if name not in heads}
    return replace(architecture, parameters={**body, "score.weight": (count, architecture.hidden)})


def element_bytes(precision: str) -> tuple[int, int]:
    """Bytes of a working weight, and of an element of optimizer state or accumulated gradient."""
    return {"bf16": (2, 4), "fp32": (4, 4), "pure_bf16": (2, 2)}[precision]


def _partitions(stage: int, ranks: int) -> dict[str, int]:
    """Over how many ranks each part of the state is split."""
    return {
        "optimizer": ranks if stage >= 1 else 1,
        "gradients": ranks if stage >= 2 else 1,
        "weights": ranks if stage == 3 else 1,
    }


def bucket_defaults(job: Job) -> dict[str, int]:
    """Sizes that DeepSpeed is configured with unless `deepspeed.zero_optimization` says otherwise, in elements.

    On a CPU a bucket is memory that other tensors of the step could use, and gloo gains nothing from size. Layers that
    ZeRO-3 has gathered stay while a GPU may soon want them again; on a CPU they go.
    """
    on_gpu = job.cluster.gpus_per_worker > 0
    reduce, live = (50_000_000, 1_000_000_000) if on_gpu else (8_000_000, 50_000_000)
    return {
        "reduce_bucket_size": reduce,
        "allgather_bucket_size": reduce,
        "stage3_prefetch_bucket_size": 20_000_000,
        "stage3_max_live_parameters": live,
        "stage3_max_reuse_distance": live,
        "sub_group_size": live,
    }


def _buckets(job: Job, architecture: Architecture, stage: int, trained: int, working: int) -> int:
    """Memory that communication holds: gradients in flight, and under ZeRO-3 the layers gathered ahead."""
    if stage < 2:
        largest = max(math.prod(shape) for shape in architecture.parameters.values())
        return min(largest, trained) * working  # the one gradient between autograd and the flat buffer
    sizes = {**bucket_defaults(job), **_numbers(job.deepspeed.get("zero_optimization"))}
    # the bucket in the gradient's own dtype, and the fp32 copy that is reduced
    in_flight = min(sizes["reduce_bucket_size"], trained) * (working + 4)
    if stage == 2:
        return int(in_flight)
    ahead = sizes["stage3_prefetch_bucket_size"] + architecture.largest_layer
    gathered = min(max(ahead, sizes["stage3_max_live_parameters"]), architecture.total)
    return int(in_flight + gathered * working)


def _numbers(options: Any) -> Mapping[str, float]:
    return {k: v for k, v in (options or {}).items() if isinstance(v, int | float)}
