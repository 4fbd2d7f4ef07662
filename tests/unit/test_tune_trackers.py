"""Searches in TensorBoard, MLflow and Weights & Biases."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from rayft.report.trackers import Trackers
from rayft.report.trials import trials_of
from rayft.spec import Log
from rayft.storage import LocalStore
from rayft.tune.best import run_folder
from rayft.tune.choose import choose
from rayft.tune.trackers import close_parent, open_parent, trial_log
from tests.ledgers import LOSS, asha_search, search_job
from tests.unit.test_report_trackers import leveldb_records


def trial_run(search: Any, store: LocalStore, number: int) -> None:
    """A trial's run as its recorder feeds the trackers."""
    values = {"train.learning_rate": 10.0**-number, "adapter.target_modules": ["q_proj"]}
    job = search.model_copy(
        update={"name": f"sweep-t{number:04d}", "log": trial_log(search, values), "tune": None}
    )
    failures: list[str] = []
    for step in (1, 2):  # two processes, the second after a restart
        trackers = Trackers(job, run_folder(store, job.name), failures.append)
        trackers.log({"kind": "eval", "step": step, "loss": 0.5, "tokens": 9, "time": 1.7e9})
        trackers.close(0)
    assert failures == []


def test_tensorboard_has_hparams(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.metadata import (
        SESSION_START_INFO_TAG,
        parse_session_start_info_plugin_data,
    )

    search = search_job().model_copy(update={"log": Log(tensorboard=True)})
    trial_run(search, LocalStore(tmp_path), 3)
    events = EventAccumulator(str(tmp_path / "trials" / "sweep-t0003" / "tensorboard"))
    events.Reload()
    content = events.SummaryMetadata(SESSION_START_INFO_TAG).plugin_data.content
    found = parse_session_start_info_plugin_data(content).hparams
    assert found["train.learning_rate"].number_value == 1e-3
    assert found["adapter.target_modules"].string_value == '["q_proj"]'


def test_mlflow_has_a_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed (pip install rayft[mlflow])")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri, store = (tmp_path / "mlruns").as_uri(), LocalStore(tmp_path / "sweep")
    search = search_job().model_copy(update={"log": Log(mlflow=uri)})
    for _ in range(2):
        assert open_parent(search, store) == ""
    for number in (1, 2):
        trial_run(search, store, number)
    assert close_parent(search, store, choose(trials_of(asha_search().rows), LOSS, {}), 0) == ""
    client = mlflow.MlflowClient(tracking_uri=uri)
    runs = {
        run.info.run_name: run
        for run in client.search_runs([client.get_experiment_by_name("rayft").experiment_id])
    }
    assert sorted(runs) == ["sweep", "sweep-t0001", "sweep-t0002"]
    parent = runs.pop("sweep")
    assert {run.data.tags["mlflow.parentRunId"] for run in runs.values()} == {parent.info.run_id}
    assert (parent.info.status, parent.data.metrics["best/eval/loss"]) == ("FINISHED", pytest.approx(1.275))
    assert parent.data.tags["rayft.best_trial"] == "t0005"


def test_a_tracker_that_is_away_does_not_stop_a_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setattr("rayft.tune.trackers.TIMEOUT_S", 2.0)
    search = search_job().model_copy(update={"log": Log(mlflow="http://127.0.0.1:9")})
    assert open_parent(search, LocalStore(tmp_path)).startswith("tracking the search with mlflow failed: ")


def test_wandb_groups_trials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed (pip install rayft[wandb])")
    monkeypatch.setenv("WANDB_MODE", "offline")
    search = search_job().model_copy(update={"log": Log(wandb="rayft-tests")})
    trial_run(search, LocalStore(tmp_path), 1)
    from wandb.proto import wandb_internal_pb2

    groups: set[str] = set()
    for _ in range(300):  # W&B's own process may flush after finish()
        for file in (tmp_path / "trials" / "sweep-t0001").glob("wandb/offline-run-*/*.wandb"):
            for data in leveldb_records(file.read_bytes()[7:]):
                record = wandb_internal_pb2.Record()
                record.ParseFromString(data)
                groups |= {record.run.run_group} if record.HasField("run") else set()
        if groups:
            break
        time.sleep(0.1)
    assert groups == {"sweep"}
