"""Who rates what, and in which order a rater sees items and answers: functions of names alone, so a restart changes nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from rayft.rate.items import Item


def order_of_answers(seed: int, item: Item, rater: str) -> tuple[int, ...]:
    """The answers' numbers in the order in which this rater sees them, at random."""
    return tuple(sorted(range(len(item.answers)), key=lambda n: _digest(seed, "answer", item.id, rater, n)))


def share_out(
    items: Sequence[Item], raters: Sequence[str], rater: str, overlap: float, seed: int
) -> list[Item]:
    """The items that `rater` is to rate, in this rater's order.

    The share `overlap` of all items goes to everybody, so that agreement can be measured; the others are dealt, each to
    one of `raters`. Without a list of raters everybody rates everything. The common ones are spread evenly among the
    rater's own.
    """
    if not raters:
        return sorted(items, key=lambda item: _digest(seed, "order", rater, item.id))
    shuffled = sorted(items, key=lambda item: _digest(seed, "share", item.id))
    common = round(overlap * len(shuffled))
    own = shuffled[:common] + shuffled[common:][sorted(raters).index(rater) :: len(raters)]
    return sorted(own, key=lambda item: _digest(seed, "order", rater, item.id))


def _digest(*parts: object) -> bytes:
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).digest()
