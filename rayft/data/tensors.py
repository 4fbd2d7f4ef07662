"""Documents to tensors.

Shapes: B rows, T tokens of a row or pack, D documents of a pack. Targets are shifted here, once and per document:
`targets[t]` is token t + 1 of the same document where that token is trained, else -100, so no label ever crosses
from one document into the next.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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


def answer_tensors(
    corpus: Corpus, micro_batch: MicroBatch, *, packed: bool, pad_id: int = 0, whole_first: bool = False
) -> dict[str, Any]:
    """The tensors of a micro-batch whose rows compare answers, D documents of R rows with N targets in all.

    Besides those of `sequence_tensors`: in_answer bool[N], row_sizes int64[R], how many documents each row has, and
    values float32[R]. With `whole_first` the prompt of the first document of each row has targets too.
    """
    documents = [document for row in micro_batch for document in row]
    firsts, sizes, values = _rows_of(corpus, documents)
    samples = [corpus.sample(document) for document in documents]
    answers = [sample.trained for sample in samples]
    if whole_first:
        samples = [
            Sample(sample.ids, _all_but_first(sample.ids)) if d in firsts else sample
            for d, sample in enumerate(samples)
        ]
    in_answer = [answer[sample.trained] for answer, sample in zip(answers, samples, strict=True)]
    return sequence_tensors(samples, packed=packed, pad_id=pad_id) | {
        "in_answer": torch.from_numpy(np.concatenate([np.empty(0, np.bool_), *in_answer])),
        "row_sizes": torch.tensor(sizes, dtype=torch.int64),
        "values": torch.tensor(values, dtype=torch.float32),
    }


def sequence_tensors(
    samples: Sequence[Sample], *, packed: bool, pad_id: int = 0, shared: bool = False
) -> dict[str, Any]:
    """Tensors of D documents with N targets: those of `micro_batch_tensors`, and

    last int64[D]: where the last token of each document is in the flattened input_ids. target_document int64[N]: the
    document of each target, in row-major order. shared: packed documents beside each other that begin with the same prompt have
    it once (`shared_tensors`).
    """
    if shared and samples:
        return shared_tensors(samples)
    tensors = pack_tensors(samples) if packed else pad_tensors(samples, pad_id)
    lengths = np.array([len(sample.ids) for sample in samples], dtype=np.int64)
    width = tensors["input_ids"].shape[1]
    starts = np.cumsum(lengths) - lengths if packed else np.arange(len(samples)) * width
    counts = [int(sample.trained.sum()) for sample in samples]
    return tensors | {
        "last": torch.from_numpy(starts + lengths - 1),
        "target_document": torch.from_numpy(np.repeat(np.arange(len(samples)), counts)),
    }


def shared_tensors(samples: Sequence[Sample]) -> dict[str, Any]:
    """`sequence_tensors` of a pack in which documents beside each other with the same prompt have it once.

    A prompt is what comes before the first trained token. It is a document of its own but for its last token, with which each answer
    begins, so that every target still follows a token of its own. Besides those tensors: prefix int32[documents of the pack],
    which document each one goes on from, or -1; positions count on from there.
    """
    pieces: list[Sample] = []
    prefix: list[int] = []
    first: list[int] = []
    answers: list[int] = []

    def lay(ids: np.ndarray, trained: np.ndarray, goes_on_from: int, position: int) -> int:
        pieces.append(Sample(ids, trained))
        prefix.append(goes_on_from)
        first.append(position)
        return len(pieces) - 1

    for own, length in runs_of_prompts(samples):
        head = lay(own[0].ids[:length], own[0].trained[:length], -1, 0) if length else -1
        answers += [lay(sample.ids[length:], sample.trained[length:], head, length) for sample in own]
    tensors = pack_tensors(pieces)
    ends = tensors["cu_seqlens"][1:].long()
    lengths = [len(piece.ids) for piece in pieces]
    counts = [int(sample.trained.sum()) for sample in samples]
    starts = np.repeat(np.array(first, np.int64), lengths)
    return tensors | {
        "position_ids": tensors["position_ids"] + torch.from_numpy(starts),
        "prefix": torch.tensor(prefix, dtype=torch.int32),
        "last": ends[answers] - 1,
        "target_document": torch.from_numpy(np.repeat(np.arange(len(samples)), counts)),
    }


def runs_of_prompts(samples: Sequence[Sample]) -> Iterator[tuple[Sequence[Sample], int]]:
    """Runs of documents with the same prompt, and how many tokens of it they can share: all but the last; 0 for a single one."""
    prompts = [sample.ids[: prompt_length(sample)].tobytes() for sample in samples]
    begin = 0
    for end in range(1, len(samples) + 1):
        if end == len(samples) or prompts[end] != prompts[begin]:
            alone = end - begin == 1
            yield samples[begin:end], 0 if alone else max(0, prompt_length(samples[begin]) - 1)
            begin = end


def prompt_length(sample: Sample) -> int:
    """Tokens before the first that is trained."""
    return int(sample.trained.argmax()) if sample.trained.any() else len(sample.ids)


def _rows_of(corpus: Corpus, documents: list[int]) -> tuple[set[int], list[int], list[float]]:
    """Which documents are the first of their row, how many documents each row has, and the rows' values."""
    firsts, sizes, values = set(), [], []
    at = 0
    while at < len(documents):
        row, value = corpus.answers(documents[at])
        assert documents[at : at + len(row)] == list(row), "a row was divided"
        firsts.add(at)
        sizes.append(len(row))
        values.append(value)
        at += len(row)
    return firsts, sizes, values


def _all_but_first(ids: np.ndarray) -> np.ndarray:
    return np.arange(len(ids)) > 0


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
