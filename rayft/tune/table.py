"""What a search shows while it runs: a table that is redrawn on a terminal, a line for every change elsewhere."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from rayft.report.text import duration, value
from rayft.report.trials import STATUSES, TrialState
from rayft.spec.tune import Objective
from rayft.tune.choose import value_of
from rayft.tune.cost import hours_of, unit_of
from rayft.tune.scale import label

STYLES = {
    "running": "cyan",
    "done": "green",
    "failed": "red",
    "waiting": "yellow",
    "stopped": "dim",
    "proposed": "dim",
}
#: Trials that the table shows; those under way come first, then the best. The page has all of them.
MAX_ROWS = 24
#: Seconds between two drawings of the table.
EVERY_S = 0.5


class SearchTable:
    """Shows the trials of a search; give it the ledger's state as often as it changes. Use it as a context.

    console: a terminal gets a table in place, anything else a line per change. aims: the objectives. total: trials in all.
    """

    def __init__(self, console: Console, aims: Sequence[Objective], total: int | None = None) -> None:
        self._console, self._aims, self._total = console, aims, total
        self._live: Live | None = None
        self._shown: dict[str, tuple[object, ...]] = {}
        self._drawn = 0.0
        self._trials: Mapping[str, TrialState] = {}

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live = Live(console=self._console, auto_refresh=False, transient=True)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        if kind is not None and self._trials and self._console.is_terminal:  # else the answers show it
            self._console.print(trials_table(self._trials, self._aims, self._total))

    def show(self, trials: Mapping[str, TrialState]) -> None:
        """Show the trials as they are now."""
        self._trials = trials
        if self._live is None:
            self._lines(trials)
        elif time.monotonic() - self._drawn >= EVERY_S:
            self._drawn = time.monotonic()
            self._live.update(trials_table(trials, self._aims, self._total), refresh=True)

    def _lines(self, trials: Mapping[str, TrialState]) -> None:
        unit = unit_of(trials.values())
        for trial in trials.values():
            now = (trial.status, trial.reason, trial.step, trial.run, len(trial.curve))
            if self._shown.get(trial.trial) == now:
                continue
            self._shown[trial.trial] = now
            if trial.status != "proposed":  # it says nothing yet: its values come with its first run
                self._console.print(
                    Text(line_of(trial, self._aims, unit), style=STYLES.get(trial.status, "")),
                    soft_wrap=True,
                    highlight=False,
                )


def line_of(trial: TrialState, aims: Sequence[Objective], unit: str) -> str:
    """One trial as one line: `t0003 running  step 8  eval.loss 0.4123  0.02 GPU-h  learning_rate=0.0001`."""
    parts = [f"{trial.trial} {trial.status}"]
    if trial.curve:
        parts.append(f"step {trial.step}")
        parts += [f"{aim.metric} {_value(trial, aim.metric)}" for aim in aims]
        parts.append(f"{hours_text(hours_of(trial, unit))} {unit}-h")
    else:
        parts.append(values_text(trial.values))
    if why := why_of(trial):
        parts.append(why)
    return "  ".join(part for part in parts if part)


def trials_table(
    trials: Mapping[str, TrialState], aims: Sequence[Objective], total: int | None = None
) -> Group:
    """The table: trial, status, step, metrics, hours, values, why stopped or waiting; and a line of sums."""
    unit = unit_of(trials.values())
    table = Table(box=box.SIMPLE, pad_edge=False, show_edge=False)
    table.add_column("trial", no_wrap=True)
    table.add_column("status", no_wrap=True)
    table.add_column("step", justify="right", no_wrap=True)
    for aim in aims:
        table.add_column(f"{aim.metric} ({aim.mode})", justify="right", no_wrap=True)
    table.add_column(f"{unit}-h", justify="right", no_wrap=True)
    table.add_column("values", overflow="ellipsis", no_wrap=True, ratio=3)
    table.add_column("why", overflow="ellipsis", no_wrap=True, ratio=2)
    best = best_so_far(trials, aims[0])
    keys = differing(trials)
    for trial in _first(trials, aims[0]):
        table.add_row(
            Text(trial.trial, style="bold" if trial.trial == best else ""),
            Text(trial.status, style=STYLES.get(trial.status, "")),
            str(trial.step) if trial.curve else "",
            *(_value(trial, aim.metric) if trial.curve else "" for aim in aims),
            hours_text(hours_of(trial, unit)),
            values_text({key: trial.values[key] for key in keys if key in trial.values}),
            why_of(trial),
        )
    counts = Counter(trial.status for trial in trials.values())
    sums = [f"{counts[status]} {status}" for status in STATUSES if counts[status]]
    hours = sum(hours_of(trial, unit) for trial in trials.values())
    began = min((trial.began for trial in trials.values()), default=0.0)
    changed = max((trial.changed for trial in trials.values()), default=0.0)
    of = f" of {total}" if total else ""
    text = f"{len(trials)}{of} trials: {', '.join(sums) or 'none yet'} · {hours_text(hours)} {unit}-h · {duration(max(0.0, changed - began))}"
    left_out = len(trials) - len(table.rows)
    more = f" · {left_out} not shown" if left_out else ""
    return Group(table, Text(text + more, style="dim"))


def why_of(trial: TrialState) -> str:
    """Why a trial was stopped, waits or failed; for one under way, where its newest run began if not at the model."""
    if trial.reason:
        return trial.reason
    newest = trial.segments[-1] if trial.segments else None
    if newest is None or trial.ended or not newest.reason:
        return ""
    fork = newest.forked_from
    from_ = f", from {fork.trial} at step {fork.step}" if fork and fork.trial != trial.trial else ""
    return newest.reason + from_


def differing(trials: Mapping[str, TrialState]) -> list[str]:
    """Keys whose values differ between trials (all, where there is one trial)."""
    keys = dict.fromkeys(key for trial in trials.values() for key in trial.values)
    if len(trials) < 2:
        return list(keys)
    return [key for key in keys if len({label(t.values.get(key)) for t in trials.values()}) > 1]


def values_text(values: Mapping[str, object]) -> str:
    """`learning_rate=0.0001 lora_r=8`, by the last part of each key where that is enough."""
    short = Counter(key.rpartition(".")[2] for key in values)
    names = {key: key.rpartition(".")[2] if short[key.rpartition(".")[2]] == 1 else key for key in values}
    return " ".join(f"{names[key]}={label(given)}" for key, given in values.items())


def hours_text(hours: float) -> str:
    """Hours with as many digits as they need: `12.3`, `0.21`, `0.0031`."""
    return f"{hours:.1f}" if hours >= 10 else f"{hours:.2g}" if hours < 0.1 else f"{hours:.2f}"


def best_so_far(trials: Mapping[str, TrialState], aim: Objective) -> str | None:
    """The trial that leads in one objective, whatever its state; None before the first value."""
    sign = -1.0 if aim.mode == "max" else 1.0
    found = [
        (sign * at, name) for name, trial in trials.items() if (at := value_of(trial, aim.metric)) is not None
    ]
    return min(found)[1] if found else None


def _first(trials: Mapping[str, TrialState], aim: Objective) -> list[TrialState]:
    """Trials in the order they are shown: as proposed where all fit, else those under way and then the best ones."""
    every = list(trials.values())
    if len(every) <= MAX_ROWS:
        return every
    sign = -1.0 if aim.mode == "max" else 1.0

    def place(trial: TrialState) -> tuple[bool, bool, float, str]:
        at = value_of(trial, aim.metric)
        return trial.ended, at is None, sign * (at or 0.0), trial.trial

    return sorted(every, key=place)[:MAX_ROWS]


def _value(trial: TrialState, metric: str) -> str:
    return value(value_of(trial, metric))
