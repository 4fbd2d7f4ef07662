"""LoRA and its variants (rsLoRA, DoRA, modules trained in full beside it) on a built model, by PEFT."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter
from transformers.pytorch_utils import Conv1D

from rayft.errors import JobError
from rayft.model.adapter_info import check_adapter
from rayft.spec import Adapter


def add_adapter(model: PreTrainedModel, adapter: Adapter, seed: int, *, zero_stage: int = 0) -> nn.Module:
    """Wrap `model` in PEFT with fresh adapter weights: trainable, fp32, equal on every rank, without effect at first.

    The base is frozen; `modules_to_save` are trained in full, in the model's dtype, and so are the adapters beside them
    under ZeRO-3, which wants one dtype. Reads no base weights (but DoRA, their norms), so the model may be sharded
    already or on the meta device; its adapter is then there too. With `type: none` the model is returned as it is.
    Raises JobError for names that match nothing and for what `check_adapter` or PEFT refuses.
    """
    if adapter.type == "none":
        return model
    check_adapter(adapter, zero_stage)
    config = lora_config(model, adapter)
    one_dtype = zero_stage == 3 and bool(adapter.modules_to_save)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # PEFT warns of settings that are right here, such as fan_in_fan_out being set for GPT-2's layers.
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        try:
            return get_peft_model(model, config, autocast_adapter_dtype=not one_dtype)
        except ValueError as error:
            raise JobError(
                f"PEFT cannot add this adapter to a {type(model).__name__}: {error}",
                "Change adapter.target_modules or the LoRA variant.",
            ) from None


def lora_config(model: PreTrainedModel, adapter: Adapter) -> LoraConfig:
    """The PEFT configuration of `adapter` for `model`. Raises JobError for names that match no module."""
    if adapter.target_modules != "all-linear":
        _refuse_unmatched("adapter.target_modules", adapter.target_modules, _adaptable(model))
        _refuse_tied_targets(model, adapter)
    _refuse_unmatched(
        "adapter.modules_to_save", adapter.modules_to_save, [n for n, _ in model.named_modules()]
    )
    scores = hasattr(model, "score")
    return LoraConfig(
        # Of a sequence classifier PEFT trains the score head in full beside the adapter.
        task_type="SEQ_CLS" if scores else "CAUSAL_LM",
        r=adapter.lora_r,
        lora_alpha=adapter.lora_alpha,  # type: ignore[arg-type]  # PEFT only multiplies with it
        lora_dropout=adapter.lora_dropout,
        target_modules=adapter.target_modules,
        modules_to_save=adapter.modules_to_save or None,
        use_rslora=adapter.use_rslora,
        use_dora=adapter.use_dora,
        # Of tied embeddings both ends stay one parameter.
        ensure_weight_tying=bool(model.all_tied_weights_keys) and bool(adapter.modules_to_save),
    )


def trainable(model: nn.Module) -> list[str]:
    """Names of the parameters that are trained, in the model's order."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def _refuse_tied_targets(model: PreTrainedModel, adapter: Adapter) -> None:
    """An adapter on one end of tied embeddings would untie them; PEFT's on both ends drift apart when sharded."""
    ends = {name.split(".")[-2] for tie in model.all_tied_weights_keys.items() for name in tie}
    targets = [] if isinstance(adapter.target_modules, str) else adapter.target_modules
    for target in targets:
        if target.split(".")[-1] in ends:
            raise JobError(
                f"adapter.target_modules: {target!r} is tied to another module of this model ({', '.join(sorted(ends))}).",
                f"Train it in full instead: adapter.modules_to_save: [{target}].",
            )


def _adaptable(model: PreTrainedModel) -> list[str]:
    """Names of layers that can carry an adapter; those of experts, which are fused in the module, as in the files."""
    layers = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Embedding, Conv1D))]
    fused = [
        t for t in get_model_conversion_mapping(model, add_legacy=False) if isinstance(t, WeightConverter)
    ]
    return layers + [pattern.removesuffix(".weight") for t in fused for pattern in t.source_patterns]


def _refuse_unmatched(key: str, wanted: Iterable[str], names: Iterable[str]) -> None:
    names = list(names)
    leaves = sorted({name.rpartition(".")[2] for name in names} - {""} - {str(i) for i in range(1000)})
    for target in wanted:
        if any(name == target or name.endswith(f".{target}") for name in names):
            continue
        near: list[Any] = difflib.get_close_matches(target, leaves, n=3, cutoff=0.5)
        raise JobError(
            f"{key}: {target!r} matches no module of the model.",
            f"Did you mean {', '.join(near)}?" if near else f"There are: {', '.join(leaves)}.",
        )
