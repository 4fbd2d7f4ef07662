"""Multiple choice by log-likelihood: the choice that the model finds most probable after the question.

Rows: `query`, `choices`, `gold` (index), and if wanted `continuation_delimiter` and `task`. A choice is scored as
`' ' + choice` after the query and the delimiter; `accuracy` goes by the sum of log-probabilities, `accuracy_norm` by
the sum divided by the choice's UTF-8 bytes (as acc and acc_norm of lm-evaluation-harness).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from rayft.errors import DataError
from rayft.evals.rows import Row, column, suite_rows
from rayft.evals.suite import Record, fraction
from rayft.generate.engine import Engine, Scored
from rayft.generate.prompts import text_prompt
from rayft.spec import Suite


class MultipleChoice:
    """Rows are questions; each is scored once per choice."""

    def __init__(
        self, suite: Suite, engine: Engine, tokenizer: PreTrainedTokenizerBase, cache_dir: Path
    ) -> None:
        self.rows = suite_rows(suite, cache_dir)
        for row in self.rows:
            _check(row)
        self.engine, self.tokenizer = engine, tokenizer

    def __len__(self) -> int:
        return len(self.rows)

    def measure(self, rows: Sequence[int]) -> list[Record]:
        asked = [self.rows[row].columns for row in rows]
        sequences = [choice for one in asked for choice in self._choices(one)]
        scores = iter(self.engine.score(sequences))
        records = []
        for row, one in zip(rows, asked, strict=True):
            totals = [next(scores)[0] for _ in one["choices"]]
            per_byte = [t / len(c.encode()) for t, c in zip(totals, one["choices"], strict=True)]
            hit, hit_norm = (max(range(len(s)), key=s.__getitem__) == one["gold"] for s in (totals, per_byte))
            records.append({"row": row, "task": str(one.get("task", "")), "hit": hit, "hit_norm": hit_norm})
        return records

    def summarise(self, records: Sequence[Record]) -> dict[str, float]:
        metrics = {
            **fraction("accuracy", [r["hit"] for r in records]),
            **fraction("accuracy_norm", [r["hit_norm"] for r in records]),
        }
        tasks = sorted({r["task"] for r in records})
        for task in tasks if len(tasks) > 1 else []:
            metrics |= fraction(
                f"accuracy_norm/{task}", [r["hit_norm"] for r in records if r["task"] == task]
            )
        return {**metrics, "rows": len(records)}

    def _choices(self, columns: dict[str, object]) -> list[Scored]:
        context = str(columns["query"]).rstrip() + str(columns.get("continuation_delimiter") or "").rstrip()
        choices = columns["choices"]
        assert isinstance(choices, list)
        before = text_prompt(self.tokenizer, context)
        sequences: list[Scored] = []
        for choice in choices:
            # Tokenised together, as running text would be; where the pieces meet, the first token that differs counts.
            ids = text_prompt(self.tokenizer, f"{context} {choice}")
            shared = next(
                (i for i, (a, b) in enumerate(zip(before, ids, strict=False)) if a != b), len(before)
            )
            sequences.append((ids, [at >= max(shared, 1) for at in range(len(ids))]))
        return sequences


def _check(row: Row) -> None:
    query, choices, gold = column(row, "query", str), column(row, "choices", list), column(row, "gold", int)
    if not query.strip():
        raise DataError(f"{row.where}: the query is empty.", "Drop the row.")
    if len(choices) < 2 or not all(isinstance(choice, str) and choice for choice in choices):
        raise DataError(
            f"{row.where}: `choices` must be at least two non-empty strings.", "Correct or drop the row."
        )
    if not 0 <= gold < len(choices):
        raise DataError(
            f"{row.where}: `gold` is {gold}, but there are {len(choices)} choices.", "It is an index from 0."
        )
