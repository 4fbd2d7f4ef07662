"""From a run's log to the reports of a trial: one flat row of numbers for every evaluation, and one for its end."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from rayft.report.log import Row

#: Fields of a suite's results that say how much was measured.
Results = dict[str, dict[str, float]]


@dataclass
class Reports:
    """Collects rows of one run and gives a report as soon as its evaluation and its step have been logged.

    Names: `eval.<metric>`, `train.<metric>` of the newest step, `suite.<suite>.<metric>` of the trained model and
    `change.<suite>.<metric>`, that less what the model began with. before: kinds of the rows of what was measured before training.
    """

    _train: dict[int, dict[str, float]] = field(default_factory=dict)
    _eval: dict[int, dict[str, float]] = field(default_factory=dict)
    _suites: dict[str, Results] = field(default_factory=dict)
    _given: set[int] = field(default_factory=set)
    _gates: set[int] = field(default_factory=set)
    before: set[str] = field(default_factory=set)

    def feed(self, rows: Iterable[Row]) -> None:
        """Take rows in the order of writing; a row of a step that was logged before takes its place."""
        for row in rows:
            kind = row["kind"]
            if kind == "step":
                self._train[row["step"]] = _numbers("train", row)
            elif kind == "eval":
                self._eval[row["step"]] = _numbers("eval", row)
                self._measured("eval", row["step"] == 0)
            elif kind == "suites":
                self._suites[row["when"]] = row["results"]
                self._measured("suites", row["when"] == "before")
            elif kind == "gate":
                self._gates.add(row["step"])

    def _measured(self, kind: str, before: bool) -> None:
        if before:
            self.before.add(kind)

    def skip(self, step: int) -> None:
        """Reports up to this step have been given."""
        self._given |= {at for at in self._eval if at <= step} | set(range(step + 1))

    def next(self) -> tuple[int, dict[str, float]] | None:
        """The oldest report that has not been given, as step and numbers; None while there is none.

        A measurement before the first step is no report: nothing can be decided by it. That of the last step is in the report at
        the end. Every other one has come when the run waits at it, or has gone beyond it.
        """
        newest = max(self._train, default=0)
        ready = [
            step
            for step in sorted(self._eval)
            if step
            and step in self._train
            and step not in self._given
            and (step in self._gates or step < newest)
        ]
        if not ready:
            return None
        self._given.add(ready[0])
        return ready[0], self._train[ready[0]] | self._eval[ready[0]]

    def last(self) -> tuple[int, dict[str, float]]:
        """The report at the end: the newest step, the newest evaluation, and the suites."""
        step = max([*self._train, *self._eval], default=0)
        numbers = self._train.get(step, {}) | (self._eval[max(self._eval)] if self._eval else {})
        before, after = self._suites.get("before", {}), self._suites.get("after", {})
        for suite, results in after.items():
            for name, value in results.items():
                if _is_number(value):
                    numbers[f"suite.{suite}.{name}"] = float(value)
                    if _is_number(earlier := before.get(suite, {}).get(name)):
                        numbers[f"change.{suite}.{name}"] = float(value) - float(earlier)  # type: ignore[arg-type]
        return step, numbers


def _numbers(prefix: str, row: Row) -> dict[str, float]:
    """Every number of a row that measures something; one that the log could not hold, or that is not finite, is NaN."""
    names = ("loss", "grad_norm", "tokens_per_s") if prefix == "train" else ("loss",)
    values: dict[str, Any] = {name: row[name] for name in names if name in row} | (row.get("metrics") or {})
    return {
        f"{prefix}.{name}": math.nan if value is None or not math.isfinite(value) else float(value)
        for name, value in values.items()
        if value is None or (isinstance(value, int | float) and not isinstance(value, bool))
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
