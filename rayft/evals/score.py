"""Scores of a file's conversations by one reward model or several: `rayft score`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from rayft.data.comparisons import Comparison, read_row
from rayft.data.formats import COMPARISONS, EXAMPLES, Conversation, Format, PromptCompletion, detect_format
from rayft.data.read import open_tables, read_rows
from rayft.data.template import ChatTokenizer
from rayft.errors import DataError
from rayft.generate.scores import ScoreEngine
from rayft.spec import Source

#: Rows scored at a time.
BATCH = 512


def score_rows(
    path: str,
    models: Sequence[tuple[ScoreEngine, PreTrainedTokenizerBase]],
    *,
    cache_dir: Path,
) -> Iterator[dict[str, Any]]:
    """Each row of `path` with `scores`, one number per answer it holds, and `disagreement` where there is more than one
    head or model: the standard deviation of their opinions about each answer.

    Rows are conversations that end with the assistant's answer (`messages`, `prompt` and `completion`), or compare
    answers. Raises DataError for rows that are neither, or beyond a model's context.
    """
    source = Source(path=path, split="test")  # type: ignore[call-arg]
    layout: Format | None = None
    for table in open_tables(source, every=BATCH, node_dir=cache_dir):
        for first in range(0, table.rows, BATCH):
            read = list(read_rows(table, first, min(BATCH, table.rows - first), node_dir=cache_dir))
            if layout is None:
                layout = _layout(read[0][1], read[0][0])
            compared = [_comparison(row, layout, source, where) for where, row in read]
            wheres = [where for where, _ in read]
            opinions = [_opinions(compared, wheres, *model) for model in models]
            for number, (_, row) in enumerate(read):
                # one list per answer: what every head of every model thinks of it
                answers = [
                    [head for one in found for head in one]
                    for found in zip(*(model[number] for model in opinions), strict=True)
                ]
                scored = {**row, "scores": [float(np.mean(heads)) for heads in answers]}
                if len(answers[0]) > 1:
                    scored["disagreement"] = [float(np.std(heads)) for heads in answers]
                yield scored


def write_scores(rows: Iterator[dict[str, Any]], out: Path) -> int:
    """Write rows as jsonl to `out`, whole or not at all, and return how many there were."""
    temporary, count = out.with_name(out.name + ".part"), 0
    with temporary.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
            count += 1
    temporary.replace(out)
    return count


def _layout(row: dict[str, Any], where: str) -> Format:
    """Rows that compare answers first: `prompt`, `completion`, `label` is also a `prompt`, `completion` row."""
    try:
        return detect_format(row, where, COMPARISONS)
    except DataError:
        return detect_format(row, where, EXAMPLES)


def _comparison(row: dict[str, Any], layout: Format, source: Source, where: str) -> Comparison:
    made = read_row(row, layout, source, where)
    if isinstance(made, Comparison):
        return made
    if isinstance(made, Conversation) and made.messages[-1]["role"] == "assistant" and len(made.messages) > 1:
        last = len(made.messages) - 1
        return Comparison((Conversation(made.messages, made.tools, made.train, completion_from=last),), 0.0)
    if isinstance(made, PromptCompletion):
        return Comparison((made,), 0.0)
    raise DataError(
        f"{where}: the row does not end with an answer of the assistant.",
        "Give `messages` that end with one, `prompt` and `completion`, or answers to compare.",
    )


def _opinions(
    compared: Sequence[Comparison],
    wheres: Sequence[str],
    engine: ScoreEngine,
    tokenizer: PreTrainedTokenizerBase,
) -> list[list[list[float]]]:
    """By row and answer: what each head of the model thinks of it."""
    encoded = ChatTokenizer(tokenizer).encode_batch(compared, wheres)
    for where, samples in zip(wheres, encoded, strict=True):
        if isinstance(samples, DataError):
            raise samples
        longest = max(len(sample.ids) for sample in samples)
        if engine.context and longest > engine.context:
            raise DataError(
                f"{where} has {longest} tokens; the model's context is {engine.context}.",
                "Shorten the row or leave it out.",
            )
    rated = iter(
        engine.rate([s.ids.tolist() for samples in encoded for s in samples])  # type: ignore[union-attr]
    )
    return [[next(rated) for _ in row.answers] for row in compared]
