"""Attention that stays inside documents: packed rows without a T x T mask, registered with transformers.

A pack is one row of documents laid end to end. The learner's forward passes `documents=Documents(...)` through the
model's keyword arguments; every layer's attention then works document by document. Rows that are not packed (B rows,
padded on the right) are B documents: causal attention never looks to the right, so padding needs no mask either.
Left padding and key/value caches are for generation, which has an attention of its own.

Shapes: B rows, T tokens of a row, H query heads, K key-value heads, D head size, N documents.
"""

from __future__ import annotations

import inspect
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from rayft.model.attention_products import documents_products

NAME = "rayft_documents"

#: Largest head size of the varlen kernel (FlashAttention 2).
_VARLEN_MAX_HEAD = 256


class Documents:
    """Where the documents of a flat row of tokens begin and end.

    cu_seqlens: int32[N + 1] cumulative lengths, on the device of the model; read once here, not in every layer.
    prefix: int32[N], the document that each one goes on from and sees all of, or -1; without it there are none.
    """

    def __init__(self, cu_seqlens: torch.Tensor, prefix: torch.Tensor | None = None) -> None:
        bounds = cu_seqlens.tolist()
        self.cu_seqlens = cu_seqlens.to(torch.int32)
        before = [] if prefix is None else prefix.tolist()
        self.prefixes = tuple(None if n < 0 else n for n in before) if max(before, default=-1) >= 0 else ()
        self.lengths = tuple(end - start for start, end in pairwise(bounds))
        self.max_length = max(self.lengths)

    @classmethod
    def rows(cls, rows: int, length: int, device: torch.device) -> Documents:
        """`rows` documents of equal length."""
        return cls(torch.arange(0, (rows + 1) * length, length, dtype=torch.int32, device=device))


def register_documents_attention() -> None:
    """Make `attn_implementation="rayft_documents"` known to transformers; doing it again changes nothing."""
    AttentionInterface.register(NAME, documents_attention)
    AttentionMaskInterface.register(NAME, documents_mask)


def documents_attention(
    module: nn.Module,
    query_BHTD: torch.Tensor,
    key_BKTD: torch.Tensor,
    value_BKTD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    documents: Documents | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each document; returns [B, T, H, D].

    sliding_window: keys a token sees, itself included. softcap: scores become softcap * tanh(score / softcap).
    Raises ValueError for what only training never does: key/value caches, attention dropout, packs without `documents`.
    """
    B, _, T, D = query_BHTD.shape
    if key_BKTD.shape[2] != T:
        raise ValueError(f"{NAME} attention has no key/value cache; generate with another implementation")
    if dropout:
        raise ValueError(f"{NAME} attention has no dropout; set the model's attention_dropout to 0")
    if documents is None:
        if attention_mask is not None:
            raise ValueError(f"position_ids restart within a row, but {NAME} attention got no `documents`")
        documents = Documents.rows(B, T, query_BHTD.device)
    scale = D**-0.5 if scaling is None else scaling
    # [B, heads, T, D] came from [B, T, heads, D] by a transpose in every family, so this mostly moves nothing.
    query, key, value = (x.transpose(1, 2).flatten(0, 1) for x in (query_BHTD, key_BKTD, value_BKTD))
    if _varlen_applies(query, softcap) and not documents.prefixes:
        out = _varlen(query, key, value, documents, scale, sliding_window)
    else:
        lengths, prefixes = documents.lengths, documents.prefixes
        out = documents_products(query, key, value, lengths, scale, sliding_window, softcap, prefixes)
    return out.unflatten(0, (B, T)), None


def documents_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    attention_mask: torch.Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> torch.Tensor | None:
    """The mask transformers hands to `documents_attention`: none.

    Where `position_ids` restart within a row, transformers would build a block mask; an empty tensor then tells the
    attention that `documents` must be there. Raises ValueError for left padding and caches.
    """
    if (
        q_offset != 0
        or kv_length != q_length
        or (attention_mask is not None and _left_padded(attention_mask))
    ):
        raise ValueError(f"{NAME} attention takes rows padded on the right and no cache, as in training")
    return None if allow_is_causal_skip else torch.empty(0)


def _left_padded(mask_BT: torch.Tensor) -> bool:
    """Whether some token follows padding."""
    mask_BT = mask_BT.bool()
    return bool((mask_BT[:, 1:] & ~mask_BT[:, :-1]).any())


def _varlen_applies(query: torch.Tensor, softcap: float | None) -> bool:
    half = query.dtype in (torch.bfloat16, torch.float16)
    return query.is_cuda and half and softcap is None and query.shape[-1] <= _VARLEN_MAX_HEAD


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    documents: Documents,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """FlashAttention over variable lengths (arXiv:2307.08691), as torch ships it for GPUs."""
    from torch.nn.attention.varlen import varlen_attn

    cu, longest = documents.cu_seqlens, documents.max_length
    grouped: dict[str, Any] = {}
    if query.shape[1] != key.shape[1]:
        if "enable_gqa" in inspect.signature(varlen_attn).parameters:
            grouped["enable_gqa"] = True
        else:  # torch 2.11
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    left = -1 if window is None else window - 1
    out = varlen_attn(
        query, key, value, cu, cu, longest, longest, scale=scale, window_size=(left, 0), **grouped
    )
    assert isinstance(out, torch.Tensor), "the log-sum-exp was not asked for"
    return out
