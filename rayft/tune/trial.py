"""One trial as Ray Tune sees it: `step()` gives the next report of a run whose workers wait at each report for the decision.

A trial is a line of runs (segments): most have one; a fork of another trial's checkpoint, or another try with less memory, begins
the next. Which segment is the newest stands in the ledger before it begins, so that any restart finds it.
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray
from pyarrow.fs import LocalFileSystem
from ray.tune import Checkpoint, Trainable
from ray.tune.execution.placement_groups import PlacementGroupFactory

from rayft.checkpoint import committed_steps
from rayft.errors import MemoryExceededError, PreemptedError, RayftError, ResourceError
from rayft.report.log import read_all
from rayft.report.trials import Fork, TrialState, trials_of
from rayft.report.trials import Segment as Begun
from rayft.spec import Job
from rayft.storage import open_store
from rayft.train.run import absolute_uri
from rayft.tune.capacity import size_of
from rayft.tune.common import baselines_of, data_key, give_baseline, keep_baseline, prepare_data
from rayft.tune.desk import MORE_NODES
from rayft.tune.segment import Segment, run_name, trial_job

ASK_TIMEOUT_S = 900.0  # the desk may wait for a flush
ASK_EVERY_S = 0.5
LOOK_EVERY_S = 2.0
#: What a trial has spent is in every report; budgets hold between two, and what was spent before a kill is known.
SPENT_EVERY_S = 60.0
#: What the process that drives a trial takes; its workers are placed apart. Memory, since a machine's CPUs may all be theirs.
DRIVER = PlacementGroupFactory([{"memory": 500e6}])
MICRO_BATCH = "train.micro_batch_size"


@dataclass(frozen=True)
class About:
    """What every trial of a search is told. folder: where the search was started, which relative paths of the job go by.
    gated: whether runs wait at each report for what is decided. turn: steps after which a trial gives way to others, or None."""

    job: Job
    search_uri: str
    desk: Any
    folder: str
    gated: bool
    turn: int | None


class Leaving(Exception):
    """The search ends for now; the trial is not over."""


class NeverFits(ResourceError):
    """The nodes there are, or may come to be, cannot hold the trial."""


class Unshared(Exception):
    """What all trials share could not be made; error says why."""

    def __init__(self, error: RayftError) -> None:
        super().__init__(error.message)
        self.error = error


class TrialRun(Trainable):  # type: ignore[misc]
    """Drives the runs of one trial."""

    def setup(self, config: dict[str, Any], about: About) -> None:
        """Called by Ray Tune in the trial's own process. config: the trial's values, by key of the job file."""
        self.about, self.desk = about, about.desk
        self.search = open_store(about.search_uri)
        self._under_way: Segment | None = None
        self._take(config)
        _go_to(about.folder)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Called by Ray Tune where the process of a trial that is over or waits takes the next one: it has imported everything."""
        self.cleanup()
        self._take(new_config)
        return True

    def _take(self, config: dict[str, Any]) -> None:
        self.trial, self.values = str(self.trial_id), dict(config)
        self._pointer: Fork | None = None
        self._at: Fork | None = None
        self._reported = 0
        self._token = uuid.uuid4().hex
        self._ask("arrive", self.trial, self._token)

    def step(self) -> dict[str, Any]:
        """The next report; `done` with the last."""
        try:
            return self._next_report()
        except Leaving as leaving:
            if self._under_way is not None:
                self._tell_spent(self._under_way)
            self.cleanup()
            return {"left": str(leaving), "done": True}

    def save(self, checkpoint_dir: str | None = None) -> Any:
        """A pointer to the checkpoint of the report that was last given; the checkpoint itself stays in its run."""
        from ray.train._internal.session import _TrainingResult

        where = "" if self._at is None else f"{self._at.trial}/{self._at.run}/{self._at.step}"
        return _TrainingResult(Checkpoint(where, LocalFileSystem()), dict(self._last_result or {}))

    def restore(self, checkpoint_path: Any) -> None:
        """Go on from a pointer: the trial's own (it is where the run stands) or another trial's, which is forked."""
        checkpoint = getattr(checkpoint_path, "checkpoint", checkpoint_path)
        if checkpoint is not None and checkpoint.path:
            trial, run, step = checkpoint.path.split("/")
            self._pointer = None if trial == self.trial else Fork(trial, run, int(step))
        metrics = getattr(checkpoint_path, "metrics", None) or {}
        self._iteration = metrics.get("training_iteration", 0)
        self._restored = True

    def cleanup(self) -> None:
        """Called by Ray Tune when the trial is stopped, paused or over."""
        if self._under_way is not None:
            self._under_way.leave("the search goes on without this trial for now")
            self._under_way = None
        self._ask("release", self.trial, self._token)

    # -- one report --------------------------------------------------------------------------------------------

    def _next_report(self) -> dict[str, Any]:
        segment = self._under_way
        turn = self.about.turn
        if segment is not None and turn and segment.steps >= turn and self._ask("look", self.trial)[1]:
            # Others wait; the run stands at a checkpoint, so it can make room and go on later.
            segment.leave("other trials wait for their turn")
            self._ask("release", self.trial, self._token)
            segment = None
        try:
            segment = self._under_way = segment or self._begin()
        except RayftError as error:
            return self._failed(None, error)
        report = segment.pending()
        while report is None:
            try:
                self._start(segment)
                report = self._await(segment)
                continue
            except Unshared as error:
                return self._fatal(error)
            except PreemptedError as error:
                if self._stopping():
                    raise Leaving(self._stopping()) from error
                segment = self._anew(segment)  # its nodes go
            except ResourceError as error:
                if segment.ran or isinstance(error, NeverFits):
                    return self._failed(segment, error)
                # It was granted a slot, so it can fit: others of a shared cluster were faster, or nodes did not come in time.
                self._ask("tell", {"event": "waiting", "trial": self.trial, "reason": error.message})
                segment = self._anew(segment)
            except RayftError as error:
                # By the code: a run whose process was killed after its end says once more how it ended.
                self._tell_spent(segment)
                smaller = self._smaller(segment) if error.code == MemoryExceededError.code else None
                if smaller is None:
                    return self._failed(segment, error)
                segment = smaller
            self._under_way = segment
            report = segment.pending()
        step, numbers, done = report
        return self._result(segment, step, numbers, done=done)

    def _anew(self, segment: Segment) -> Segment:
        """The same run, to be started again when there is room."""
        self._tell_spent(segment)
        self._ask("release", self.trial, self._token)
        return self._begin()

    def _await(self, segment: Segment) -> tuple[int, dict[str, float], bool]:
        """The next report of a run under way. Raises what ended the run."""
        looked = told = time.monotonic()
        while True:
            report = segment.listen(ASK_EVERY_S)
            for baseline in segment.measured():
                keep_baseline(segment.store, self.search, baseline)
                self._ask("made", baseline.key)
            if segment.attempted:
                segment.attempted, segment.ran = False, True
                self._ask("placed", self.trial)
            if report is not None:
                return report
            if time.monotonic() - told > SPENT_EVERY_S:
                told = time.monotonic()
                self._tell_spent(segment)
            if time.monotonic() - looked > LOOK_EVERY_S:
                looked = time.monotonic()
                if reason := self._stopping():
                    segment.leave(reason)
                    raise Leaving(reason)

    def _tell_spent(self, segment: Segment) -> None:
        self._ask("tell", {"event": "spent", "trial": self.trial, **segment.spent()})

    def _result(
        self, segment: Segment, step: int, numbers: dict[str, float], *, done: bool
    ) -> dict[str, Any]:
        self._at = Fork(self.trial, segment.run, step)
        self._reported += 1
        if done:
            segment.leave("")
            self._ask("release", self.trial, self._token)
        spent = segment.spent()
        return {"step": step, "report": self._reported, "run": segment.run, **numbers, **spent, "done": done}

    def _failed(self, segment: Segment | None, error: RayftError) -> dict[str, Any]:
        self._ask("release", self.trial, self._token)
        failed = {"failed_code": error.code, "failed_reason": str(error.message), "done": True}
        if segment is None:
            return {"step": 0, "run": "", **failed}
        return {"step": segment.reports.last()[0], "run": segment.run, **segment.spent(), **failed}

    def _fatal(self, unshared: Unshared) -> dict[str, Any]:
        """What no trial could do without: it ends the search, and no trial."""
        self._ask("release", self.trial, self._token)
        error = unshared.error
        told = {"fatal_code": error.code, "fatal_reason": error.message, "fatal_remedy": error.remedy}
        return {"step": 0, "run": "", **told, "done": True}

    # -- segments ----------------------------------------------------------------------------------------------

    def _begin(self) -> Segment:
        """The trial's newest segment, or the next one where another trial's checkpoint is to be forked."""
        state = trials_of(read_all(self.search)).get(self.trial)
        segments = state.segments if state else []
        newest = segments[-1] if segments else None
        if newest is None:
            values, forked, reason = self.values, None, ""
        elif self._pointer is not None and not self._follows(segments):
            # A micro-batch that was made smaller stays so: the machine's memory is what it was.
            kept = {key: value for key, value in newest.values.items() if key == MICRO_BATCH}
            values, forked, reason = kept | self.values, self._pointer, "exploit"
        else:
            return self._segment(newest.run, newest.values, newest.forked_from, state)
        return self._new_segment(len(segments), values, forked, reason, state)

    def _follows(self, segments: list[Begun]) -> bool:
        """Whether the trial goes on from the pointer, with these values, already."""
        fork = next(
            (one for one in reversed(segments) if one.forked_from and one.forked_from.trial != self.trial),
            None,
        )
        if fork is None or fork.forked_from != self._pointer:
            return False
        return all(fork.values.get(key) == value for key, value in self.values.items())

    def _new_segment(
        self,
        number: int,
        values: dict[str, Any],
        forked: Fork | None,
        reason: str,
        state: TrialState | None,
    ) -> Segment:
        run = run_name(self.about.job.name, self.trial, number)
        trial_job(
            self.about.job, run, values, forked
        )  # what no job can be is refused before it is in the ledger
        row = {"event": "segment", "trial": self.trial, "run": run, "values": values}
        forked_from = None if forked is None else asdict(forked)
        self._ask("tell", {**row, "forked_from": forked_from, "reason": reason})
        return self._segment(run, values, forked, state)

    def _segment(
        self, run: str, values: dict[str, Any], forked: Fork | None, state: TrialState | None
    ) -> Segment:
        job = trial_job(self.about.job, run, values, forked)
        given = (
            [step for step, _ in state.curve if forked is None or step <= forked.step or run == state.run]
            if state
            else []
        )
        since = forked.step if forked else 0
        last = max([since, *given])
        self._reported = max(self._reported, len(given))
        spent = {
            name: getattr(state, name) if state else 0.0 for name in ("gpu_hours", "cpu_hours", "seconds")
        }
        return Segment(job, run, last, spent, gated=self.about.gated)

    def _smaller(self, segment: Segment) -> Segment | None:
        """The same trial with half the rows in a forward pass, from where it stood; None where there is nothing left to halve."""
        state = trials_of(read_all(self.search))[self.trial]
        tried = sum(one.reason.startswith("out of memory") for one in state.segments)
        tune = self.about.job.tune
        size = segment.job.train.micro_batch_size
        if size == 1 or tune is None or tried >= tune.oom_retries:
            return None
        last = segment.job.train.max_steps
        # From its last step nothing would be left to do but what ran out of memory.
        step = max((at for at in committed_steps(segment.store) if not last or at < last), default=None)
        forked = Fork(self.trial, segment.run, step) if step else None
        values = {**state.segments[-1].values, MICRO_BATCH: size // 2}
        reason = f"out of memory: micro_batch_size {size} -> {size // 2}"
        return self._new_segment(len(state.segments), values, forked, reason, state)

    def _start(self, segment: Segment) -> None:
        """Start the run if it is not under way: first what all trials share, then a slot."""
        if segment.started:
            return
        self._shared(segment)
        size = size_of(segment.job)
        fitted = time.monotonic()
        while reason := str(self._ask("ask_slot", self.trial, size)):
            if not reason.startswith(MORE_NODES):
                fitted = time.monotonic()
            elif time.monotonic() - fitted > segment.job.cluster.start_timeout_s:
                raise NeverFits(
                    f"The trial got no room within {segment.job.cluster.start_timeout_s:g} s; it waited for {reason}.",
                    "Ask for less per trial, or add nodes.",
                )
            self._pause()
        segment.start()

    def _shared(self, segment: Segment) -> None:
        job, name = segment.job, f"{self.trial}"
        if key := data_key(job):
            while (who := self._ask("share_of", key, name)) not in ("yours", "done"):
                self._pause()
            if who == "yours":
                try:
                    message = prepare_data(job, absolute_uri(str(job.data.cache)))
                except RayftError as error:
                    own = any(key.startswith(("data.", "model.")) for key in self.values)
                    raise error if own else Unshared(error) from error
                self._ask("made", key)
                self._ask("tell", {"kind": "event", "event": "data", "message": message})
        for baseline in baselines_of(job):
            if segment.store.exists(baseline.mark):
                # An earlier process of the trial may have been the one to measure it.
                if not give_baseline(segment.store, self.search, baseline):
                    keep_baseline(segment.store, self.search, baseline)
                self._ask("made", baseline.key)
                continue
            if segment.forked:
                continue
            while self._ask("share_of", baseline.key, name) not in ("yours", "done"):
                self._pause()
            if give_baseline(segment.store, self.search, baseline):
                self._ask("made", baseline.key)
            else:
                segment.shares.append(baseline)

    def _pause(self) -> None:
        """Between two questions. Raises Leaving where the search is to end."""
        if reason := self._stopping():
            raise Leaving(reason)
        time.sleep(ASK_EVERY_S)

    def _stopping(self) -> str:
        return str(self._ask("look", self.trial)[0])

    def _ask(self, method: str, *args: Any) -> Any:
        return ray.get(getattr(self.desk, method).remote(*args), timeout=ASK_TIMEOUT_S)


def _go_to(folder: str) -> None:
    """To where relative paths of the job are files: a submitted job's package where there is one, else the driver's folder."""
    package = ray.get_runtime_context().runtime_env.get("working_dir")
    target = os.environ.get("TUNE_ORIG_WORKING_DIR", "") if package else folder
    with contextlib.suppress(OSError):
        os.chdir(target if target and Path(target).is_dir() else Path.cwd())
