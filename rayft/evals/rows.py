"""Rows of a suite's file, and for suites that generate: the prompt of a row and the answer it asks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from rayft.data.formats import Conversation, PromptCompletion, detect_format, normalise
from rayft.data.read import open_tables, read_rows
from rayft.data.template import ChatTokenizer
from rayft.errors import DataError
from rayft.generate.engine import Engine
from rayft.generate.prompts import answer_text, chat_prompt, text_prompt
from rayft.spec import Source, Suite


@dataclass(frozen=True)
class Row:
    """One row of a suite's file; `where` names it in an error."""

    where: str
    columns: dict[str, Any]


@dataclass(frozen=True)
class Question:
    """What is asked, as token ids and for people, and the answer the row gives."""

    prompt: list[int]
    shown: str
    reference: str


def suite_rows(suite: Suite, cache_dir: Path) -> list[Row]:
    """The suite's rows: all, or `limit` of them evenly spread over the file, which may be sorted.

    Raises DataError if there is no such file or it holds no rows.
    """
    source = Source(path=suite.path, split="test")  # type: ignore[call-arg]
    tables = open_tables(source, every=1000, node_dir=cache_dir)
    rows = [
        Row(where, columns)
        for table in tables
        for where, columns in read_rows(table, 0, table.rows, node_dir=cache_dir)
    ]
    if suite.limit is None or suite.limit >= len(rows):
        return rows
    return [rows[number * len(rows) // suite.limit] for number in range(suite.limit)]


def column(row: Row, name: str, kind: type[Any]) -> Any:
    """The value of a column. Raises DataError if it is missing or of another type."""
    value = row.columns.get(name)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        found = "missing" if value is None else f"of type {type(value).__name__}"
        raise DataError(
            f"{row.where}: the column {name!r} is {found}.",
            f"It must be of type {kind.__name__} in every row.",
        )
    return value


def questions(rows: Sequence[Row], suite: Suite, tokenizer: PreTrainedTokenizerBase) -> list[Question]:
    """Prompts and reference answers of `messages` or `prompt`/`completion` rows.

    The reference is the last message, which must be the assistant's, or the completion. Raises DataError.
    """
    chat = ChatTokenizer(tokenizer)
    return [_question(row, suite, chat) for row in rows]


def _question(row: Row, suite: Suite, chat: ChatTokenizer) -> Question:
    layout = detect_format(row.columns, row.where)
    meant = normalise(row.columns, layout, Source(path=suite.path), row.where)  # type: ignore[call-arg]
    if isinstance(meant, PromptCompletion):
        return Question(text_prompt(chat.tokenizer, meant.prompt), meant.prompt, meant.completion)
    if not isinstance(meant, Conversation) or meant.messages[-1]["role"] != "assistant":
        raise DataError(
            f"{row.where}: a {suite.type} suite needs rows that end with the assistant's answer.",
            "Give `messages` with an assistant message at the end, or `prompt` and `completion`.",
        )
    asked = meant.messages[:-1]
    if not asked:
        raise DataError(f"{row.where}: nothing is asked before the answer.", "Put a user message first.")
    prompt = chat_prompt(chat, asked, meant.tools, row.where)
    return Question(prompt, str(asked[-1]["content"]), str(meant.messages[-1]["content"]))


def answers(
    asked: Sequence[Question], suite: Suite, engine: Engine, tokenizer: PreTrainedTokenizerBase
) -> list[str]:
    """What the model answers, greedily, in the order of the questions."""
    generated = engine.generate([q.prompt for q in asked], max_new_tokens=suite.max_new_tokens)
    return [answer_text(tokenizer, ids) for ids in generated]
