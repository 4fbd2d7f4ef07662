"""Rewards of triage records: `rewards: [{type: function, path: jobs/triage/reward.py:fields}]`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rayft.evals.json_answers import parse, same


def fields(
    prompts: Sequence[Any], completions: Sequence[str], reference: Sequence[str], **_: Any
) -> list[float]:
    """The share of the reference's fields that an answer has right; 0 where it is not JSON, or has fields of its own."""
    return [_share(parse(text), parse(right)) for text, right in zip(completions, reference, strict=True)]


def exact(
    prompts: Sequence[Any], completions: Sequence[str], reference: Sequence[str], **_: Any
) -> list[float]:
    """1 where the record is the reference's, else 0."""
    return [
        float(same(parse(text), parse(right))) for text, right in zip(completions, reference, strict=True)
    ]


def _share(record: Any, right: dict[str, Any]) -> float:
    if not isinstance(record, dict) or record.keys() - right.keys():
        return 0.0
    return sum(name in record and same(record[name], value) for name, value in right.items()) / len(right)
