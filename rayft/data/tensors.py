"""Documents to tensors.

Shapes: B rows, T tokens of a row or pack, D documents of a pack. Targets are shifted here, once and per document:
`targets[t]` is token t + 1 of the same document where that token is trained, else -100, so no label ever crosses
from one document into the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from rayft.data.corpus import Corpus
from rayft.data.step import MicroBatch
from rayft.data.template import Sample

IGNORE = -100

#: Fills an empty micro-batch: one token without a target, so that every rank runs the same collectives.
_NOTHING = Sample(np.zeros(1, dtype=np.int32), np.zeros(1, dtype=np.bool_))


def micro_batch_tensors(
    corpus: Corpus, micro_batch: MicroBatch, *, packed: bool, pad_id: int = 0
) -> dict[str, Any]:
    """The tensors of one micro-batch of a `StepPlan`."""
    samples = [corpus.sample(document) for row in micro_batch for document in row]
    return pack_tensors(samples) if packed else pad_tensors(samples, pad_id)


def pack_tensors(samples: Sequence[Sample]) -> dict[str, Any]:
    """One flat row of documents: input_ids, targets, position_ids int64[1, T], cu_seqlens int32[D + 1]."""
    samples = samples or [_NOTHING]
    lengths = [len(sample.ids) for sample in samples]
    return {
        "input_ids": _row([sample.ids for sample in samples]),
        "targets": _row([_targets(sample) for sample in samples]),
        "position_ids": _row([np.arange(length) for length in lengths]),
        "cu_seqlens": torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32)),
    }


def pad_tensors(samples: Sequence[Sample], pad_id: int) -> dict[str, Any]:
    """One document per row, padded on the right: input_ids, targets, position_ids, attention_mask int64[B, T].

    Padding is known by the mask and by targets, never by its id, which may be the end token's.
    """
    samples = samples or [_NOTHING]
    longest = max(len(sample.ids) for sample in samples)
    shape = (len(samples), longest)
    ids, targets = np.full(shape, pad_id, dtype=np.int64), np.full(shape, IGNORE, dtype=np.int64)
    mask = np.zeros(shape, dtype=np.int64)
    for b, sample in enumerate(samples):
        length = len(sample.ids)
        ids[b, :length], targets[b, :length], mask[b, :length] = sample.ids, _targets(sample), 1
    positions = np.broadcast_to(np.arange(longest), shape).copy()
    arrays = {"input_ids": ids, "targets": targets, "position_ids": positions, "attention_mask": mask}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _targets(sample: Sample) -> np.ndarray:
    targets = np.full(len(sample.ids), IGNORE, dtype=np.int64)
    targets[:-1] = np.where(sample.trained[1:], sample.ids[1:], IGNORE)
    return targets


def _row(parts: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))[None]
