"""Trackers: a restart continues the same tracker run, no step twice, and a broken tracker stops nothing."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from rayft.errors import JobError
from rayft.report import trackers as trackers_module
from rayft.report.log import RunLog
from rayft.report.trackers import Trackers, metrics_of, wanted_trackers
from rayft.spec import Job, parse_job
from rayft.storage import LocalStore
from tests.unit.test_report_log import RemoteStore

FAILURES: list[str] = []


@pytest.fixture(autouse=True)
def _no_failures() -> None:
    FAILURES.clear()


def job(**log: Any) -> Job:
    return parse_job({"name": "x", "model": {"path": "m"}, "data": {"train": [{"path": "a"}]}, "log": log})


def step(number: int) -> dict[str, Any]:
    return {
        "kind": "step",
        "step": number,
        "loss": 1 / number,
        "grad_norm": None,
        "learning_rate": 1e-4,
        "seconds": {},
    }


def train(job: Job, store: LocalStore, first: int, last: int, epoch: int) -> None:
    """One process of a run: rows go to the log and to the trackers, as the trainer sends them."""
    trackers = Trackers(job, store, FAILURES.append)
    log = RunLog(store, epoch, lambda: True)
    rows = [step(number) for number in range(first, last + 1)]
    rows.append({"kind": "eval", "step": last, "loss": 0.5, "tokens": 9})
    for row in rows:
        log.append(row)
        trackers.log({**row, "time": 1.7e9 + row["step"]})
    log.close()
    trackers.close(code=0)


def run_twice(job: Job, store: LocalStore) -> None:
    """Steps 1 to 5 in one process, then from the checkpoint of step 3 to step 8 in another."""
    train(job, store, 1, 5, epoch=1)
    train(job, store, 4, 8, epoch=2)
    assert FAILURES == []


def test_metrics_of_rows() -> None:
    row = {**step(4), "seconds": {"forward": 1.5}, "peak_memory_gb": [1.0, 2.0], "tokens_per_s": 100.0}
    assert metrics_of(row) == {
        "train/loss": 0.25,
        "train/learning_rate": 1e-4,
        "train/tokens_per_s": 100.0,
        "seconds/forward": 1.5,
        "train/peak_memory_gb": 2.0,
    }
    assert metrics_of({"kind": "suites", "results": {"a": {"f1": 0.5}}}) == {"a/f1": 0.5}
    assert metrics_of({"kind": "event", "event": "start"}) == {}


def tensorboard_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }


def test_tensorboard_continues(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    run_twice(job(tensorboard=True), LocalStore(tmp_path))
    scalars = tensorboard_scalars(tmp_path / "tensorboard")
    assert scalars["train/loss"] == [(n, pytest.approx(1 / n)) for n in range(1, 9)]
    assert [number for number, _ in scalars["eval/loss"]] == [5, 8]


def test_tensorboard_holds_what_a_killed_process_sent(tmp_path: Path) -> None:
    """Nothing waits for close: the thread writes and flushes every row."""
    pytest.importorskip("tensorboard")
    store = LocalStore(tmp_path)
    trackers = Trackers(job(tensorboard=True), store, FAILURES.append)
    folder = tmp_path / "tensorboard"
    for number in (1, 2):
        trackers.log({**step(number), "time": 1.7e9})
        for _ in range(200):
            trackers._feeds[0]._thread.join(0.05)
            if folder.exists() and len(tensorboard_scalars(folder).get("train/loss", [])) == number:
                break
    assert tensorboard_scalars(folder)["train/loss"] == [(1, 1.0), (2, 0.5)]
    trackers.close()


def test_tensorboard_of_a_remote_run_is_uploaded(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    train(job(tensorboard=True), RemoteStore(tmp_path), 1, 3, epoch=1)
    assert FAILURES == []
    assert [number for number, _ in tensorboard_scalars(tmp_path / "tensorboard")["train/loss"]] == [1, 2, 3]


def test_mlflow_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed (pip install rayft[mlflow])")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = (tmp_path / "mlruns").as_uri()
    run_twice(job(mlflow=uri), LocalStore(tmp_path / "run"))
    client = mlflow.MlflowClient(tracking_uri=uri)
    (run,) = client.search_runs([client.get_experiment_by_name("rayft").experiment_id])
    assert run.info.run_id == json.loads((tmp_path / "run" / "trackers.json").read_text())["mlflow"]["run_id"]
    assert run.info.status == "FINISHED"
    assert run.data.params["train.learning_rate"] == "1e-05"
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(metric.step, metric.value) for metric in history] == [(n, 1 / n) for n in range(1, 9)]


def test_wandb_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed (pip install rayft[wandb])")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run_twice(job(wandb="rayft-tests"), LocalStore(tmp_path))
    identity = json.loads((tmp_path / "trackers.json").read_text())["wandb"]["run_id"]
    # A folder is named by its second, with `-1` where two runs share it; W&B's own process may flush after finish().
    for _ in range(300):
        files = sorted((tmp_path / "wandb").glob(f"offline-run-*-{identity}*/run-{identity}.wandb"))
        numbers = sorted(number for file in files for number in wandb_steps(file))
        if len(numbers) >= 8:
            break
        time.sleep(0.1)
    assert (len(files), numbers) == (2, list(range(1, 9)))


def wandb_steps(file: Path) -> list[int]:
    """Steps of a W&B file in which the training loss stands."""
    from wandb.proto import wandb_internal_pb2

    steps: Counter[int] = Counter()
    for data in leveldb_records(file.read_bytes()[7:]):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if any((item.key or ".".join(item.nested_key)) == "train/loss" for item in record.history.item):
            steps[record.history.step.num] += 1
    assert set(steps.values()) <= {1}
    return sorted(steps)


def leveldb_records(raw: bytes) -> list[bytes]:
    """Records of a LevelDB log (blocks of 32 KiB; checksum 4, length 2, type 1), after W&B's header of 7 bytes."""
    records, at = [], 0
    while at + 7 <= len(raw):
        if 32768 - (at + 7) % 32768 < 7:
            at += 32768 - (at + 7) % 32768
            continue
        length, kind = int.from_bytes(raw[at + 4 : at + 6], "little"), raw[at + 6]
        if at + 7 + length > len(raw):
            break  # not wholly written yet
        if kind in (1, 2):
            records.append(b"")
        records[-1] += raw[at + 7 : at + 7 + length]
        at += 7 + length
    return records


class Broken:
    """A tracking library whose server goes away at step 3."""

    last_step = -1

    def __init__(self, *_: Any) -> None:
        self.state: dict[str, Any] = {"run_id": "r1"}

    def log(self, metrics: dict[str, float], step: int, time: float) -> None:
        if step == 3:
            raise ConnectionError("no route to host")

    def close(self, code: int) -> None:
        raise AssertionError("not reached")


def test_a_failing_tracker_is_one_sentence_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    monkeypatch.setattr(trackers_module, "wanted_trackers", lambda job: ["mlflow", "tensorboard"])
    monkeypatch.setattr("rayft.report.tracker_backends.MLflow", Broken)
    train(job(), LocalStore(tmp_path), 1, 6, epoch=1)
    assert FAILURES == ["tracking with mlflow stopped: ConnectionError: no route to host"]
    assert len(tensorboard_scalars(tmp_path / "tensorboard")["train/loss"]) == 6


def test_a_tracker_that_hangs_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    forever = threading.Event()
    monkeypatch.setattr(trackers_module, "wanted_trackers", lambda job: ["mlflow"])
    monkeypatch.setattr("rayft.report.tracker_backends.MLflow", lambda *_: forever.wait())
    trackers = Trackers(job(), LocalStore(tmp_path), FAILURES.append)
    trackers.log({**step(1), "time": 0.0})
    trackers.close(timeout_s=0.05)
    assert FAILURES == ["mlflow did not take the last rows within 0 s"]
    forever.set()


def test_what_a_tracker_holds_is_not_sent_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A remote log may lag behind the tracker by seconds; the tracker knows better."""
    sent: list[int] = []

    class Ahead(Broken):
        last_step = 4

        def log(self, metrics: dict[str, float], step: int, time: float) -> None:
            sent.append(step)

        def close(self, code: int) -> None:
            pass

    monkeypatch.setattr(trackers_module, "wanted_trackers", lambda job: ["mlflow"])
    monkeypatch.setattr("rayft.report.tracker_backends.MLflow", Ahead)
    train(job(), LocalStore(tmp_path), 3, 6, epoch=1)
    assert sent == [5, 6, 6]


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(JobError, match=r"wandb is not installed. Install rayft\[wandb\]"):
        wanted_trackers(job(wandb="p"))
    assert wanted_trackers(job()) == []
