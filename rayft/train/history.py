"""What an earlier start of a run left behind, and whether this start may go on from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.console import Console

from rayft.checkpoint import latest
from rayft.errors import DataError, JobError, RayftError
from rayft.report.lineage import read_lineage
from rayft.report.log import read_log
from rayft.spec import Job, changed_keys, dump_job
from rayft.storage import Store
from rayft.train.failures import changed_job
from rayft.train.finish import job_of_run


@dataclass(frozen=True)
class End:
    """An `end` of the run log. prepared: the start had found model and data in order, and started workers."""

    code: int
    message: str
    terminal: bool
    prepared: bool


#: Their cause lies outside of the job and may be gone: the file is there now, the row corrected. Looking costs seconds.
LOOKED_AT_AGAIN = (JobError.code, DataError.code)


def already_ended(store: Store, job: Job, console: Console) -> bool:
    """Whether there is nothing to do.

    Raises JobError for another job under the name of one that has checkpoints, and again the error that ended this
    very job for good.
    """
    if not store.exists("job.yaml") or refuse_other_job(store, job):
        return False
    end = last_end(store)
    if end is None:
        return False
    if end.code == 0:
        console.print(f"The run {job.name} is done; its model is in {store.where('model')}.")
        return True
    if end.terminal and end.code not in LOOKED_AT_AGAIN and unchanged(store, job):
        raise ended_for_good(job.name, end)
    return False


def unchanged(store: Store, job: Job) -> bool:
    """Whether the job is that of the start before, to the last key."""
    return store.exists("job.yaml") and dump_job(job_of_run(store)) == dump_job(job)


def refuse_other_job(store: Store, job: Job) -> list[str]:
    """The keys that differ from the stored job's; raises JobError for them where there are checkpoints already.

    Until then a mistake may be corrected under the run's name.
    """
    changes = changed_keys(job_of_run(store), job)
    if changes and latest(store, verify=False) is not None:
        raise changed_job(job.name, changes)
    return changes


def take_job(store: Store, job: Job) -> End | None:
    """Store the job as this run's; whoever calls it holds the lease. What an untrained other job measured is dropped.

    Returns what ended this very job for good after it was prepared: it will again if model and data are the same.
    """
    end = last_end(store) if unchanged(store, job) else None
    if store.exists("job.yaml") and refuse_other_job(store, job):
        store.delete(
            [f"{kind}-{when}.json" for kind in ("suites", "samples") for when in ("before", "after")]
        )
    store.put("job.yaml", dump_job(job).encode())
    return end if end is not None and end.terminal and end.prepared else None


class EndedBefore(RayftError):
    """What ended the run for good, said again; nothing new to record."""

    terminal = True


class OriginChanged(JobError):
    """Curable from outside, by restoring what changed."""

    terminal = False


def refuse_other_origin(store: Store, name: str, origin: dict[str, Any], end: End | None) -> None:
    """Raise OriginChanged where a run with checkpoints was trained on other rows, tokens or another base model.

    Positions and the schedule would mean something else. origin: `Prepared.origin` of this start. end: from
    `take_job`; with the same origin its error is raised again, before a worker starts.
    """
    before = read_lineage(store)
    if before is None:
        return
    different = [words for words, value in identities(origin).items() if identities(before)[words] != value]
    if different and latest(store, verify=False) is not None:
        raise OriginChanged(
            f"The run {name!r} has checkpoints, and since then {' and '.join(different)} changed.",
            "Restore what it was trained with to resume it, or use another name.",
        )
    if not different and end is not None:
        raise ended_for_good(name, end)


def identities(origin: dict[str, Any]) -> dict[str, Any]:
    """The digests in an origin, by the words for what they are of."""
    return {
        "the base model": origin["model"]["identity"],
        "the rows of data.train (or how they are tokenised)": origin["data"]["identity"],
    }


def last_end(store: Store) -> End | None:
    """How the last start that recorded an end ended."""
    end, prepared = None, False
    for row in read_log(store):
        if row["kind"] == "event" and row["event"] == "plan":
            prepared = True
        if row["kind"] == "event" and row["event"] == "end":
            end = End(row["code"], row["message"], row["terminal"], prepared)
            prepared = False
    return end


def ended_for_good(name: str, end: End) -> EndedBefore:
    """The error of an unchanged retry."""
    error = EndedBefore(
        f"The run {name} ended before and an unchanged retry cannot cure it: {end.message}",
        "Change the job; where a key makes it another run, give it another name.",
    )
    error.code = end.code
    return error
