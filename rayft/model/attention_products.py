"""Attention per document as batched matrix products with a backward of its own, for CPUs and for what varlen lacks.

On CPUs the fused attention kernels spend most of their time in the backward. Here every document (or group of
documents of like length, padded within the group) is a few batched products in the model's dtype, with the softmax
in fp32 inside. Query heads that share a key-value head are folded into the rows of one product, so keys and values
are never repeated. Long documents go block by block of queries, which skips keys that causality or the window hides.
A document may go on from another one, its prefix, of which it sees all: several answers to one prompt.

Shapes: T tokens of the pack, H query heads, K key-value heads, G = H/K, D head size; within a group of N documents
padded to S tokens, each after a prefix of P tokens: queries [N*K, S*G, D] (row s*G + g), keys and values [N*K, P + S, D].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
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
    """Documents of one batched product: their first tokens, their lengths, and the padded length; where their prefixes begin,
    and the length that all of these have (0: there are none)."""

    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    padded: int
    prefixes: tuple[int, ...] = ()
    prefix: int = 0

    def spans(self) -> Iterator[tuple[int, slice, int]]:
        """(index in the group, tokens of the pack, length) of every document."""
        for n, (start, length) in enumerate(zip(self.starts, self.lengths, strict=True)):
            yield n, slice(start, start + length), length


def group_documents(lengths: Sequence[int], prefixes: Sequence[int | None] = ()) -> list[Group]:
    """Put documents of like length together: padding a document must cost less than a product of its own.

    prefixes: which document each one goes on from, if any; only those after prefixes of the same length are put together, and
    those without one come first.
    """
    starts = [0, *accumulate(lengths)]
    before = [prefixes[i] if prefixes else None for i in range(len(lengths))]
    seen = [0 if prefix is None else lengths[prefix] for prefix in before]

    def cost(i: int) -> int:
        return lengths[i] * (lengths[i] + seen[i])

    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (seen[i], -lengths[i], i)):
        if lengths[i] == 0:
            continue
        first = groups[-1][0] if groups else i
        if groups and seen[first] == seen[i] and cost(first) - cost(i) <= _GROUP_COST:
            groups[-1].append(i)
        else:
            groups.append([i])
    return [
        Group(
            tuple(starts[i] for i in group),
            tuple(lengths[i] for i in group),
            lengths[group[0]],
            tuple(starts[prefix] for i in group if seen[i] and (prefix := before[i]) is not None),
            seen[group[0]],
        )
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
    prefixes: Sequence[int | None] = (),
) -> torch.Tensor:
    """Causal attention inside each document, and to all of its prefix: query [T, H, D], key and value [T, K, D] -> [T, H, D].

    prefixes: which document each one goes on from, if any; that one has none itself.
    """
    groups = group_documents(lengths, prefixes)
    return _DocumentsProducts.apply(query, key, value, groups, scale, window, softcap)


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
            q = _gather(query, group, heads)
            k, v = (_gather(x, group, heads, group.prefix) for x in (key, value))
            o = torch.empty_like(q)
            saved += [q, k, v]
            for block in _blocks(group, q.shape[1] // group.padded, window):
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
        # What documents ask of the keys and values of their prefixes.
        asked = (_PrefixSums(), _PrefixSums())
        for group in groups:
            q, k, v = next(saved), next(saved), next(saved)
            grad_o, grad_q = _gather(grad_out, group, heads), torch.empty_like(q)
            blocks = list(_blocks(group, q.shape[1] // group.padded, window))
            sums = _KeySums(k, single=len(blocks) == 1 and blocks[0].keys.start == 0)
            for block in blocks:
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
            _scatter(grad_q.mul_(scale), grads[0], group, heads)
            for gathered, grad, of_prefixes in zip(
                (grad_k.mul_(scale), grad_v), grads[1:], asked, strict=True
            ):
                _scatter(gathered, grad, group, heads, group.prefix)
                of_prefixes.add(gathered, group, heads)
        for grad, of_prefixes in zip(grads[1:], asked, strict=True):
            of_prefixes.add_to(grad)
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


class _PrefixSums:
    """Gradients of keys or values of prefixes: sums over the documents that go on from them, in fp32."""

    def __init__(self) -> None:
        self._sums: dict[int, torch.Tensor] = {}

    def add(self, gathered: torch.Tensor, group: Group, heads: int) -> None:
        if not group.prefix:
            return
        documents = gathered.view(len(group.starts), heads, -1, gathered.shape[2])[:, :, : group.prefix]
        for start in dict.fromkeys(group.prefixes):
            own = [n for n, prefix in enumerate(group.prefixes) if prefix == start]
            total = documents[own].sum(0, dtype=torch.float32).transpose(0, 1)
            self._sums[start] = self._sums[start] + total if start in self._sums else total

    def add_to(self, grad: torch.Tensor) -> None:
        """The prefixes' own gradients are there already."""
        for start, total in self._sums.items():
            span = slice(start, start + len(total))
            grad[span] = (grad[span].float() + total).to(grad.dtype)


@dataclass(frozen=True)
class Block:
    """A run of queries and the keys they may see; `rows` counts folded rows (query s, head g at s*G + g).

    offset: of the first query's own key among the keys.
    """

    queries: int
    rows: slice
    keys: slice
    offset: int
    fold: int
    window: int | None


def _blocks(group: Group, fold: int, window: int | None) -> Iterator[Block]:
    for begin in range(0, group.padded, _BLOCK):
        end = min(begin + _BLOCK, group.padded)
        own = group.prefix + begin
        first = 0 if window is None else max(0, own - window + 1)
        keys = slice(first, group.prefix + end)
        yield Block(end - begin, slice(begin * fold, end * fold), keys, own - first, fold, window)


def _probabilities(
    q: torch.Tensor, k: torch.Tensor, block: Block, scale: float, softcap: float | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Softmax of one block's scores, and the capped scores where there is a cap, else None."""
    rows, keys_T = q[:, block.rows], k[:, block.keys].transpose(1, 2)
    mask = _mask(block.offset, block.queries, block.fold, block.window, q.dtype, q.device)
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
    return group.prefix + group.padded <= _KEEP and softcap is None


def _gather(x: torch.Tensor, group: Group, heads: int, prefix: int = 0) -> torch.Tensor:
    """[T, K*G, D] -> [N*K, (P + S)*G, D] of the group's documents, padded with zeros, after the P tokens of their prefixes."""
    fold = x.shape[1] // heads
    shape = (len(group.starts), heads, prefix + group.padded, fold, x.shape[2])
    gathered = x.new_zeros(shape) if min(group.lengths) < group.padded else x.new_empty(shape)
    for n, span, length in group.spans():
        gathered[n, :, prefix : prefix + length] = x[span].unflatten(1, (heads, fold)).transpose(0, 1)
    for n, start in enumerate(group.prefixes if prefix else ()):
        gathered[n, :, :prefix] = x[start : start + prefix].unflatten(1, (heads, fold)).transpose(0, 1)
    return gathered.view(-1, (prefix + group.padded) * fold, x.shape[2])


def _scatter(gathered: torch.Tensor, x: torch.Tensor, group: Group, heads: int, prefix: int = 0) -> None:
    """The inverse of `_gather`, into `x`; padding is left behind, and so are prefixes."""
    documents = gathered.view(len(group.starts), heads, prefix + group.padded, -1, x.shape[2])
    for n, span, length in group.spans():
        own = documents[n, :, prefix : prefix + length]
        x[span].unflatten(1, (heads, -1)).copy_(own.transpose(0, 1))
