"""Rows that say how good answers are: pairs, ranked lists, single answers with a label.

Columns are TRL's: `prompt`, `chosen`, `rejected` (with an optional `margin`), `prompt`, `completion`, `label`; and
`prompt`, `completions` with the best first. Prompt and answers are strings or lists of messages; of a pair without a
`prompt`, the messages that both sides begin with are the prompt.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from rayft.data.formats import (
    COMPARISONS,
    Conversation,
    Format,
    PromptCompletion,
    Row,
    Text,
    kind_of,
    normalise,
    prompt_completion,
    refuse_missing,
    rename,
)
from rayft.errors import DataError
from rayft.spec import Source


@dataclass(frozen=True)
class Comparison:
    """Answers to one prompt, the best first, each with its prompt as the row of a supervised data set.

    value: by how much the first of a pair should win at least (NaN if the row does not say), or of a single answer
    its label, 1 good and 0 bad.
    """

    answers: tuple[Conversation | PromptCompletion, ...]
    value: float


def read_row(row: dict[str, Any], layout: Format, source: Source, where: str) -> Row | Comparison:
    """What a row of any layout means. Raises DataError naming the row, the column and what is wrong with it."""
    if layout not in COMPARISONS:
        return normalise(row, layout, source, where)
    row = rename(row, source, where)
    refuse_missing(row, layout, where)
    return comparison(row, layout, source, where)


def comparison(row: dict[str, Any], layout: Format, source: Source, where: str) -> Comparison:
    """What a row of the layouts `preference`, `ranked` and `labelled` means. Raises DataError naming the row."""
    row = dict(row)
    if layout == "labelled":
        return Comparison((_answer(row, "completion", row["completion"], source, where),), _label(row, where))
    if layout == "ranked":
        answers = _ranked(row, where)
        names = [f"completions[{number}]" for number in range(len(answers))]
        value = math.nan
    else:
        answers, names = [row["chosen"], row["rejected"]], ["chosen", "rejected"]
        if row.get("prompt") is None:
            row["prompt"], answers = _shared_prompt(answers, where)
        value = _margin(row, where)
    made = tuple(_answer(row, n, a, source, where) for n, a in zip(names, answers, strict=True))
    seen: dict[str, str] = {}
    for name, answer in zip(names, made, strict=True):
        if (twin := seen.setdefault(_said(answer), name)) != name:
            raise DataError(
                f"{where}: {twin!r} and {name!r} say the same, so neither is better.", "Drop the row."
            )
    return Comparison(made, value)


def _answer(
    row: dict[str, Any], name: str, answer: Any, source: Source, where: str
) -> Conversation | PromptCompletion:
    """One answer with its prompt. Raises DataError if either is empty or not what it should be."""
    prompt = row["prompt"]
    if isinstance(answer, list) and len(answer) == 1 and isinstance(answer[0], dict) and "role" in answer[0]:
        said = answer[0].get("content")
        empty = not answer[0].get("tool_calls") and (
            said is None or (isinstance(said, str) and not said.strip())
        )
    else:
        empty = answer is None or answer == [] or (isinstance(answer, str) and not answer.strip())
    if empty:
        raise DataError(
            f"{where}: {name!r} is empty.", "Drop the row: an empty answer cannot be learned from."
        )
    if prompt in ("", []):
        raise DataError(f"{where}: the prompt is empty.", "Drop the row or give it a prompt.")
    if not isinstance(answer, str | list):
        raise DataError(
            f"{where}: {name!r} is {kind_of(answer)}.", "It must be a string or a list of messages."
        )
    made = prompt_completion({**row, "completion": answer}, source, where)
    assert not isinstance(made, Text)
    if isinstance(made, Conversation) and made.messages[-1]["role"] != "assistant":
        raise DataError(
            f"{where}: {name!r} ends with a message from {made.messages[-1]['role']!r}.",
            "An answer ends with a message of the assistant.",
        )
    return made


def _shared_prompt(answers: list[Any], where: str) -> tuple[list[Any], list[Any]]:
    """The messages both sides begin with, and what each says after them."""
    if not all(isinstance(answer, list) for answer in answers):
        raise DataError(
            f"{where}: there is no 'prompt', and 'chosen' and 'rejected' are not lists of messages that contain it.",
            "Add a prompt column, or map one with `columns`.",
        )
    shared = 0
    for one, other in zip(*answers, strict=False):
        if one != other:
            break
        shared += 1
    shared = min(shared, *(len(answer) - 1 for answer in answers))
    if shared < 1:
        raise DataError(
            f"{where}: 'chosen' and 'rejected' share no prompt: they differ from their first message on.",
            "Both must be answers to the same conversation.",
        )
    return answers[0][:shared], [answer[shared:] for answer in answers]


def _ranked(row: dict[str, Any], where: str) -> list[Any]:
    answers = row["completions"]
    if not isinstance(answers, list) or len(answers) < 2:
        raise DataError(
            f"{where}: 'completions' is {kind_of(answers)}.",
            "It must be a list of at least two answers, best first.",
        )
    return answers


def _label(row: dict[str, Any], where: str) -> float:
    label = row["label"]
    if label not in (0, 1) or isinstance(label, str):
        raise DataError(
            f"{where}: the label is {label!r}.",
            "It must be true or 1 for a good answer, false or 0 for a bad one.",
        )
    return float(label)


def _margin(row: dict[str, Any], where: str) -> float:
    margin = row.get("margin")
    if margin is None:
        return math.nan
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not 0 <= margin < math.inf:
        raise DataError(
            f"{where}: the margin is {margin!r}.",
            "It must be a number from 0 up; if the rejected answer is the better one, swap the two.",
        )
    return float(margin)


def _said(answer: Conversation | PromptCompletion) -> str:
    """What an answer says, without its prompt."""
    if isinstance(answer, PromptCompletion):
        return answer.completion.strip()
    own = answer.messages[answer.completion_from :]
    return repr([{**message, "content": message["content"].strip()} for message in own])
