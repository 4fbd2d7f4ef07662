"""Rows that say how good answers are: pairs, ranked lists, single answers with a label.

Columns are TRL's: `prompt`, `chosen`, `rejected` (with an optional `margin`), `prompt`, `completion`, `label`; and
`prompt`, `completions` with the best first. Prompt and answers are strings or lists of messages; of a pair without a
`prompt`, the messages that both sides begin with are the prompt.
"""

from __future__ import annotations

import json
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

_FIELDS = ("prompt", "chosen", "rejected", "completion", "completions")
_EMPTY = "Drop the row: an empty answer cannot be learned from."


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
    row = {field: listed(field, value) for field, value in row.items()}
    if layout == "labelled":
        (prompt, answers), names = _apart(row["prompt"], [row["completion"]]), ["completion"]
        value = _label(row, where)
    elif layout == "ranked":
        (prompt, answers), value = _apart(row["prompt"], _ranked(row, where)), math.nan
        names = [f"completions[{number}]" for number in range(len(answers))]
    else:
        pair, names = [row["chosen"], row["rejected"]], ["chosen", "rejected"]
        prompt, answers = _shared(pair, where) if row.get("prompt") is None else _apart(row["prompt"], pair)
        value = _margin(row, where)
    row["prompt"] = prompt
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
    if row["prompt"] in ("", []):
        raise DataError(f"{where}: the prompt is empty.", "Drop the row or give it a prompt.")
    if answer is None or answer == [] or (isinstance(answer, str) and not answer.strip()):
        raise DataError(f"{where}: {name!r} is empty.", _EMPTY)
    if not isinstance(answer, str | list):
        raise DataError(
            f"{where}: {name!r} is {kind_of(answer)}.", "It must be a string or a list of messages."
        )
    made = prompt_completion({**row, "completion": answer}, source, where)
    assert not isinstance(made, Text)
    if isinstance(made, Conversation):
        own = made.messages[made.completion_from :]
        for place, message in (("begins", own[0]), ("ends", own[-1])):
            if message["role"] != "assistant":
                raise DataError(
                    f"{where}: {name!r} {place} with a message from {message['role']!r}.",
                    "An answer begins and ends with a message of the assistant; what comes before it is the prompt.",
                )
        if not own[-1]["content"].strip() and not own[-1].get("tool_calls"):
            raise DataError(f"{where}: {name!r} is empty.", _EMPTY)
    return made


def _apart(prompt: Any, answers: list[Any]) -> tuple[Any, list[Any]]:
    """The prompt and the answers without it, where every one of them is a whole conversation that begins with it."""
    begin = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    whole = [
        isinstance(answer, list) and isinstance(begin, list) and bool(begin) and answer[: len(begin)] == begin
        for answer in answers
    ]
    return (begin, [answer[len(begin) :] for answer in answers]) if all(whole) else (prompt, answers)


def _shared(answers: list[Any], where: str) -> tuple[list[Any], list[Any]]:
    """The messages both sides begin with, and what the assistant says on each side after them."""
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
    goes_on = [isinstance(a[shared], dict) and a[shared].get("role") == "assistant" for a in answers if a]
    if shared < 1 or not all(goes_on) or len(goes_on) < 2:
        raise DataError(
            f"{where}: 'chosen' and 'rejected' share no prompt: something else than an answer differs first.",
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
    words = {"true": 1, "1": 1, "false": 0, "0": 0}  # how a CSV file has them
    known = words.get(label.strip().lower(), label) if isinstance(label, str) else label
    if isinstance(known, str) or known not in (0, 1):
        raise DataError(
            f"{where}: the label is {label!r}.",
            "It must be true or 1 for a good answer, false or 0 for a bad one.",
        )
    return float(known)


def _margin(row: dict[str, Any], where: str) -> float:
    margin = row.get("margin")
    if margin is None or margin == "":
        return math.nan
    try:
        number = math.nan if isinstance(margin, bool) else float(margin)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number < math.inf:
        raise DataError(
            f"{where}: the margin is {margin!r}.",
            "It must be a number from 0 up; if the rejected answer is the better one, swap the two.",
        )
    return number


def listed(field: str, value: Any) -> Any:
    """CSV files hold lists of messages, or of answers, as JSON text; other text that looks like it stays text."""
    if field not in _FIELDS or not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return value
    messages = all(isinstance(one, dict) and "role" in one for one in found)
    return found if found and (messages or field == "completions") else value


def _said(answer: Conversation | PromptCompletion) -> str:
    """What an answer says, without its prompt."""
    if isinstance(answer, PromptCompletion):
        return answer.completion.strip()
    own = answer.messages[answer.completion_from :]
    return repr([{**message, "content": message["content"].strip()} for message in own])
