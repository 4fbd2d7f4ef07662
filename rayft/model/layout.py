"""The file layout of a model: which tensors its safetensors files hold, and how they are made of the module's.

The reverse of reading: a family's stacked experts become one tensor per expert again, a renamed head gets its old name.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    rename_source_key,
)

Read = Callable[[str], torch.Tensor]


@dataclass
class Group:
    """Tensors on one side that a transform turns into tensors on the other (one per expert into a stack, say)."""

    target: str
    transform: WeightConverter | WeightRenaming
    sources: list[tuple[str, str]] = field(default_factory=list)  # (pattern of the transform, name)

    def results(self, read: Read, module: PreTrainedModel) -> dict[str, torch.Tensor]:
        """Tensors by their names on the other side, made of what `read` returns for each source."""
        transform = deepcopy(self.transform)
        for pattern, name in self.sources:
            transform.add_tensor(self.target, name, pattern, read(name))  # type: ignore[arg-type]  # or a future
        results = transform.convert(self.target, model=module, config=module.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in results.items()}


def file_groups(names: list[str], conversions: list[WeightTransform]) -> list[Group]:
    """Group the module's `names` by what they become in the files, given the conversions that lead back."""
    reverse = [conversion.reverse_transform() for conversion in conversions[::-1]]
    renamings = [t for t in reverse if isinstance(t, WeightRenaming)]
    converters = [t for t in reverse if isinstance(t, WeightConverter)]
    by_pattern = {pattern: t for t in converters for pattern in t.source_patterns}
    groups: dict[str, Group] = {}
    for name in sorted(names, key=dot_natural_key):
        key, pattern = rename_source_key(name, renamings, converters, reverse=True)
        transform = by_pattern[pattern] if pattern else WeightRenaming(name, key)
        groups.setdefault(key, Group(key, transform)).sources.append((pattern or name, name))
    return list(groups.values())
