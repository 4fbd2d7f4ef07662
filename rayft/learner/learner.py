"""The learner: build the engine, take an optimizer step, measure a loss, hand out and take in fragments."""

from __future__ import annotations

import contextlib
import resource
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from rayft.checkpoint import CheckpointReader, Fragment
from rayft.learner.engine import initialize
from rayft.learner.shards import MOMENTS, ReplicatedLayout
from rayft.objectives.base import Loss
from rayft.spec import Job

Batch = dict[str, torch.Tensor]


@dataclass
class StepResult:
    """What one optimizer step did. `loss` is the global sum divided by the global denominator, equal on all ranks,
    and so are the metrics."""

    loss: float
    grad_norm: float
    applied: bool
    seconds: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)


#: The method that a learner computes.
Method = TypeVar("Method", bound=Loss)


class ObjectiveModule(nn.Module):
    """The model with its objective as one forward, since ZeRO's hooks count on the outermost module being called."""

    def __init__(self, model: nn.Module, objective: Loss) -> None:
        super().__init__()
        self.model = model
        self.objective = objective

    def forward(self, batch: Batch, function: str = "loss") -> Any:
        return getattr(self.objective, function)(self.model, batch)


class Learner(Generic[Method]):
    """Owns the DeepSpeed engine of one rank.

    Loss convention: an objective returns the *sum* of its loss over a micro-batch; a step divides by a denominator
    that is global over ranks and micro-batches, so the split into ranks and micro-batches never shows in the result.
    """

    def __init__(
        self, job: Job, model: nn.Module, objective: Method, *, stage: int, device: str = "cpu"
    ) -> None:
        self.job, self.objective, self.stage = job, objective, stage
        self.device = torch.device(device)
        self.world_size = dist.get_world_size()
        self.engine, self.layout = initialize(job, ObjectiveModule(model, objective), stage)

    @property
    def module(self) -> nn.Module:
        """The model, adapters included; under ZeRO-3 its parameters are gathered by hooks while it runs."""
        return self.engine.module.model

    def step(self, micro_batches: Iterable[Batch], denominator: int, learning_rate: float) -> StepResult:
        """One optimizer step over this rank's micro-batches (equal in number on all ranks).

        denominator: global count that the summed loss and metrics are divided by, as the objective says.
        Nothing is updated, and `applied` is False, when the gradient norm is not finite.
        """
        self.module.train()
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        seconds = {"forward": 0.0, "backward": 0.0, "optimizer": 0.0}
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        metrics: Counter[str] = Counter()
        for batch in micro_batches:
            started = time.perf_counter()
            loss_sum, batch_metrics = self.engine(self._to_device(batch))
            total += loss_sum.detach().double()
            forwarded = time.perf_counter()
            self.engine.backward(loss_sum * (self.world_size / denominator))
            metrics.update(batch_metrics)
            seconds["forward"] += forwarded - started
            seconds["backward"] += time.perf_counter() - forwarded
        started = time.perf_counter()
        self.engine.step()
        seconds["optimizer"] = time.perf_counter() - started
        sums = torch.cat([total[None], total.new_tensor([metrics[name] for name in sorted(metrics)])])
        if self.world_size > 1:
            dist.all_reduce(sums)
        loss, *means = (sums / denominator).tolist()
        norm = self._grad_norm()
        named = dict(zip(sorted(metrics), means, strict=True))
        return StepResult(loss, norm, bool(np.isfinite(norm)), seconds, named)

    def loss(self, micro_batches: Iterable[Batch]) -> tuple[float, dict[str, float]]:
        """Sums of the objective's loss and metrics over this rank's micro-batches (equal in number on all ranks),
        without training."""
        total, metrics = 0.0, Counter[str]()
        for loss_sum, batch_metrics in self.infer(micro_batches, "loss"):
            total += float(loss_sum)
            metrics.update(batch_metrics)
        return total, dict(metrics)

    def infer(self, micro_batches: Iterable[Batch], function: str) -> Iterator[Any]:
        """What the objective's `function` gives for each micro-batch, without gradients (equal in number on all ranks)."""
        self.module.eval()
        try:
            for batch in micro_batches:
                with torch.no_grad():
                    result = self.engine(self._to_device(batch), function)
                yield result
        finally:
            self.module.train()

    def fragments(self) -> Iterator[Fragment]:
        """This rank's part of the training state: master weights and moments of every trainable parameter.

        The arrays are views of live state on CPU (copies from a GPU): consume them before the next step.
        """
        self._ensure_state()
        for shard in self.layout.owned():
            for kind in ("param", *MOMENTS):
                yield Fragment(shard.name, kind, shard.shape, *_as_array(shard.get(kind), shard.offset))

    @torch.no_grad()
    def weights(self, *, bucket_bytes: int, trained: bool = True) -> Iterator[list[tuple[str, torch.Tensor]]]:
        """The working weights, whole, in buckets of about so many bytes; a collective under ZeRO-3.

        trained: only those that are trained; what is frozen is where the base model came from. The tensors are live, and under
        ZeRO-3 they are gone when the next bucket is asked for.
        """
        module = self.module
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad or not trained]
        for bucket in in_buckets(named, bucket_bytes):
            with self._gathered([p for _, p in bucket]):
                yield [(name, p.data) for name, p in bucket]

    def _gathered(self, parameters: list[nn.Parameter]) -> Any:
        if self.stage < 3:
            return contextlib.nullcontext()
        import deepspeed

        return deepspeed.zero.GatheredParameters(parameters)

    def optimizer_step(self) -> int:
        """Updates applied so far; part of the checkpoint, since Adam's bias correction depends on it."""
        return self.layout.optimizer_step()

    @torch.no_grad()
    def load(self, reader: CheckpointReader, optimizer_step: int) -> None:
        """Take in a checkpoint of any world size and ZeRO stage; working copies equal the master weights afterwards."""
        self.layout.create_state(optimizer_step)
        for shard in self.layout.held():
            for kind in ("param", *MOMENTS):
                array = reader.read(shard.name, kind, shard.offset, shard.length)
                shard.set(kind, _as_tensor(array).to(self.device))
        self.layout.refresh()

    def peak_memory_gb(self) -> float:
        """Peak memory of this rank in GB (1e9 bytes): of the GPU's allocator, or of the process on CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e9
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9

    def close(self) -> None:
        """Release the engine's hooks and buffers."""
        self.engine.destroy()

    def _ensure_state(self) -> None:
        if self.layout.optimizer_step() == 0:
            self.layout.create_state(0)

    def _grad_norm(self) -> float:
        if isinstance(self.layout, ReplicatedLayout):
            return self.layout.optimizer.grad_norm
        norm = self.engine.get_global_grad_norm()
        return float(norm) if norm is not None else float("nan")

    def _to_device(self, batch: Batch) -> Batch:
        return {key: value.to(self.device, non_blocking=True) for key, value in batch.items()}


def in_buckets(
    named: Iterable[tuple[str, nn.Parameter]], bucket_bytes: int
) -> Iterator[list[tuple[str, nn.Parameter]]]:
    """The parameters in their order, a new bucket wherever one would hold more than `bucket_bytes` of several."""
    bucket: list[tuple[str, nn.Parameter]] = []
    size = 0
    for name, parameter in named:
        own = getattr(parameter, "ds_numel", parameter.numel()) * parameter.element_size()
        if bucket and size + own > bucket_bytes:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, parameter))
        size += own
    if bucket:
        yield bucket


def _as_array(tensor: torch.Tensor, offset: int) -> tuple[str, int, np.ndarray]:
    flat = tensor.detach().cpu()
    if flat.dtype == torch.bfloat16:
        return "bfloat16", offset, flat.view(torch.uint16).numpy()
    return str(flat.dtype).removeprefix("torch."), offset, flat.numpy()


def _as_tensor(array: np.ndarray) -> torch.Tensor:
    if array.dtype == np.uint16:
        return torch.from_numpy(array).view(torch.bfloat16)
    return torch.from_numpy(array)
