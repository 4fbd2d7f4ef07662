"""Where a rank's part of the training state lies, for each way DeepSpeed lays it out.

A shard is one contiguous piece of one parameter's flattened tensor together with the same piece of its optimizer
state. Checkpoints are written from shards and loaded into them, so the format knows no ZeRO stage and no world size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from rayft.learner.replicated import ReplicatedAdamW

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Shard:
    """`length` elements of parameter `name` from element `offset` of its flattened tensor of shape `shape`."""

    name: str
    shape: tuple[int, ...]
    offset: int
    length: int
    get: Callable[[str], torch.Tensor]
    set: Callable[[str, torch.Tensor], None]


class Layout:
    """Access to the shards of one engine. `owned` is what this rank saves, `held` what it must load."""

    def owned(self) -> Iterator[Shard]:
        raise NotImplementedError

    def held(self) -> Iterator[Shard]:
        return self.owned()

    def create_state(self, step: int) -> None:
        """Make optimizer state exist before the first step, at step count `step`."""
        raise NotImplementedError

    def refresh(self) -> None:
        """Make the working copies equal the master weights after a load."""
        raise NotImplementedError

    def optimizer_step(self) -> int:
        """How many updates the optimizer state has seen."""
        raise NotImplementedError


class ReplicatedLayout(Layout):
    """Stage 0: every rank holds everything and saves an equal slice of each flat buffer."""

    def __init__(self, optimizer: ReplicatedAdamW, names: dict[Any, str]) -> None:
        self.optimizer, self.names = optimizer, names

    def _shards(self, rank: int, world_size: int) -> Iterator[Shard]:
        for index, params in enumerate(self.optimizer.params):
            master = self.optimizer.masters[index]
            state = self.optimizer.state[master]
            slice_size = -(-master.numel() // world_size)
            low, high = rank * slice_size, (rank + 1) * slice_size
            for p in params:
                start = self.optimizer.address[p][1]
                first, last = max(start, low), min(start + p.numel(), high)
                if first < last:
                    yield _flat_shard(
                        self.names[p], p.shape, first - start, master, state, first, last - first
                    )

    def owned(self) -> Iterator[Shard]:
        rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        return self._shards(rank, world_size)

    def held(self) -> Iterator[Shard]:
        return self._shards(0, 1)

    def create_state(self, step: int) -> None:
        for master in self.optimizer.masters:
            _create_adam_state(self.optimizer, master, step)

    def refresh(self) -> None:
        self.optimizer.refresh()

    def optimizer_step(self) -> int:
        return _adam_step(self.optimizer)


class PartitionedLayout(Layout):
    """Stages 1 and 2: flat partitions of master weights; DeepSpeed maps each parameter to its piece."""

    def __init__(self, zero: Any, names: dict[Any, str]) -> None:
        self.zero, self.names = zero, names
        bf16 = hasattr(zero, "fp32_groups_flat_partition")
        self.groups = zero.bf16_groups if bf16 else zero.bit16_groups
        self.partitions = zero.fp32_groups_flat_partition if bf16 else zero.single_partition_of_fp32_groups

    def owned(self) -> Iterator[Shard]:
        for params, partition in zip(self.groups, self.partitions, strict=True):
            state = self.zero.optimizer.state[partition]
            for p in params:
                mapping = p._hp_mapping
                if mapping is None:
                    continue
                low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
                yield _flat_shard(self.names[p], p.shape, low.start, partition, state, high.start, high.numel)

    def create_state(self, step: int) -> None:
        for partition in self.partitions:
            _create_adam_state(self.zero.optimizer, partition, step)

    def refresh(self) -> None:
        self.zero.update_lp_params()

    def optimizer_step(self) -> int:
        return _adam_step(self.zero.optimizer)


class ShardedLayout(Layout):
    """Stage 3: DeepSpeed's local access, one equal (padded) partition of every parameter per rank."""

    def __init__(self, zero: Any, names: dict[Any, str]) -> None:
        self.zero, self.names = zero, names

    def owned(self) -> Iterator[Shard]:
        for p, name in self.names.items():
            size = p.partition_numel()
            offset = self.zero._get_param_partition_rank(p) * size
            length = min(size, p.ds_numel - offset)
            if length > 0:
                yield Shard(
                    name, tuple(p.ds_shape), offset, length, self._getter(p, length), self._setter(p, length)
                )

    def _getter(self, p: Any, length: int) -> Callable[[str], torch.Tensor]:
        from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

        def get(kind: str) -> torch.Tensor:
            whole = (
                safe_get_local_fp32_param(p) if kind == "param" else safe_get_local_optimizer_state(p, kind)
            )
            return whole.view(-1)[:length]

        return get

    def _setter(self, p: Any, length: int) -> Callable[[str, torch.Tensor], None]:
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        def put(kind: str, value: torch.Tensor) -> None:
            padded = torch.zeros(p.partition_numel(), dtype=value.dtype, device=value.device)
            padded[:length] = value
            if kind == "param":
                safe_set_local_fp32_param(p, padded)
                p.ds_tensor.data.copy_(padded)
            else:
                safe_set_local_optimizer_state(p, padded, kind)

        return put

    def create_state(self, step: int) -> None:
        for partition in self.zero.fp32_partitioned_groups_flat:
            _create_adam_state(self.zero.optimizer, partition, step)

    def refresh(self) -> None:
        persistent = self.zero.persistent_parameters
        if persistent:
            persistent[0].partition(persistent)
        self.zero.invalidate_secondary_tensor()  # hpZ's copies of what was there before
        if persistent:
            persistent[0].all_gather(persistent)

    def optimizer_step(self) -> int:
        return _adam_step(self.zero.optimizer)


def _flat_shard(
    name: str, shape: Any, offset: int, master: torch.Tensor, state: dict[str, Any], start: int, length: int
) -> Shard:
    def piece(kind: str) -> torch.Tensor:
        return (master if kind == "param" else state[kind]).detach()[start : start + length]

    def put(kind: str, value: torch.Tensor) -> None:
        piece(kind).copy_(value)

    return Shard(name, tuple(shape), offset, length, piece, put)


def _create_adam_state(optimizer: torch.optim.Optimizer, master: torch.Tensor, step: int) -> None:
    state = optimizer.state[master]
    for kind in MOMENTS:
        if kind not in state:
            state[kind] = torch.zeros_like(master.detach())
    count = torch.tensor(float(step), dtype=torch.float32, device=master.device)
    state["step"] = count if isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW) else step


def _adam_step(optimizer: torch.optim.Optimizer) -> int:
    steps = {int(state["step"]) for state in optimizer.state.values() if "step" in state}
    assert len(steps) <= 1, f"optimizer groups disagree on the step count: {steps}"
    return steps.pop() if steps else 0
