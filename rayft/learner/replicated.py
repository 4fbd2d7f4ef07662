"""AdamW for ZeRO stage 0: replicated weights, one flat gradient, one collective a step.

DeepSpeed's stage 0 keeps bf16 gradients in bf16 across micro-batches and offers no access to its master weights.
Here gradients are accumulated in the precision of the master weights, in one flat buffer per parameter group, and
the master weights, moments and gradients of a parameter are views at one address, which is what fragments need.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist


class ReplicatedAdamW(torch.optim.AdamW):
    """Fused AdamW on flat master weights that every rank holds whole.

    groups: dicts with `params` (list of Parameters) and `weight_decay`. master_dtype: dtype of master weights,
    moments and accumulated gradients; parameters of another dtype are working copies refreshed after each step.
    The update divides the summed gradient by the world size, as DeepSpeed does.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        max_grad_norm: float,
        master_dtype: torch.dtype,
    ) -> None:
        self.params = [list(group["params"]) for group in groups]
        self.masters: list[torch.Tensor] = []
        self.address: dict[torch.nn.Parameter, tuple[int, int]] = {}
        self._working: list[torch.Tensor] = []
        self._gradients: list[torch.Tensor] = []
        self._filled: set[torch.nn.Parameter] = set()
        self.max_grad_norm = max_grad_norm
        self.grad_norm = 0.0
        flat_groups = []
        for index, group in enumerate(groups):
            master = self._flatten(index, master_dtype)
            flat_groups.append({"params": [master], "weight_decay": group["weight_decay"]})
        super().__init__(flat_groups, lr=lr, betas=betas, eps=eps, fused=True)

    def _flatten(self, index: int, master_dtype: torch.dtype) -> torch.nn.Parameter:
        params = self.params[index]
        size = sum(p.numel() for p in params)
        working = torch.empty(size, dtype=params[0].dtype, device=params[0].device)
        start = 0
        for p in params:
            view = working[start : start + p.numel()].view(p.shape)
            view.copy_(p.data)
            p.data = view
            self.address[p] = (index, start)
            p.register_post_accumulate_grad_hook(self._collect)
            start += p.numel()
        master = working if working.dtype == master_dtype else working.to(master_dtype)
        self._working.append(working)
        self._gradients.append(torch.zeros(size, dtype=master_dtype, device=working.device))
        parameter = torch.nn.Parameter(master, requires_grad=True)
        self.masters.append(parameter)
        return parameter

    def _collect(self, p: torch.nn.Parameter) -> None:
        """Move a fresh gradient into the flat buffer: the first of a step overwrites, later ones add."""
        assert p.grad is not None
        target = self._view(self._gradients, p)
        if p in self._filled:
            target.add_(p.grad.view(-1))
        else:
            target.copy_(p.grad.view(-1))
            self._filled.add(p)
        p.grad = None

    def _view(self, buffers: list[Any], p: torch.nn.Parameter) -> torch.Tensor:
        index, start = self.address[p]
        return buffers[index][start : start + p.numel()]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Reduce over ranks, clip, update, refresh the working copies. Skips the update if the norm is not finite."""
        assert closure is None
        for params in self.params:
            for p in params:
                if p not in self._filled:
                    self._view(self._gradients, p).zero_()
        self._filled.clear()
        if dist.is_initialized() and dist.get_world_size() > 1:
            for gradient in self._gradients:
                dist.all_reduce(gradient)
                gradient.div_(dist.get_world_size())
        norms = [torch.linalg.vector_norm(g, dtype=torch.float32) for g in self._gradients]
        norm = torch.linalg.vector_norm(torch.stack(norms))
        self.grad_norm = float(norm)
        if not torch.isfinite(norm):
            return
        clip = self.max_grad_norm / (self.grad_norm + 1e-6) if self.max_grad_norm else 1.0
        for master, gradient in zip(self.masters, self._gradients, strict=True):
            if clip < 1.0:
                gradient.mul_(clip)
            master.grad = gradient
        super().step()
        for master in self.masters:
            master.grad = None
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the master weights into the working copies."""
        for master, working in zip(self.masters, self._working, strict=True):
            if working.data_ptr() != master.data_ptr():
                working.copy_(master)
