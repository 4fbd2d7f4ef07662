"""Layers whose elementwise work is fused: the same numbers, fewer passes over memory, fewer tensors kept.

transformers computes RMSNorm, SwiGLU and (peft) LoRA as chains of small operations, each with its own pass and its own
tensors for the backward. On a CPU these passes cost a fifth of a training step, and the fp32 copies of RMSNorm are
the largest part of the activations. Here each is one autograd function that keeps its inputs and little else.

Shapes: T tokens (all leading dimensions), H hidden, F feed-forward, I inputs, O outputs, R rank of the adapter.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear as PeftLoraLinear
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.activations import SiLUActivation

from rayft.model.head import causal_model

#: Families (`config.model_type`) whose norm is weight * x / rms(x) and whose feed-forward is down(silu(gate) * up).
PROVEN = frozenset({"llama", "qwen2", "qwen3", "mistral", "mixtral", "qwen3_moe"})


def install_fused(model: nn.Module) -> int:
    """Replace layers of a proven family by their fused equals, in place, and return how many.

    Call it once the adapters are there. Parameters, their names and the calls of submodules stay as they are.
    """
    inner = causal_model(model)
    if inner.config.model_type not in PROVEN:
        return 0
    replaced = 0
    for module in inner.modules():
        fused = _equal_of(module)
        if fused is not None:
            module.__class__ = fused
            replaced += 1
    return replaced


def _equal_of(module: nn.Module) -> type[nn.Module] | None:
    name = type(module).__name__
    if name.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
        return RmsNorm
    if name.endswith("MLP") and isinstance(getattr(module, "act_fn", None), (nn.SiLU, SiLUActivation)):
        return SwiGlu
    return LoraLinear if type(module) is PeftLoraLinear else None


class RmsNorm(nn.Module):
    """weight * x / sqrt(mean(x^2) + eps), the root and the quotient in fp32 (arXiv:1910.07467)."""

    weight: nn.Parameter
    variance_epsilon: float

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return _RmsNorm.apply(hidden, self.weight, self.variance_epsilon)


class SwiGlu(nn.Module):
    """down(silu(gate(x)) * up(x)) (arXiv:2002.05202)."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.down_proj(_SiluProduct.apply(self.gate_proj(hidden), self.up_proj(hidden)))


class LoraLinear(PeftLoraLinear):
    """x W' + scaling (x A') B' without a pass of its own for the adapter's output."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        name = self.active_adapters[0] if len(self.active_adapters) == 1 else None
        if name is None or args or kwargs or not self._is_plain(name):
            return super().forward(x, *args, **kwargs)
        base, a, b = self.base_layer, self.lora_A[name], self.lora_B[name]
        return _LoraLinear.apply(x, base.weight, base.bias, a.weight, b.weight, self.scaling[name])

    def _is_plain(self, name: str) -> bool:
        """Whether the adapter is on and vanilla; weights that ZeRO-3 shards must be reached through their modules."""
        return (
            not self.disable_adapters
            and not self.merged
            and name in self.lora_A
            and name not in self.lora_variant
            and isinstance(self.lora_dropout[name], nn.Identity)
            and type(self.base_layer) is nn.Linear
            and self.lora_A[name].weight.dtype == self.base_layer.weight.dtype
            and self.lora_B[name].bias is None
            and not hasattr(self.base_layer.weight, "ds_tensor")
        )


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        x32 = x.to(torch.float32, copy=True)
        mean_square = torch.linalg.vector_norm(x32, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        scale = mean_square.add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return x32.mul_(scale).to(x.dtype).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """d/dx = scale * (g w - xhat mean(g w xhat)), d/dweight = sum g xhat, with xhat = x scale."""
        x, weight, scale = ctx.saved_tensors
        xhat = x.to(torch.float32, copy=True).mul_(scale)
        grad32 = grad.to(torch.float32, copy=True)
        product = grad32 * xhat
        weight32 = weight.to(torch.float32)
        mean = (product @ weight32).unsqueeze(-1).div_(x.shape[-1])
        grad_weight = product.flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        grad_x = grad32.mul_(weight32).addcmul_(xhat, mean, value=-1).mul_(scale).to(x.dtype)
        return grad_x, grad_weight, None


class _SiluProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return nn.functional.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        grad_up = nn.functional.silu(gate).mul_(grad)
        return torch.ops.aten.silu_backward(grad * up, gate), grad_up


class _LoraLinear(torch.autograd.Function):
    """weight [O, I] frozen, a [R, I], b [O, R]."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        flat = x.flatten(0, -2)
        low_TR = flat @ a.t()
        out = nn.functional.linear(flat, weight, bias).addmm_(low_TR, b.t(), alpha=scaling)
        ctx.save_for_backward(x, weight, a, b, low_TR)
        ctx.scaling = scaling
        return out.unflatten(0, x.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, a, b, low_TR = ctx.saved_tensors
        flat = grad.flatten(0, -2)
        grad_low = (flat @ b).mul_(ctx.scaling)
        grad_b = (flat.t() @ low_TR).mul_(ctx.scaling)
        grad_a = grad_low.t() @ x.flatten(0, -2)
        grad_x = (flat @ weight).addmm_(grad_low, a).view_as(x) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, grad_a, grad_b, None
