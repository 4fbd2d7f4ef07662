"""`rayft submit` and `rayft resume`: a job becomes a submission of Ray's job API."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

import rayft
from rayft.checkpoint.stop import STOP_WAIT_S
from rayft.errors import JobError, ResourceError
from rayft.fleet.attempts import Attempt, attempt_of, attempts_of, describe
from rayft.fleet.client import Client
from rayft.fleet.follow import follow
from rayft.fleet.outcome import RunFolder
from rayft.fleet.package import ENTRYPOINT, JOB_FILE, Package, package, packages_of
from rayft.fleet.runs import DEFAULT
from rayft.fleet.saving import saving_line, saving_on
from rayft.fleet.version import SUBMITTER_VERSION
from rayft.report.text import gib
from rayft.spec import Job, load_job
from rayft.spec.profile import load_profile


@dataclass(frozen=True)
class Submission:
    """What is sent: everything of `ray job submit`. working_dir: a folder here, or the URI of one that was uploaded."""

    name: str
    working_dir: str
    entrypoint: str
    metadata: dict[str, str]

    @property
    def runtime_env(self) -> dict[str, Any]:
        """Ray's runtime environment of the job."""
        variables = {
            SUBMITTER_VERSION: rayft.__version__,
            "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S),
        }
        return {"working_dir": self.working_dir, "env_vars": variables}

    def line(self, address: str) -> str:
        """The `ray job submit` line that does the same."""
        environment = {"env_vars": self.runtime_env["env_vars"]}
        words = [
            *("ray", "job", "submit", "--address", address, "--submission-id", self.name),
            *("--working-dir", self.working_dir, "--runtime-env-json", json.dumps(environment)),
            *("--metadata-json", json.dumps(self.metadata), "--", *shlex.split(self.entrypoint)),
        ]
        return shlex.join(words)


def submit(
    job_file: str,
    overrides: list[str],
    address: str | None,
    *,
    wait: bool,
    profile: str | None = None,
    console: Console | None = None,
) -> int:
    """Send a job to a cluster; returns the run's exit code, or 0 at once without `wait`.

    profile: of the fleet that the cluster is on. Its address and storage stand where none is given, and it says whether a
    checkpoint fits; raises ResourceError for one that does not where it refuses that.
    """
    console = console or Console()
    job = load_job(job_file, overrides)
    fleet = load_profile(profile) if profile else None
    if fleet is not None:
        address = address or fleet.address
        if job.storage == DEFAULT:
            job = job.model_copy(update={"storage": fleet.storage})
    packed = package(job)
    client = Client(address)
    client.refuse_other_ray()
    say_package(packed, console)
    if fleet is not None:
        line = saving_line(saving_on(load_job(packed.folder / JOB_FILE), fleet), fleet)
        console.print(escape(line), soft_wrap=True, highlight=False)
    run_uri = run_uri_of(job)
    return send(client, job.name, run_uri, str(packed.folder), packed.digest, wait=wait, console=console)


def resume(run: str, address: str | None, *, wait: bool, console: Console | None = None) -> int:
    """Send the same package under the same name again; returns as `submit`."""
    console = console or Console()
    client = Client(address)
    client.refuse_other_ray()
    attempts = attempts_of(client.all(), run)
    last = attempts[-1] if attempts else None
    if last is None:
        refuse_odd_name(run)
        folder = newest_package(run)
        if folder is None:
            raise JobError(
                f"The cluster at {client.address} knows no run {run!r}, and no job of that name was submitted from here.",
                "Submit its job file; under the same name it resumes.",
            )
        run_uri = run_uri_of(load_job(folder / "job.yaml"))
        return send(client, run, run_uri, str(folder), folder.name, wait=wait, console=console)
    refuse_live(last, client)
    end = RunFolder(last.run_uri).end_since(last.started)
    if end is not None and end.code == 0:
        console.print(escape(f"The run {run} is done; its results are in {last.run_uri}."), soft_wrap=True)
        return 0
    working_dir = find_package(last, client)
    return send(client, run, last.run_uri, working_dir, last.package, wait=wait, console=console)


def send(
    client: Client,
    run: str,
    run_uri: str,
    working_dir: str,
    digest: str,
    *,
    wait: bool,
    console: Console,
) -> int:
    """Submit a packaged run as its next attempt. Raises ResourceError while an attempt at it is live."""
    attempts = attempts_of(client.all(), run)
    for earlier in attempts:
        refuse_live(earlier, client)
    number = 1 + max((attempt.number for attempt in attempts), default=0)
    metadata = describe(run, number, run_uri, digest)
    submission = Submission(f"{run}-{number}", working_dir, ENTRYPOINT, metadata)
    console.print(escape(submission.line(client.address)), soft_wrap=True, highlight=False)
    client.submit(submission.name, submission.entrypoint, submission.runtime_env, metadata)
    attempt = attempt_of(client.info(submission.name))
    assert attempt is not None
    console.print(
        escape(f"Submitted {submission.name}; its results go to {run_uri}."), soft_wrap=True, highlight=False
    )
    if not wait:
        return 0
    return follow(client, attempt, console)


def refuse_live(attempt: Attempt, client: Client) -> None:
    """Raise ResourceError for an attempt that has not ended."""
    if attempt.live:
        raise ResourceError(
            f"The run {attempt.run!r} is held by its submission {attempt.submission}, which is {attempt.status.lower()}.",
            f"Follow it with `rayft logs {attempt.run} --follow --address {client.address}`, stop it, or use another name.",
        )


def find_package(attempt: Attempt, client: Client) -> str:
    """The working directory of an earlier attempt: the folder here, or what was uploaded if the cluster still has it."""
    refuse_odd_name(attempt.run)
    if attempt.package.isalnum() and (folder := packages_of(attempt.run) / attempt.package).is_dir():
        return str(folder)
    uri = str(attempt.runtime_env.get("working_dir", ""))
    if uri.startswith("gcs://") and client.has_package(uri):
        return uri
    raise JobError(
        f"What was submitted as {attempt.submission} is neither on this machine nor on the cluster any more.",
        "Submit its job file; under the same name it resumes.",
    )


def newest_package(run: str) -> Path | None:
    """The package of a run that was submitted last from here."""
    home = packages_of(run)
    folders = (
        [path for path in home.iterdir() if path.is_dir() and path.name.isalnum()] if home.is_dir() else []
    )
    return max(folders, key=lambda path: path.stat().st_mtime, default=None)


def refuse_odd_name(run: str) -> None:
    """Raise JobError for what can be no run's name, before a path is made of it."""
    import re

    from rayft.spec.job import RUN_NAME

    if not re.fullmatch(RUN_NAME, run):
        raise JobError(f"{run!r} is no name of a run.", "`rayft list` shows the runs of a cluster.")


def run_uri_of(job: Job) -> str:
    """The run folder's URI."""
    return f"{job.storage.rstrip('/')}/{job.name}"


def say_package(packed: Package, console: Console) -> None:
    """What travels with the job, and what it is named there."""
    for note in packed.notes:
        console.print(escape(note), soft_wrap=True, highlight=False)
    size = gib(packed.size) if packed.size >= 1 << 20 else f"{packed.size / 1024:.0f} KiB"
    console.print(f"{packed.files} files, {size}, go with the job.", soft_wrap=True, highlight=False)
