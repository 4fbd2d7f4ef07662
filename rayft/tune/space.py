"""Values of trials: the space of a search, what is drawn from it, and the job that values make."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import numpy as np

from rayft.errors import JobError
from rayft.spec import Job
from rayft.spec.search import Conditions, with_values
from rayft.spec.tune import FORKING, Dimension

MOST_POINTS = 10_000
#: How often values that no job can have together are drawn anew.
MOST_DRAWS = 200
#: Sets the draws of a search apart from others by the same seed.
STREAM = 0x7475_6E65


def job_of(job: Job, values: Mapping[str, Any]) -> Job:
    """A trial's job: the search's without its group `tune`, with these values by dotted key. Raises JobError."""
    return with_values(job, values)


class Space:
    """The dimensions of a search in the order of their dependencies. job: with a group `tune`."""

    def __init__(self, job: Job) -> None:
        assert job.tune is not None
        self.job, self.tune = job, job.tune
        self._conditions = Conditions(job)
        self.order: list[str] = self._conditions.order

    def __getitem__(self, key: str) -> Dimension:
        return self.tune.space[key]

    def refusal(self, values: Mapping[str, Any]) -> JobError | None:
        """Why no job can have these values together; None: it can."""
        try:
            job_of(self.job, values)
        except JobError as error:
            return error
        return None

    def active(self, key: str, values: Mapping[str, Any]) -> bool:
        """Whether the dimension has a value beside those of the dimensions before it in `order`."""
        return self._conditions.active(key, values)

    @property
    def crossed(self) -> list[str]:
        """Dimensions that are enumerated: grids, and choices too under the searcher grid."""
        whole = self.tune.searcher == "grid"
        return [key for key in self.order if whole or self[key].grid is not None]

    def points(self) -> Iterator[dict[str, Any]]:
        """Every combination of the crossed dimensions, the last of them changing fastest; one empty point without any."""
        return self._points(self.crossed, {})

    def _points(self, keys: list[str], chosen: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if not keys:
            yield chosen
        elif not self.active(keys[0], chosen):
            yield from self._points(keys[1:], chosen)
        else:
            dimension = self[keys[0]]
            for index in range(dimension.count):
                yield from self._points(keys[1:], {**chosen, keys[0]: dimension.value(index)})

    @property
    def combinations(self) -> int:
        """How many points the crossed dimensions have. Raises JobError for more than a search could try."""
        return len(self.all_points)

    @cached_property
    def all_points(self) -> list[dict[str, Any]]:
        """`points`, listed, without those that no job can have if nothing else is drawn. Raises JobError for more than a search
        could try, or none."""
        found = list(itertools.islice(self.points(), MOST_POINTS + 1))
        count = len(found)
        if count * self.tune.num_trials > MOST_POINTS:
            raise JobError(
                f"tune.space: the grid has {'over ' if count > MOST_POINTS else ''}{min(count, MOST_POINTS)} combinations, with "
                f"tune.num_trials {self.tune.num_trials} more than {MOST_POINTS} trials.",
                "Give shorter lists, or draw from them with tune.searcher random.",
            )
        return self._valid(found) if len(self.crossed) == len(self.order) else found

    def _valid(self, points: list[dict[str, Any]]) -> list[dict[str, Any]]:
        refusals = [self.refusal(values) for values in points]
        valid = [values for values, refusal in zip(points, refusals, strict=True) if refusal is None]
        if not valid:
            assert refusals[0] is not None
            raise refusals[0]
        return valid

    @cached_property
    def everything(self) -> list[dict[str, Any]] | None:
        """All values that a trial can have, or None where they are more than can be listed."""
        if any(self[key].continuous for key in self.order):
            return None
        found = list(itertools.islice(self._points(self.order, {}), MOST_POINTS + 1))
        return self._valid(found) if len(found) <= MOST_POINTS else None

    @property
    def trials(self) -> int:
        """How many trials the search has at most; a setting is run twice only where trials exchange their states."""
        wanted = self.combinations * self.tune.num_trials
        repeats = self.everything is None or self.tune.scheduler in FORKING
        return wanted if repeats else min(wanted, len(self.everything or []))

    def has(self, values: Mapping[str, Any]) -> bool:
        """Whether these are a trial's values: those of its active dimensions, each one of its dimension's."""
        active = [key for key in self.order if self.active(key, values)]
        return set(active) == set(values) and all(self[key].has(values[key]) for key in active)


def sample(space: Space, seed: int, number: int) -> dict[str, Any]:
    """Values of trial `number`, drawn at random: a function of the space, the seed and the number alone.

    Each key draws from a stream of its own, so that a dimension more or less leaves the values of the others as they were.
    Crossed dimensions take the point `number` belongs to; all points come once before one comes again. Values that no job can
    have together are drawn anew; raises JobError where that does not end.
    """
    for attempt in range(MOST_DRAWS):
        values = point(space, number) if space.crossed else {}
        for key in space.order:
            if key not in values and key not in space.crossed and space.active(key, values):
                values[key] = space[key].at(drawn(seed, number, f"{key}#{attempt}" if attempt else key))
        refusal = space.refusal(values)
        if refusal is None:
            return {key: values[key] for key in space.order if key in values}
    assert refusal is not None
    raise JobError(
        f"tune.space: of {MOST_DRAWS} draws for trial {number} none makes a job; the last one: {refusal.message}",
        "Narrow the dimensions, or make one depend on the other by `when`.",
    )


def point(space: Space, number: int) -> dict[str, Any]:
    """The combination of the crossed dimensions that trial `number` takes."""
    return dict(space.all_points[number % space.combinations])


def drawn(seed: int, number: int, name: str) -> float:
    """A number in [0, 1) for trial `number`, from the stream of that name."""
    return float(np.random.default_rng([STREAM, seed, number, *name.encode()]).random())
