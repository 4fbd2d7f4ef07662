"""Ledgers of searches as their drivers write them, for tests of what is made from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rayft.report.log import Row, RunLog
from rayft.report.trials import TRIAL
from rayft.spec import Job, parse_job
from rayft.spec.tune import Objective
from rayft.storage import Store

#: What most searches here aim at, and a metric that some bound.
LOSS = [Objective(metric="eval.loss")]
CHANGE = "change.general.bits_per_byte"


def search_job(**tune: Any) -> Job:
    """The job of a search over a learning rate and a rank, 24 steps a trial, with what `tune` says otherwise."""
    space = {
        "train.learning_rate": {"loguniform": [1e-5, 1e-2]},
        "adapter.lora_r": {"choice": [4, 8, 16]},
    }
    return parse_job(
        {
            "name": "sweep",
            "storage": "runs",
            "model": {"path": "org/<model>"},
            "adapter": {"type": "lora"},
            "data": {"train": [{"path": "a"}], "eval": [{"path": "b"}]},
            "train": {"max_steps": 24},
            "eval": {
                "every_steps": 4,
                "suites": [{"name": "general", "type": "bits_per_byte", "path": "x", "forgetting": True}],
            },
            "tune": {"space": space, "metric": "eval.loss", **tune},
        }
    )


class Ledger:
    """Rows of a search; times go on by a second a row. `epoch` is the driver that writes."""

    def __init__(self, began: float = 1.7e9) -> None:
        self.rows: list[Row] = []
        self.epoch, self._time = 1, began

    def add(self, event: str, trial: str = "", **fields: Any) -> None:
        """One row; events without a trial are of the search."""
        self._time += 1.0
        kind = {"kind": TRIAL, "trial": trial} if trial else {"kind": "event", "message": ""}
        self.rows.append(
            {"time": self._time, "epoch": self.epoch, "attempt": 1, **kind, "event": event, **fields}
        )

    def begin(self, trial: str, values: Mapping[str, Any], run: str | None = None) -> None:
        """A trial is proposed and its first run begins."""
        self.add("proposed", trial, values=dict(values))
        self.segment(trial, run or f"sweep-{trial}", values)

    def segment(
        self,
        trial: str,
        run: str,
        values: Mapping[str, Any],
        forked: tuple[str, str, int] | None = None,
        reason: str = "",
    ) -> None:
        """A run of a trial begins; forked: trial, run and step."""
        fork = dict(zip(("trial", "run", "step"), forked, strict=True)) if forked else None
        self.add("segment", trial, run=run, values=dict(values), forked_from=fork, reason=reason)

    def report(
        self, trial: str, step: int, loss: float | None, run: str | None = None, **metrics: Any
    ) -> None:
        """A report with an evaluation loss; every step takes a hundredth of a CPU-hour."""
        self.add(
            "report",
            trial,
            run=run or f"sweep-{trial}",
            step=step,
            metrics={"eval.loss": loss, **{name.replace("__", "."): v for name, v in metrics.items()}},
            gpu_hours=0.0,
            cpu_hours=0.01 * step,
            seconds=3.0 * step,
        )

    def end(self, trial: str, status: str = "done", reason: str = "", step: int = 24, code: int = 0) -> None:
        self.add("ended", trial, status=status, code=code, reason=reason, step=step)

    def curve(self, trial: str, losses: Sequence[float | None], every: int = 4, **last: Any) -> None:
        """Reports of a trial, one every few steps; `last` are metrics of the last."""
        for number, loss in enumerate(losses, start=1):
            self.report(trial, every * number, loss, **(last if number == len(losses) else {}))

    def write(self, store: Store) -> None:
        """The rows into a run log, as the search's driver writes it (what it stamps itself is its own)."""
        log = RunLog(store, 1, lambda: True)
        for row in self.rows:
            log.append(row)
        log.close()


def asha_search(trials: int = 8) -> Ledger:
    """A finished search of which half was stopped at step 8, two failed, and one each has an odd value."""
    ledger = Ledger()
    ledger.add("open", began=1.7e9)
    for number in range(trials):
        name = f"t{number:04d}"
        rate = 1e-5 * 10 ** (3 * number / max(1, trials - 1))
        ledger.begin(name, {"train.learning_rate": rate, "adapter.lora_r": (4, 8, 16)[number % 3]})
        at = 1.0 + abs(number - trials * 0.6) / trials
        losses = [at + 1.5 / (step + 1) for step in range(6)]
        if number == trials - 1:
            ledger.report(name, 4, None)
            ledger.end(name, "failed", "the loss is NaN at step 6", 4, code=6)
        elif number % 2 == 0:
            ledger.curve(name, losses[:2])
            ledger.end(name, "stopped", "asha: rung of step 8", 8)
        else:
            ledger.curve(
                name, losses, suite__general__bits_per_byte=0.9, change__general__bits_per_byte=0.01 * number
            )
            ledger.end(name)
    ledger.add("end", code=0)
    return ledger


def pbt_search() -> Ledger:
    """Four trials; t0000 goes on from t0002 at step 8, and t0001 from t0000 at step 16."""
    ledger = Ledger()
    rates = {"t0000": 1e-5, "t0001": 2e-5, "t0002": 1e-3, "t0003": 4e-4}
    for name, rate in rates.items():
        ledger.begin(name, {"train.learning_rate": rate})
    for step in (4, 8):
        for number, name in enumerate(rates):
            ledger.report(name, step, 3.0 - step / 8 - (0.2 * number if number != 3 else 0.3))
    ledger.segment(
        "t0000", "sweep-t0000-1", {"train.learning_rate": 8e-4}, ("t0002", "sweep-t0002", 8), "exploit"
    )
    for step in (12, 16):
        for number, name in enumerate(rates):
            run = "sweep-t0000-1" if name == "t0000" else None
            ledger.report(name, step, (1.2 if name == "t0000" else 2.8 - 0.2 * number) - step / 40, run=run)
    ledger.segment(
        "t0001", "sweep-t0001-1", {"train.learning_rate": 9e-4}, ("t0000", "sweep-t0000-1", 16), "exploit"
    )
    for step in (20, 24):
        for number, name in enumerate(rates):
            run = {"t0000": "sweep-t0000-1", "t0001": "sweep-t0001-1"}.get(name)
            base = {"t0000": 1.2, "t0001": 1.1}.get(name, 2.8 - 0.2 * number)
            ledger.report(name, step, base - step / 40, run=run)
    for name in rates:
        ledger.end(name)
    return ledger


def planted(count: int) -> Ledger:
    """A finished search in which the learning rate decides and the rank does nothing."""
    ledger = Ledger()
    for number in range(count):
        rate = 1e-5 * 10 ** (3 * ((number * 7) % count) / count)
        ledger.begin(
            f"t{number:04d}", {"train.learning_rate": rate, "adapter.lora_r": (4, 8, 16)[number % 3]}
        )
        ledger.curve(f"t{number:04d}", [5.0, 3.0 - 200 * rate])
        ledger.end(f"t{number:04d}", step=8)
    return ledger
