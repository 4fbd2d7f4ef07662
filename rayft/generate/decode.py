"""The decoding loop: a batch of prompts goes on token by token, and rows that have ended leave it.

Shapes: B rows still running, T tokens so far, S tokens of all prompts together, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from rayft.generate.engine import Sync
from rayft.model.attention import Documents
from rayft.model.head import causal_model

#: Number of the row that keeps a rank going whose own rows have ended; it draws from no row's stream.
NOBODY = -1

#: Chooses the next token of each row from its logits [B, V]; the rows' numbers are given beside them.
Choice = Callable[[torch.Tensor, Sequence[int]], torch.Tensor]

#: Whether a row, by its number, ends with the token it just got.
Ends = Callable[[int, int], bool]


def greedy(logits_BV: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """The most probable token of each row. (`max`, since `argmax` on bf16 takes ten times as long on a CPU.)"""
    return logits_BV.max(-1).indices


def sampling(
    temperature: float,
    top_p: float,
    seed_of: Callable[[int], int],
    record: Callable[[Sequence[int], list[float]], None] | None = None,
    *,
    top_k: int | None = None,
) -> Choice:
    """Nucleus sampling (arXiv:1904.09751) in which row n draws from a stream of its own, with the seed `seed_of(n)`.

    So what a row draws does not depend on the rows beside it or on when they end. top_k: of the nucleus, only so many tokens.
    `record` is told the rows and the log-probability of what each drew, at the temperature, before the nucleus was cut out.
    """
    streams: dict[int, torch.Generator] = {}

    def draw(row: int) -> float:
        if row not in streams:
            seed = 0 if row == NOBODY else seed_of(row) % (1 << 63)
            streams[row] = torch.Generator().manual_seed(seed)
        return float(torch.rand((), generator=streams[row], dtype=torch.float64))

    def choose(logits_BV: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        logprobs_BV = (logits_BV.float() / temperature).log_softmax(-1)
        kept_BV, ids_BV = logprobs_BV.exp(), None
        if top_p < 1 or top_k is not None:  # sorting takes longer than all the rest
            sorted_BV, ids_BV = kept_BV.sort(-1, descending=True)
            before_BV = sorted_BV.cumsum(-1) - sorted_BV
            kept_BV = sorted_BV.masked_fill(before_BV >= top_p, 0.0)
            if top_k is not None:
                kept_BV[:, top_k:] = 0.0
        kept_BV = kept_BV.cumsum(-1, dtype=torch.float64)
        at_B1 = torch.tensor([[draw(row)] for row in rows], device=kept_BV.device, dtype=torch.float64)
        picked_B1 = torch.searchsorted(kept_BV, at_B1 * kept_BV[:, -1:], right=True)
        picked_B1 = picked_B1.clamp(max=kept_BV.shape[-1] - 1)
        tokens_B1 = picked_B1 if ids_BV is None else ids_BV.gather(-1, picked_B1)
        if record is not None:
            record(rows, logprobs_BV.gather(-1, tokens_B1)[:, 0].tolist())
        return tokens_B1[:, 0]

    return choose


def rows_of_seed(seed: int) -> Callable[[int], int]:
    """Seeds of the rows of a call with one seed."""
    return lambda row: seed * 1_000_003 + row


@dataclass
class Batch:
    """Rows in the middle of decoding: logits [B, V] of the next token, cache, mask [B, T], positions [B] of the last token."""

    logits_BV: torch.Tensor
    cache: Cache
    mask_BT: torch.Tensor
    positions_B: torch.Tensor

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these (indices into the batch)."""
        index = torch.tensor(rows, device=self.mask_BT.device)
        self.cache.reorder_cache(index)  # type: ignore[arg-type]
        self.mask_BT, self.positions_B = self.mask_BT[index], self.positions_B[index]

    def go_on(self, model: nn.Module, tokens_B: torch.Tensor) -> None:
        """Feed one token per row."""
        self.mask_BT = torch.cat([self.mask_BT, self.mask_BT.new_ones(len(tokens_B), 1)], dim=1)
        self.positions_B = self.positions_B + 1
        self.logits_BV = model(
            input_ids=tokens_B[:, None],
            attention_mask=self.mask_BT,
            position_ids=self.positions_B[:, None],
            past_key_values=self.cache,
            use_cache=True,
        ).logits[:, -1]


@torch.no_grad()
def decode(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    choose: Choice,
    *,
    rows: Sequence[int],
    stop_ids: frozenset[int],
    max_new_tokens: int,
    packed: bool,
    ends: Ends | None = None,
    sync: Sync | None = None,
) -> Iterator[list[tuple[int, int]]]:
    """Yield for every step the (row number, token) of the rows still running; a row's last token may be a stop.

    prompts: token ids, none empty. rows: the number of each prompt, told to `choose` and in what is yielded.
    ends: asked about every token that is no stop, whether the row ends with it. packed: the model runs under `packed_generation`. With `sync`, ranks run equally many forwards: one without rows
    of its own (`prompts` may be empty) goes on with a row nobody reads.
    """
    running = list(rows)
    batch = (prefill_packed if packed else prefill_padded)(model, prompts or [[0]])
    for step in range(max_new_tokens):
        tokens_B = choose(batch.logits_BV, running or [NOBODY])
        tokens = tokens_B.tolist()
        if running:
            yield list(zip(running, tokens, strict=True))
        going = [
            i
            for i, row in enumerate(running)
            if tokens[i] not in stop_ids and not (ends and ends(row, tokens[i]))
        ]
        running = [running[i] for i in going] if step + 1 < max_new_tokens else []
        if not (sync(bool(running)) if sync else running):
            return
        going = going if running else [0]
        if len(going) < len(tokens):
            batch.keep(going)
            tokens_B = tokens_B[going]
        batch.go_on(model, tokens_B)


def prefill_packed(model: nn.Module, prompts: Sequence[Sequence[int]]) -> Batch:
    """Read the prompts laid end to end, as training reads documents, then part the cache into rows. Several answers to one prompt
    read it once."""
    device = next(model.parameters()).device
    places: dict[tuple[int, ...], int] = {}
    which_B = torch.tensor([places.setdefault(tuple(prompt), len(places)) for prompt in prompts])
    lengths = torch.tensor([len(prompt) for prompt in places])
    ends = lengths.cumsum(0)
    pack = DynamicCache()
    logits = model(
        input_ids=torch.tensor([[token for prompt in places for token in prompt]], device=device),
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None].to(device),
        documents=Documents(torch.nn.functional.pad(ends, (1, 0)).to(device)),
        past_key_values=pack,
        use_cache=True,
        logits_to_keep=(ends - 1).to(device),
    ).logits[0][which_B.to(device)]
    lengths, ends = lengths[which_B], ends[which_B]
    # Row b's tokens end at column T: column t is token ends[b] - T + t of the pack, or padding.
    tokens_T = torch.arange(int(lengths.max())) - int(lengths.max())
    mask_BT = (tokens_T >= -lengths[:, None]).long().to(device)
    from_BT = (ends[:, None] + tokens_T).clamp(min=0).to(device)
    cache = DynamicCache()
    for index, layer in enumerate(pack.layers):
        assert isinstance(layer, DynamicLayer)
        assert layer.keys is not None
        assert layer.values is not None
        # [1, K, S, D] -> [B, K, T, D]
        keys, values = (x[0][:, from_BT].transpose(0, 1).contiguous() for x in (layer.keys, layer.values))
        layer.keys = layer.values = None  # one layer twice in memory at a time, not the whole cache
        cache.update(keys, values, index)
    return Batch(logits, cache, mask_BT, (lengths - 1).to(device))


def prefill_padded(model: nn.Module, prompts: Sequence[Sequence[int]]) -> Batch:
    """Read the prompts padded on the left, which every family of transformers can."""
    device = next(model.parameters()).device
    length = max(len(prompt) for prompt in prompts)
    ids_BT = torch.tensor([[0] * (length - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask_BT = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts], device=device)
    positions_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache(config=causal_model(model).config)
    logits_BV = model(
        input_ids=ids_BT,
        attention_mask=mask_BT,
        position_ids=positions_BT,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    ).logits[:, -1]
    return Batch(logits_BV, cache, mask_BT, positions_BT[:, -1])
