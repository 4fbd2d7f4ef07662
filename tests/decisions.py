"""Ray Tune's part of a search without Ray: trials whose reports are planned, a driver that may die after any row of the ledger,
and the next one, which goes on from there."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pyarrow.fs import LocalFileSystem
from ray.tune import Checkpoint
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler

from rayft.report.log import Row
from rayft.report.trials import TRIAL, trials_of
from rayft.spec import Job
from rayft.tune.scheduler import Kept
from rayft.tune.schedulers import make_scheduler

EVERY, METRIC = 4, "eval.loss"
#: In the place of a loss: the trial ends here by a failure of its own.
FAILS = "fails"
#: Losses of trials, one every EVERY steps; after the last one a trial is done.
Plan = Mapping[str, Sequence[Any]]
#: Reports in the order in which they come: trial, number from 1.
Order = Sequence[tuple[str, int]]


class Killed(Exception):
    """The driver died."""


class Driver:
    """One driver of a search: `Kept` around the job's scheduler, which is Ray's, called in the order in which Ray Tune calls it.

    rows: the ledger, which outlives the driver. dies_after: the count of rows at which it dies, right after the last is written.
    """

    def __init__(
        self, job: Job, rows: list[Row], dies_after: int | None = None, over: Callable[[], str] = lambda: ""
    ) -> None:
        assert job.tune is not None
        self.rows, self._dies_after = rows, dies_after
        self.before = trials_of(rows)
        self._epoch = max((row["epoch"] for row in rows), default=0) + 1
        self.inner = make_scheduler(job)
        self.kept = Kept(self.inner, job.tune, self.before, self.tell, over)
        self.before = trials_of(rows)  # with decisions that the driver before had not written
        self.trials: dict[str, Trial] = {}
        #: What was decided: trial, step, decision.
        self.decisions: list[tuple[str, int, str]] = []
        self.search_alg = None

    def tell(self, row: Row) -> None:
        self.rows.append({"time": float(len(self.rows)), "epoch": self._epoch, "kind": TRIAL, **row})
        if len(self.rows) == self._dies_after:
            raise Killed

    def written(self, *events: str) -> list[tuple[str, ...]]:
        """Trial, event and what it says, of rows of these events."""
        told = {"report": "step", "ended": "status", "waiting": "reason", "proposed": "trial"}
        rows = [row for row in self.rows if row["event"] in events]
        return [(row["trial"], row["event"], row[told[row["event"]]]) for row in rows]

    # -- what schedulers ask of Ray Tune's controller ------------------------------------------------------------

    def get_trials(self) -> list[Trial]:
        return list(self.trials.values())

    def get_live_trials(self) -> list[Trial]:
        return [trial for trial in self.trials.values() if not trial.is_finished()]

    def pause_trial(self, trial: Trial, should_checkpoint: bool = True) -> None:
        trial.set_status(Trial.PAUSED)

    def stop_trial(self, trial: Trial) -> None:
        assert trial.status == Trial.PAUSED
        self.kept.on_trial_remove(self, trial)
        trial.set_status(Trial.TERMINATED)

    def _schedule_trial_save(self, trial: Trial, result: Mapping[str, Any] | None = None) -> Checkpoint:
        return Checkpoint(f"{trial.trial_id}/{(result or {}).get('step')}", LocalFileSystem())

    # -- what Ray Tune's controller does -------------------------------------------------------------------------

    def add(self, name: str, config: Mapping[str, Any] | None = None) -> Trial:
        """A trial begins, or goes on: it is told to the scheduler and runs."""
        if name not in self.before:
            self.tell({"event": "proposed", "trial": name, "values": dict(config or {})})
        trial = Trial("rayft", trial_id=name, config=dict(config or {}), experiment_tag=name, stub=True)
        self.trials[name] = trial
        self.kept.on_trial_add(self, trial)
        trial.set_status(Trial.RUNNING)
        return trial

    def report(self, name: str, step: int, value: float | None, **more: Any) -> str:
        """A report but the last: what was decided; a trial that is to stop is over then."""
        trial, result = self.trials[name], self.result(name, step, value, **more)
        decision = self.kept.on_trial_result(self, trial, result)
        self.decisions.append((name, step, decision))
        trial.run_metadata.last_result = result
        if decision == TrialScheduler.STOP:
            self.complete(name, result)
        elif decision == TrialScheduler.PAUSE:
            trial.set_status(Trial.PAUSED)
        return decision

    def complete(self, name: str, result: Mapping[str, Any]) -> None:
        """The last report, or that at which a trial was stopped."""
        self.kept.on_trial_complete(self, self.trials[name], dict(result))
        self.trials[name].set_status(Trial.TERMINATED)

    def dies(self, name: str) -> None:
        """A trial's own process dies; Ray Tune starts it again."""
        trial = self.trials[name]
        trial.set_status(Trial.ERROR)
        self.kept.on_trial_error(self, trial)
        trial.set_status(Trial.PENDING)
        self.trials[name] = self.trials.pop(name)
        self.kept.on_trial_add(self, trial)
        trial.set_status(Trial.RUNNING)

    def result(self, name: str, step: int, value: float | None, **more: Any) -> dict[str, Any]:
        """As `TrialRun` and Ray Tune make it."""
        report = step // EVERY
        own = {"step": step, "report": report, "run": f"sweep-{name}", "training_iteration": report}
        spent = {"gpu_hours": 0.0, "cpu_hours": 0.01 * step, "seconds": 3.0 * step}
        metrics = {} if value is None else {METRIC: value, "train.loss": 1.0}
        return {**own, **spent, **metrics, "config/train.learning_rate": 0.1, "pid": 7, "done": False, **more}

    def play(self, plan: Plan, order: Order) -> None:
        """The reports of a plan, from where the ledger stands: trials that go on are there first, others when they begin."""
        for name, state in self.before.items():
            if not state.ended:
                self.add(name)
        for name, number in order:
            if name not in self.before and name not in self.trials:
                self.add(name)
            step, last = number * EVERY, number == len(plan[name])
            trial = self.trials.get(name)
            told = self.before[name].step if name in self.before else 0
            # A run waits at the report after the last one that is in the ledger; its end comes again.
            if trial is None or trial.is_finished() or (step <= told and not last):
                continue
            trial.set_status(Trial.RUNNING)
            value = plan[name][number - 1]
            if value == FAILS:
                failed = {"failed_code": 6, "failed_reason": "the loss is NaN"}
                self.complete(name, self.result(name, step, None, **failed))
            elif last:
                self.complete(name, self.result(name, step, value))
            else:
                self.report(name, step, value)


def uninterrupted(job: Job, plan: Plan, order: Order) -> list[Row]:
    """The ledger of a search whose driver lived."""
    rows: list[Row] = []
    Driver(job, rows).play(plan, order)
    return rows


def interrupted(job: Job, plan: Plan, order: Order, at: int) -> list[Row]:
    """The ledger of a search whose driver died after `at` rows, and was replaced."""
    rows: list[Row] = []
    try:
        Driver(job, rows, dies_after=at).play(plan, order)
    except Killed:
        Driver(job, rows).play(plan, order)
    return rows


def outcome(rows: Sequence[Row]) -> dict[str, Any]:
    """What a search came to: of each trial its end, why, where, and the steps that it reported."""
    return {
        name: (state.status, state.reason, state.step, [step for step, _ in state.curve])
        for name, state in trials_of(rows).items()
    }


def some_plan(seed: int, *, fail: bool = False, trials: int = 6) -> dict[str, list[Any]]:
    """Noisy falling losses, some trials better than others; fail: some diverge on the way."""
    draw = random.Random(seed)
    plan: dict[str, list[Any]] = {}
    for number in range(trials):
        base = draw.uniform(0.5, 2)
        losses: list[Any] = [round(base + 2 / (n + 1) + draw.uniform(-0.4, 0.4), 3) for n in range(6)]
        if fail and draw.random() < 0.4:
            losses = [*losses[: draw.randrange(1, 5)], FAILS]
        plan[f"t{number:04d}"] = losses
    return plan


def in_turns(plan: Plan, at_once: int = 3) -> Order:
    """The order on a cluster with so many places where every report takes as long."""
    waiting, order = list(plan), list[tuple[str, int]]()
    running: dict[str, int] = {}
    while waiting or running:
        while waiting and len(running) < at_once:
            running[waiting.pop(0)] = 0
        for name in list(running):
            running[name] += 1
            order.append((name, running[name]))
            if running[name] == len(plan[name]):
                del running[name]
    return order


def at_random(plan: Plan, seed: int) -> Order:
    """An order in which some trials are slow and others fast."""
    names = [name for name, losses in plan.items() for _ in losses]
    random.Random(seed).shuffle(names)
    return [(name, names[: at + 1].count(name)) for at, name in enumerate(names)]
