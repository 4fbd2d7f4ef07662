"""Runs that a job names: `runs/NAME` is the run NAME on the storage that the job will have, wherever the job comes from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rayft.errors import JobError
from rayft.spec import Job, parse_job

#: Where runs are by default; jobs name them so, whatever storage a fleet has.
DEFAULT = "runs"


def on_storage(
    job: Job, storage: str, stays: Callable[[str], bool] = lambda _: False
) -> tuple[Job, list[str]]:
    """The job with the runs that it names at their places below `storage`, and what was changed, for people.

    stays: says of a model's path that it is left as it is. Raises JobError for a fork of what no node will find.
    """
    values, notes = job.model_dump(mode="json"), []

    def move(group: dict[str, Any], key: str, where: str) -> None:
        path = group.get(key)
        if path and not stays(path) and (moved := _moved(path, job, storage)) != path:
            group[key] = moved
            notes.append(f"{where} {path} is read from {moved}.")

    move(values["model"], "path", "model.path")
    move(values["model"], "tokenizer", "model.tokenizer")
    for index, source in enumerate(values.get("rewards", ())):
        if source["type"] == "model":
            move(source, "path", f"rewards.{index}.path")
    if job.checkpoint.fork is not None:
        run, step = job.checkpoint.fork
        moved = _moved(run, job, storage)
        if "://" not in moved and not Path(moved).is_absolute():
            raise fork_refused(run, storage)
        if moved != run:
            values["checkpoint"]["fork_from"] = f"{moved}@{step}"
            notes.append(f"checkpoint.fork_from {run} is read from {moved}.")
    return (parse_job(values) if notes else job), notes


def fork_refused(run: str, storage: str) -> JobError:
    """The error for a run to begin from that lies on this machine alone."""
    return JobError(
        f"checkpoint.fork_from {run} is a folder of this machine, and checkpoints do not travel with a job.",
        f"Copy it below {storage} and name it there.",
    )


def refuse_another_name(key: str, trial: Job, there: Job) -> None:
    """Raise JobError where a value of `tune.space` would be named otherwise where the trial runs: lists of values stay as they are."""
    if _value(there, key) != _value(trial, key):
        raise JobError(
            f"tune.space.{key}: {_value(trial, key)!r} would have another name where the trials run, and lists of values stay as "
            "they are.",
            "Name a hub id, or what lies on storage, by its place there.",
        )


def _value(job: Job, key: str) -> Any:
    """What a job has at a dotted key."""
    node: Any = job.model_dump(mode="json")
    for part in key.split("."):
        node = node[int(part)] if isinstance(node, list) else (node or {}).get(part)
    return node


def _moved(path: str, job: Job, storage: str) -> str:
    local = path.removeprefix("file://")
    if "://" in local or ".." in local.split("/"):
        return path
    for folder in (DEFAULT, job.storage.rstrip("/")):
        if local.startswith(f"{folder}/"):
            return f"{storage.rstrip('/')}/{local.removeprefix(f'{folder}/')}"
    return path
