"""Trainable parameters of adapters counted from the config alone, against PEFT on the real modules."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

from rayft.plan.architecture import read_architecture
from rayft.plan.trainable import trainable_parameters
from rayft.spec import Adapter
from tests.unit.test_plan_architecture import CASES, build

ADAPTERS: list[dict[str, Any]] = [
    {"lora_r": 2},
    {"lora_r": 3, "use_rslora": True, "modules_to_save": ["lm_head"]},
    {"lora_r": 2, "target_modules": ["q_proj", "v_proj", "query_key_value"]},
    {"lora_r": 2, "target_modules": ["o_proj", "dense"], "use_dora": True},
    {"lora_r": 2, "target_modules": ["q_proj", "dense", "embed_tokens", "embed_in"]},
    {"lora_r": 2, "target_modules": ["1.self_attn.q_proj", "1.attention.dense"]},
]


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize(("family", "variant"), CASES)
def test_count_is_pefts(family: str, variant: dict[str, Any], adapter: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")
    module = build(family, variant)
    architecture = read_architecture(module.config.to_dict())
    if architecture.tied and "modules_to_save" in adapter:
        pytest.skip("a tied head is saved with its embedding")
    ours = Adapter(type="lora", **adapter)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(
            r=ours.lora_r,
            target_modules=ours.target_modules,
            modules_to_save=ours.modules_to_save or None,
            use_dora=ours.use_dora,
            use_rslora=ours.use_rslora,
        )
        adapted = peft.get_peft_model(module, config)
    expected = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert trainable_parameters(ours, architecture) == expected


def test_full_fine_tuning_trains_everything() -> None:
    architecture = read_architecture(build("llama", {}).config.to_dict())
    assert trainable_parameters(Adapter(), architecture) == architecture.total


@pytest.mark.parametrize("names", [["gate_proj", "up_proj", "down_proj"], ["down_proj", "q_proj"]])
def test_expert_projections_by_the_names_they_had(names: list[str]) -> None:
    peft = pytest.importorskip("peft")
    module = build("qwen3_moe", {"num_experts": 4, "moe_intermediate_size": 32, "head_dim": 16})
    architecture = read_architecture(module.config.to_dict())
    adapted = peft.get_peft_model(module, peft.LoraConfig(r=2, target_modules=names))
    expected = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert (
        trainable_parameters(Adapter(type="lora", lora_r=2, target_modules=names), architecture) == expected
    )
