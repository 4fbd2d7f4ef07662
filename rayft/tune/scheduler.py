"""A scheduler of Ray Tune's that survives: every report and every end goes into the ledger before anything follows from it, and a
new driver's scheduler is first told what the ledger holds."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import PopulationBasedTraining, TrialScheduler

from rayft.errors import DataError, JobError, RayftError, StorageError, WorkerError
from rayft.report.trials import TrialState, number
from rayft.spec.tune import Tune
from rayft.tune.history import results_in_order, results_of

#: What Ray Tune and rayft add to a result, which is no metric.
NO_METRICS = (
    "step", "report", "run", "done", "left", "failed_code", "failed_reason", "trial_id", "training_iteration", "timestamp",
    "date", "time_this_iter_s", "time_total_s", "pid", "hostname", "node_ip", "time_since_restore", "iterations_since_restore",
    "gpu_hours", "cpu_hours", "seconds", "should_checkpoint", "experiment_tag",
)  # fmt: skip
#: Metrics that only a trial's last report has.
AT_THE_END = ("suite.", "change.")
#: Keys that decide what a run measures: where they are searched, one trial may report what another does not.
MEASURES = re.compile(r"(method|dpo|reward|rewards|rl|rollout)(\.|$)")


class Kept(TrialScheduler):  # type: ignore[misc]
    """Around one of Ray's own schedulers.

    states: what the ledger holds at the start, by trial. tell: writes a row of it, durable when it returns. over: says which budget
    is spent, or "". ASHA and the median rule are told of all earlier reports, so that they decide as they would have; HyperBand and
    populations, whose memory is of trials that are there, begin anew with those that go on (populations at their next interval).
    """

    def __init__(
        self,
        inner: TrialScheduler,
        tune: Tune,
        states: dict[str, TrialState],
        tell: Callable[[dict[str, Any]], None],
        over: Callable[[], str],
    ) -> None:
        super().__init__()
        self.inner, self.tune, self._tell, self._over = inner, tune, tell, over
        self._past = dict(states)
        #: (trial, run) -> step of its last report in the ledger; a fork may report a step again that its trial had before.
        self._told = {
            (name, segment.run): max(segment.reports)
            for name, state in states.items()
            for segment in state.segments
            if segment.reports
        }
        self._ended = {name for name, state in states.items() if state.ended}
        #: Metrics that any trial has reported.
        self._known = {
            metric
            for state in states.values()
            for segment in state.segments
            for metrics in segment.reports.values()
            for metric in metrics
        }
        self._running: set[str] = set()
        self._added: set[str] = set()
        #: Trials that a spent budget stopped before their end.
        self._left: set[str] = set()
        self._depth = 0
        #: What makes going on pointless, found while trials run.
        self.fatal: RayftError | None = None
        self._replay()

    def under_way(self) -> bool:
        """Whether a trial runs that is neither over nor waiting nor has left."""
        return bool(self._running)

    @property
    def metric(self) -> str | None:
        return self.inner.metric

    @property
    def supports_buffered_results(self) -> bool:
        return False

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        """The inner scheduler has its own."""
        return True

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """Called by Ray Tune, again for a trial whose process is started again; of that the inner scheduler need not know."""
        self._running.add(trial.trial_id)
        if trial.trial_id in self._added:
            return
        self._added.add(trial.trial_id)
        self._ask("on_trial_add", tune_controller, trial)
        past = self._past.get(trial.trial_id)
        if past is None:
            return
        if self.tune.scheduler == "median":
            for result in self._results(past):
                self._ask("on_trial_complete", tune_controller, trial, result)  # which only remembers it
        if isinstance(self.inner, PopulationBasedTraining):
            state = self.inner._trial_state[trial]
            state.last_perturbation_time = last_compared(past, self.inner._perturbation_interval)

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Called by Ray Tune with each report but the last."""
        self._running.add(trial.trial_id)
        step = int(result["step"])
        again = step <= self._told.get((trial.trial_id, str(result["run"])), -1)
        if not again:
            self._report(trial, result)
            if reason := self._lacks(result):
                self._end(trial, "failed", JobError.code, reason, step)
                return str(TrialScheduler.STOP)
        if self._over():
            # It is saved, and not over: what a spent budget leaves unfinished goes on when the search is given more.
            self._left.add(trial.trial_id)
            return str(TrialScheduler.STOP)
        if again or self.fatal is not None or number(result.get(self.tune.aims[0].metric)) is None:
            return str(TrialScheduler.CONTINUE)
        decision = str(self._ask("on_trial_result", tune_controller, trial, result))
        if decision == TrialScheduler.STOP:
            self._end(trial, "stopped", 0, f"{self.tune.scheduler}: step {step}", step)
        elif decision == TrialScheduler.PAUSE:
            self._running.discard(trial.trial_id)
            reason = f"{self.tune.scheduler} to compare it"
            self._tell({"event": "waiting", "trial": trial.trial_id, "reason": reason})
        return decision

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        """Called by Ray Tune with a trial's last report, and for one that was stopped."""
        self._running.discard(trial.trial_id)
        if result.get("left") or trial.trial_id in self._left:
            return  # what other trials are compared with stays as it is: this one goes on later
        if "fatal_reason" in result:
            error = {JobError.code: JobError, DataError.code: DataError}.get(
                int(result["fatal_code"]), StorageError
            )
            self.fatal = self.fatal or error(str(result["fatal_reason"]), str(result["fatal_remedy"]))
            return
        if "failed_code" in result:
            reason = str(result["failed_reason"])
            self._end(trial, "failed", int(result["failed_code"]), reason, int(result["step"]), result)
            self._ask("on_trial_error", tune_controller, trial)
            return
        if trial.trial_id not in self._ended:
            if int(result["step"]) > self._told.get((trial.trial_id, str(result["run"])), -1):
                self._report(trial, result)
            if reason := self._lacks(result, last=True):
                self._end(trial, "failed", JobError.code, reason, int(result["step"]))
            else:
                self._end(trial, "done", 0, "", int(result["step"]))
        if number(result.get(self.tune.aims[0].metric)) is not None:
            self._ask("on_trial_complete", tune_controller, trial, result)
        else:
            self._ask("on_trial_error", tune_controller, trial)

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        """Called by Ray Tune where a trial's own process died: each time (it is started again), or once too often."""
        if trial.status == Trial.ERROR:  # what a trial is that Ray Tune is about to add anew
            again = {
                "event": "waiting",
                "trial": trial.trial_id,
                "reason": "its process died and is started again",
            }
            self._tell(again)
            return
        reason = (
            trial.get_error() and str(trial.get_error()).strip().splitlines()[-1]
        ) or "its process failed"
        self._running.discard(trial.trial_id)
        self._end(trial, "failed", WorkerError.code, reason, int((trial.last_result or {}).get("step", 0)))
        self._ask("on_trial_error", tune_controller, trial)

    def on_trial_remove(self, tune_controller: Any, trial: Trial) -> None:
        """Called by Ray Tune for a trial that is stopped while it waits."""
        if trial.trial_id not in self._ended:
            step = self._last_step(trial.trial_id)
            self._end(trial, "stopped", 0, f"{self.tune.scheduler}: step {step}", step)
        self._ask("on_trial_remove", tune_controller, trial)

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        """Called by Ray Tune."""
        chosen = self._ask("choose_trial_to_run", tune_controller)
        if chosen is not None:
            self._running.add(chosen.trial_id)
        return chosen

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Ray Tune keeps a copy for a restart of its own, and here the ledger has everything."""
        return {}

    def debug_string(self) -> str:
        return str(self.inner.debug_string())

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the ledger has it."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: the ledger has it."""

    # -- the ledger --------------------------------------------------------------------------------------------

    def _ask(self, method: str, *arguments: Any) -> Any:
        """Call the inner scheduler, which may call this one again."""
        self._depth += 1
        try:
            return getattr(self.inner, method)(*arguments)
        finally:
            self._depth -= 1
            if not self._depth:
                # HyperBand marks a bracket for the length of a call, and forgets to take that back.
                for band in getattr(self.inner, "_hyperbands", ()):
                    for bracket in filter(None, band):
                        bracket.is_being_processed = False

    def _replay(self) -> None:
        """Tell the inner scheduler what the ledger holds, in the order in which it came."""
        asha = self.tune.scheduler == "asha"
        if not asha and self.tune.scheduler != "median":
            return
        stand_ins = {name: _Gone(name) for name in self._past}
        for stand_in in stand_ins.values():
            self.inner.on_trial_add(None, stand_in)
        for state, result in results_in_order(self._past.values()):
            if self.tune.aims[0].metric not in result:
                continue
            last, stand_in = result["step"] == state.curve[-1][0], stand_ins[state.trial]
            undecided = last and not state.ended
            if undecided or (asha and not (last and state.status == "done")):
                decision = str(self.inner.on_trial_result(_NoController(), stand_in, result))
                if undecided and decision == TrialScheduler.STOP:
                    # A driver died between a report and what followed from it.
                    self._end(stand_in, "stopped", 0, f"{self.tune.scheduler}: step {state.step}", state.step)
            else:
                self.inner.on_trial_complete(None, stand_in, result)  # which only remembers it
        if not asha:  # those that go on come with what they have reported
            for name in stand_ins.keys() - self._ended:
                self.inner._results.pop(stand_ins[name], None)

    def _results(self, state: TrialState) -> list[dict[str, Any]]:
        return [one for one in results_of(state) if self.tune.aims[0].metric in one]

    def _last_step(self, trial: str) -> int:
        return max((step for (name, _), step in self._told.items() if name == trial), default=0)

    def _report(self, trial: Trial, result: dict[str, Any]) -> None:
        metrics = {
            name: value
            for name, value in result.items()
            if name not in NO_METRICS
            and not name.startswith("config/")
            and isinstance(value, (int, float))
            and not isinstance(value, bool)
        }
        spent = {name: result.get(name, 0.0) for name in ("gpu_hours", "cpu_hours", "seconds")}
        row = {"event": "report", "trial": trial.trial_id, "run": result["run"], "step": int(result["step"])}
        self._tell({**row, "metrics": metrics, **spent})
        self._known |= metrics.keys()
        self._told[(trial.trial_id, str(result["run"]))] = int(result["step"])

    def _end(
        self,
        trial: Trial,
        status: str,
        code: int,
        reason: str,
        step: int,
        spent: dict[str, Any] | None = None,
    ) -> None:
        self._ended.add(trial.trial_id)
        row = {
            "event": "ended",
            "trial": trial.trial_id,
            "status": status,
            "code": code,
            "reason": reason,
            "step": step,
        }
        used = {name: (spent or {}).get(name) for name in ("gpu_hours", "cpu_hours", "seconds")}
        self._tell(row | {name: value for name, value in used.items() if value is not None})

    def _lacks(self, result: dict[str, Any], *, last: bool = False) -> str:
        """Why the trial of this report has failed: it lacks what trials are compared or bounded by; "" where it has all of it.

        Where no trial has ever reported it and none would, since no value of the space decides what is measured, nothing could be
        compared: that ends the search, and no trial.
        """
        wanted = [aim.metric for aim in self.tune.aims if last or not aim.metric.startswith(AT_THE_END)]
        wanted += [name for name in self.tune.constraints if last or name.startswith("eval.")]
        missing = next((name for name in wanted if name not in result), "")
        if not missing or self.fatal is not None:
            return ""
        if missing in self._known or any(map(MEASURES.match, self.tune.space)):
            return f"it reports no {missing}"
        known = ", ".join(
            sorted(key for key in result if key not in NO_METRICS and "/" not in key and "." in key)
        )
        self.fatal = JobError(
            f"tune: no report has the metric {missing!r}; the first one has {known or 'none'}.",
            "Name one of these in tune.metric, tune.objectives and tune.constraints.",
        )
        return ""


def last_compared(state: TrialState, interval: float) -> int:
    """The step at which a trial of a population was last compared with the others: a population has no memory of a driver before."""
    compared = 0
    for step, _ in state.curve:
        if step - compared >= interval:
            compared = step
    return compared


class _Gone:
    """Stands for a trial of an earlier driver: schedulers that keep results know trials by id or identity alone."""

    def __init__(self, trial_id: str) -> None:
        self.trial_id, self.status = trial_id, Trial.TERMINATED

    def is_finished(self) -> bool:
        return True


class _NoController:
    """Stands for Ray Tune's controller while earlier reports are told again: no trial is there yet that could run instead."""

    def get_live_trials(self) -> list[Trial]:
        return []
