"""`rayft list`, `rayft status` and `rayft logs`: what a cluster and the run folders say about runs."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape

from rayft.errors import EXIT_CODES, RayftError
from rayft.fleet.attempts import Attempt, attempts_of, last_attempt
from rayft.fleet.client import Client
from rayft.fleet.follow import follow
from rayft.fleet.outcome import RunFolder, end_in, outcome_of
from rayft.report.log import Row, current_rows
from rayft.report.progress import Progress
from rayft.report.text import duration, value
from rayft.report.trials import STATUSES, trials_of


def show_list(address: str | None, console: Console | None = None) -> int:
    """A line for every attempt at every run on the cluster; of what has ended, the run's exit code."""
    console = console or Console()
    attempts = attempts_of(Client(address).all())
    if not attempts:
        console.print("No run was submitted to this cluster.")
        return 0
    logs = {uri: RunFolder(uri).rows() for uri in {attempt.run_uri for attempt in attempts}}
    table = [("RUN", "SUBMISSION", "STATUS", "CODE", "STARTED", "RAN", "STORAGE")]
    for attempt in sorted(attempts, key=lambda one: (one.run, one.number)):
        table.append(
            (
                attempt.run,
                attempt.submission,
                attempt.status.lower(),
                _code(attempt, logs[attempt.run_uri]),
                _clock(attempt.started),
                _ran(attempt),
                attempt.run_uri,
            )
        )
    _print_table(table, console)
    return 0


def show_status(run: str, address: str | None, console: Console | None = None) -> int:
    """Where a run stands: its attempts here, its last step and event; of a search how many trials are what."""
    console = console or Console()
    client = Client(address)
    last = last_attempt(client, run)
    lines = [f"{last.run}: {last.submission} is {last.status.lower()}, for {_ran(last)}"]
    folder = RunFolder(last.run_uri)
    if not last.live:
        outcome = outcome_of(last, folder.end_since(last.started))
        lines = [
            f"{last.run}: {last.submission} {last.status.lower()} after {_ran(last)} with code {outcome.code}, "
            f"{EXIT_CODES[outcome.code]}: {outcome.message}"
        ]
    lines.append(f"storage: {last.run_uri}")
    rows = folder.rows()
    if rows is None:
        lines.append("The run log cannot be read from here.")
    else:
        lines += _trials(rows) + _newest(current_rows(rows))
    earlier = [attempt for attempt in attempts_of(client.all(), last.run) if attempt != last]
    lines += [f"before: {one.submission} {one.status.lower()}, code {_code(one, rows)}" for one in earlier]
    for line in lines:
        console.print(escape(line), soft_wrap=True, highlight=False)
    return 0


def show_logs(run: str, address: str | None, *, follow_on: bool, console: Console | None = None) -> int:
    """What the run's last attempt has printed; followed, also what it prints, and then the run's exit code."""
    console = console or Console()
    client = Client(address)
    attempt = last_attempt(client, run)
    if follow_on and attempt.live:
        return follow(client, attempt, console)
    try:
        console.file.write(client.logs(attempt.submission))
    except RayftError as error:
        rows = RunFolder(attempt.run_uri).rows()
        if rows is None:
            raise
        console.print(escape(f"{error.message} What follows is from the run log."), soft_wrap=True)
        progress = Progress(console, None)
        for row in rows:
            if row["time"] >= (attempt.started or 0.0):
                progress.row(row)
    if not follow_on:
        return 0
    return outcome_of(attempt, RunFolder(attempt.run_uri).end_since(attempt.started)).code


def _trials(rows: Sequence[Row]) -> list[str]:
    """How many trials of a search are what; nothing for a run."""
    statuses = [trial.status for trial in trials_of(rows).values()]
    counts = [f"{statuses.count(status)} {status}" for status in STATUSES if status in statuses]
    return [f"trials: {', '.join(counts)}"] if counts else []


def _newest(rows: Sequence[dict[str, object]]) -> list[str]:
    """The last step and the last event."""
    lines = []
    steps = [row for row in rows if row["kind"] == "step"]
    if steps:
        lines.append(f"step {steps[-1]['step']}, loss {value(steps[-1]['loss'])}, {_ago(steps[-1])}")  # type: ignore[arg-type]
    events = [row for row in rows if row["kind"] == "event"]
    if events:
        message = f": {events[-1]['message']}" if events[-1].get("message") else ""
        lines.append(f"{events[-1]['event']}{message}, {_ago(events[-1])}")
    return lines or ["The run log is empty yet."]


def _code(attempt: Attempt, rows: list[Row] | None) -> str:
    """The exit code of an attempt that has ended, by the run log and the API."""
    return (
        "-" if attempt.live else str(outcome_of(attempt, end_in(rows, attempt.started, attempt.ended)).code)
    )


def _ran(attempt: Attempt) -> str:
    if attempt.started is None:
        return "-"
    return duration(max(0.0, (attempt.ended or time.time()) - attempt.started))


def _clock(seconds: float | None) -> str:
    return "-" if seconds is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _ago(row: dict[str, object]) -> str:
    return f"{duration(max(0.0, time.time() - float(row['time'])))} ago"  # type: ignore[arg-type]


def _print_table(table: Sequence[Sequence[str]], console: Console) -> None:
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    for row in table:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        console.print(escape(line), soft_wrap=True, highlight=False)
