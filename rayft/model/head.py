"""The loss head: hidden states of trained tokens only, the vocabulary in chunks, logits never whole.

The work happens inside the output embedding's own forward, so that ZeRO-3's hooks gather the (often tied) weight once
per micro-batch. For a summed loss the gradient is known as soon as the logits are, so it is computed with them and no
logits are kept; log-probabilities of single tokens are for other losses and compute their logits again in the backward.

Shapes: B rows, T tokens of a row, N trained tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from peft.utils import ModulesToSaveWrapper
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from rayft.data.tensors import IGNORE
from rayft.model.attention import NAME as DOCUMENTS
from rayft.model.attention import Documents
from rayft.model.families import PROVEN

#: Packs are filled up to a multiple of this many tokens: products of odd lengths are 4 % slower on two cores.
_MULTIPLE = 16

#: Elements of fp32 logits that are exponentiated at a time on a CPU, to stay in its cache.
_CPU_TILE = 1 << 20


class Shape(NamedTuple):
    """What happens to logits before the softmax: softcap * tanh(logits / softcap) where there is one, then / temperature."""

    softcap: float | None = None
    temperature: float = 1.0


class NllHead(nn.Linear):
    """An output embedding that also takes targets and then returns losses instead of logits."""

    chunk: int
    softcap: float | None

    def forward(
        self,
        hidden: torch.Tensor,
        targets_N: torch.Tensor | None = None,
        *,
        summed: bool = True,
        temperature: float = 1.0,
    ) -> torch.Tensor:
        """Logits of `hidden`; with targets, the summed NLL or the log-probabilities [N] of the targets, fp32.

        temperature: of the distribution the log-probabilities are of.
        """
        if targets_N is None:
            return super().forward(hidden)
        shape = Shape(self.softcap, temperature)
        function = _SummedNll if summed else _TokenLogprobs
        return function.apply(hidden, self.weight, targets_N, self.chunk, shape, torch.is_grad_enabled())


def install_nll_head(model: nn.Module, chunk: int) -> None:
    """Make the output embedding of `model` (adapters may be around it) compute losses in chunks of `chunk` tokens.

    Call it once the adapters are there. A family that is not proven, or a head that is itself adapted, is left alone:
    `forward_nll` then goes through the model's own forward and holds the logits of a micro-batch whole.
    """
    inner = causal_model(model)
    linears = _linears(inner.get_output_embeddings())
    if inner.config.model_type not in PROVEN or any(head.bias is not None for head in linears):
        return
    for head in linears:
        head.__class__ = NllHead
        head.chunk = chunk
        head.softcap = getattr(inner.config, "final_logit_softcapping", None)


def forward_nll(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    """Sum over the trained tokens of a micro-batch of -log p(target), fp32 scalar with gradient.

    batch: input_ids, position_ids, targets int64[B, T] (-100: not trained; already shifted), and cu_seqlens int32[D + 1]
    for a pack or attention_mask [B, T] for rows padded on the right. Without any target the sum is 0 and still depends
    on every parameter, as ranks that run the same collectives need it.
    """
    return _forward(model, batch, summed=True)


def forward_logprobs(model: nn.Module, batch: dict[str, Any], *, temperature: float = 1.0) -> torch.Tensor:
    """log p(target) of the trained tokens of a micro-batch in row-major order, fp32[N] with gradient.

    temperature: of the sampling that p describes; logits are divided by it.
    """
    return _forward(model, batch, summed=False, temperature=temperature)


def causal_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside adapters and wrappers."""
    return next(module for module in model.modules() if isinstance(module, PreTrainedModel))


def forward_hidden(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    """Hidden states of the last layer, [B, T, H]; a pack may come out longer than it went in."""
    inner = causal_model(model)
    return inner.base_model(**_inputs(inner, batch))[0]


def _forward(
    model: nn.Module, batch: dict[str, Any], *, summed: bool, temperature: float = 1.0
) -> torch.Tensor:
    inner = causal_model(model)
    if "cu_seqlens" in batch:
        batch = _filled(batch)
    inputs = _inputs(inner, batch)
    targets = batch["targets"].flatten()
    trained = (targets != IGNORE).nonzero().squeeze(1)
    head = inner.get_output_embeddings()
    if any(isinstance(part, NllHead) for part in _linears(head)):
        hidden = inner.base_model(**inputs)[0]
        hidden = hidden.flatten(0, 1).index_select(0, trained)
        return head(hidden, targets[trained], summed=summed, temperature=temperature)
    logits = inner(**inputs).logits.flatten(0, 1).index_select(0, trained).float() / temperature
    losses = nn.functional.cross_entropy(logits, targets[trained], reduction="none")
    return losses.sum() if summed else -losses


def _inputs(inner: PreTrainedModel, batch: dict[str, Any]) -> dict[str, Any]:
    """What the model's own forward is called with; a pack is filled up first."""
    if "cu_seqlens" in batch:
        batch = _filled(batch)
    inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "use_cache": False}
    return inputs | _boundaries(inner, batch)


def _linears(head: nn.Module) -> list[Any]:
    """The linear layer that is the head, with the copies that train beside an adapter; none if it is adapted itself."""
    parts: list[Any] = [head]
    if isinstance(head, ModulesToSaveWrapper):
        parts = [head.original_module, *head.modules_to_save.values()]
    return parts if all(type(part) in (nn.Linear, NllHead) for part in parts) else []


def _filled(batch: dict[str, Any]) -> dict[str, Any]:
    """The pack with one more document, without targets, that makes its length a multiple of `_MULTIPLE`."""
    missing = -batch["input_ids"].shape[1] % _MULTIPLE
    if not missing:
        return batch
    ids, targets, positions = batch["input_ids"], batch["targets"], batch["position_ids"]
    cu_seqlens = batch["cu_seqlens"]
    prefix = (
        {"prefix": torch.nn.functional.pad(batch["prefix"], (0, 1), value=-1)} if "prefix" in batch else {}
    )
    return prefix | {
        "input_ids": torch.cat([ids, ids.new_zeros(1, missing)], 1),
        "targets": torch.cat([targets, targets.new_full((1, missing), IGNORE)], 1),
        "position_ids": torch.cat([positions, torch.arange(missing, device=ids.device)[None]], 1),
        "cu_seqlens": torch.cat([cu_seqlens, cu_seqlens[-1:] + missing]),
    }


def _boundaries(inner: PreTrainedModel, batch: dict[str, Any]) -> dict[str, Any]:
    """What tells the model's attention where documents or rows end."""
    if "cu_seqlens" not in batch:
        return {"attention_mask": batch["attention_mask"]}
    documents = Documents(batch["cu_seqlens"], batch.get("prefix"))
    if inner.config._attn_implementation == DOCUMENTS:
        return {"documents": documents}
    assert not documents.prefixes, "only the attention of packs knows documents that share a prefix"
    # Names of transformers' flash attention; sdpa and eager go by position_ids.
    cu, longest = documents.cu_seqlens, documents.max_length
    return {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": longest, "max_length_k": longest}


class _SummedNll(torch.autograd.Function):
    """Sum of -log p(target), its gradients computed in the forward and only scaled in the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        chunk: int,
        shape: Shape,
        differentiate: bool,
    ) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        minus_one = torch.full_like(targets, -1.0, dtype=torch.float32)
        grads = _Gradients(hidden, weight, ctx.needs_input_grad if differentiate else (False, False), chunk)
        for rows in _chunks(len(targets), chunk):
            logits = nn.functional.linear(hidden[rows], weight)
            weights = minus_one[rows] if differentiate else None
            total -= _target_logprobs(logits, targets[rows], shape, weights).sum()
            grads.add(rows, logits)
        ctx.grads = grads.result()
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError("the gradient of a summed loss can be taken once")
        grads, ctx.grads = ctx.grads, None
        return (*(None if g is None else g.mul_(grad) for g in grads), None, None, None, None)


class _TokenLogprobs(torch.autograd.Function):
    """log p(target) per token; the logits are computed again in the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        chunk: int,
        shape: Shape,
        differentiate: bool,
    ) -> torch.Tensor:
        if differentiate:
            ctx.save_for_backward(hidden, weight, targets)
            ctx.arguments = (chunk, shape)
        logprobs = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        for rows in _chunks(len(targets), chunk):
            logits = nn.functional.linear(hidden[rows], weight)
            logprobs[rows] = _target_logprobs(logits, targets[rows], shape)
        return logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (hidden, weight, targets), (chunk, shape) = ctx.saved_tensors, ctx.arguments
        grads = _Gradients(hidden, weight, ctx.needs_input_grad, chunk)
        for rows in _chunks(len(targets), chunk):
            logits = nn.functional.linear(hidden[rows], weight)
            _target_logprobs(logits, targets[rows], shape, grad_N[rows])
            grads.add(rows, logits)
        return (*grads.result(), None, None, None, None)


class _Gradients:
    """Gradients of hidden states and weight, gathered chunk by chunk from the gradients of the logits."""

    def __init__(
        self, hidden: torch.Tensor, weight: torch.Tensor, wanted: tuple[bool, ...], chunk: int
    ) -> None:
        self._hidden, self._weight = hidden, weight
        self._grad_hidden = torch.empty_like(hidden) if wanted[0] else None
        # A sum over chunks is kept in fp32; a single product needs no sum.
        single = len(hidden) <= chunk
        self._grad_weight = (
            torch.zeros_like(weight, dtype=weight.dtype if single else torch.float32) if wanted[1] else None
        )

    def add(self, rows: slice, grad_logits: torch.Tensor) -> None:
        if self._grad_hidden is not None:
            torch.mm(grad_logits, self._weight, out=self._grad_hidden[rows])
        if self._grad_weight is not None:
            self._grad_weight += grad_logits.t() @ self._hidden[rows]

    def result(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        weight = self._grad_weight
        return self._grad_hidden, None if weight is None else weight.to(self._weight.dtype)


def _chunks(count: int, chunk: int) -> Iterator[slice]:
    return (slice(start, start + chunk) for start in range(0, count, chunk))


def _target_logprobs(
    logits_NV: torch.Tensor,
    targets_N: torch.Tensor,
    shape: Shape,
    weights_N: torch.Tensor | None = None,
) -> torch.Tensor:
    """log p(target) [N] in fp32, overwriting the logits: with d sum(weights * log p) / d logits if weights are given."""
    softcap, temperature = shape
    logprobs = torch.empty(len(targets_N), dtype=torch.float32, device=logits_NV.device)
    tile = (
        max(1, _CPU_TILE // logits_NV.shape[1]) if logits_NV.device.type == "cpu" else max(1, len(targets_N))
    )
    for rows in _chunks(len(targets_N), tile):
        logits, target = logits_NV[rows], targets_N[rows, None]
        x = logits.float()
        slope = None
        if softcap is not None:
            x.div_(softcap).tanh_()
            slope = 1 - x**2 if weights_N is not None else None
            x.mul_(softcap)
        if temperature != 1.0:
            x.div_(temperature)
        picked = x.gather(1, target)
        highest = x.amax(-1, keepdim=True)
        total = x.sub_(highest).exp_().sum(-1, keepdim=True)
        logprobs[rows] = (picked - highest - total.log()).squeeze(1)
        if weights_N is not None:
            weight = weights_N[rows, None]
            x.mul_(-weight / total).scatter_add_(1, target, weight)
            if temperature != 1.0:
                x.div_(temperature)
            if slope is not None:
                x.mul_(slope)
            logits.copy_(x)
    return logprobs
