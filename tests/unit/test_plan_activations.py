"""Predicted activations against what autograd really keeps, layer by layer, on the real transformers modules."""

from __future__ import annotations

import math
from typing import Any

import pytest

from rayft.plan.activations import FUSED, activation_bytes, layer_bytes_per_token, logits_bytes
from rayft.plan.architecture import FAMILY_DEFAULTS, Architecture, read_architecture
from rayft.plan.trainable import adapted_stacks
from rayft.spec import Adapter, Job, parse_job

TOKENS = 64
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 64,
}
MORE: dict[str, dict[str, int]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 96},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 64, "num_experts_per_tok": 3},
}


def kept_bytes(family: str, layers: int, dtype: Any, adapted: bool) -> int:
    """Bytes of distinct tensors, parameters aside, that the backbone's forward pass keeps for the backward pass."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    from rayft.model.fused import install_fused

    torch.set_num_threads(1)
    config = AutoConfig.for_model(family, num_hidden_layers=layers, **{**SIZES, **MORE.get(family, {})})
    config._attn_implementation = "sdpa"
    model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if adapted:
        model = get_peft_model(
            model, LoraConfig(r=1, target_modules="all-linear"), autocast_adapter_dtype=False
        )
    install_fused(model)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Any] = {}

    def pack(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = model(input_ids=torch.zeros(1, TOKENS, dtype=torch.long), use_cache=False, logits_to_keep=1)
    assert outputs.logits.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


def test_families_taken_as_fused_are_those_that_are() -> None:
    from rayft.model.fused import PROVEN

    assert FUSED == PROVEN


def stacked_parameters(architecture: Architecture) -> int:
    return sum(math.prod(shape) for shape in adapted_stacks(Adapter(type="lora"), architecture).values())


@pytest.mark.parametrize("element", [2, 4])
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("family", FAMILY_DEFAULTS)
def test_layer_keeps_what_is_predicted(family: str, element: int, adapted: bool) -> None:
    """The difference of two depths is one layer; routers, rotary tables and frozen experts are the slack."""
    import torch

    dtype = torch.bfloat16 if element == 2 else torch.float32
    measured = (kept_bytes(family, 3, dtype, adapted) - kept_bytes(family, 1, dtype, adapted)) / 2 / TOKENS
    sizes = {**SIZES, **MORE.get(family, {}), "model_type": family, "num_hidden_layers": 1}
    architecture = read_architecture(sizes)
    predicted: float = layer_bytes_per_token(architecture, element, norms_trained=not adapted)
    if adapted:
        predicted += element * stacked_parameters(architecture) / TOKENS
    assert predicted == pytest.approx(measured, rel=0.25 if family in MORE else 0.05)


CONFIG = {**SIZES, "model_type": "llama", "num_hidden_layers": 8}
LLAMA = read_architecture(CONFIG)


def job(**groups: Any) -> Job:
    values = {"name": "x", "model": {"path": "m"}, "data": {"train": [{"path": "a"}], "max_length": 512}}
    return parse_job({**values, "cluster": {"gpus_per_worker": 1}, **groups})


def kept(**groups: Any) -> int:
    return activation_bytes(job(**groups), LLAMA, 2)


def test_micro_batch_and_checkpointing() -> None:
    assert kept(train={"micro_batch_size": 4}) == 4 * kept()
    layer = layer_bytes_per_token(LLAMA, 2) * 512
    assert kept() - kept(train={"gradient_checkpointing": True}) == 7 * layer - 8 * 512 * 2 * 128


def test_scores_are_kept_where_the_attention_keeps_them() -> None:
    on_cpu: dict[str, Any] = {"cluster": {}}
    assert kept(**on_cpu) - kept() == 8 * 512 * 4 * 256 * 2  # probabilities of documents up to 256 tokens
    short = {"data": {"train": [{"path": "a"}], "max_length": 128}}
    assert kept(**on_cpu, **short) - kept(**short) == 8 * 128 * 4 * 128 * 2
    assert kept(**on_cpu, model={"path": "m", "attention": "sdpa"}) == kept()
    assert kept(model={"path": "m", "attention": "eager"}) - kept() == 8 * 512 * 4 * 512 * 8


def test_updates_of_adapted_experts_are_whole() -> None:
    mixtral = read_architecture({**CONFIG, "model_type": "mixtral", "num_local_experts": 4})
    attention = {"type": "lora", "target_modules": ["q_proj"]}
    size = 2 * stacked_parameters(mixtral)

    def extra(**train: Any) -> int:
        both = ({"type": "lora"}, attention)
        every, few = (activation_bytes(job(adapter=a, train=train), mixtral, 2) for a in both)
        return every - few

    assert extra() == size
    assert extra(gradient_checkpointing=True) == size // 8


def test_logits_exist_a_chunk_at_a_time() -> None:
    """In bf16 and fp32 on a GPU, in bf16 on a CPU, with the gradient of a trained head; 64 words, 128 wide."""
    head = 64 * 128
    assert logits_bytes(job(train={"logits_chunk": 128}), LLAMA, 2) == 128 * 64 * 6 + head * 6
    assert logits_bytes(job(), LLAMA, 2) == 512 * 64 * 6 + head * 4  # one chunk: nothing is summed in fp32
    assert logits_bytes(job(cluster={}), LLAMA, 2) == 512 * 64 * 2 + head * 4
    assert logits_bytes(job(adapter={"type": "lora"}), LLAMA, 2) == 512 * 64 * 6
    saved = {"type": "lora", "modules_to_save": ["lm_head"]}
    assert logits_bytes(job(adapter=saved), LLAMA, 2) == 512 * 64 * 6 + head * 4
