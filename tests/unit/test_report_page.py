"""The report page and the lineage file, read back as a browser would: well-formed, self-contained, nothing unescaped."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayft.report.charts import MAX_POINTS, Series, line_chart, nice_ticks, stacked_bar, thin
from rayft.report.lineage import git_state, read_lineage, write_lineage
from rayft.report.log import RunLog
from rayft.report.page import render_page, write_page
from rayft.spec import dump_job, parse_job
from rayft.storage import LocalStore, ObjectNotFound
from tests.shared import ROOT

JOB = parse_job(
    {
        "name": "triage",
        "model": {"path": "org/<model>"},
        "data": {"train": [{"path": "a"}]},
        "eval": {"suites": [{"name": "general", "type": "bits_per_byte", "path": "x", "forgetting": True}]},
    }
)
VOID = {"meta", "line", "circle", "polyline", "i"}


class Reader(HTMLParser):
    """Checks that tags nest, and collects the text and what would be fetched."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.fetched: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.words.append(data.strip())


def step(number: int, **more: Any) -> dict[str, Any]:
    row = {
        "kind": "step",
        "step": number,
        "loss": 1 / number,
        "grad_norm": 1.0,
        "learning_rate": 1e-4,
        "rows": 8,
    }
    row |= {"tokens": 100, "trained_tokens": 30, "tokens_per_s": 50.0, "trained_tokens_per_s": 15.0}
    return {**row, "seconds": {"forward": 1.0, "backward": 3.0}, "peak_memory_gb": [2.0, 3.0], **more}


def a_run(store: LocalStore) -> None:
    store.put("job.yaml", dump_job(JOB).encode())
    log = RunLog(store, 1, lambda: True)
    log.event("plan", "it fits", stage=2, memory_terms_gb={"weights": 1.0, "logits": 1.5})
    log.begin_attempt(1, 1, None)
    log.append(
        {"kind": "suites", "when": "before", "step": 0, "results": {"general": {"bits_per_byte": 0.9}}}
    )
    for number in range(1, 5):
        log.append(step(number))
    log.event("checkpoint", step=4)
    log.event("failure", "rank 1 <died> & left")
    log.begin_attempt(2, 2, 4)
    log.append(step(5, loss=float("nan")))
    log.append({"kind": "eval", "step": 5, "loss": 0.4, "tokens": 10})
    log.append({"kind": "suites", "when": "after", "step": 5, "results": {"general": {"bits_per_byte": 1.0}}})
    log.event("end", "done", code=0, terminal=False)
    log.close()


def test_page_of_a_run(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    a_run(store)
    write_lineage(store, {"model": "sha256:1", "data": {"train": "sha256:2"}})
    write_page(store)
    page = Reader((tmp_path / "report.html").read_text())
    assert page.fetched == []
    for text in ("triage", "done", "org/<model> · sft, full fine-tuning", "rank 1 <died> & left", "sha256:2"):
        assert any(text in word for word in page.words), text
    row = page.words[page.words.index("general") :][:6]
    assert row == ["general", "bits_per_byte", "0.9000", "1.0000", "+0.1000", "forgot"]
    assert "committed at steps 4" in page.words
    assert page.words[page.words.index("2.50") - 1 :][:8] == [
        "0",
        "2.50",
        "2.00",
        "-20%",
        "1",
        "2.50",
        "3.00",
        "+20%",
    ]
    assert any(word.startswith("backward 15.0 s (75.0%)") for word in page.words)


def test_on_a_gpu_the_overhead_is_not_measured() -> None:
    job = JOB.model_copy(update={"cluster": JOB.cluster.model_copy(update={"gpus_per_worker": 1})})
    stamps = {"time": 0, "attempt": 1, "epoch": 1}
    plan = {
        "kind": "event",
        "event": "plan",
        "stage": 0,
        "memory_terms_gb": {"weights": 1.0, "overhead": 9.0},
        **stamps,
    }
    words = Reader(render_page(job, "", [plan, {**step(1), **stamps}], None)).words
    assert words[words.index("2.00") - 2 :][:4] == ["0", "1.00", "2.00", "+100%"]


def test_page_of_a_run_that_just_began() -> None:
    page = Reader(render_page(JOB, "name: triage", [], None))
    assert "not ended" in page.words
    assert "Training" not in page.words


def test_page_of_a_run_that_failed(tmp_path: Path) -> None:
    rows = [
        {"kind": "event", "event": "end", "time": 0, "attempt": 1, "epoch": 1, "message": "NaN", "code": 6}
    ]
    assert "training diverged" in Reader(render_page(JOB, "", rows, None)).words


def test_no_job_no_page(tmp_path: Path) -> None:
    with pytest.raises(ObjectNotFound):
        write_page(LocalStore(tmp_path))


def test_chart_marks_restarts_and_keeps_its_lines_apart() -> None:
    chart = line_chart([Series("a", [(1, 1.0), (9, 2.0)]), Series("b", [(5, 3.0)])], marks=[4, 400])
    assert chart.count("<polyline") == 2
    assert chart.count('class="mark"') == 1
    assert "resumed from step 4<" in chart
    assert "nothing logged" in line_chart([Series("a", [])])
    assert "nothing logged" in stacked_bar([("a", 0.0, "red")], "s")


@given(st.lists(st.tuples(st.integers(0, 10**6), st.floats(-1e12, 1e12)), min_size=1, max_size=30))
def test_every_chart_can_be_drawn_within_its_box(points: list[tuple[int, float]]) -> None:
    points = sorted(dict(points).items())
    chart = line_chart([Series("a", [(float(x), y) for x, y in points])])
    data = json.loads(chart.split('data-lines="')[1].split('"')[0].replace("&quot;", '"'))
    assert all(0 <= x <= 520 and 0 <= y <= 220 for _, _, x, y in data[0]["points"])


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9))
def test_ticks_are_few_round_and_inside(low: float, width: float) -> None:
    high = low + width
    if high <= low or width < abs(low) * 1e-6:
        return
    ticks = nice_ticks(low, high)
    assert 1 <= len(ticks) <= 7
    assert all(low - width * 0.01 <= tick <= high + width * 0.01 for tick in ticks)


def test_ticks() -> None:
    assert nice_ticks(0, 2.5) == [0, 0.5, 1, 1.5, 2, 2.5]
    assert nice_ticks(0.0, 9.7e-5) == [0, 2e-5, 4e-5, 6e-5, 8e-5]


def test_thinning_keeps_spikes() -> None:
    points = [(float(n), 0.0) for n in range(10_000)]
    points[7_777] = (7_777.0, 99.0)
    kept = thin(points)
    assert len(kept) <= MAX_POINTS + 2
    assert (7_777.0, 99.0) in kept
    assert list(kept) == sorted(kept)


def test_lineage_grows_only_when_circumstances_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LocalStore(tmp_path)
    assert read_lineage(store) is None
    write_lineage(store, {"data": "sha256:1"})
    write_lineage(store, {"data": "sha256:1"})
    first = read_lineage(store)
    assert first is not None
    assert len(first["starts"]) == 1
    monkeypatch.setattr("platform.node", lambda: "another-host")
    write_lineage(store, {"data": "sha256:1"})
    second = read_lineage(store)
    assert second is not None
    assert [start["hardware"]["host"] for start in second["starts"]][1] == "another-host"
    assert second["data"] == "sha256:1"
    assert second["starts"][0]["packages"]["numpy"]


def test_git_state(tmp_path: Path) -> None:
    assert git_state(tmp_path) is None
    state = git_state(ROOT)
    if state is None:
        pytest.skip("the tests run outside of a git checkout")
    assert len(state["commit"]) == 40


def test_page_of_a_reward_model(tmp_path: Path) -> None:
    """Metrics of the method over training and held-out rows, calibration, and scores against length."""
    store = LocalStore(tmp_path)
    store.put("job.yaml", dump_job(JOB).encode())
    log = RunLog(store, 1, lambda: True)
    for number in range(1, 4):
        log.append(step(number, metrics={"accuracy": 0.5 + number / 10, "mean_score": -0.1}))
    log.append(
        {"kind": "eval", "step": 3, "loss": 0.4, "rows": 10, "metrics": {"accuracy": 0.7, "mean_score": 0.2}}
    )
    log.close()
    details = {
        "pairs <a>": {
            "calibration": [[0.55, 0.5, 8], [0.9, 0.8, 4]],
            "length_and_score": [[3, 0.5], [9, -1.0]],
        }
    }
    store.put("details-after.json", json.dumps(details).encode())
    write_page(store)
    text = (tmp_path / "report.html").read_text()
    page = Reader(text)
    for title in (
        "accuracy",
        "mean score",
        "pairs <a>: share right by confidence, %",
        "pairs <a>: score by length in tokens",
    ):
        assert title in page.words
    assert "55" in text
    scattered = text[text.index("score by length") :]
    assert scattered.count("<circle") == 2
    assert "<polyline" not in scattered[: scattered.index("</figure>")]


def test_progress_shows_what_a_method_measures() -> None:
    import io

    from rich.console import Console

    from rayft.report.progress import Progress

    out = io.StringIO()
    progress = Progress(Console(file=out, width=200), 2)
    progress.row({**step(1, metrics={"accuracy": 0.75, "margin": 0.5}), "time": 1.0})
    progress.row({"kind": "eval", "step": 1, "loss": 0.4, "rows": 10, "metrics": {"accuracy": 0.7}})
    progress.row({"kind": "eval", "step": 1, "loss": 0.4, "tokens": 1000, "metrics": {}})
    assert "accuracy 75%  margin 0.5000" in out.getvalue()
    assert "eval at step 1: loss 0.4000, accuracy 70% on 10 rows" in out.getvalue()
    assert "loss 0.4000 on 1,000 tokens" in out.getvalue()
