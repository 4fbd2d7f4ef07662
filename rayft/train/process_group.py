"""How Ray Train's workers meet: a process group of torch, set up in the workers alone.

Ray's own `TorchTrainer` has its controller import torch, and starts an actor for data sets that there are not, before any worker
is there: 1.5 s of CPU in each, at every start and restart.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from rayft.train.address import free_address

#: A group that lost a rank is torn down by Ray; its collectives need not be waited for any longer.
SHUTDOWN_S = 5.0


@dataclass
class ProcessGroup(BackendConfig):
    """backend: of torch.distributed. timeout_s: of its collectives."""

    backend: str
    timeout_s: int

    @property
    def backend_cls(self) -> type[Backend]:
        """What the controller calls."""
        return Meeting


class Meeting(Backend):
    """Brings the workers together before they train, and apart before they go."""

    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: ProcessGroup) -> None:
        """Have every worker join, where the first one says."""
        address = worker_group.execute_single(0, free_address)
        worker_group.execute(join, address, backend_config.backend, backend_config.timeout_s)

    def on_shutdown(self, worker_group: Any, backend_config: ProcessGroup) -> None:
        """Have every worker leave, unless another one's death keeps it."""
        with contextlib.suppress(GetTimeoutError):
            ray.get(worker_group.execute_async(leave), timeout=SHUTDOWN_S)


#: The cleaner gives the workers' room back when the controller has died. It asks the dashboard of the machine's newest Ray whether
#: the controller lives, and where that is another cluster than its own it takes the room from living workers. Ray itself gives the
#: room back when the driver ends, which a dead controller brings about; where the driver is an actor, rayft.tune.leftover does.
LEFT_OUT = (DatasetsCallback, PlacementGroupCleanerCallback)


class Trainer(DataParallelTrainer):
    """Ray Train without data sets of Ray Data, whose actor and imports nothing here needs, and without its cleaner."""

    def _create_default_callbacks(self) -> list[Any]:
        made = super()._create_default_callbacks()
        return [callback for callback in made if not isinstance(callback, LEFT_OUT)]


def join(address: str, backend: str, timeout_s: float) -> None:
    """In a worker: be a rank of the process group, with the variables that libraries look for."""
    from datetime import timedelta

    import torch.distributed as dist
    from ray.train import get_context

    context = get_context()
    ranks = {
        "RANK": context.get_world_rank(),
        "WORLD_SIZE": context.get_world_size(),
        "LOCAL_RANK": context.get_local_rank(),
        "LOCAL_WORLD_SIZE": context.get_local_world_size(),
        "NODE_RANK": context.get_node_rank(),
    }
    os.environ.update({name: str(value) for name, value in ranks.items()})
    if "nccl" in backend:
        import torch
        from ray.train.torch import get_device

        torch.cuda.set_device(get_device())
    dist.init_process_group(
        backend,
        init_method=address,
        rank=ranks["RANK"],
        world_size=ranks["WORLD_SIZE"],
        timeout=timedelta(seconds=timeout_s),
    )


def leave() -> None:
    """In a worker: give the process group up."""
    import torch.distributed as dist

    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.destroy_process_group()
