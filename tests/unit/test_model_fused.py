"""Fused layers against the layers of transformers and peft they replace: outputs, gradients, what is left alone."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from rayft.model.attention import NAME, register_documents_attention
from rayft.model.fused import PROVEN, LoraLinear, RmsNorm, SwiGlu, install_fused
from rayft.model.head import causal_model, forward_nll
from tests.tiny import tiny_model
from tests.unit.test_model_families import assert_same_gradients, documents, gradients, model_of, pack


def lora(model: nn.Module, **arguments: object) -> nn.Module:
    """LoRA on all linear layers whose B is not zero."""
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", **arguments))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return adapted


def kinds(model: nn.Module) -> set[type]:
    return {type(m) for m in model.modules()} & {RmsNorm, SwiGlu, LoraLinear}


def check(model: nn.Module) -> None:
    fused = copy.deepcopy(model)
    assert install_fused(fused) > 0
    batch = pack(documents())
    ours, theirs = forward_nll(fused, batch), forward_nll(model, batch)
    assert torch.allclose(ours, theirs, rtol=1e-6)
    assert_same_gradients(gradients(fused, ours), gradients(model, theirs), 1e-6)


@pytest.mark.parametrize("family", sorted(PROVEN))
def test_same_loss_and_gradients_in_every_family(family: str) -> None:
    model = model_of(family, NAME)
    check(model)
    install_fused(model)
    assert RmsNorm in kinds(model)


@pytest.mark.parametrize("arguments", [{}, {"use_rslora": True}, {"lora_bias": True}, {"use_dora": True}])
def test_same_loss_and_gradients_with_adapters(arguments: dict[str, object]) -> None:
    register_documents_attention()
    check(lora(tiny_model("llama", attention=NAME), **arguments))


def test_adapters_can_be_switched_off_and_merged() -> None:
    register_documents_attention()
    model = tiny_model("llama", attention=NAME)
    batch = pack(documents())
    base = forward_nll(model, batch)
    adapted = lora(model)
    install_fused(adapted)
    tuned = forward_nll(adapted, batch)
    assert not torch.allclose(tuned, base, rtol=1e-3)
    with adapted.disable_adapter():
        assert torch.allclose(forward_nll(adapted, batch), base, rtol=1e-6)
    assert torch.allclose(forward_nll(adapted.merge_and_unload(), batch), tuned, rtol=1e-5)


def test_adapter_dropout_goes_through_peft() -> None:
    register_documents_attention()
    adapted = lora(tiny_model("llama", attention=NAME), lora_dropout=0.5).train()
    install_fused(adapted)
    batch = pack(documents())
    torch.manual_seed(1)
    first = forward_nll(adapted, batch)
    assert not torch.equal(first, forward_nll(adapted, batch))


def test_bf16_is_as_close_to_fp32_as_transformers() -> None:
    exact = tiny_model("llama", attention="eager")
    batch = pack(documents())
    expected = gradients(exact, forward_nll(exact, batch))

    def error(fused: bool) -> float:
        model = copy.deepcopy(exact).bfloat16()
        if fused:
            install_fused(model)
        ours = gradients(model, forward_nll(model, batch))
        return float(torch.stack([(ours[n].float() - g).norm() for n, g in expected.items()]).norm())

    assert error(fused=True) <= 1.1 * error(fused=False)


def test_other_families_are_left_alone() -> None:
    model = tiny_model("gemma3_text")
    assert install_fused(model) == 0
    assert not kinds(model)


def test_names_of_parameters_stay() -> None:
    model = lora(tiny_model("qwen3"))
    before = [name for name, _ in model.named_parameters()]
    install_fused(model)
    assert kinds(model) == {RmsNorm, SwiGlu, LoraLinear}
    assert [name for name, _ in model.named_parameters()] == before
    assert causal_model(model).config.model_type == "qwen3"
