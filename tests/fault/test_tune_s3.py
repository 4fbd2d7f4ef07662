"""A search whose folder is in S3 loses everything, and goes on from what is there."""

from __future__ import annotations

from pathlib import Path

import pytest

from rayft.spec import load_job
from rayft.storage import open_store
from rayft.tune.history import history_of
from rayft.tune.propose import proposer_of
from tests.cluster.steps import prepare_folder
from tests.runs import rayft, wait_until, write_job
from tests.s3 import FaultyProxy
from tests.searches import RATE, curve_of, rows_of, search_of, trials_in

pytestmark = [pytest.mark.slow, pytest.mark.full, pytest.mark.timeout(900)]

SEARCH_S = 420


def test_a_search_in_s3_through_faults_and_a_kill(
    tmp_path: Path, s3_bucket: str, s3_proxy: FaultyProxy
) -> None:
    folder = prepare_folder(tmp_path)
    tune = {
        "space": {RATE: {"loguniform": [1e-4, 1e-2]}},
        "searcher": "optuna",
        "scheduler": "asha",
        "num_trials": 6,
        "max_concurrent": 1,
    }
    path = write_job(search_of(folder, "far", tune, storage=f"s3://{s3_bucket}/runs"), folder / "far.yaml")
    uri = f"s3://{s3_bucket}/runs/far"
    for fault in ("slow_down", "reset"):
        s3_proxy.add(fault, times=3)  # type: ignore[arg-type]

    def second_under_way() -> bool:
        return any(row["trial"] == "t0001" for row in rows_of(uri, "report"))

    with rayft("tune", str(path), log=folder / "far.log") as search:
        wait_until("a report of the second trial", second_under_way, search, SEARCH_S)
        search.kill_tree()
    first = trials_in(uri)["t0000"]
    with rayft("tune", str(path), "--takeover", log=folder / "far.log") as search:
        assert search.wait(SEARCH_S) == 0, search.output()
    trials = trials_in(uri)
    assert {trial.status for trial in trials.values()} <= {"done", "stopped"}
    assert (trials["t0000"].status, curve_of(trials["t0000"])) == ("done", curve_of(first))
    for trial in trials.values():
        steps = [step for step, _ in curve_of(trial)]
        assert steps == [2, 4, 6][: len(steps)]
        assert trial.status == "stopped" or len(steps) == 3
    assert [row["trial"] for row in rows_of(uri, "segment")] == sorted(trials)
    # Rebuilt from what lies in S3, Optuna proposes what it would have.
    job = load_job(path, [])
    for number in (4, 5):
        before = [state for name, state in trials.items() if name < f"t{number:04d}"]
        expected = proposer_of(job).propose(number, history_of(job, before))
        assert trials[f"t{number:04d}"].values == expected
    store = open_store(uri)
    assert all(store.exists(name) for name in ("best.yaml", "report.html", "model/config.json"))
