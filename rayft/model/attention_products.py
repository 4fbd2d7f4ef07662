"""Attention per document as batched matrix products with a backward of its own, for CPUs and for what varlen lacks.

On CPUs the fused attention kernels spend most of their time in the backward. Here every document (or group of
documents of like length, padded within the group) is a few batched products in the model's dtype, with the softmax
in fp32 inside. Query heads that share a key-value head are folded into the rows of one product, so keys and values
are never repeated. Long documents go block by block of queries, which skips keys that causality or the window hides.

Shapes: T tokens of the pack, H query heads, K key-value heads, G = H/K, D head size; within a group of N documents
padded to S tokens: queries [N*K, S*G, D] (row s*G + g), keys and values [N*K, S, D].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch.autograd.function import once_differentiable

#: Squared tokens of padding that cost as much as one more group of products (measured on 2 cores, 9 heads of 64).
_GROUP_COST = 5000

#: Queries of a document that are treated at a time.
_BLOCK = 256

#: Probabilities of documents up to this length are kept for the backward; those of longer ones are computed again,
#: since they grow with the square of the length.
_KEEP = 512


@dataclass(frozen=True)
class Group:
    """Documents of one batched product: their first tokens, their lengths, and the padded length."""

    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    padded: int

    def spans(self) -> Iterator[tuple[int, slice, int]]:
        """(index in the group, tokens of the pack, length) of every document."""
        for n, (start, length) in enumerate(zip(self.starts, self.lengths, strict=True)):
            yield n, slice(start, start + length), length


def group_documents(lengths: Sequence[int]) -> list[Group]:
    """Put documents of like length together: padding a document must cost less than a product of its own."""
    starts, position = [], 0
    for length in lengths:
        starts.append(position)
        position += length
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if lengths[i] == 0:
            continue
        longest = lengths[groups[-1][0]] if groups else 0
        if groups and longest**2 - lengths[i] ** 2 <= _GROUP_COST:
            groups[-1].append(i)
        else:
            groups.append([i])
    return [
        Group(tuple(starts[i] for i in group), tuple(lengths[i] for i in group), lengths[group[0]])
        for group in groups
    ]


def documents_products(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: Sequence[int],
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Causal attention inside each document: query [T, H, D], key and value [T, K, D] -> [T, H, D]."""
    return _DocumentsProducts.apply(query, key, value, group_documents(lengths), scale, window, softcap)


class _DocumentsProducts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        groups: list[Group],
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        out = query.new_empty(query.shape)
        heads = key.shape[1]
        saved: list[torch.Tensor] = []
        for group in groups:
            q, k, v = (_gather(x, group, heads) for x in (query, key, value))
            o = torch.empty_like(q)
            saved += [q, k, v]
            for block in _blocks(group.padded, q.shape[1] // k.shape[1], window):
                probabilities, _ = _probabilities(q, k, block, scale, softcap)
                o[:, block.rows] = torch.bmm(probabilities, v[:, block.keys])
                if _keeps(group, softcap):
                    saved.append(probabilities)
            _scatter(o, out, group, heads)
        ctx.save_for_backward(*saved)
        ctx.arguments = (groups, scale, window, softcap, query.shape, key.shape)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        groups, scale, window, softcap, query_shape, key_shape = ctx.arguments
        grads = [grad_out.new_empty(shape) for shape in (query_shape, key_shape, key_shape)]
        heads = key_shape[1]
        saved = iter(ctx.saved_tensors)
        for group in groups:
            q, k, v = next(saved), next(saved), next(saved)
            grad_o, grad_q = _gather(grad_out, group, heads), torch.empty_like(q)
            sums = _KeySums(k, single=group.padded <= _BLOCK)
            for block in _blocks(group.padded, q.shape[1] // k.shape[1], window):
                rows, keys = block.rows, block.keys
                if _keeps(group, softcap):
                    probabilities, capped = next(saved), None
                else:
                    probabilities, capped = _probabilities(q, k, block, scale, softcap)
                grad_probabilities = torch.bmm(grad_o[:, rows], v[:, keys].transpose(1, 2))
                grad_scores = torch._softmax_backward_data(grad_probabilities, probabilities, -1, q.dtype)
                if capped is not None:
                    grad_scores *= 1 - (capped / softcap) ** 2
                grad_q[:, rows] = torch.bmm(grad_scores, k[:, keys])
                sums.add(
                    keys,
                    torch.bmm(grad_scores.transpose(1, 2), q[:, rows]),
                    torch.bmm(probabilities.transpose(1, 2), grad_o[:, rows]),
                )
            grad_k, grad_v = sums.result()
            for gathered, grad in zip((grad_q.mul_(scale), grad_k.mul_(scale), grad_v), grads, strict=True):
                _scatter(gathered, grad, group, heads)
        return (*grads, None, None, None, None)


class _KeySums:
    """Gradients of keys and values: sums over blocks of queries, in fp32 where there is more than one block."""

    def __init__(self, like: torch.Tensor, *, single: bool) -> None:
        self._sums: tuple[torch.Tensor, ...] = ()
        if not single:
            self._sums = tuple(torch.zeros_like(like, dtype=torch.float32) for _ in range(2))
        self._dtype = like.dtype

    def add(self, keys: slice, *parts: torch.Tensor) -> None:
        if not self._sums:
            self._sums = parts
            return
        for total, part in zip(self._sums, parts, strict=True):
            total[:, keys] += part.float()

    def result(self) -> tuple[torch.Tensor, ...]:
        return tuple(total.to(self._dtype) for total in self._sums)


@dataclass(frozen=True)
class Block:
    """A run of queries and the keys they may see; `rows` counts folded rows (query s, head g at s*G + g)."""

    queries: range
    rows: slice
    keys: slice
    fold: int
    window: int | None


def _blocks(length: int, fold: int, window: int | None) -> Iterator[Block]:
    for begin in range(0, length, _BLOCK):
        end = min(begin + _BLOCK, length)
        first_key = 0 if window is None else max(0, begin - window + 1)
        yield Block(range(begin, end), slice(begin * fold, end * fold), slice(first_key, end), fold, window)


def _probabilities(
    q: torch.Tensor, k: torch.Tensor, block: Block, scale: float, softcap: float | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Softmax of one block's scores, and the capped scores where there is a cap, else None."""
    rows, keys_T = q[:, block.rows], k[:, block.keys].transpose(1, 2)
    mask = _mask(
        block.queries.start - block.keys.start,
        len(block.queries),
        block.fold,
        block.window,
        q.dtype,
        q.device,
    )
    if softcap is None:
        scores = torch.baddbmm(mask.expand(len(q), -1, -1), rows, keys_T, alpha=scale)
        return torch.softmax(scores, -1), None
    capped = torch.bmm(rows, keys_T).mul_(scale / softcap).tanh_().mul_(softcap)
    return torch.softmax(capped + mask, -1), capped


@lru_cache(maxsize=32)
def _mask(
    offset: int, queries: int, fold: int, window: int | None, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Additive mask [queries*G, offset + queries]: -inf where key t is not seen by query `offset + s`."""
    query = torch.arange(offset, offset + queries, device=device).repeat_interleave(fold)[:, None]
    key = torch.arange(offset + queries, device=device)
    seen = key <= query
    if window is not None:
        seen &= key > query - window
    return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, float("-inf"))


def _keeps(group: Group, softcap: float | None) -> bool:
    return group.padded <= _KEEP and softcap is None


def _gather(x: torch.Tensor, group: Group, heads: int) -> torch.Tensor:
    """[T, K*G, D] -> [N*K, S*G, D] of the group's documents, padded with zeros."""
    fold = x.shape[1] // heads
    shape = (len(group.starts), heads, group.padded, fold, x.shape[2])
    gathered = x.new_zeros(shape) if min(group.lengths) < group.padded else x.new_empty(shape)
    for n, span, length in group.spans():
        gathered[n, :, :length] = x[span].unflatten(1, (heads, fold)).transpose(0, 1)
    return gathered.view(-1, group.padded * fold, x.shape[2])


def _scatter(gathered: torch.Tensor, x: torch.Tensor, group: Group, heads: int) -> None:
    """The inverse of `_gather`, into `x`; padding is left behind."""
    documents = gathered.view(len(group.starts), heads, group.padded, -1, x.shape[2])
    for n, span, length in group.spans():
        x[span].unflatten(1, (heads, -1)).copy_(documents[n, :, :length].transpose(0, 1))
