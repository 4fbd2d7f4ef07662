"""Submissions of runs on a cluster, as its job API knows them: `<run>-<attempt>`, described by their metadata."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import rayft
from rayft.errors import JobError
from rayft.fleet.client import Client
from rayft.fleet.owner import submitter

#: Keys of a submission's metadata: whose it is, and where its results are.
RUN, STORAGE, ATTEMPT, PACKAGE, VERSION = (
    "rayft.run",
    "rayft.storage",
    "rayft.attempt",
    "rayft.package",
    "rayft.version",
)
LIVE = ("PENDING", "RUNNING")


@dataclass(frozen=True)
class Attempt:
    """One submission of a run. started, ended: seconds since 1970. code: the driver's exit code, where the API has one."""

    run: str
    number: int
    submission: str
    status: str
    code: int | None
    started: float | None
    ended: float | None
    run_uri: str
    package: str
    entrypoint: str
    runtime_env: dict[str, Any]

    @property
    def live(self) -> bool:
        """Whether it has not ended."""
        return self.status in LIVE


def attempt_of(details: Any) -> Attempt | None:
    """The attempt that Ray's JobDetails describe; None for what rayft has not submitted."""
    metadata = details.metadata or {}
    if RUN not in metadata or STORAGE not in metadata:
        return None
    number = metadata.get(ATTEMPT, "")
    return Attempt(
        metadata[RUN],
        int(number) if number.isdecimal() else 0,
        details.submission_id,
        str(getattr(details.status, "value", details.status)),
        details.driver_exit_code,
        details.start_time / 1000 if details.start_time else None,
        details.end_time / 1000 if details.end_time else None,
        metadata[STORAGE],
        metadata.get(PACKAGE, ""),
        details.entrypoint,
        details.runtime_env or {},
    )


def attempts_of(details: Iterable[Any], run: str | None = None) -> list[Attempt]:
    """Attempts, of one run or of all, oldest first."""
    found = [attempt for job in details if (attempt := attempt_of(job)) and run in (None, attempt.run)]
    return sorted(found, key=lambda attempt: (attempt.started or 0.0, attempt.number))


def last_attempt(client: Client, run: str) -> Attempt:
    """The newest attempt at a run. Raises JobError where the cluster has none."""
    attempts = attempts_of(client.all())
    of_run = [attempt for attempt in attempts if run in (attempt.run, attempt.submission)]
    if not of_run:
        known = sorted({attempt.run for attempt in attempts})
        raise JobError(
            f"The cluster at {client.address} knows no run {run!r}.",
            f"It knows {', '.join(known)}." if known else "It knows no run at all.",
        )
    return of_run[-1]


def describe(run: str, number: int, run_uri: str, package: str) -> dict[str, str]:
    """The metadata of a new attempt, with whose it is."""
    own = {RUN: run, ATTEMPT: str(number), STORAGE: run_uri, PACKAGE: package, VERSION: rayft.__version__}
    return own | submitter()
