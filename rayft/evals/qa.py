"""Answers from a given context, scored as SQuAD does, and whether the model says so when the context holds none.

Rows: `messages` (or `prompt`/`completion`) and, if there is more than one right answer, `answers`: texts, or SQuAD's
`[{"text": …}, …]` or `{"text": […]}`. A row whose reference is the suite's `refusal` sentence has no answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.data.metrics.squad_metrics import compute_exact, compute_f1, normalize_answer

from rayft.errors import DataError
from rayft.evals.rows import Row, answers, questions, suite_rows
from rayft.evals.suite import Record, fraction, mean
from rayft.generate.engine import Engine
from rayft.spec import Suite


class QuestionAnswering:
    """F1 and exact match over rows that have an answer; refusals over those that have none."""

    def __init__(
        self, suite: Suite, engine: Engine, tokenizer: PreTrainedTokenizerBase, cache_dir: Path
    ) -> None:
        self.suite, self.engine, self.tokenizer = suite, engine, tokenizer
        rows = suite_rows(suite, cache_dir)
        self.questions = questions(rows, suite, tokenizer)
        self.right = [
            [] if self._refuses(question.reference) else _right_answers(row, question.reference)
            for row, question in zip(rows, self.questions, strict=True)
        ]

    def __len__(self) -> int:
        return len(self.questions)

    def measure(self, rows: Sequence[int]) -> list[Record]:
        asked = [self.questions[row] for row in rows]
        texts = answers(asked, self.suite, self.engine, self.tokenizer)
        return [self._record(row, text.strip()) for row, text in zip(rows, texts, strict=True)]

    def summarise(self, records: Sequence[Record]) -> dict[str, float]:
        answerable = [r for r in records if self.right[r["row"]]]
        unanswerable = [r for r in records if not self.right[r["row"]]]
        metrics = {
            **mean("f1", [r["f1"] for r in answerable]),
            **fraction("exact_match", [r["exact"] for r in answerable]),
        }
        if self.suite.refusal:
            metrics |= fraction("right_refusals", [r["refused"] for r in unanswerable])
            metrics |= fraction("answered", [not r["refused"] for r in answerable])
        return {**metrics, "rows": len(records)}

    def _record(self, row: int, text: str) -> Record:
        refused, right = self._refuses(text), self.right[row]
        return {
            "row": row,
            "refused": refused,
            "f1": 0.0 if refused else max((compute_f1(answer, text) for answer in right), default=0.0),
            "exact": not refused and any(compute_exact(answer, text) for answer in right),
            "prompt": self.questions[row].shown,
            "answer": text,
            "reference": self.questions[row].reference,
        }

    def _refuses(self, text: str) -> bool:
        refusal = self.suite.refusal
        return refusal is not None and normalize_answer(text) == normalize_answer(refusal)


def _right_answers(row: Row, reference: str) -> list[str]:
    given: Any = row.columns.get("answers") or [reference]
    texts = given.get("text") if isinstance(given, dict) else given
    found: list[Any] = [one.get("text") if isinstance(one, dict) else one for one in texts or []]
    if not found or not all(isinstance(one, str) for one in found):
        raise DataError(
            f"{row.where}: `answers` holds no texts.", 'Give [{"text": …}, …] or a list of strings.'
        )
    return found
