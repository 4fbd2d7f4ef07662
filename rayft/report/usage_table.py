"""`rayft usage`: the table and the JSON of what runs used."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime

from rich import box
from rich.console import Console
from rich.table import Table

from rayft.errors import JobError
from rayft.report.spans import PARTS
from rayft.report.usage import HOUR, Line, Usage, find_runs, lines_by, sums, usage_of
from rayft.storage import open_store

#: Columns of a table that no terminal folds.
WIDE = 160


def show_usage(
    prefixes: Sequence[str],
    *,
    by: str = "run",
    since: str | None = None,
    until: str | None = None,
    as_json: bool = False,
    console: Console | None = None,
) -> int:
    """Print what the runs at or below the prefixes used. Raises JobError where there is none."""
    begin, end = moment(since, "--since"), moment(until, "--until")
    if begin is not None and end is not None and begin >= end:
        raise JobError(f"--since {since} is not before --until {until}.", "Swap them.")
    runs = collect(prefixes, since=begin, until=end)
    if begin is not None or end is not None:
        runs = [used for used in runs if used.wall_ms]
    lines = lines_by(runs, by)
    if as_json:
        window = {"since": begin, "until": end}
        totals = [line.as_json() for line in sums(runs)]
        print(json.dumps({"by": by, **window, "lines": [line.as_json() for line in lines], "totals": totals}))
        return 0
    console = console or Console()
    if not console.is_terminal:
        console.width = max(console.width, WIDE)
    console.print(usage_table(lines, sums(runs), by))
    for used in runs:
        for note in used.notes:
            console.print(f"{used.run}: {note}", soft_wrap=True, highlight=False, markup=False)
    return 0


def collect(
    prefixes: Sequence[str], *, since: float | None = None, until: float | None = None
) -> list[Usage]:
    """What every run at or below the prefixes used; a run that two of them hold is counted once."""
    found: dict[str, Usage] = {}
    for prefix in prefixes:
        before = len(found)
        for name, store in find_runs(open_store(prefix)):
            if store.uri in found:
                before -= 1
            elif used := usage_of(
                name if len(prefixes) == 1 else f"{prefix.rstrip('/')}/{name}",
                store,
                since=since,
                until=until,
            ):
                found[store.uri] = used
        if len(found) <= before:
            raise JobError(
                f"There is no run log at or below {prefix}.", "Give a run folder, or the `storage` of runs."
            )
    return list(found.values())


def usage_table(lines: Sequence[Line], together: Sequence[Line], by: str) -> Table:
    """A line for each run, user or team with its hours and where they went, and the sums; parts that took nothing are left out."""
    lost = [part for part in PARTS[1:] if any(line.parts[part] for line in lines)]
    table = Table(title=f"Use by {by}; parts in per cent of the hours", box=box.SIMPLE_HEAD)
    table.add_column(by, overflow="fold", min_width=12)
    for heading in ("state", "user") if by == "run" else ("runs",):
        table.add_column(heading, overflow="fold", justify="right" if heading == "runs" else "left")
    for heading in ("hours", "goodput", *lost):
        table.add_column(heading, justify="right", no_wrap=True)
    for line in lines:
        table.add_row(line.name, *_facts(line, by), *_numbers(line, lost))
    if len(lines) > 1:
        table.add_section()
    for line in together if len(lines) > 1 else ():
        facts = ["", ""] if by == "run" else [str(line.runs)]
        table.add_row("all", *facts, *_numbers(line, lost), style="bold")
    return table


def moment(text: str | None, option: str) -> float | None:
    """Seconds since 1970 of a date or a date and time; UTC unless it says otherwise. Raises JobError for anything else."""
    if text is None:
        return None
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise JobError(
            f"{option} {text!r} is no date.", "Write 2026-11-01 or 2026-11-01T12:00 (UTC), or add +02:00."
        ) from None
    return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()


def _facts(line: Line, by: str) -> list[str]:
    if by != "run":
        return [str(line.runs)]
    return [line.detail["state"], ", ".join(line.detail["users"]) or "-"]


def _numbers(line: Line, parts: Sequence[str]) -> list[str]:
    shares = [
        f"{100 * line.parts[part] / line.total:.1f}" if line.total else "" for part in ("useful", *parts)
    ]
    return [f"{line.total / HOUR:,.2f} {line.unit}", *shares]
