"""`rayft rollouts`: look at the answers a run was trained on, filter them, compare two steps. Needs no model and no cluster."""

from __future__ import annotations

import io
import json
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rayft.errors import JobError
from rayft.rlhf.kept import Kind, key_of
from rayft.storage import ObjectNotFound, Store, open_store

Row = dict[str, Any]

CONDITION = re.compile(r"^\s*([\w/.-]+?)\s*(<=|>=|!=|=|<|>|~)\s*(.*?)\s*$")
COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "!=": operator.ne,
    "=": operator.eq,
    "<": operator.lt,
    ">": operator.gt,
}
#: Characters of a prompt and of an answer that a listing shows.
SHOWN = 2000


def browse(
    run: str,
    *,
    step: int | None = None,
    where: Sequence[str] = (),
    sort: str | None = None,
    limit: int = 5,
    kind: Kind = "step",
    console: Console | None = None,
) -> int:
    """Print a line for every step of a run, or the answers of one step that meet every condition.

    kind: which answers; see `Kind`.
    """
    console, store = console or Console(), open_store(run)
    if step is None:
        if where or sort:
            raise JobError("--where and --sort look at the answers of one step.", "Name it with --step.")
        console.print(_overview(store, kind))
        return 0
    rows = chosen(read_step(store, step, kind), where, sort)
    for row in rows[:limit]:
        _show(row, console)
    console.print(f"{min(limit, len(rows))} of {len(rows)} answers of step {step}", highlight=False)
    return 0


def compare(
    run: str,
    first: int,
    second: int,
    *,
    limit: int = 5,
    kind: Kind = "step",
    console: Console | None = None,
) -> int:
    """Print what changed between two steps: means, and prompts of both whose scores moved most."""
    console, store = console or Console(), open_store(run)
    before, after = read_step(store, first, kind), read_step(store, second, kind)
    table = Table("", f"step {first}", f"step {second}", "change")
    for name, (one, other) in {
        name: (_mean(before, name), _mean(after, name)) for name in _numbers(before)
    }.items():
        table.add_row(name, f"{one:.4g}", f"{other:.4g}", f"{other - one:+.4g}")
    console.print(table)
    scores = [
        {row: _mean(rows, "score", row) for row in {r["row"] for r in rows}} for rows in (before, after)
    ]
    both = sorted(scores[0].keys() & scores[1].keys(), key=lambda row: -abs(scores[1][row] - scores[0][row]))
    console.print(f"{len(both)} prompts are in both", highlight=False)
    for row in both[:limit]:
        console.rule(f"row {row}: score {scores[0][row]:.4g} to {scores[1][row]:.4g}")
        for number, rows in ((first, before), (second, after)):
            answer = next(r for r in rows if r["row"] == row)
            console.print(f"[bold]step {number}[/]: {escape(answer['text'][:SHOWN])}", highlight=False)
    return 0


def read_step(store: Store, step: int, kind: Kind = "step") -> list[Row]:
    """The answers of a step with what was learned from them. Raises JobError, naming what there is, if it was not kept."""
    try:
        return read_rows(store, key_of(kind, step))
    except ObjectNotFound:
        there = steps_of(store, kind)
        kept = f"it has steps {there[0]} to {there[-1]}" if there else "it has none"
        if there and kind != "step":
            kept = f"it has steps {', '.join(map(str, there))}"
        what = {
            "step": "rollouts of",
            "dropped": "dropped answers at",
            "held-out": "answers to held-out prompts at",
        }[kind]
        raise JobError(
            f"The run at {store.uri} has no {what} step {step}; {kept}.", "Name one of these."
        ) from None


def read_rows(store: Store, key: str) -> list[Row]:
    """The rows of a file of answers. Raises ObjectNotFound."""
    rows: list[Row] = pq.read_table(io.BytesIO(store.get(key))).to_pylist()
    return rows


def steps_of(store: Store, kind: Kind = "step") -> list[int]:
    """Steps with answers of that kind."""
    pattern = rf"rollouts/{kind}-(\d+)\.parquet"
    found = (re.fullmatch(pattern, entry.key) for entry in store.list("rollouts"))
    return sorted(int(match[1]) for match in found if match)


def chosen(rows: Sequence[Row], where: Sequence[str], sort: str | None) -> list[Row]:
    """Rows that meet every condition (`score<0.5`, `ended=false`, `text~pattern`), sorted by a column (`-score`: falling).

    Columns that hold a list for each answer count by its length, as `tokens` by that of the answer.
    Raises JobError for what is no condition and for columns that are not there.
    """
    found = list(rows)
    for condition in where:
        match = CONDITION.match(condition)
        if match is None:
            raise JobError(
                f"{condition!r} is no condition.", "Write it like score<0.5, ended=false or text~pattern."
            )
        column, sign, wanted = match.groups()
        found = [row for row in found if _meets(_value(row, column), sign, wanted, condition)]
    if sort:
        name, falling = sort.removeprefix("-"), sort.startswith("-")
        found.sort(key=lambda row: _value(row, name), reverse=falling)
    return found


def _meets(value: Any, sign: str, wanted: str, condition: str) -> bool:
    if sign == "~":
        try:
            return re.search(wanted, str(value)) is not None
        except re.error as error:
            raise JobError(
                f"{condition!r}: {error}.", "What stands after ~ is a regular expression."
            ) from None
    if isinstance(value, str):
        return COMPARE[sign](value, wanted)
    if isinstance(value, bool):
        if wanted.lower() not in ("true", "false"):
            raise JobError(f"{condition!r} compares yes or no with {wanted!r}.", "Give true or false.")
        return COMPARE[sign](value, wanted.lower() == "true")
    try:
        return COMPARE[sign](value, float(wanted))
    except ValueError:
        raise JobError(
            f"{condition!r} compares a number with {wanted!r}.", "Give a number, or use ~ to look for a text."
        ) from None


def _value(row: Row, column: str) -> Any:
    if column == "tokens":
        return len(row["ids"])
    if column not in row:
        names = ", ".join(sorted([*row, "tokens"]))
        raise JobError(f"Answers have no column {column!r}.", f"They have {names}.")
    return len(row[column]) if isinstance(row[column], list) else row[column]


def _overview(store: Store, kind: Kind) -> Table:
    steps = steps_of(store, kind)
    if not steps and kind == "dropped" and steps_of(store):
        raise JobError(
            f"No answers were dropped at {store.uri}.",
            "With rl.drop_uniform_groups those are dropped whose group all have the same reward.",
        )
    if not steps and kind == "held-out":
        raise JobError(
            f"There are no answers to held-out prompts at {store.uri}.",
            "Give a job data.eval, and its run keeps them.",
        )
    if not steps:
        raise JobError(
            f"There are no rollouts at {store.uri}.",
            "Give the folder of a run that learned from rewards, such as runs/NAME.",
        )
    table = Table("step", "answers", "score", "tokens", "ended", "weights")
    for step in steps:
        rows = read_step(store, step, kind)
        scores = [row["score"] for row in rows]
        table.add_row(
            str(step),
            str(len(rows)),
            f"{np.mean(scores):.4g} ± {np.std(scores):.2g}",
            f"{_mean(rows, 'tokens'):.1f}",
            f"{100 * _mean(rows, 'ended'):.0f} %",
            ", ".join(str(version) for version in sorted({row["version"] for row in rows})),
        )
    return table


def _show(row: Row, console: Console) -> None:
    sources = ", ".join(f"{name[6:]} {row[name]:.4g}" for name in row if name.startswith("score/"))
    advantage = f"{np.mean(row['advantages']):.3g}" if row.get("advantages") else "none"
    console.rule(f"row {row['row']}, sample {row['sample']}")
    content = json.loads(row["prompt"])
    turns = (
        [("prompt", content)] if isinstance(content, str) else [(m["role"], m["content"]) for m in content]
    )
    for role, text in [*turns, ("answer", row["text"])]:
        console.print(f"[bold]{escape(role)}[/]: {escape(str(text)[:SHOWN])}", highlight=False)
    console.print(
        f"score {row['score']:.4g} ({sources}), mean advantage {advantage}, {len(row['ids'])} tokens"
        f"{'' if row['ended'] else ', cut off'}, weights of version {row['version']}",
        style="dim",
        highlight=False,
    )


def _numbers(rows: Sequence[Row]) -> list[str]:
    """Columns with a number for each answer that means something on average."""
    names = [name for name in rows[0] if name.startswith("score")] if rows else []
    return [*names, "tokens", "ended"]


def _mean(rows: Sequence[Row], name: str, row: int | None = None) -> float:
    return float(np.mean([_value(r, name) for r in rows if row is None or r["row"] == row]))
