"""Parameters counted from a config alone against the real transformers modules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rayft.errors import JobError
from rayft.plan.architecture import FAMILY_DEFAULTS, Architecture, read_architecture
from rayft.plan.headers import weight_shapes

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
}
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "llama": [
        {},
        {"attention_bias": True, "mlp_bias": True},
        {"tie_word_embeddings": True},
        {"head_dim": 24},
    ],
    "gemma": [{"head_dim": 32}, {"tie_word_embeddings": False}],
    "gpt_neox": [{"num_key_value_heads": None}, {"attention_bias": False}],
    "mixtral": [{"num_local_experts": 4}],
    "qwen2_moe": [
        {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48},
        {"num_experts": 4, "mlp_only_layers": [0], "decoder_sparse_step": 2},
    ],
    "qwen3_moe": [{"num_experts": 4, "moe_intermediate_size": 32, "head_dim": 16}, {"mlp_only_layers": [1]}],
}
CASES = [
    (family, variant)
    for family in FAMILY_DEFAULTS
    for variant in VARIANTS.get(family, [{}, {"head_dim": 24}])
]


def build(family: str, variant: dict[str, Any]) -> Any:
    """The transformers module on the meta device: shapes without memory."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    given = {**SIZES, **variant}
    config = transformers.AutoConfig.for_model(family, **{k: v for k, v in given.items() if v is not None})
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(("family", "variant"), CASES)
def test_every_parameter_has_its_name_and_shape(family: str, variant: dict[str, Any]) -> None:
    module = build(family, variant)
    expected = {name: tuple(p.shape) for name, p in module.named_parameters()}
    found = read_architecture(module.config.to_dict())
    assert dict(found.parameters) == expected
    assert found.total == sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(("family", "variant"), CASES)
def test_config_as_written_to_disk(tmp_path: Path, family: str, variant: dict[str, Any]) -> None:
    module = build(family, variant)
    module.config.save_pretrained(tmp_path)
    found = read_architecture(json.loads((tmp_path / "config.json").read_text()))
    assert found.total == sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    "family", [name for name in FAMILY_DEFAULTS if "moe" not in name and name != "mixtral"]
)
def test_what_a_config_leaves_out_is_as_in_transformers(family: str) -> None:
    """Only sizes are given; everything else (head size, biases, tied embeddings) is the family's default."""
    sizes = {**SIZES, "num_key_value_heads": 4}
    module = build(family, {"num_key_value_heads": 4})
    found = read_architecture({**sizes, "model_type": family})
    assert found.total == sum(p.numel() for p in module.parameters())


PUBLISHED = [
    # config.json of the model as published, number of parameters as its card counts them
    (
        {
            "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
        },
        8_030_261_248,
    ),
    (
        {
            "model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
            "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
            "tie_word_embeddings": True,
        },
        596_049_920,
    ),
    (
        {
            "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000, "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
        46_702_792_704,
    ),
    (
        {
            "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
            "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
        },
        134_515_008,
    ),
]  # fmt: skip


@pytest.mark.parametrize(("config", "parameters"), PUBLISHED)
def test_published_models(config: dict[str, Any], parameters: int) -> None:
    assert read_architecture(config).total == parameters


def test_active_parameters_of_a_mixture_of_experts() -> None:
    mixtral = read_architecture(PUBLISHED[2][0])
    assert mixtral.active == 12_879_925_248
    assert mixtral.intermediate == 2 * 14336
    assert read_architecture(PUBLISHED[0][0]).active == 8_030_261_248


def test_largest_layer() -> None:
    assert read_architecture(PUBLISHED[3][0]).largest_layer == 49152 * 576
    assert read_architecture(PUBLISHED[2][0]).largest_layer == 1_451_270_144


def test_unknown_family() -> None:
    config = {**PUBLISHED[0][0], "model_type": "lama"}
    with pytest.raises(JobError, match=r"does not know the model family 'lama'.* Did you mean 'llama'"):
        read_architecture(config)


def test_unknown_family_with_its_weights_at_hand(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    module = build("olmo2", {})
    tensors = {name: torch.zeros(p.shape) for name, p in module.named_parameters()}
    names = sorted(tensors)
    for number, half in enumerate((names[::2], names[1::2])):
        save_file(
            {name: tensors[name] for name in half}, tmp_path / f"model-{number}.safetensors", {"format": "pt"}
        )
    found = read_architecture(module.config.to_dict(), weight_shapes(tmp_path))
    assert found.total == sum(p.numel() for p in module.parameters())
    assert isinstance(found, Architecture)


def test_a_tied_head_stored_twice_is_counted_once() -> None:
    shapes = {"model.embed_tokens.weight": (128, 64), "lm_head.weight": (128, 64)}
    config = {**SIZES, "model_type": "llama", "tie_word_embeddings": True}
    assert read_architecture(config, shapes).total == 128 * 64


@pytest.mark.parametrize("content", [b"", b"\x00" * 8, b"\xff" * 8 + b"{}", b"\x02" + b"\x00" * 7 + b"{"])
def test_damaged_weights(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(JobError, match=r"model\.safetensors are damaged"):
        weight_shapes(tmp_path)


def test_no_weights_at_hand(tmp_path: Path) -> None:
    assert weight_shapes(tmp_path) is None


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "vocab_size"])
def test_a_config_without_a_size(key: str) -> None:
    config = {**PUBLISHED[0][0], key: None}
    with pytest.raises(JobError, match=f"gives {key} as None"):
        read_architecture(config)
