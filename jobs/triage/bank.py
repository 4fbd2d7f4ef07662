"""What the wording of the tickets is made of: train and test have a bank each (`wording_train`, `wording_test`).

`[a|b]` is a choice, also nested and also empty. Placeholders: `{p}` product, `{o}` order, `{t}` plan, `{m}` an amount of
money, `{x}` an id that is not the order, `{n}` a small number, `{d}` a weekday.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Bank:
    """Everything that a split may say; each list is drawn from uniformly."""

    brands: list[str]
    models: list[str]
    devices: dict[str, list[str]]
    problems: dict[str, list[str]]
    impacts: dict[str, list[str]]
    orders: list[str]
    plans: list[str]
    refunds: list[str]
    security: list[str]
    distractors: list[str]
    greetings: list[str]
    closings: list[str]


def words(text: str) -> list[str]:
    """The words of a block of text."""
    return text.split()
