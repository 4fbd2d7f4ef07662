"""Ray's schedulers in real searches: what they pause goes on where it stood, what they stop is over, what they fork is another run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rayft.cli import main
from rayft.report.trials import TrialState
from rayft.storage import open_store
from tests.cluster.steps import prepare_folder
from tests.runs import losses, write_job
from tests.searches import RATE, curve_of, rows_of, search_of, trials_in

pytestmark = [pytest.mark.slow, pytest.mark.full, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> Path:
    return prepare_folder(tmp_path_factory.mktemp("tune"))


def searched(folder: Path, name: str, tune: dict[str, Any], steps: int) -> dict[str, TrialState]:
    job = search_of(folder, name, tune, train={"max_steps": steps})
    assert main(["tune", str(write_job(job, folder / f"{name}.yaml"))]) == 0
    return trials_in(folder / "runs" / name)


def test_hyperband_pauses_and_what_it_chooses_goes_on(folder: Path) -> None:
    """Of four reports: the first bracket of three runs to the end, the second is compared at its second report."""
    rates = [3e-3, 2e-3, 1e-3, 1e-2, 1e-6, 1e-7]
    tune = {
        "space": {RATE: {"grid": rates}},
        "searcher": "grid",
        "scheduler": "hyperband",
        "reduction_factor": 2,
        "max_concurrent": 2,
    }
    trials = searched(folder, "band", tune, 8)
    assert [trial.status for trial in trials.values()][:3] == ["done"] * 3
    second = [trials[f"t{number:04d}"] for number in (3, 4, 5)]
    assert second[0].status == "done"
    assert {trial.status for trial in second[1:]} <= {"stopped", "done"}
    stopped = [trial for trial in second if trial.status == "stopped"]
    assert stopped
    assert all((trial.step, trial.reason) == (4, "hyperband: step 4") for trial in stopped)
    waited = {
        row["trial"] for row in rows_of(folder / "runs" / "band", "waiting") if "to compare" in row["reason"]
    }
    assert {trial.trial for trial in second} & waited
    for trial in trials.values():
        # Whatever pauses there were, it is one run, and no step of it was taken twice.
        assert [segment.run for segment in trial.segments] == [f"band-{trial.trial}"]
        steps = losses(open_store(folder / "runs" / "band" / "trials" / f"band-{trial.trial}"))
        assert sorted(steps) == list(range(1, trial.step + 1))
        assert [step for step, _ in curve_of(trial)] == list(range(2, trial.step + 1, 2))


def test_the_median_rule_stops_what_is_worse_than_most(folder: Path) -> None:
    tune = {
        "space": {RATE: {"grid": [1e-2, 9e-3, 1e-7]}},
        "searcher": "grid",
        "scheduler": "median",
        "max_concurrent": 1,
    }
    trials = searched(folder, "median", tune, 6)
    assert [trial.status for trial in trials.values()] == ["done", "done", "stopped"]
    assert trials["t0002"].reason.startswith("median: step ")


def test_pb2_forks_within_its_bounds(folder: Path) -> None:
    low, high = 1e-7, 1e-2
    tune = {
        "space": {RATE: {"loguniform": [low, high]}},
        "scheduler": "pb2",
        "quantile": 0.5,
        "num_trials": 2,
        "max_concurrent": 1,
    }
    trials = searched(folder, "pb2", tune, 8)
    assert {trial.status for trial in trials.values()} == {"done"}
    forks = [segment for trial in trials.values() for segment in trial.forks]
    assert forks, "no trial has exploited another"
    assert all(low <= segment.values[RATE] <= high for segment in forks)
