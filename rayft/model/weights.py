"""A model's weights, one tensor at a time, under the names of the module that they belong to.

Names and layouts in the files differ from the module's (experts stored one by one, old prefixes, tied heads). The
conversions are transformers' own; what is added is that nothing is read before it is asked for, and that a name that
is missing or left over is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    rename_source_key,
)

from rayft.errors import JobError
from rayft.model.files import ModelFiles, NewScore, auto_class, load_config
from rayft.model.layout import Group
from rayft.spec import Model

#: Dtypes of a safetensors header that can be trained.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class Weights:
    """Random access to a model's tensors by the module's state-dict names; tied ones appear once.

    names: what the module needs, in the module's order. tied: further names, each with the one it shares its value with.
    conversions: the transforms from files to module that apply, for writing the same layout again. Raises JobError for names that are missing, left over, or of a wrong shape.
    """

    def __init__(self, files: ModelFiles, module: PreTrainedModel) -> None:
        expected: dict[str, torch.Tensor] = dict(module.state_dict())
        self._source, self._module = files.source, module
        self._mapped: dict[Path, Any] = {}
        self._groups: dict[str, Group] = {}
        self._new: dict[str, NewScore] = {}
        if files.random_weights:
            self.conversions = _family_layout(module)
            self.tied = dict(module.all_tied_weights_keys)
        else:
            self._headers = {key: entry for path in files.weights for key, entry in _header(path).items()}
            transforms = get_model_conversion_mapping(module)
            groups, left_over = _group_keys(list(self._headers), transforms, module, expected)
            self.conversions = [transform for transform in transforms if transform.was_used()]
            self._groups = {name: group for group in groups for name in group.results(self._meta, module)}
            self.tied = self._ties()
            if files.score:
                # A language model's head has no place in a reward model, which begins with new ones instead.
                left_over = [
                    key
                    for key in left_over
                    if not key.endswith("lm_head.weight") and not key.startswith("embed_out.")
                ]
                self._new = {
                    name: files.score for name in expected if is_score(name) and name not in self._groups
                }
            self._refuse_misfits(left_over, expected)
        if files.random_weights and files.score:
            self._new = {name: files.score for name in expected if is_score(name)}
        self.names = [name for name in expected if name not in self.tied]
        self.shapes = {name: expected[name].shape for name in self.names}

    def read(self, name: str) -> torch.Tensor:
        """The tensor `name`, in the file's dtype, on CPU. It may be a view of the mapped file: do not write into it."""
        if name in self._new:
            return new_score(self.shapes[name], self._new[name])
        if not self._groups:
            return random_tensor(self._module, name)
        return self._groups[name].results(self._tensor, self._module)[name].contiguous()

    def resolve(self, name: str) -> torch.Tensor:
        """`read`, for names that are tied to another one too."""
        return self.read(self.tied.get(name, name))

    def close(self) -> None:
        """Unmap the files. Tensors that were read stay valid."""
        self._mapped.clear()

    def _tensor(self, key: str) -> torch.Tensor:
        path = self._headers[key].path
        if path not in self._mapped:
            self._mapped.clear()  # one file at a time: what was read of a mapped one counts as memory of this process
            self._mapped[path] = safe_open(path, framework="pt")
        return self._mapped[path].get_tensor(key)

    def _meta(self, key: str) -> torch.Tensor:
        header = self._headers[key]
        if header.dtype not in _DTYPES:
            raise JobError(
                f"{header.path}: tensor {key} has dtype {header.dtype}, which cannot be trained.",
                "Give the model in bfloat16, float16 or float32.",
            )
        return torch.empty(header.shape, dtype=_DTYPES[header.dtype], device="meta")

    def _ties(self) -> dict[str, str]:
        """Names that share another one's value. The files may hold either end of a tie, or both, then equal."""
        ties = {}
        for target, source in self._module.all_tied_weights_keys.items():
            if source not in self._groups:
                ties[source] = target
                continue
            ties[target] = source
            if target in self._groups and not torch.equal(self.read(source), self.read(target)):
                raise JobError(
                    f"The config of {self._source} ties {target} to {source}, but the weights differ.",
                    "Set tie_word_embeddings to false in its config.json.",
                )
        return ties

    def _refuse_misfits(self, left_over: list[str], expected: dict[str, torch.Tensor]) -> None:
        kind = type(self._module).__name__
        known = self._groups.keys() | self.tied.keys() | self._new.keys()
        missing = [name for name in expected if name not in known]
        if missing:
            raise JobError(
                f"The weights of {self._source} lack {_some(missing)}, which {kind} needs.",
                "Give a complete causal language model.",
            )
        if left_over:
            raise JobError(
                f"The weights of {self._source} hold {_some(left_over)}, for which {kind} has no place.",
                "Give a causal language model without further heads.",
            )
        for name, group in self._groups.items():
            shape = group.results(self._meta, self._module)[name].shape
            if shape != expected[name].shape and is_score(name):
                raise JobError(
                    f"The weights of {self._source} have {shape[0]} score heads; the job asks for {expected[name].shape[0]}.",
                    f"Set reward.heads to {shape[0]}, or start from a language model.",
                )
            if shape != expected[name].shape:
                raise JobError(
                    f"The weights of {self._source} have {name} of shape {tuple(shape)}; "
                    f"its config says {tuple(expected[name].shape)}.",
                    "config.json and weights do not belong together.",
                )


def stream_weights(
    files: ModelFiles, model: Model, *, read: bool = True
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (state-dict name, tensor) one at a time, each in the file's dtype on CPU; tied weights once.

    `read=False` yields the same names in the same order with meta tensors and reads no weights: what the other ranks
    of a gathered assignment need. Raises JobError for weights that do not fit the model.
    """
    weights = Weights(files, skeleton(files, model))
    for name in weights.names:
        yield name, weights.read(name) if read else torch.empty(weights.shapes[name], device="meta")
    weights.close()


def skeleton(files: ModelFiles, model: Model) -> PreTrainedModel:
    """The model with all parameters and buffers on the meta device: names, shapes and classes without memory."""
    config = load_config(files, model)
    with torch.device("meta"):
        return auto_class(files).from_config(
            config, dtype=torch.float32, trust_remote_code=model.trust_remote_code
        )


def is_score(name: str) -> bool:
    """Whether a state-dict name is that of a score head's weight."""
    return name == "score.weight"


def new_score(shape: torch.Size, score: NewScore) -> torch.Tensor:
    """The weight [heads, hidden] of new score heads, fp32, equal on every rank: normal with standard deviation
    1 / sqrt(hidden + 1), so that scores begin at a size of about 1 (arXiv:2009.01325, appendix B.1); or zeros."""
    if score.zeros:
        return torch.zeros(shape)
    generator = torch.Generator().manual_seed(score.seed)
    return torch.randn(shape, generator=generator) / (shape[-1] + 1) ** 0.5


def random_tensor(model: PreTrainedModel, name: str) -> torch.Tensor:
    """The weight `name` as the family initialises it, fp32, seeded by its module's name: equal on every rank."""
    import xxhash

    owner, _, leaf = name.rpartition(".")
    module = deepcopy(model.get_submodule(owner))
    for child in list(module._modules):
        module._modules[child] = None
    module = module.to_empty(device="cpu").float()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(xxhash.xxh3_64_intdigest(owner.encode()) >> 1)
        _family_of(model, owner)._init_weights(module)
    return getattr(module, leaf).detach()


def _family_of(model: PreTrainedModel, owner: str) -> PreTrainedModel:
    """The innermost sub-model around module `owner`: its `_init_weights` is the one that applies."""
    while owner:
        owner = owner.rpartition(".")[0]
        module = model.get_submodule(owner)
        if isinstance(module, PreTrainedModel):
            return module
    return model


@dataclass(frozen=True)
class _Header:
    """Where a tensor of the files is, and what it is."""

    path: Path
    dtype: str
    shape: list[int]


def _group_keys(
    keys: list[str],
    transforms: list[WeightTransform],
    module: PreTrainedModel,
    expected: dict[str, torch.Tensor],
) -> tuple[list[Group], list[str]]:
    """Group the files' keys by the module's name they lead to, as transformers does when it loads; and what is left."""
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {pattern: t for t in converters for pattern in t.source_patterns}
    prefix = module.base_model_prefix
    groups: dict[str, Group] = {}
    left_over = []
    for key in sorted(keys, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, expected)
        if name not in expected and key in expected:
            name, pattern = rename_source_key(key, [], [], prefix, expected)
        if name in expected:
            transform = by_pattern[pattern] if pattern else WeightRenaming(key, name)
            groups.setdefault(name, Group(name, transform)).sources.append((pattern or key, key))
        elif not _ignorable(key, module):
            left_over.append(key)
    return list(groups.values()), left_over


def _ignorable(key: str, module: PreTrainedModel) -> bool:
    """Leftovers of old checkpoints that the architecture is known to do without."""
    patterns = {r"rotary_emb\.inv_freq", r"(^|\.)position_ids$", r"attention\.(masked_)?bias$"}
    patterns |= set(module._keys_to_ignore_on_load_unexpected or ())
    return any(re.search(pattern, key) for pattern in patterns)


def _family_layout(module: PreTrainedModel) -> list[WeightTransform]:
    """The family's file layout, where no files say which of its variants to keep."""
    conversions = get_model_conversion_mapping(module, add_legacy=False)
    return [c for c in conversions if not isinstance(c, PrefixChange)]


def _header(path: Path) -> dict[str, _Header]:
    """What a safetensors file holds, without reading its data. Raises JobError for a damaged file."""
    try:
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 -- not a dict
            return {key: _Header(path, s.get_dtype(), s.get_shape()) for key, s in slices.items()}
    except (SafetensorError, OSError) as error:
        raise JobError(
            f"The weights file {path} cannot be read: {error}.", "Copy or download the model again."
        ) from None


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
