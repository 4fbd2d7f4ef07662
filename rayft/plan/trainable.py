"""How many parameters an adapter trains, from the architecture alone."""

from __future__ import annotations

import math

from rayft.plan.architecture import Architecture, Shape
from rayft.spec import Adapter

#: Families whose experts and router PEFT adapts as stacked parameters, under the names their projections once had:
#: parameter suffix to those names. `all-linear` includes them all; plain linear layers of these names are then left out.
STACKED: dict[str, dict[str, tuple[str, ...]]] = {
    "mixtral": {
        "experts.gate_up_proj": ("w1", "w3"),
        "experts.down_proj": ("w2",),
        "mlp.gate.weight": ("gate",),
    },
    "qwen3_moe": {
        "experts.gate_up_proj": ("gate_proj", "up_proj"),
        "experts.down_proj": ("down_proj",),
        "mlp.gate.weight": ("gate",),
    },
}


def trainable_parameters(adapter: Adapter, architecture: Architecture) -> int:
    """Parameters that are trained: all, or those of the adapter and its `modules_to_save`.

    LoRA adds r (inputs + outputs) to each target, DoRA one magnitude per output besides (arXiv:2402.09353). A stack of
    experts gets r for each expert, and twice that where it fuses two projections.
    """
    if adapter.type == "none":
        return architecture.total
    magnitude = 1 if adapter.use_dora else 0
    count = sum(
        adapter.lora_r * (inputs + outputs) + magnitude * outputs
        for inputs, outputs in adapted_linears(adapter, architecture).values()
    )
    for name, shape in adapted_stacks(adapter, architecture).items():
        experts, outputs, inputs = shape if len(shape) == 3 else (1, *shape)
        fused = 2 if name.endswith("gate_up_proj") else 1
        count += fused * adapter.lora_r * experts * (inputs + outputs)
    return count + sum(
        math.prod(shape)
        for name, shape in architecture.parameters.items()
        if _named(name.rpartition(".")[0], adapter.modules_to_save)
    )


def adapted_linears(adapter: Adapter, architecture: Architecture) -> dict[str, tuple[int, int]]:
    """Linear modules that LoRA adapts, name to (inputs, outputs)."""
    former = {name for names in STACKED.get(architecture.family, {}).values() for name in names}
    if adapter.target_modules == "all-linear":
        return {n: size for n, size in architecture.linears().items() if n.rpartition(".")[2] not in former}
    wanted = [name for name in adapter.target_modules if name.rpartition(".")[2] not in former]
    return {name: size for name, size in architecture.matrices().items() if _named(name, wanted)}


def adapted_stacks(adapter: Adapter, architecture: Architecture) -> dict[str, Shape]:
    """Stacked experts and routers that LoRA adapts, parameter to shape; empty for full fine-tuning."""
    adapted: dict[str, Shape] = {}
    if adapter.type == "none":
        return adapted
    for suffix, former in STACKED.get(architecture.family, {}).items():
        if adapter.target_modules == "all-linear" or set(former) <= set(adapter.target_modules):
            adapted |= {n: shape for n, shape in architecture.parameters.items() if n.endswith(suffix)}
    return adapted


def _named(module: str, wanted: list[str]) -> bool:
    """PEFT's rule: the whole name, or its last parts."""
    return any(module == name or module.endswith(f".{name}") for name in wanted)
