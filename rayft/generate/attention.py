"""Attention for generation: prompts as documents of one pack, single new tokens as batched products.

transformers' sdpa attention copies keys and values once per query head of a group as soon as there is a padding
mask, and on a CPU these copies and the kernel for a single query cost several times the rest of a decoding step
(SmolLM2-135M, 50 rows, 140 tokens, bf16: 17 ms a layer, as batched products 0.3 ms).

Shapes: B rows, H query heads, K key-value heads, T tokens in the cache, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from rayft.model.attention import NAME as DOCUMENTS
from rayft.model.attention import (
    Documents,
    documents_attention,
    documents_mask,
    register_documents_attention,
)
from rayft.model.families import can_pack
from rayft.model.head import causal_model

NAME = "rayft_generate"


def generation_attention(
    module: nn.Module,
    query_BHQD: torch.Tensor,
    key_BKTD: torch.Tensor,
    value_BKTD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    documents: Documents | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Prompts (with `documents`) as in training; else one new token per row [B, H, 1, D] against the cache.

    attention_mask: additive, [B, 1, 1, T]. Products in the model's dtype, softmax in fp32, as eager attention.
    Returns [B, Q, H, D].
    """
    if documents is not None:
        return documents_attention(
            module,
            query_BHQD,
            key_BKTD,
            value_BKTD,
            attention_mask,
            scaling=scaling,
            softcap=softcap,
            documents=documents,
            **kwargs,
        )
    B, H, _, D = query_BHQD.shape
    K = key_BKTD.shape[1]
    scale = D**-0.5 if scaling is None else scaling
    # The query heads that share a key-value head become the rows of one product.
    scores_BKGT = (query_BHQD.reshape(B, K, H // K, D) * scale) @ key_BKTD.transpose(2, 3)
    if softcap is not None:
        scores_BKGT = torch.tanh(scores_BKGT / softcap) * softcap
    if attention_mask is not None:
        scores_BKGT = scores_BKGT + attention_mask
    weights_BKGT = scores_BKGT.softmax(-1, dtype=torch.float32).to(value_BKTD.dtype)
    return (weights_BKGT @ value_BKTD).view(B, 1, H, D), None


def generation_mask(batch_size: int, q_length: int, kv_length: int, **kwargs: Any) -> torch.Tensor | None:
    """No mask for prompts, an additive one for the rows of a cache, whose padding stands on the left."""
    make = documents_mask if q_length == kv_length else eager_mask
    return make(batch_size=batch_size, q_length=q_length, kv_length=kv_length, **kwargs)


@contextmanager
def packed_generation(model: nn.Module) -> Iterator[bool]:
    """Let `model` take prompts as packs and decode with `generation_attention`; yields whether its family can.

    Other families go on with sdpa or eager attention as loaded.
    """
    AttentionInterface.register(NAME, generation_attention)
    AttentionMaskInterface.register(NAME, generation_mask)
    packs = can_pack(causal_model(model).config)[0]
    with _attention(model, NAME if packs else None):
        yield packs


@contextmanager
def packed_scoring(model: nn.Module) -> Iterator[bool]:
    """Let `model` take whole sequences as packs; yields whether its family can."""
    register_documents_attention()
    packs = can_pack(causal_model(model).config)[0]
    with _attention(model, DOCUMENTS if packs else None):
        yield packs


@contextmanager
def _attention(model: nn.Module, name: str | None) -> Iterator[None]:
    inner = causal_model(model)
    before = inner.config._attn_implementation
    if name is None:
        yield
        return
    inner.set_attn_implementation(name)
    try:
        yield
    finally:
        inner.set_attn_implementation(before)
