"""A search whose folder is in S3 loses everything, and goes on from what is there."""

from __future__ import annotations

from pathlib import Path

import pytest

from rayft.storage import open_store
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
    tune = {"space": {RATE: {"loguniform": [1e-4, 1e-2]}}, "num_trials": 2, "max_concurrent": 1}
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
    assert [trial.status for trial in trials.values()] == ["done", "done"]
    assert curve_of(trials["t0000"]) == curve_of(first)
    assert [len(curve_of(trial)) for trial in trials.values()] == [3, 3]
    assert [row["trial"] for row in rows_of(uri, "segment")] == ["t0000", "t0001"]
    store = open_store(uri)
    assert all(store.exists(name) for name in ("best.yaml", "report.html", "model/config.json"))
