"""Tables at the end of a run: the suites before and after with their deltas, and the summary."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from rayft.report.log import Row
from rayft.report.text import count, duration, value
from rayft.spec import Suite

Results = dict[str, dict[str, float]]

#: Metrics of which less is better; of all others more is.
LOWER_IS_BETTER = frozenset({"bits_per_byte", "loss", "perplexity", "ece"})
#: Suffix of a metric's standard error, shown beside the metric.
STDERR = "_stderr"
#: Metrics that say how much was measured, not how well.
COUNTS = frozenset({"rows", "rows_skipped", "documents", "tokens", "bytes"})
#: Metrics that are no shares.
PLAIN = frozenset({"margin", "mean_score", "length_correlation", "disagreement"}) | LOWER_IS_BETTER


@dataclass(frozen=True)
class Delta:
    """One metric of one suite before and after training.

    `verdict`: `better`, `worse` or `same`; a difference below two standard errors (of the difference, the two
    measurements taken as independent) is `same`. `forgot`: it is worse in a suite that should not get worse.
    """

    suite: str
    metric: str
    before: float | None
    after: float | None
    stderr: float | None
    forgetting: bool

    @property
    def change(self) -> float | None:
        return None if self.before is None or self.after is None else self.after - self.before

    @property
    def verdict(self) -> str:
        if not self.change or abs(self.change) < 2 * (self.stderr or 0):
            return "same"
        return "better" if (self.change < 0) == (self.metric in LOWER_IS_BETTER) else "worse"

    def text(self, number: float | None) -> str:
        """A value of this metric as people read it: shares in per cent."""
        if number is None:
            return ""
        return value(number) if self.metric in PLAIN else f"{100 * number:.1f} %"

    @property
    def change_text(self) -> str:
        """The change with its standard error, shares in points."""
        if self.change is None:
            return ""
        scale, digits = (1, 4) if self.metric in PLAIN else (100, 1)
        noise = f" ± {scale * self.stderr:.{digits}f}" if self.stderr is not None else ""
        return f"{scale * self.change:+.{digits}f}{noise}"

    @property
    def forgot(self) -> bool:
        return self.forgetting and self.verdict == "worse"


def deltas(before: Results | None, after: Results | None, suites: Sequence[Suite]) -> list[Delta]:
    """Every metric of every suite in the job's order; either side may be missing."""
    before, after = before or {}, after or {}
    found = []
    for suite in suites:
        old, new = before.get(suite.name, {}), after.get(suite.name, {})
        for metric in dict.fromkeys([*new, *old]):
            if metric in COUNTS or metric.endswith(STDERR):
                continue
            errors = [side[metric + STDERR] for side in (old, new) if metric + STDERR in side]
            stderr = math.hypot(*errors) if errors else None
            found.append(
                Delta(suite.name, metric, old.get(metric), new.get(metric), stderr, suite.forgetting)
            )
    return found


def suites_table(before: Results | None, after: Results | None, suites: Sequence[Suite]) -> Table:
    """The suites before and after training, one line a metric; what was forgotten is marked."""
    table = Table(title="Before and after")
    for heading in ("suite", "metric"):
        table.add_column(heading)
    for heading in ("before", "after", "delta"):
        table.add_column(heading, justify="right")
    table.add_column("")
    last = None
    for delta in deltas(before, after, suites):
        if last not in (None, delta.suite):
            table.add_section()
        table.add_row(
            delta.suite if delta.suite != last else "",
            delta.metric,
            delta.text(delta.before),
            delta.text(delta.after),
            Text(delta.change_text, style={"better": "green", "worse": "red", "same": ""}[delta.verdict]),
            _mark(delta),
        )
        last = delta.suite
    return table


def summary_table(rows: Iterable[Row], title: str, facts: dict[str, str] | None = None) -> Table:
    """What the run did, from its log: steps, tokens, loss, speed, time, memory, checkpoints; then `facts`."""
    table = Table(title=title, show_header=False)
    table.add_column(style="bold")
    table.add_column()
    for name, text in {**summary(list(rows)), **(facts or {})}.items():
        table.add_row(name, text)
    return table


def summary(rows: Sequence[Row]) -> dict[str, str]:
    """The summary's lines, name to text; lines with nothing to say are left out."""
    steps = [row for row in rows if row["kind"] == "step"]
    evals = [row for row in rows if row["kind"] == "eval"]
    saved = [row for row in rows if row["kind"] == "event" and row["event"] == "checkpoint"]
    resumed = [row for row in rows if row["kind"] == "event" and row["event"] == "resume"]
    lines: dict[str, str] = {}
    if steps:
        tokens, trained = sum(row["tokens"] for row in steps), sum(row["trained_tokens"] for row in steps)
        seconds = sum(sum(row["seconds"].values()) for row in steps)
        lines["steps"] = f"{steps[-1]['step']:,}, {sum(row['rows'] for row in steps):,} rows"
        lines["tokens"] = f"{count(tokens)}, of which {count(trained)} trained"
        lines["training loss"] = f"{value(steps[0]['loss'])} to {value(steps[-1]['loss'])}"
        lines["speed"] = f"{count(tokens / max(seconds, 1e-9))} tokens/s over {duration(seconds)} of training"
        memory = [peak for row in steps for peak in row.get("peak_memory_gb") or []]
        if memory:
            lines["peak memory"] = f"{max(memory):.2f} GB per rank"
    if evals:
        if "loss" in evals[-1]:
            best = min(evals, key=lambda row: math.inf if row["loss"] is None else row["loss"])
            lines["evaluation loss"] = (
                f"{value(evals[-1]['loss'])}, best {value(best['loss'])} at step {best['step']}"
            )
        for name, number in (evals[-1].get("metrics") or {}).items():
            if len(evals) > 1:
                first = (evals[0].get("metrics") or {}).get(name)
                since = "" if first is None else f"{value(first)} at step {evals[0]['step']} to "
                lines[f"evaluation {name.replace('_', ' ')}"] = since + value(number)
    if saved:
        lines["checkpoints"] = f"{len(saved)}, the last at step {saved[-1]['step']}"
    if resumed:
        lines["resumed"] = (
            f"{'once' if len(resumed) == 1 else f'{len(resumed)} times, last'} from step {resumed[-1]['resumed_step']}"
        )
    return lines


def _mark(delta: Delta) -> Text:
    if delta.forgot:
        return Text("forgot", style="bold red")
    return Text("kept" if delta.forgetting and delta.change is not None else "", style="dim")
