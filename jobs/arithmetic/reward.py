"""Rewards of arithmetic whose answer is known: `rewards: [{type: function, path: jobs/arithmetic/reward.py:right}]`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def right(prompts: Sequence[Any], completions: Sequence[str], answer: Sequence[str], **_: Any) -> list[float]:
    """1 where the last number of an answer is the last one in the column `answer`, else 0."""
    pairs = zip(completions, answer, strict=True)
    return [float(last_number(text) == last_number(str(wanted))) for text, wanted in pairs]


def last_number(text: str) -> float | None:
    """The last number in a text; commas between thousands do not part it."""
    found = NUMBER.findall(re.sub(r"(?<=\d),(?=\d{3}\b)", "", text))
    return float(found[-1]) if found else None
