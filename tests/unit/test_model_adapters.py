"""Adapters: no effect at first, the same on every rank, sharded or not, and refused where the libraries cannot."""

from __future__ import annotations

import importlib.util
import re
from typing import Any

import pytest
import torch
from torch import nn

from rayft.errors import JobError
from rayft.model.adapter_info import check_adapter
from rayft.model.adapters import add_adapter, trainable
from rayft.spec import Adapter
from tests.tiny import FAMILIES, tiny_model

INPUT_IDS = torch.arange(24).view(1, 24)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def lora(**values: Any) -> Adapter:
    return Adapter.model_validate({"type": "lora", "lora_r": 4, **values})


@torch.no_grad()
def logits(module: nn.Module) -> torch.Tensor:
    return module(input_ids=INPUT_IDS).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_fresh_adapter_changes_nothing(family: str) -> None:
    base = logits(tiny_model(family))
    module = add_adapter(tiny_model(family), lora(), seed=0)
    assert torch.equal(logits(module), base)
    names = trainable(module)
    assert all(".lora_A." in name or ".lora_B." in name for name in names)
    for name in (n for n in names if ".lora_B." in n):
        nn.init.normal_(module.get_parameter(name))
    assert not torch.allclose(logits(module), base, atol=0.1), "the adapter is in the forward pass"


@pytest.mark.parametrize(
    "values", [{"use_dora": True}, {"use_rslora": True}, {"modules_to_save": ["lm_head"]}]
)
@pytest.mark.parametrize("tied", [False, True])
def test_variants_start_at_the_base_too(values: dict[str, Any], tied: bool) -> None:
    base = logits(tiny_model(tie_word_embeddings=tied))
    module = add_adapter(tiny_model(tie_word_embeddings=tied), lora(**values), seed=0)
    assert torch.allclose(logits(module), base, atol=1e-5)


@pytest.mark.parametrize(
    ("values", "scale"), [({}, 16 / 4), ({"use_rslora": True}, 16 / 4**0.5)], ids=["alpha/r", "alpha/sqrt(r)"]
)
def test_scale(values: dict[str, Any], scale: float) -> None:
    module = add_adapter(tiny_model(), lora(lora_alpha=16, target_modules=["q_proj"], **values), seed=0)
    layer: Any = module.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    nn.init.normal_(b)
    x = torch.randn(3, 32)
    with torch.no_grad():
        assert torch.allclose(layer(x) - layer.base_layer(x), scale * (x @ a.T @ b.T), atol=1e-4)


def test_initial_weights_follow_from_the_seed_alone() -> None:
    def weights(noise: int, seed: int) -> torch.Tensor:
        torch.manual_seed(noise)
        module = add_adapter(tiny_model(), lora(), seed=seed)
        return torch.cat([p.flatten() for p in module.parameters() if p.requires_grad])

    torch.manual_seed(5)
    before = torch.get_rng_state()
    add_adapter(tiny_model(), lora(), seed=0)
    assert torch.equal(torch.get_rng_state(), before), "the caller's random state is left alone"
    assert torch.equal(weights(1, seed=0), weights(2, seed=0))
    assert not torch.equal(weights(1, seed=0), weights(1, seed=1))


def test_adapters_are_fp32_under_a_bf16_base() -> None:
    module = add_adapter(tiny_model(dtype=torch.bfloat16), lora(), seed=0)
    assert {p.dtype for p in module.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in module.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_zero_3_gets_one_dtype() -> None:
    values = lora(modules_to_save=["lm_head"])
    module = add_adapter(tiny_model(dtype=torch.bfloat16), values, seed=0, zero_stage=3)
    assert {p.dtype for p in module.parameters() if p.requires_grad} == {torch.bfloat16}


def test_target_modules_by_name() -> None:
    names = trainable(add_adapter(tiny_model(), lora(target_modules=["layers.1.self_attn.q_proj"]), seed=0))
    prefix = "base_model.model.model.layers.1.self_attn.q_proj"
    assert names == [f"{prefix}.lora_A.default.weight", f"{prefix}.lora_B.default.weight"]


def test_modules_to_save_of_tied_embeddings_train_one_parameter() -> None:
    module = add_adapter(
        tiny_model("qwen3"), lora(modules_to_save=["lm_head"], target_modules=["q_proj"]), seed=0
    )
    whole = [name for name in trainable(module) if "lora" not in name]
    assert whole == ["base_model.model.model.embed_tokens.modules_to_save.default.weight"]
    module.get_parameter(whole[0]).data.zero_()
    assert logits(module).abs().max() == 0.0, "both ends of the tie have changed"


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_can_be_adapted_by_their_names_in_the_files(family: str) -> None:
    experts = ["w1", "w2", "w3"] if family == "mixtral" else ["gate_proj", "up_proj", "down_proj"]
    names = trainable(add_adapter(tiny_model(family), lora(target_modules=["q_proj", *experts]), seed=0))
    assert any("experts" in name for name in names)


def test_type_none_is_full_fine_tuning() -> None:
    model = tiny_model()
    assert add_adapter(model, Adapter(), seed=0) is model
    assert trainable(model) == [name for name, _ in model.named_parameters()]


@pytest.mark.parametrize(
    ("family", "values", "says"),
    [
        ("llama", {"target_modules": ["q_prj"]}, r"adapter.target_modules: 'q_prj'.*Did you mean q_proj"),
        ("llama", {"target_modules": ["q_proj", "xyzzy"]}, r"'xyzzy' matches no module.*There are: .*v_proj"),
        ("gpt_neox", {"target_modules": ["q_proj"]}, r"'q_proj'.*query_key_value"),
        ("llama", {"modules_to_save": ["head"]}, r"adapter.modules_to_save: 'head'.*lm_head"),
        (
            "qwen3",
            {"target_modules": ["q_proj", "lm_head"]},
            r"'lm_head' is tied.*modules_to_save: \[lm_head\]",
        ),
        ("mixtral", {"use_dora": True}, r"PEFT cannot add this adapter to a MixtralForCausalLM"),
    ],
)
def test_names_and_variants_that_do_not_fit_are_refused(
    family: str, values: dict[str, Any], says: str
) -> None:
    with pytest.raises(JobError) as error:
        add_adapter(tiny_model(family), lora(**values), seed=0)
    assert re.search(says, str(error.value), re.S)


def test_what_the_libraries_cannot_do_together_is_refused() -> None:
    qlora = Adapter.model_validate({"type": "qlora"})
    with pytest.raises(JobError, match=r"use_dora does not work with zero\.stage 3"):
        check_adapter(lora(use_dora=True), zero_stage=3)
    check_adapter(lora(use_dora=True), zero_stage=2)
    with pytest.raises(JobError, match=r"qlora does not work with zero\.stage 3"):
        check_adapter(qlora, zero_stage=3)
    if importlib.util.find_spec("bitsandbytes") is None:
        with pytest.raises(JobError, match=r"bitsandbytes.*Install rayft\[qlora\]"):
            check_adapter(qlora, zero_stage=2)
    elif not torch.cuda.is_available():
        with pytest.raises(JobError, match="needs a GPU"):
            check_adapter(qlora, zero_stage=2)
