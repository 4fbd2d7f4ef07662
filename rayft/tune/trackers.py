"""A search in the trackers: its trials are runs that report for themselves (`rayft.report.trackers`), and this ties them together.

TensorBoard: `tensorboard --logdir <search folder>/trials` shows every trial, and on its HParams page by the values of each. W&B: all trials
are of one group with the search's name. MLflow: all are children of one run with the search's name, which ends with the best
values. Where a tracker fails the search goes on: every function returns a sentence on what went wrong, or nothing.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from typing import Any

from rayft.report.tracker_backends import GROUP_TAG, PARENT_TAG, MLflow, flat
from rayft.report.trackers import STATE_KEY
from rayft.spec import Job, Log
from rayft.spec.search import given
from rayft.storage import ObjectNotFound, Store
from rayft.tune.choose import Choice

#: A tracking server that takes longer is left out.
TIMEOUT_S = 30.0


def trial_log(search: Job, values: Mapping[str, Any]) -> Log:
    """The group `log` of a trial's job. values: the trial's, by dotted key."""
    return search.log.model_copy(update={"group": search.name, "hparams": dict(values)})


def open_parent(search: Job, store: Store) -> str:
    """Before the first trial: the MLflow run of the search in the folder `store`, or the one an earlier driver made."""

    def open_it() -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        client = MlflowClient(tracking_uri=search.log.mlflow)
        if run := _known(store):
            client.update_run(run, status="RUNNING")
            return
        experiment = client.get_experiment_by_name(MLflow.EXPERIMENT)
        number = experiment.experiment_id if experiment else client.create_experiment(MLflow.EXPERIMENT)
        tags = {"rayft.run": store.uri, GROUP_TAG: search.name, PARENT_TAG: search.name}
        made = str(client.create_run(number, run_name=search.name, tags=tags).info.run_id)
        store.put(STATE_KEY, json.dumps({"mlflow": {"run_id": made}}).encode())
        params = [Param(key, str(value)[:500]) for key, value in flat(given(search)).items()]
        client.log_batch(made, params=params[:100])  # the server takes no more at a time

    return _in_time(open_it) if search.log.mlflow else ""


def close_parent(search: Job, store: Store, choice: Choice | None, code: int) -> str:
    """At the end: the best trial's values and metrics in the MLflow run of the search, and its end."""

    def close_it() -> None:
        from mlflow import MlflowClient

        run = _known(store)
        if run is None:
            return
        client = MlflowClient(tracking_uri=search.log.mlflow)
        if choice is not None:
            client.set_tag(run, "rayft.best_trial", choice.trial.trial)
            for key, value in choice.trial.values.items():
                client.set_tag(run, f"best.{key}", str(value)[:5000])
            for metric, number in choice.values.items():
                client.log_metric(run, f"best/{metric.replace('.', '/')}", number, step=choice.trial.step)
        client.set_terminated(run, MLflow.ENDS.get(code, "FAILED"))

    return _in_time(close_it) if search.log.mlflow else ""


def _in_time(do: Callable[[], None]) -> str:
    """Run it in a thread, for a while; whatever a tracker's library raises must not reach the search."""
    failed: list[str] = []

    def run() -> None:
        try:
            do()
        except Exception as error:
            failed.append(f"tracking the search with mlflow failed: {type(error).__name__}: {error}")

    thread = threading.Thread(target=run, name="tracker-mlflow", daemon=True)
    thread.start()
    thread.join(TIMEOUT_S)
    if thread.is_alive():
        return f"tracking the search with mlflow failed: no answer within {TIMEOUT_S:g} s"
    return failed[0] if failed else ""


def _known(store: Store) -> str | None:
    try:
        return str(json.loads(store.get(STATE_KEY))["mlflow"]["run_id"])
    except (ObjectNotFound, KeyError):
        return None
