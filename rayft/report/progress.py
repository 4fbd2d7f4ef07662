"""Progress on the console: one line a step, one line an event; the same text with and without a terminal."""

from __future__ import annotations

from collections import deque

from rich.console import Console
from rich.text import Text

from rayft.report.log import Row
from rayft.report.text import count, duration, value

#: Steps over which the time left is estimated.
WINDOW = 50

EVENT_STYLES = {
    "failure": "red",
    "hang": "red",
    "end": "bold",
    "preempted": "yellow",
    "restart": "yellow",
    "checkpoint": "dim",
}


class Progress:
    """Prints the rows of a run log as they come; give it every row, it prints those people want to see.

    `total_steps` is the last step of the run (None: unknown, then without the time left); `every` thins the step
    lines, the last step is always shown.
    """

    def __init__(self, console: Console, total_steps: int | None, *, every: int = 1) -> None:
        self._console = console
        self._total = total_steps
        self._every = every
        self._recent: deque[tuple[int, float]] = deque(maxlen=WINDOW + 1)

    def row(self, row: Row) -> None:
        """Print one row of the run log."""
        kind = row["kind"]
        if kind == "step":
            self._step(row)
        elif kind == "eval":
            unit = "tokens" if "tokens" in row else "rows"
            loss = [f"loss {value(row['loss'])}"] if "loss" in row else []
            found = ", ".join([*loss, *_shown(row)])
            self._print(f"eval at step {row['step']}: {found} on {count(row[unit])} {unit}", "cyan")
        elif kind == "suites":
            self._print(f"suites {row['when']} training: {', '.join(row['results']) or 'none'}", "cyan")
        elif kind == "event":
            text = f"{row['event']}: {row['message']}" if row.get("message") else row["event"]
            self._print(text, EVENT_STYLES.get(row["event"], ""))

    def _step(self, row: Row) -> None:
        step = row["step"]
        if self._recent and step <= self._recent[-1][0]:
            self._recent.clear()  # the run went back to a checkpoint
        self._recent.append((step, row["time"]))
        if step % self._every and step != self._total:
            return
        total = f"/{self._total}" if self._total else ""
        parts = [f"step {step:>{len(total) - 1 if total else 1}}{total}", f"loss {value(row['loss'])}"]
        parts += _shown(row)
        if row.get("grad_norm") is not None:
            parts.append(f"grad {row['grad_norm']:.3g}")
        parts += [f"lr {row['learning_rate']:.2e}", f"{count(row['tokens_per_s'])} tokens/s"]
        left = self._seconds_left(row)
        if left is not None:
            parts.append(f"{duration(left)} left")
        self._print("  ".join(parts), "")

    def _seconds_left(self, row: Row) -> float | None:
        """Steps left at the pace of the last ones, evaluations and checkpoints in between included."""
        if not self._total:
            return None
        first_step, first_time = self._recent[0]
        steps = row["step"] - first_step
        pace = (row["time"] - first_time) / steps if steps else sum(row["seconds"].values())
        return pace * (self._total - row["step"])

    def _print(self, text: str, style: str) -> None:
        self._console.print(Text(text, style=style), soft_wrap=True, highlight=False)


def _shown(row: Row) -> list[str]:
    """The metrics of a method that people look at while it runs."""
    metrics = row.get("metrics") or {}
    shown = [f"accuracy {metrics['accuracy']:.0%}"] if "accuracy" in metrics else []
    return shown + [f"{name} {value(metrics[name])}" for name in ("margin", "score", "kl") if name in metrics]
