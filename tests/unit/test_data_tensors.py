"""Tensors of a micro-batch: targets shifted per document, padding that nothing depends on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from rayft.data.template import Sample
from rayft.data.tensors import IGNORE, micro_batch_tensors, pack_tensors, pad_tensors
from rayft.spec import Data, Source
from tests.tiny import tiny_model
from tests.tiny_data import chat_rows, corpus_of, family_tokenizer, write_jsonl

A = Sample(np.array([10, 11, 12, 13], np.int32), np.array([False, False, True, True]))
B = Sample(np.array([20, 21], np.int32), np.array([False, True]))


def test_targets_are_the_next_token_of_the_same_document() -> None:
    batch = pack_tensors([A, B])
    assert batch["input_ids"].tolist() == [[10, 11, 12, 13, 20, 21]]
    assert batch["targets"].tolist() == [[IGNORE, 12, 13, IGNORE, 21, IGNORE]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1]]
    assert batch["cu_seqlens"].tolist() == [0, 4, 6]
    assert (batch["input_ids"].dtype, batch["cu_seqlens"].dtype) == (torch.int64, torch.int32)


def test_padding_is_on_the_right_and_known_by_the_mask() -> None:
    batch = pad_tensors([A, B], pad_id=21)
    assert batch["input_ids"].tolist() == [[10, 11, 12, 13], [20, 21, 21, 21]]
    assert batch["targets"].tolist() == [[IGNORE, 12, 13, IGNORE], [21, IGNORE, IGNORE, IGNORE]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3]] * 2


def test_the_pad_token_may_be_the_end_token() -> None:
    """The loss of a padded batch does not depend on what it is padded with, and keeps the end token as a target."""
    model = tiny_model()
    losses = []
    for pad_id in (21, 0):
        batch = pad_tensors([A, B], pad_id)
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten()))
    assert torch.equal(losses[0], losses[1])


def test_an_empty_micro_batch_is_one_token_without_a_target() -> None:
    packed, padded = pack_tensors([]), pad_tensors([], pad_id=5)
    assert packed["cu_seqlens"].tolist() == [0, 1]
    for batch in (packed, padded):
        assert batch["input_ids"].shape == (1, 1)
        assert batch["targets"].tolist() == [[IGNORE]]


def test_trained_tokens_are_all_targets(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", chat_rows(6))
    _, corpus = corpus_of(Data(train=[Source(path=str(path))]), family_tokenizer("llama3"), tmp_path)
    documents = [d for row in range(6) for d in corpus.documents(row)]
    expected = sum(map(corpus.trained_count, documents))
    for packed, micro_batch in ((True, [documents]), (False, [[d] for d in documents])):
        batch = micro_batch_tensors(corpus, micro_batch, packed=packed)
        assert int((batch["targets"] != IGNORE).sum()) == expected
