"""What a finished run leaves behind: the exported model, the report page, the table of what it learned and forgot."""

from __future__ import annotations

import json
from typing import Any

import ray
from rich.console import Console

from rayft.checkpoint import CheckpointReader, latest
from rayft.errors import StorageError
from rayft.report.log import read_log
from rayft.report.page import write_page
from rayft.report.tables import suites_table, summary_table
from rayft.storage import ObjectNotFound, Store
from rayft.train.prepare import Prepared


def finish(prepared: Prepared, store: Store, recorder: Any, console: Console) -> None:
    """Export the last checkpoint as `model/`, write `report.html`, and print the tables."""
    from rayft.model.export import export_model

    job = prepared.plan.job
    step = latest(store, verify=False)
    if step is None:
        raise StorageError(f"{store.uri} holds no committed checkpoint to export.", "Run again.")
    report = export_model(
        CheckpointReader(store, step), prepared.files, job, store.child("model"), merge=False
    )
    ray.get(
        recorder.event.remote(
            "export", f"step {step} is in {store.where('model')}", step=step, **report.facts()
        ),
        timeout=60,
    )
    ray.get(recorder.flush.remote(), timeout=60)
    write_page(store)
    show_result(store, job, console)


def show_result(store: Store, job: Any, console: Console) -> None:
    """The table at the end of a run, and how to talk to the result."""
    before, after = suite_results(store, "before"), suite_results(store, "after")
    if job.eval.suites:
        console.print(suites_table(before, after, job.eval.suites))
    console.print(summary_table(read_log(store), job.name))
    console.print(f"Report: {store.where('report.html')}")
    console.print(f"Talk to it: rayft chat {store.where('model')}")


def suite_results(store: Store, when: str) -> dict[str, dict[str, float]] | None:
    """What `measure_suites` kept, or None if it did not run."""
    try:
        return json.loads(store.get(f"suites-{when}.json"))
    except ObjectNotFound:
        return None
