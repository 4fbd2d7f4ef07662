"""Progress lines, the table of suites before and after, the summary."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from rayft.report.progress import Progress
from rayft.report.tables import deltas, suites_table, summary, summary_table
from rayft.report.text import count, duration
from rayft.spec import Suite


def step(number: int, time: float, **more: Any) -> dict[str, Any]:
    row = {
        "kind": "step",
        "time": time,
        "step": number,
        "loss": 1.25,
        "grad_norm": 0.5,
        "learning_rate": 1e-4,
    }
    row |= {
        "rows": 8,
        "tokens": 1000,
        "trained_tokens": 300,
        "tokens_per_s": 512.0,
        "peak_memory_gb": [1.5, 2.25],
    }
    return {**row, "seconds": {"data": 0.5, "forward": 1.5, "backward": 2.0}, **more}


def printed(
    rows: list[dict[str, Any]], total: int | None = 100, every: int = 1, terminal: bool = False
) -> list[str]:
    out = io.StringIO()
    progress = Progress(Console(file=out, force_terminal=terminal, width=40), total, every=every)
    for row in rows:
        progress.row(row)
    return out.getvalue().splitlines()


def test_a_step_is_one_plain_line() -> None:
    lines = printed([step(1, 10.0), step(2, 16.0)])
    assert lines == [
        "step   1/100  loss 1.2500  grad 0.5  lr 1.00e-04  512 tokens/s  6m 36s left",  # from its own 4 s
        "step   2/100  loss 1.2500  grad 0.5  lr 1.00e-04  512 tokens/s  9m 48s left",  # 6 s from row to row
    ]


def test_time_left_starts_anew_after_going_back() -> None:
    rows = [step(8, 0.0), step(9, 1.0), step(5, 100.0), step(6, 102.0)]
    assert printed(rows)[-1].endswith("3m 08s left")


def test_unknown_total_and_thinned_lines() -> None:
    lines = printed([step(n, float(n)) for n in range(1, 8)], total=7, every=3)
    assert [line.split()[1] for line in lines] == ["3/7", "6/7", "7/7"]
    assert "left" not in printed([step(1, 0.0)], total=None)[0]
    assert printed([step(1, 0.0)], total=None)[0].startswith("step 1  loss")


def test_a_lost_loss_and_events() -> None:
    rows = [step(1, 0.0, loss=None, grad_norm=None)]
    rows += [{"kind": "event", "event": "failure", "message": "rank 1 died [3/4]"}]
    rows += [
        {"kind": "eval", "step": 5, "loss": 0.5, "tokens": 12_345},
        {"kind": "event", "event": "start", "message": ""},
    ]
    lines = printed(rows)
    assert "loss nan" in lines[0]
    assert lines[1:] == ["failure: rank 1 died [3/4]", "eval at step 5: loss 0.5000 on 12.3k tokens", "start"]
    assert "\x1b[31m" in printed(rows, terminal=True)[1]


SUITES = [
    Suite(name="triage", type="json", path="x"),
    Suite(name="general", type="bits_per_byte", path="x", forgetting=True),
    Suite(name="choice", type="multiple_choice", path="x", forgetting=True),
]
BEFORE = {
    "triage": {"exact_match": 0.0, "exact_match_stderr": 0.0, "rows": 100},
    "general": {"bits_per_byte": 0.9, "bytes": 1000},
    "choice": {"accuracy": 0.50, "accuracy_stderr": 0.03},
}
AFTER = {
    "triage": {"exact_match": 0.92, "exact_match_stderr": 0.03, "rows": 100},
    "general": {"bits_per_byte": 1.1, "bytes": 1000},
    "choice": {"accuracy": 0.45, "accuracy_stderr": 0.03},
}


def test_deltas_know_directions_noise_and_forgetting() -> None:
    found = {delta.suite: delta for delta in deltas(BEFORE, AFTER, SUITES)}
    assert list(found) == ["triage", "general", "choice"]
    assert (found["triage"].verdict, found["triage"].forgot) == ("better", False)
    assert (found["general"].verdict, found["general"].forgot) == ("worse", True)
    (unwatched,) = deltas({"triage": {"f1": 0.9}}, {"triage": {"f1": 0.1}}, SUITES)
    assert (unwatched.verdict, unwatched.forgot) == ("worse", False)
    assert found["choice"].stderr == pytest.approx(0.03 * 2**0.5)
    assert (found["choice"].verdict, found["choice"].forgot) == ("same", False)  # 0.05 is within 2 x 0.042


def test_deltas_with_one_side_missing() -> None:
    (delta, *_) = deltas(None, AFTER, SUITES)
    assert (delta.before, delta.after, delta.change, delta.verdict) == (None, 0.92, None, "same")
    assert deltas(None, None, SUITES) == []


def test_suites_table_as_printed() -> None:
    out = io.StringIO()
    Console(file=out, width=100).print(suites_table(BEFORE, AFTER, SUITES))
    lines = [line for line in out.getvalue().splitlines() if "│" in line]
    cells = [[cell.strip() for cell in line.strip("│ ").split("│")] for line in lines]
    assert cells[0] == ["triage", "exact_match", "0.0 %", "92.0 %", "+92.0 ± 3.0"]
    assert "forgot" in lines[1]
    assert "+0.2000" in lines[1]
    assert "kept" in lines[2]


def test_summary_of_a_log() -> None:
    rows = [step(1, 0.0, loss=2.0), step(2, 4.0, loss=1.0)]
    rows += [
        {"kind": "eval", "step": 1, "loss": 0.7, "tokens": 5},
        {"kind": "eval", "step": 2, "loss": 0.9, "tokens": 5},
    ]
    rows += [
        {"kind": "event", "event": "checkpoint", "step": 2},
        {"kind": "event", "event": "resume", "resumed_step": 1},
    ]
    assert summary(rows) == {
        "steps": "2, 16 rows",
        "tokens": "2,000, of which 600 trained",
        "training loss": "2.0000 to 1.0000",
        "speed": "250 tokens/s over 8s of training",
        "peak memory": "2.25 GB per rank",
        "evaluation loss": "0.9000, best 0.7000 at step 1",
        "checkpoints": "1, the last at step 2",
        "resumed": "once from step 1",
    }
    assert summary([]) == {}
    out = io.StringIO()
    Console(file=out, width=100).print(summary_table(rows, "demo", {"chat": "rayft chat runs/demo"}))
    assert "rayft chat runs/demo" in out.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(4.4, "4s"), (59.6, "1m 00s"), (185, "3m 05s"), (7440, "2h 04m"), (273_600, "3d 4h")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"), [(812.4, "812"), (4512, "4,512"), (61_400, "61.4k"), (8.03e9, "8.03B")]
)
def test_count(number: float, text: str) -> None:
    assert count(number) == text
