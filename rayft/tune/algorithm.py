"""Where Ray Tune's trials come from: first those that an earlier driver left unfinished, then new proposals, each in the ledger
before it starts."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.tune.experiment import Experiment, Trial
from ray.tune.experiment.config_parser import _create_trial_from_spec, _make_parser
from ray.tune.search.search_algorithm import SearchAlgorithm

from rayft.report.trials import TrialState
from rayft.spec import Job
from rayft.tune.budget import Spending
from rayft.tune.capacity import sizes_of
from rayft.tune.history import history_of
from rayft.tune.propose import Proposer
from rayft.tune.space import Space, job_of

ASK_TIMEOUT_S = 600.0
#: How often the cluster is asked for how many trials there is room.
ROOM_EVERY_S = 2.0


class Proposals(SearchAlgorithm):  # type: ignore[misc]
    """Trials `t0000`, `t0001`, … of a search.

    states: the ledger, as a function that returns it as of now. tell: writes a row of it, durable when it returns. at_once: the
    whole population starts together, as schedulers that compare one need it; else a trial is proposed when there is room for it,
    so that a search algorithm knows what the others came to.
    """

    def __init__(
        self,
        job: Job,
        proposer: Proposer,
        desk: Any,
        states: Callable[[], dict[str, TrialState]],
        tell: Callable[[dict[str, Any]], None],
        spending: Spending,
        *,
        at_once: bool,
    ) -> None:
        assert job.tune is not None
        self.job, self.tune = job, job.tune
        self._proposer, self._desk, self._states, self._tell = proposer, desk, states, tell
        self._spending, self._at_once = spending, at_once
        self._parser = _make_parser()
        self._spec: dict[str, Any] = {}
        before = states()
        self._again = [state for state in before.values() if not state.ended]
        self._number, self._total = len(before), Space(job).trials
        self._live: set[str] = set()
        self._asked, self._room = 0.0, 0
        self._least = sizes_of(job)[0]  # what a trial's own values ask for counts when it asks for its slot
        self.leaving: Callable[[], bool] = lambda: False

    @property
    def total_samples(self) -> int:
        return self._total

    def add_configurations(
        self, experiments: Experiment | list[Experiment] | dict[str, dict[str, Any]]
    ) -> None:
        """Called by Ray Tune once, with what all trials have in common."""
        experiment = experiments[0] if isinstance(experiments, Sequence) else experiments
        assert isinstance(experiment, Experiment)
        self._spec = experiment.spec

    def next_trial(self) -> Trial | None:
        """A trial to start, or None for now."""
        if self._finished or self.leaving():
            return None
        if self._spending.over():
            self._again = []
            self.set_finished()
            return None
        if not self._at_once and len(self._live) >= self._most():
            return None
        if self._again:
            state = self._again.pop(0)
            return self._trial(state.trial, state.values)
        if self._number >= self._total:
            self.set_finished()
            return None
        states = self._states()
        history = history_of(self.job, states.values())
        running = [state.values for state in states.values() if not state.ended]
        values = self._proposer.propose(self._number, history, running)
        if values is None:
            self.set_finished()
            return None
        name = f"t{self._number:04d}"
        job_of(self.job, values)  # what no job can be is refused before it is anywhere
        self._tell({"event": "proposed", "trial": name, "values": values})
        self._number += 1
        return self._trial(name, values)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Called by Ray Tune."""
        self._live.discard(trial_id)
        if error:
            self._desk.release.remote(trial_id)  # its process is dead and cannot say so

    def is_finished(self) -> bool:
        """Whether no trial comes any more."""
        if self.leaving():
            return True
        return bool(self._finished) or (not self._again and self._number >= self._total)

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Ray Tune keeps a copy for a restart of its own, and here the ledger has everything."""
        return {}

    def _trial(self, name: str, values: dict[str, Any]) -> Trial:
        self._live.add(name)
        spec = {**self._spec, "config": dict(values)}
        return _create_trial_from_spec(
            spec, self._parser, trial_id=name, evaluated_params=dict(values), experiment_tag=name
        )

    def _most(self) -> int:
        """How many trials may be under way: as many as there is room for, and at least one, which may wait."""
        if time.monotonic() - self._asked > ROOM_EVERY_S:
            self._asked = time.monotonic()
            self._room = ray.get(self._desk.room.remote(self._least), timeout=ASK_TIMEOUT_S)
        return max(1, self._room)
