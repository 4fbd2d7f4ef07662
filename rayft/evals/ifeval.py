"""Verifiable instructions (IFEval, arXiv:2311.07911): each answer is checked by a program, by the library if-verifiable.

Rows: `prompt` (text), `instruction_id_list`, `kwargs`. `strict` checks the answer as it is, `loose` also without its
first or last line and without asterisks; `prompt_*` counts answers that follow all their instructions.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from rayft.data.template import ChatTokenizer
from rayft.errors import DataError, JobError
from rayft.evals.rows import Question, Row, answers, column, suite_rows
from rayft.evals.suite import Record, fraction
from rayft.generate.engine import Engine
from rayft.generate.prompts import chat_prompt
from rayft.spec import Suite


class IfEval:
    """Rows whose checkers need NLTK's sentence data where that is not installed are left out and counted."""

    def __init__(
        self, suite: Suite, engine: Engine, tokenizer: PreTrainedTokenizerBase, cache_dir: Path
    ) -> None:
        self.suite, self.engine, self.tokenizer = suite, engine, tokenizer
        _library()
        chat = ChatTokenizer(tokenizer)
        self.columns: list[dict[str, Any]] = []
        self.questions: list[Question] = []
        self.skipped = 0
        for row in suite_rows(suite, cache_dir):
            if not _checkable(row):
                self.skipped += 1
                continue
            prompt = row.columns["prompt"]
            ids = chat_prompt(chat, [{"role": "user", "content": prompt}], where=row.where)
            self.columns.append(row.columns)
            self.questions.append(Question(ids, prompt, ", ".join(row.columns["instruction_id_list"])))

    def __len__(self) -> int:
        return len(self.questions)

    def measure(self, rows: Sequence[int]) -> list[Record]:
        asked = [self.questions[row] for row in rows]
        texts = answers(asked, self.suite, self.engine, self.tokenizer)
        return [self._record(row, text) for row, text in zip(rows, texts, strict=True)]

    def summarise(self, records: Sequence[Record]) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for mode in ("strict", "loose"):
            metrics |= fraction(f"prompt_{mode}", [all(r[mode]) for r in records])
            metrics |= fraction(f"instruction_{mode}", [hit for r in records for hit in r[mode]])
        return {**metrics, "rows": len(records), "rows_skipped": self.skipped}

    def _record(self, row: int, text: str) -> Record:
        checked = check_answer(self.columns[row], text)
        return {
            "row": row,
            "strict": [strict for strict, _ in checked],
            "loose": [loose for _, loose in checked],
            "prompt": self.questions[row].shown,
            "answer": text,
            "reference": self.questions[row].reference,
        }


def check_answer(columns: dict[str, Any], text: str) -> list[tuple[bool, bool]]:
    """For each instruction of the row, whether the answer follows it strictly and loosely."""
    library = _library()
    instructions = columns["instruction_id_list"]
    if not text.strip():
        return [(False, False)] * len(instructions)
    sample = library.IFEvalSample(
        key=columns.get("key", 0),
        prompt=columns["prompt"],
        instruction_id_list=instructions,
        kwargs=columns["kwargs"],
    )
    results, _ = library.evaluate_output_for_sample("ifeval", sample, text)
    return [(result.strict_pass, result.loose_pass) for result in results]


def _checkable(row: Row) -> bool:
    """Whether the row's checkers run here. Raises DataError for a row they do not understand."""
    column(row, "prompt", str)
    instructions, kwargs = column(row, "instruction_id_list", list), column(row, "kwargs", list)
    if not instructions or len(instructions) != len(kwargs):
        raise DataError(
            f"{row.where}: {len(instructions)} instructions and {len(kwargs)} kwargs.",
            "There must be one for each.",
        )
    try:
        checked = check_answer(row.columns, "One sentence. And another.")
    except LookupError as error:
        if "nltk" in str(error).lower():
            return False
        raise DataError(
            f"{row.where}: instruction arguments are missing: {error}.", "Correct the row."
        ) from None
    except (TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{row.where}: the instructions cannot be checked: {error}.", "Correct the row."
        ) from None
    if len(checked) != len(instructions):
        raise DataError(
            f"{row.where}: not all instructions are known: {', '.join(instructions)}.", "Use IFEval's own."
        )
    return True


def _library() -> Any:
    try:
        import if_verifiable
        import langdetect
    except ImportError:
        raise JobError(
            "An `ifeval` suite needs the library if-verifiable, which is not installed.",
            "Install it with `pip install rayft[ifeval]`.",
        ) from None
    langdetect.DetectorFactory.seed = 0  # it draws at random otherwise
    return if_verifiable
