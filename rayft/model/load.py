"""Build the model that is trained: on every rank in full, or empty inside a sharded context that fills it later."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import (
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    initialization,
)

from rayft.errors import JobError
from rayft.model.files import ModelFiles, auto_class, load_config
from rayft.model.weights import Weights, skeleton
from rayft.spec import Model


def build_model(
    files: ModelFiles,
    model: Model,
    *,
    dtype: torch.dtype,
    attention: str,
    gradient_checkpointing: bool = False,
    device: str = "cpu",
) -> PreTrainedModel:
    """The whole model with its weights, in evaluation mode.

    attention: as in `Model.attention`. Weights are read one tensor at a time into memory of the final dtype and device.
    Raises JobError for weights that do not fit the config.
    """
    with torch.device(device):
        module = build_empty(files, model, dtype=dtype, attention=attention)
    # As the learner's are made, on the CPU: a GPU's powers differ in the last bits, and angles grow with the position.
    restore_buffers(module)
    weights = Weights(files, module)
    for name in weights.names:
        assign(module, name, weights.read(name))
    weights.close()
    if gradient_checkpointing:
        enable_gradient_checkpointing(module, reentrant=False)
    return module


def build_empty(files: ModelFiles, model: Model, *, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    """The model with unset parameters and tied weights, in evaluation mode.

    Made for `deepspeed.zero.Init`, which shards each module as it is built. After that context call `restore_buffers`
    (inside it even new buffers are bf16), and assign what `rayft.model.weights.stream_weights` yields. No
    `HfDeepSpeedConfig` may be alive: transformers would then open a sharded context of its own.
    """
    config = load_config(files, model)
    with initialization.no_init_weights():
        module = _from_config(files, config, model, dtype, attention)
    module.tie_weights()
    if (files.folder / "generation_config.json").exists():
        module.generation_config = GenerationConfig.from_pretrained(files.folder)
    return module.eval()


def build_quantized(
    files: ModelFiles, model: Model, *, dtype: torch.dtype, attention: str, device: str
) -> PreTrainedModel:
    """The model with its linear weights in 4 bits (NF4, double quantization: QLoRA, arXiv:2305.14314) on a GPU.

    Check with `rayft.model.adapter_info.check_adapter` first that bitsandbytes and a GPU are there.
    """
    from transformers import BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    module = auto_class(files).from_pretrained(
        files.folder,
        config=load_config(files, model),
        dtype=dtype,
        quantization_config=quantization,
        device_map={"": device},
        attn_implementation=attention_name(load_config(files, model), attention),
        trust_remote_code=model.trust_remote_code,
    )
    if files.score:  # a new head is the same on every rank, which transformers' would not be
        weights = Weights(files, skeleton(files, model))
        module.score.weight.data = weights.read("score.weight").to(device, dtype)
        weights.close()
    return module


def assign(module: nn.Module, name: str, value: torch.Tensor) -> None:
    """Copy `value` into the parameter or persistent buffer `name` of `module`, cast to its dtype."""
    owner, _, leaf = name.rpartition(".")
    with torch.no_grad():
        getattr(module.get_submodule(owner), leaf).copy_(value)


def enable_gradient_checkpointing(module: PreTrainedModel, *, reentrant: bool) -> None:
    """Recompute each layer's activations in the backward pass.

    `reentrant=True` under ZeRO-3: the other variant compares the recomputed tensors' shapes with the saved ones, which
    gathering changes.
    """
    module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})


def restore_buffers(module: nn.Module) -> None:
    """Compute the rotary frequencies again in fp32 on the CPU, after something cast the whole module to bf16 or made it elsewhere.

    `deepspeed.zero.Init` and, below stage 3, `deepspeed.initialize` do. `module` may be wrapped and sharded. In bf16 the
    frequencies are off by up to 0.4 %, which at position 1000 is several radians.
    """
    for family in (m for m in module.modules() if isinstance(m, PreTrainedModel)):
        for part in family.modules():
            if any(True for _ in part.parameters(recurse=False)):
                continue
            for name, buffer in part.named_buffers(recurse=False):
                if buffer.is_floating_point():
                    setattr(part, name, torch.empty_like(buffer, dtype=torch.float32))
            if part._buffers:
                family._init_weights(part)


def attention_name(config: PretrainedConfig, attention: str) -> str:
    """The implementation's name in transformers for `Model.attention`; registers rayft's own if it is chosen."""
    if attention == "auto":
        from rayft.model.families import can_pack

        attention = "documents" if can_pack(config)[0] else "sdpa"
    if attention != "documents":
        return attention
    from rayft.model.attention import register_documents_attention

    register_documents_attention()
    return "rayft_documents"


def _from_config(
    files: ModelFiles, config: PretrainedConfig, model: Model, dtype: torch.dtype, attention: str
) -> Any:
    try:
        return auto_class(files).from_config(
            config,
            dtype=dtype,
            attn_implementation=attention_name(config, attention),
            trust_remote_code=model.trust_remote_code,
        )
    except (ValueError, ImportError) as error:
        raise JobError(
            f"The model {model.path} cannot be built with model.attention {attention}: {error}",
            "Use sdpa, or a causal language model of a family that transformers has this method's head for.",
        ) from None
