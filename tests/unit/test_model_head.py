"""The chunked loss head against cross entropy over whole logits: values, gradients, chunks, caps, adapters."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from rayft.data.tensors import IGNORE
from rayft.model.attention import NAME, register_documents_attention
from rayft.model.head import NllHead, causal_model, forward_logprobs, forward_nll, install_nll_head
from tests.tiny import tiny_model
from tests.unit.test_model_families import assert_same_gradients, documents, gradients, pack

N, H, V = 11, 16, 37


def head_of(chunk: int, softcap: float | None = None, dtype: torch.dtype = torch.float32) -> NllHead:
    torch.manual_seed(0)
    head = nn.Linear(H, V, bias=False, dtype=dtype)
    head.__class__ = NllHead
    head.chunk, head.softcap = chunk, softcap
    return head


def expected(
    head: NllHead, hidden: torch.Tensor, targets: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """log p(target) [N] by the definition."""
    logits = hidden @ head.weight.t()
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return (logits.float() / temperature).log_softmax(-1).gather(1, targets[:, None]).squeeze(1)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("chunk", [1, 4, 11, 100])
def test_loss_and_gradients_for_every_chunk(chunk: int, softcap: float | None) -> None:
    head = head_of(chunk, softcap)
    hidden = torch.randn(N, H, requires_grad=True)
    targets = torch.randint(0, V, (N,))
    ours, theirs = head(hidden, targets), -expected(head, hidden, targets).sum()
    assert torch.allclose(ours, theirs, rtol=1e-6)
    for a, b in zip(
        torch.autograd.grad(ours * 0.3, [hidden, head.weight]),
        torch.autograd.grad(theirs * 0.3, [hidden, head.weight]),
        strict=True,
    ):
        assert (a - b).norm() <= 1e-6 * b.norm()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("chunk", [4, 100])
def test_log_probabilities_and_gradients_per_token(
    chunk: int, softcap: float | None, temperature: float
) -> None:
    head = head_of(chunk, softcap)
    hidden = torch.randn(N, H, requires_grad=True)
    targets, weights = torch.randint(0, V, (N,)), torch.randn(N)
    ours = head(hidden, targets, summed=False, temperature=temperature)
    theirs = expected(head, hidden, targets, temperature)
    assert torch.allclose(ours, theirs, atol=1e-6)
    for a, b in zip(
        torch.autograd.grad(ours, [hidden, head.weight], weights),
        torch.autograd.grad(theirs, [hidden, head.weight], weights),
        strict=True,
    ):
        assert (a - b).norm() <= 1e-6 * b.norm()


def test_extreme_logits_stay_finite() -> None:
    head = head_of(4)
    hidden = 1e4 * torch.randn(N, H, requires_grad=True)
    targets = torch.randint(0, V, (N,))
    loss = head(hidden, targets)
    assert torch.allclose(loss, -expected(head, hidden, targets).sum(), rtol=1e-5)
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, [head.weight]))


def test_bf16_loss_is_fp32_over_bf16_logits() -> None:
    head = head_of(4, dtype=torch.bfloat16)
    hidden, targets = torch.randn(N, H, dtype=torch.bfloat16), torch.randint(0, V, (N,))
    loss = head(hidden, targets)
    assert loss.dtype == torch.float32
    assert torch.allclose(loss, -expected(head, hidden, targets).sum(), rtol=1e-6)


def test_many_chunks_are_as_exact_as_one_in_bf16() -> None:
    """The weight's gradient is summed over chunks in fp32, so its error does not grow with their number."""
    hidden, targets = torch.randn(512, H, dtype=torch.bfloat16), torch.randint(0, V, (512,))

    def error(chunk: int) -> float:
        head = head_of(chunk, dtype=torch.bfloat16)
        exact = head.weight.detach().double().requires_grad_()
        loss = nn.functional.cross_entropy(hidden.double() @ exact.t(), targets, reduction="sum")
        (wanted,) = torch.autograd.grad(loss, [exact])
        (grad,) = torch.autograd.grad(head(hidden, targets), [head.weight])
        return float((grad - wanted).norm() / wanted.norm())

    assert error(4) <= 1.5 * error(512)


def test_without_targets_it_is_the_plain_layer() -> None:
    head = head_of(4)
    hidden = torch.randn(2, N, H)
    assert torch.equal(head(hidden), hidden @ head.weight.t())


def test_the_gradient_is_there_once() -> None:
    head = head_of(4)
    loss = head(torch.randn(N, H), torch.randint(0, V, (N,)))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        loss.backward()


def test_evaluation_computes_no_gradient() -> None:
    head = head_of(4)
    with torch.no_grad():
        loss = head(torch.randn(N, H), torch.randint(0, V, (N,)))
    assert not loss.requires_grad


@pytest.fixture
def model() -> nn.Module:
    register_documents_attention()
    return tiny_model("llama", attention=NAME)


def test_an_empty_micro_batch_touches_every_parameter(model: nn.Module) -> None:
    install_nll_head(model, chunk=8)
    batch = pack(documents([1]))
    batch["targets"].fill_(IGNORE)
    loss = forward_nll(model, batch)
    assert float(loss.detach()) == 0
    loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("modules_to_save", [None, ["lm_head"]])
def test_adapters_around_the_model(model: nn.Module, modules_to_save: list[str] | None) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], modules_to_save=modules_to_save)
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    batch = pack(documents())
    theirs = forward_nll(adapted, batch)  # not installed: through the model's own forward
    theirs_gradients = gradients(adapted, theirs)
    install_nll_head(adapted, chunk=7)
    ours = forward_nll(adapted, batch)
    assert torch.allclose(ours, theirs, rtol=1e-6)
    assert_same_gradients(gradients(adapted, ours), theirs_gradients, 1e-5)
    with adapted.disable_adapter():
        assert torch.allclose(forward_nll(adapted, batch), forward_nll(model, batch), rtol=1e-6)


def test_an_adapted_head_goes_through_whole_logits(model: nn.Module) -> None:
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["lm_head"]))
    install_nll_head(adapted, chunk=7)
    assert not isinstance(causal_model(adapted).get_output_embeddings().base_layer, NllHead)
    assert torch.isfinite(forward_nll(adapted, pack(documents())))


def test_log_probabilities_sum_to_the_loss(model: nn.Module) -> None:
    install_nll_head(model, chunk=7)
    batch = pack(documents())
    logprobs = forward_logprobs(model, batch)
    assert logprobs.shape == (int((batch["targets"] != IGNORE).sum()),)
    assert torch.allclose(-logprobs.sum(), forward_nll(model, batch), rtol=1e-6)
