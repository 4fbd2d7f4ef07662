"""Column layouts of rows: which one a source has, and what a row of it means.

The names are those of TRL and the OpenAI API (`text`, `messages`, `prompt`/`completion`); alpaca and sharegpt rows
are converted. A row becomes one of three things: `Text`, `PromptCompletion` (plain strings) or `Conversation`; one
that compares answers becomes a `Comparison` (`rayft.data.comparisons`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rayft.data.messages import check_messages, check_tools
from rayft.errors import DataError
from rayft.spec import Job, Source

Format = Literal[
    "text", "messages", "prompt_completion", "alpaca", "sharegpt", "preference", "ranked", "labelled"
]

#: Columns that a layout needs; `columns` of a source renames to these.
REQUIRED: dict[Format, tuple[str, ...]] = {
    "text": ("text",),
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "sharegpt": ("conversations",),
    "preference": ("chosen", "rejected"),
    "ranked": ("prompt", "completions"),
    "labelled": ("prompt", "completion", "label"),
}

#: Layouts that show what to say, and those that say how good answers are (`rayft.data.comparisons`).
EXAMPLES: tuple[Format, ...] = ("text", "messages", "prompt_completion", "alpaca", "sharegpt")
COMPARISONS: tuple[Format, ...] = ("preference", "ranked", "labelled")

#: Roles of sharegpt dumps and what they are called in `messages`.
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}


def layouts_of(job: Job) -> tuple[Format, ...]:
    """The layouts that a job's method learns from."""
    if job.method == "dpo":
        return ("labelled",) if job.dpo.loss == "kto" else ("preference",)
    return COMPARISONS if job.method == "reward" else EXAMPLES


@dataclass(frozen=True)
class Text:
    """Running text; every token but the first is trained."""

    text: str


@dataclass(frozen=True)
class PromptCompletion:
    """Plain strings without a chat template; the completion is trained."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Conversation:
    """Messages for the chat template.

    `train[i]` is True or False where the row says so itself for message i, None where `data.loss_on` decides.
    `completion_from` is the index of the first message of the completion in a prompt/completion row, else None.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    train: list[bool | None]
    completion_from: int | None = None


Row = Text | PromptCompletion | Conversation


def detect_format(columns: Iterable[str], where: str, layouts: Sequence[Format] = EXAMPLES) -> Format:
    """The one of `layouts` whose columns are all there. Raises DataError naming the candidates if there are none or two."""
    present = set(columns)
    fitting = [name for name, needed in REQUIRED.items() if present.issuperset(needed)]
    found = [name for name in fitting if name in layouts]
    if len(found) == 1:
        return found[0]
    listed = ", ".join(sorted(present)) or "none"
    if not found and fitting:
        raise DataError(
            f"{where}: the columns ({listed}) are those of {' and '.join(fitting)} rows, which this method cannot learn from.",
            f"It takes {', '.join(layouts)} rows. Methods: sft imitates answers, reward and dpo learn from comparisons "
            "(dpo.loss kto from labels).",
        )
    if not found:
        layouts_ = "; ".join(f"{name}: {' + '.join(REQUIRED[name])}" for name in layouts)
        raise DataError(
            f"{where}: the columns ({listed}) fit no known layout.",
            f"Rename them with `columns` of the source, {{field: column}}. Layouts: {layouts_}.",
        )
    raise DataError(
        f"{where}: the columns ({listed}) fit {' and '.join(found)}.",
        f"Set `format` of the source to {' or '.join(found)}.",
    )


def rename(row: dict[str, Any], source: Source, where: str) -> dict[str, Any]:
    """The row under rayft's field names. Raises DataError if a column named in `columns` is not there."""
    if not source.columns:
        return row
    for field, column in source.columns.items():
        if column not in row:
            raise DataError(
                f"{where}: there is no column {column!r}, which `columns` maps to {field!r}.",
                f"Columns are: {', '.join(row) or 'none'}.",
            )
    renamed = {k: v for k, v in row.items() if k not in source.columns.values()}
    return renamed | {field: row[column] for field, column in source.columns.items()}


def normalise(row: dict[str, Any], layout: Format, source: Source, where: str) -> Row:
    """What one row means. Raises DataError naming the row (`where`), the column and what is wrong with it."""
    row = rename(row, source, where)
    refuse_missing(row, layout, where)
    if layout == "text":
        return Text(_string(row, "text", where))
    if layout == "prompt_completion":
        return prompt_completion(row, source, where)
    if layout == "messages":
        return conversation(json_value(row["messages"], "'messages'", where), row, source, where)
    messages = _from_alpaca(row, where) if layout == "alpaca" else _from_sharegpt(row, where)
    return conversation(messages, row, source, where)


def refuse_missing(row: dict[str, Any], layout: Format, where: str) -> None:
    """Raise DataError where a column that the layout needs is missing or null."""
    for field in REQUIRED[layout]:
        if row.get(field) is None:
            raise DataError(
                f"{where}: the column {field!r} is missing or null.", f"Every {layout} row needs it."
            )


def conversation(
    messages: Any, row: dict[str, Any], source: Source, where: str, completion_from: int | None = None
) -> Conversation:
    checked, train = check_messages(messages, where)
    if source.system and checked[0]["role"] not in ("system", "developer"):
        checked.insert(0, {"role": "system", "content": source.system})
        train.insert(0, None)
        completion_from = None if completion_from is None else completion_from + 1
    tools = check_tools(json_value(row.get("tools"), "'tools'", where), where)
    return Conversation(checked, tools, train, completion_from)


def prompt_completion(row: dict[str, Any], source: Source, where: str) -> Row:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        if not completion:
            raise DataError(f"{where}: the completion is empty.", "Drop the row or give it an answer.")
        return PromptCompletion(prompt, completion)
    # One side is a conversation: a string on the other side is the turn that belongs there.
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    for field, value in (("prompt", prompt), ("completion", completion)):
        if not isinstance(value, list) or not value:
            raise DataError(
                f"{where}: {field!r} is {kind_of(value)}.", "It must be a string or a list of messages."
            )
    return conversation([*prompt, *completion], row, source, where, completion_from=len(prompt))


def _from_alpaca(row: dict[str, Any], where: str) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if row.get("system"):
        messages.append({"role": "system", "content": _string(row, "system", where)})
    for turn in json_value(row.get("history"), "'history'", where) or []:
        if not isinstance(turn, (list, tuple)) or len(turn) != 2:
            raise DataError(f"{where}: 'history' must be a list of [question, answer] pairs.")
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    question = _string(row, "instruction", where)
    if row.get("input"):
        question += "\n\n" + _string(row, "input", where)
    messages += [
        {"role": "user", "content": question},
        {"role": "assistant", "content": _string(row, "output", where)},
    ]
    return messages


def _from_sharegpt(row: dict[str, Any], where: str) -> list[dict[str, Any]]:
    turns = json_value(row["conversations"], "'conversations'", where)
    if not isinstance(turns, list) or not turns:
        raise DataError(
            f"{where}: 'conversations' is {kind_of(turns)}.", "It must be a list of {from, value} turns."
        )
    messages: list[dict[str, Any]] = []
    if row.get("system"):
        messages.append({"role": "system", "content": _string(row, "system", where)})
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict) or not {"from", "value"} <= turn.keys():
            raise DataError(f"{where}: turn {number} of 'conversations' has no 'from' and 'value'.")
        role = SHAREGPT_ROLES.get(turn["from"])
        if role is None:
            raise DataError(
                f"{where}: turn {number} comes from {turn['from']!r}.",
                f"Known are: {', '.join(SHAREGPT_ROLES)}.",
            )
        message = {"role": role, "content": turn["value"]}
        if turn["from"] == "function_call":
            calls = json_value(turn["value"], f"the function call of turn {number}", where)
            message |= {"content": "", "tool_calls": calls if isinstance(calls, list) else [calls]}
        if "weight" in turn or "train" in turn:
            message["train"] = turn.get("train", turn.get("weight"))
        messages.append(message)
    return messages


def _string(row: dict[str, Any], field: str, where: str) -> str:
    value = row[field]
    if not isinstance(value, str):
        raise DataError(
            f"{where}: the column {field!r} is {kind_of(value)}.",
            "It must be a string; map another column with `columns` if this is the wrong one.",
        )
    return value


def json_value(value: Any, field: str, where: str) -> Any:
    """CSV and parquet dumps often hold lists as JSON text; other values pass through."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: {field} is text that is not valid JSON: {error}.", "It must be a list of objects."
        ) from None


def kind_of(value: Any) -> str:
    names = {str: "text", list: "a list", dict: "an object", int: "a number", float: "a number"}
    return "an empty list" if value == [] else names.get(type(value), f"a {type(value).__name__}")
