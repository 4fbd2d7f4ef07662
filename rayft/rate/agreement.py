"""What the ratings say of the raters: agreement, position bias, speed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import krippendorff
import numpy as np
from rich.markup import escape
from rich.table import Table

from rayft.rate.items import Item
from rayft.rate.ledger import Event, standing


@dataclass(frozen=True)
class Rater:
    """What one rater did.

    first: share of the choices between two answers (ties aside) that fell on the one shown further to the left;
    first_stderr: its standard error were there no bias. seconds: median for a rating.
    """

    name: str
    ratings: int
    ties: int
    skips: int
    first: float | None
    first_stderr: float | None
    seconds: float | None

    @property
    def biased(self) -> bool:
        """Whether the position decided more than chance would (three standard errors)."""
        return self.first is not None and abs(self.first - 0.5) > 3 * (self.first_stderr or 1.0)


@dataclass(frozen=True)
class Agreement:
    """alpha: Krippendorff's, nominal, over what every rater said of every two answers (better, worse, equal); None
    where no two raters judged the same. shared: pairs of answers that two or more judged; same: how often two
    raters' judgements of a pair are the same."""

    raters: list[Rater]
    alpha: float | None
    shared: int
    same: float | None


def measure(items: Sequence[Item], events: Sequence[Event]) -> Agreement:
    """Agreement and raters' habits from the ratings that stand."""
    stands = standing(list(events))
    raters = sorted({event.rater for event in events})
    judged: dict[str, dict[tuple[str, int, int], int]] = {name: {} for name in raters}
    for (name, _), event in stands.items():
        if event.kind == "rating":
            judged[name] |= {(event.item, a, b): verdict for a, b, verdict in _verdicts(event)}
    units = sorted({unit for own in judged.values() for unit in own})
    shared = [unit for unit in units if sum(unit in own for own in judged.values()) > 1]
    pairs = [
        judged[one][unit] == judged[other][unit]
        for unit in shared
        for one, other in combinations(raters, 2)
        if unit in judged[one] and unit in judged[other]
    ]
    return Agreement(
        raters=[_rater(name, [e for (rater, _), e in stands.items() if rater == name]) for name in raters],
        alpha=_alpha([[judged[name].get(unit, np.nan) for unit in shared] for name in raters]),
        shared=len(shared),
        same=sum(pairs) / len(pairs) if pairs else None,
    )


def table(agreement: Agreement) -> Table:
    """Raters, one a line; agreement in the caption."""
    made = Table(title="Raters")
    made.add_column("rater")
    for heading in ("ratings", "ties", "skips", "left chosen", "median seconds"):
        made.add_column(heading, justify="right")
    for rater in agreement.raters:
        first = "" if rater.first is None else f"{rater.first:.0%}{' biased' if rater.biased else ''}"
        seconds = "" if rater.seconds is None else f"{rater.seconds:.1f}"
        made.add_row(
            escape(rater.name), str(rater.ratings), str(rater.ties), str(rater.skips), first, seconds
        )
    made.caption = summary(agreement)
    return made


def summary(agreement: Agreement) -> str:
    """Agreement in one sentence."""
    if agreement.same is None:
        return "no two raters have judged the same answers yet"
    alpha = "not defined" if agreement.alpha is None else f"{agreement.alpha:.2f}"
    return f"{agreement.shared} pairs judged by two or more: {agreement.same:.0%} the same, Krippendorff's alpha {alpha}"


def _verdicts(event: Event) -> list[tuple[int, int, int]]:
    """(a, b, verdict) of every two answers a < b: 1 where a is better, -1 where b is, 0 where they are equal."""
    place = {number: rank for rank, group in enumerate(event.ranking) for number in group}
    numbers = sorted(place)
    return [
        (a, b, int(np.sign(place[b] - place[a]))) for i, a in enumerate(numbers) for b in numbers[i + 1 :]
    ]


def _alpha(values: list[list[float]]) -> float | None:
    """Krippendorff's alpha; None where it is not defined: nothing shared, or everybody always said the same thing."""
    matrix = np.array(values, dtype=float)
    if matrix.size == 0 or len(np.unique(matrix[~np.isnan(matrix)])) < 2:
        return None
    return float(krippendorff.alpha(reliability_data=matrix, level_of_measurement="nominal"))


def _rater(name: str, events: Sequence[Event]) -> Rater:
    rated = [event for event in events if event.kind == "rating"]
    choices = [choice for event in rated for choice in _left_chosen(event)]
    ties = sum(len(event.ranking) == 1 for event in rated)
    return Rater(
        name=name,
        ratings=len(rated),
        ties=ties,
        skips=len(events) - len(rated),
        first=sum(choices) / len(choices) if choices else None,
        first_stderr=math.sqrt(0.25 / len(choices)) if choices else None,
        seconds=statistics.median(event.seconds for event in rated) if rated else None,
    )


def _left_chosen(event: Event) -> list[bool]:
    """Of every two answers that are not equal: whether the one shown further to the left won."""
    position = {number: at for at, number in enumerate(event.shown)}
    return [(verdict > 0) == (position[a] < position[b]) for a, b, verdict in _verdicts(event) if verdict]
