"""Run or merge a model of any size in the memory of one of its layers.

The model stands on the meta device; each layer's parameters are read (fp32) just before it runs and dropped after it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import init_empty_weights
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from rayft.model.files import ModelFiles
from rayft.model.head import causal_model
from rayft.model.layout import Read
from rayft.model.load import build_empty
from rayft.spec import Model

#: Name of PEFT's only adapter in a rayft model.
ADAPTER = "default"


def empty_model(files: ModelFiles, model: Model) -> PreTrainedModel:
    """The model with parameters on the meta device and real buffers, for `StreamedModel`."""
    with init_empty_weights(include_buffers=False):
        module = build_empty(files, model, dtype=torch.float32, attention="eager")
    module.tie_weights()  # moving to the meta device has untied them
    return module


class StreamedModel:
    """`module` with its parameters on the meta device, and `read`, which returns them by their names in `module`.

    Buffers must be real; persistent ones are read at once. Of tied parameters, `read` is asked for the first name.
    """

    def __init__(self, module: nn.Module, read: Read) -> None:
        self.module, self._read = module.eval(), read
        self._names = {parameter: name for name, parameter in module.named_parameters()}
        self.units = dict(_units(module))
        for name, value in module.state_dict().items():
            if value.device.type != "meta":
                value.copy_(read(name))

    @contextlib.contextmanager
    def loaded(self, unit: str) -> Iterator[nn.Module]:
        """The unit with real fp32 parameters; they are gone afterwards."""
        module, empty = self.units[unit], []
        for part in module.modules():
            for leaf, parameter in part._parameters.items():
                if parameter is not None:
                    empty.append((part, leaf, parameter))
                    # A copy: merging writes into it, and what was read may be the mapped file.
                    value = self._read(self._names[parameter]).to(torch.float32, copy=True)
                    part._parameters[leaf] = nn.Parameter(value.view(parameter.shape), requires_grad=False)
        try:
            yield module
        finally:
            for part, leaf, parameter in empty:
                part._parameters[leaf] = parameter

    @torch.no_grad()
    def logits(self, prompts: list[list[int]]) -> list[torch.Tensor]:
        """Logits [T, V] in fp32 of each prompt (token ids), all prompts in one pass over the weights."""
        longest = max(map(len, prompts))
        # Causal: what pads a row on the right does not reach its prompt.
        input_ids = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts])
        with contextlib.ExitStack() as hooks:
            for name, unit in self.units.items():
                hooks.enter_context(self._loaded_while_it_runs(name, unit))
            logits = self._logits(input_ids)
        return [row[: len(prompt)].float() for row, prompt in zip(logits, prompts, strict=True)]

    def _logits(self, input_ids_BT: torch.Tensor) -> torch.Tensor:
        """Logits of every token; of a reward model, its scores there."""
        inner: Any = causal_model(self.module)
        if hasattr(inner, "score"):
            return inner.score(inner.base_model(input_ids=input_ids_BT, use_cache=False)[0])
        return self.module(input_ids=input_ids_BT, use_cache=False).logits

    def merged(self, unit: str) -> dict[str, torch.Tensor]:
        """The unit's base parameters in fp32 with the adapter merged into them, by their names without PEFT."""
        with self.loaded(unit) as module, torch.no_grad():
            for layer in module.modules():
                if isinstance(layer, BaseTunerLayer):
                    layer.merge(adapter_names=[ADAPTER])
                    layer.merged_adapters.clear()
            named = [(f"{unit}.{name}", parameter) for name, parameter in module.named_parameters()]
            return {base_name(name): p.detach() for name, p in named if base_name(name) is not None}  # type: ignore[misc]

    @contextlib.contextmanager
    def _loaded_while_it_runs(self, name: str, unit: nn.Module) -> Iterator[None]:
        running = contextlib.ExitStack()

        def load(*_: object) -> None:
            running.enter_context(self.loaded(name))

        def drop(*_: object) -> None:
            running.close()

        handles = [unit.register_forward_pre_hook(load), unit.register_forward_hook(drop)]
        try:
            yield
        finally:
            running.close()
            for handle in handles:
                handle.remove()


def base_name(name: str) -> str | None:
    """Name in the model without PEFT of parameter `name` of the model with it; None for what exists only with PEFT."""
    parts = name.removeprefix("base_model.model.").split(".")
    if "original_module" in parts or any(part.startswith("lora_") for part in parts):
        return None
    if "modules_to_save" in parts:
        at = parts.index("modules_to_save")
        del parts[at : at + 2]
    return ".".join(part for part in parts if part != "base_layer")


def frozen_name(name: str) -> str | None:
    """Like `base_name`, but for reading the base: the original of a module trained in full has a name, not the copy."""
    if ".modules_to_save." in name:
        return None
    return base_name(name.replace(".original_module.", "."))


def _units(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Parts that are loaded as a whole: each layer of a stack, and outside stacks whatever holds parameters itself."""
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if isinstance(child, nn.ModuleList):
            yield from ((f"{path}.{i}", layer) for i, layer in enumerate(child))
        elif _holds_parameters(child):
            yield path, child
        else:
            yield from _units(child, f"{path}.")


def _holds_parameters(module: nn.Module) -> bool:
    wrapper = isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
    return wrapper or next(module.parameters(recurse=False), None) is not None
