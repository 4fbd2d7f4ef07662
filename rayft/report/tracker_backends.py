"""The tracking libraries behind one interface (`trackers.Backend`); imported only where a job names one."""

from __future__ import annotations

import json
import os
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any, ClassVar

from rayft.spec import Job
from rayft.storage import Store

#: MLflow's tags of runs that belong together, and of the run that stands for all of them.
GROUP_TAG, PARENT_TAG = "rayft.group", "rayft.parent_of"


class TensorBoard:
    """Event files in `tensorboard/` of the run folder; every process adds a file, TensorBoard reads them as one."""

    last_step = -1
    #: Seconds between uploads of the event file to a remote run folder.
    UPLOAD_EVERY_S = 30.0

    def __init__(self, job: Job, store: Store, state: dict[str, Any]) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self.state = state
        local = store.local_path("tensorboard")
        self._remote = None if local else store
        self._folder = local or Path(tempfile.mkdtemp(prefix="rayft-tensorboard-"))
        self._writer = EventFileWriter(str(self._folder))
        self._uploaded = time.monotonic()
        if job.log.hparams and not state:
            self._describe(job.log.hparams, job.log.group or job.name)
            self.state = {"hparams": True}

    def _describe(self, values: dict[str, Any], group: str) -> None:
        """What the HParams page shows of this run."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb

        plain = {
            key: value if isinstance(value, bool | int | float | str) else json.dumps(value)
            for key, value in values.items()
        }
        summary = hparams_pb(plain, trial_id=f"{group} {json.dumps(plain, sort_keys=True)}")
        self._writer.add_event(Event(wall_time=time.time(), summary=summary))
        self._writer.flush()

    def log(self, metrics: dict[str, float], step: int, time: float) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._writer.add_event(Event(wall_time=time, step=step, summary=Summary(value=values)))
        self._writer.flush()  # where TensorFlow is installed, its file layer buffers
        self._upload(self.UPLOAD_EVERY_S)

    def close(self, code: int) -> None:
        self._writer.close()
        self._upload(0.0)

    def _upload(self, every_s: float) -> None:
        if self._remote is None or time.monotonic() - self._uploaded < every_s:
            return
        for file in self._folder.iterdir():
            self._remote.upload(file, f"tensorboard/{file.name}")
        self._uploaded = time.monotonic()


class MLflow:
    """A run in the experiment `rayft` of the tracking server `log.mlflow`."""

    EXPERIMENT = "rayft"
    ENDS: ClassVar = {0: "FINISHED", 8: "KILLED"}

    def __init__(self, job: Job, store: Store, state: dict[str, Any]) -> None:
        from mlflow import MlflowClient

        self._client = MlflowClient(tracking_uri=job.log.mlflow)
        if state:
            self._run = state["run_id"]
            self._client.update_run(self._run, status="RUNNING")
            history = self._client.get_metric_history(self._run, "train/loss")
            self.last_step = max((metric.step for metric in history), default=-1)
        else:
            self._run = self._create(job, store)
            self.last_step = -1
        self.state = {"run_id": self._run}

    def log(self, metrics: dict[str, float], step: int, time: float) -> None:
        from mlflow.entities import Metric

        at = int(time * 1000)
        self._client.log_batch(self._run, [Metric(name, value, at, step) for name, value in metrics.items()])

    def close(self, code: int) -> None:
        self._client.set_terminated(self._run, self.ENDS.get(code, "FAILED"))

    def _create(self, job: Job, store: Store) -> str:
        experiment = self._client.get_experiment_by_name(self.EXPERIMENT)
        number = experiment.experiment_id if experiment else self._client.create_experiment(self.EXPERIMENT)
        tags = {"rayft.run": store.uri}
        if job.log.group:
            tags[GROUP_TAG] = job.log.group
            if parent := parent_run(self._client, number, job.log.group):
                tags["mlflow.parentRunId"] = parent
        run = self._client.create_run(number, run_name=job.name, tags=tags)
        from mlflow.entities import Param

        params = [Param(key, str(value)[:500]) for key, value in flat(job.model_dump(mode="json")).items()]
        for start in range(0, len(params), 100):  # the server takes a hundred at a time
            self._client.log_batch(run.info.run_id, params=params[start : start + 100])
        return str(run.info.run_id)


class WeightsAndBiases:
    """A run in the project `log.wandb`; offline too (WANDB_MODE=offline), with the same id after a restart."""

    def __init__(self, job: Job, store: Store, state: dict[str, Any]) -> None:
        import wandb

        self.state = state or {"run_id": uuid.uuid4().hex[:12]}
        folder = store.local_path("wandb")
        self._run = wandb.init(
            project=job.log.wandb,
            id=self.state["run_id"],
            name=job.name,
            group=job.log.group,
            resume="allow",
            config=job.model_dump(mode="json"),
            dir=_existing(folder.parent) if folder else tempfile.mkdtemp(prefix="rayft-wandb-"),
            settings=wandb.Settings(silent=True, console="off"),
        )
        # The step that comes next: what the server has seen of a resumed run, 0 for a new one.
        self.last_step = self._run.step - 1

    def log(self, metrics: dict[str, float], step: int, time: float) -> None:
        self._run.log(metrics, step=step)

    def close(self, code: int) -> None:
        self._run.finish(exit_code=code)


def parent_run(client: Any, experiment: str, group: str) -> str | None:
    """Id of the newest MLflow run that stands for a group."""
    where = f"tags.`{PARENT_TAG}` = '{group}'"
    found = client.search_runs([experiment], where, order_by=["attributes.start_time DESC"], max_results=1)
    return str(found[0].info.run_id) if found else None


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def _existing(folder: Path) -> str:
    os.makedirs(folder, exist_ok=True)
    return str(folder)
