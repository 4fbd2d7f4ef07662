"""Under ZeRO-3: a model built empty inside `deepspeed.zero.Init`, filled by streaming, adapted, equals the whole one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rayft.learner.engine import start_communication
from rayft.model import resolve_model
from rayft.model.adapters import add_adapter
from rayft.model.load import assign, build_empty, build_model, restore_buffers
from rayft.model.weights import stream_weights
from rayft.spec import Adapter, Model
from tests.ranks import run_ranks
from tests.tiny import save_tiny

FAMILIES = ["qwen3", "gemma3_text", "gpt_neox", "mixtral"]


def forward_errors(folder: Path) -> dict[str, float]:
    """On a rank: largest difference of a logit, sharded against whole, by case; and whether all was sharded."""
    import deepspeed

    start_communication()
    errors = {}
    for family in FAMILIES:
        for dtype in (torch.float32, torch.bfloat16):
            model = Model.model_validate({"path": str(folder / family)})
            files = resolve_model(model, folder / "cache")
            whole: nn.Module = build_model(files, model, dtype=dtype, attention="eager")
            sharded: Any = _sharded(files, model, dtype, deepspeed)
            errors[f"{family} {dtype}"] = _error(sharded, whole)

            adapter = Adapter.model_validate({"type": "lora", "lora_r": 4, "target_modules": "all-linear"})
            adapted = add_adapter(sharded, adapter, seed=3, zero_stage=3)
            whole = add_adapter(whole, adapter, seed=3)  # type: ignore[arg-type]
            for module in (adapted, whole):
                for name, parameter in module.named_parameters():
                    if ".lora_B." in name:
                        nn.init.constant_(parameter, 0.1)
            errors[f"{family} {dtype} lora"] = _error(adapted, whole)
    return errors


def _sharded(files: Any, model: Model, dtype: torch.dtype, deepspeed: Any) -> Any:
    rank = torch.distributed.get_rank()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    with deepspeed.zero.Init(config_dict_or_path=config):
        empty = build_empty(files, model, dtype=dtype, attention="eager")
    restore_buffers(empty)
    assert all(parameter.numel() == 0 for parameter in empty.parameters())
    for name, tensor in stream_weights(files, model, read=rank == 0):
        with deepspeed.zero.GatheredParameters([empty.get_parameter(name)], modifier_rank=0):
            if rank == 0:
                assign(empty, name, tensor)
    return empty


def _error(sharded: nn.Module, whole: nn.Module) -> float:
    import deepspeed

    input_ids = torch.arange(24).view(1, 24)
    sharded_parameters = [p for p in sharded.parameters() if hasattr(p, "ds_id")]
    with torch.no_grad(), deepspeed.zero.GatheredParameters(sharded_parameters):
        return (sharded(input_ids=input_ids).logits - whole(input_ids=input_ids).logits).abs().max().item()


@pytest.mark.slow
def test_sharded_models_compute_what_whole_ones_do(tmp_path: Path) -> None:
    for family in FAMILIES:
        save_tiny(tmp_path / family, family)
    for errors in run_ranks(forward_errors, 2, tmp_path):
        assert len(errors) == 4 * len(FAMILIES)
        assert errors == dict.fromkeys(errors, 0.0)
