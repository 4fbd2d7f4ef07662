"""What runs used, from their logs: every moment goes to one part, and the parts add up to the whole."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayft.cli import main
from rayft.errors import JobError
from rayft.report.spans import PARTS, SHARE, Devices, Start, starts_of, usable
from rayft.report.usage import HOUR, Usage, lines_by, measure, sums, usage_of
from rayft.report.usage_table import collect
from rayft.storage import open_store

ONE_CPU = Devices(0, SHARE)
T0 = 1_700_000_000.0


class Log:
    """A run log that is written by hand."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.epoch = self.attempt = 0

    def add(self, at: float, kind: str, **fields: Any) -> Log:
        stamp = {"time": T0 + at, "epoch": self.epoch, "attempt": self.attempt}
        self.rows.append({**stamp, "kind": kind, **fields})
        return self

    def event(self, at: float, event: str, **fields: Any) -> Log:
        return self.add(at, "event", event=event, message="", **fields)

    def open(self, at: float, user: str = "ann", team: str = "nlp", began: float | None = None) -> Log:
        self.epoch, self.attempt = self.epoch + 1, 0
        began = T0 + (at if began is None else began)
        return self.event(at, "open", began=began, user=user, team=team, devices={"CPU": 2.0, "GPU": 2.0})

    def begin(self, at: float, resumed: int | None, gpus: float = 2.0, **fields: Any) -> Log:
        self.epoch, self.attempt = self.epoch + 1, self.attempt + 1
        event = "start" if resumed is None else "resume"
        return self.event(at, event, resumed_step=resumed, devices={"CPU": 2.0, "GPU": gpus}, **fields)

    def step(self, at: float, step: int, seconds: float = 1.0, checkpoint: float = 0.0) -> Log:
        return self.add(at, "step", step=step, seconds={"forward": seconds, "checkpoint": checkpoint})

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True)
        (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        return folder


def used(rows: list[dict[str, Any]], now: float = 1e6) -> Usage:
    return measure("run", starts_of(rows, ONE_CPU), since=None, until=None, now=T0 + now)


def gpu_seconds(usage: Usage) -> dict[str, float]:
    assert usage.unit == "GPU"
    return {part: amount / 1000 / SHARE for part, amount in usage.parts.items() if amount}


def undisturbed() -> Log:
    log = Log().open(2, began=0).begin(20, None, waited=[T0 + 5, T0 + 15])
    log.step(31, 1, seconds=4).step(34, 2).step(41, 3, checkpoint=2.0)
    log.add(45, "eval", step=3, took_s=3.0).step(45.5, 4).event(50, "checkpoint", step=4)
    return log.add(58, "suites", step=4, when="after", results={}, took_s=6.0).event(60, "end", code=0)


def test_an_undisturbed_run_by_hand() -> None:
    """Two GPUs: 0-20 load less 10 of waiting, the first step 4 of 11 s, a checkpoint of 2, an evaluation of 3, and so on."""
    parts = gpu_seconds(used(undisturbed().rows))
    assert parts == {
        "load": 2 * (10 + 7),
        "waiting": 2 * 10,
        "useful": 2 * (4 + 3 + 5 + 1 + 0.5),
        "checkpoint": 2 * (2 + 4.5),  # training stood still for 2, and the last commit was waited for
        "evaluation": 2 * (3 + 6),
        "other": 2 * (2 + 2),
    }
    assert sum(parts.values()) == 2 * 60
    assert used(undisturbed().rows).state == "done"


def test_a_search_holds_nothing_beside_its_trials() -> None:
    log = Log().event(0, "open", began=T0, user="ann", team="nlp", devices={}).event(3600, "end", code=0)
    usage = used(log.rows)
    assert (usage.unit, sum(usage.parts.values()), usage.state) == ("CPU", 0, "done")


def test_steps_that_were_computed_again_and_the_way_back() -> None:
    log = Log().open(0).begin(10, None).step(20, 1, seconds=10).step(30, 2).step(40, 3)
    # A worker dies at some time after 40; the group stands again at 60 and resumes from step 1.
    log.begin(60, 1).step(75, 2, seconds=5).step(80, 3).event(81, "end", code=0)
    assert gpu_seconds(used(log.rows)) == {
        "load": 20,
        "useful": 2 * (10 + 5 + 5),
        "repeated": 2 * 20,
        "restart": 2 * (20 + 10),
        "other": 2,
    }


def test_a_new_driver_after_a_kill_is_a_restart_and_the_time_between_is_nobodys() -> None:
    log = Log().open(0).begin(10, None).step(20, 1, seconds=10).event(25, "checkpoint", step=1)
    log.open(1000, user="bob", team="speech").begin(1010, 1).step(1020, 2, seconds=4).event(
        1020, "end", code=0
    )
    usage = used(log.rows)
    assert gpu_seconds(usage) == {"load": 20, "useful": 2 * 14, "restart": 2 * (5 + 10 + 6)}
    assert usage.wall_ms == 45_000
    assert (usage.starts, usage.attempts, usage.state) == (2, 2, "done")
    assert "without a word once" in usage.notes[0]
    by_user = {line.name: line.total / 1000 / SHARE for line in lines_by([usage], "user")}
    assert by_user == {"ann": 50, "bob": 40}
    by_team = {line.name: line.goodput for line in lines_by([usage], "team")}
    assert by_team == {"nlp": 20 / 50, "speech": 8 / 40}


def test_an_elastic_run_is_charged_with_what_it_held() -> None:
    log = Log().open(0).begin(10, None, gpus=4).step(20, 1, seconds=10)
    log.begin(30, 1, gpus=2).step(40, 2, seconds=10).event(40, "end", code=0)
    assert gpu_seconds(used(log.rows)) == {"load": 40, "useful": 40 + 20, "restart": 20}


def test_a_run_that_never_got_its_devices_waited_for_what_it_asked() -> None:
    log = Log().open(0).event(300, "placed", waited=[T0 + 10, T0 + 300]).event(300, "end", code=4)
    assert gpu_seconds(used(log.rows)) == {"load": 20, "waiting": 580}


def test_a_clock_that_runs_back_and_a_takeover_that_overlaps() -> None:
    log = Log().open(0).begin(10, None).step(20, 1, seconds=10).step(15, 2, seconds=1).step(30, 3)
    log.open(25).begin(28, 3).step(35, 4, seconds=7).event(35, "end", code=0)
    usage = used(log.rows)
    assert usage.wall_ms == 30_000 + 10_000  # both held their devices meanwhile
    assert sum(usage.parts.values()) == 2 * SHARE * usage.wall_ms


def test_what_is_still_going_and_what_was_killed_are_told_apart() -> None:
    rows = Log().open(0).begin(10, None).step(20, 1).rows
    going, killed = used(rows, now=60), used(rows, now=60 + 3600)
    assert (going.state, killed.state) == ("going", "no end")
    assert "up to the last row" in going.notes[0]
    assert "without a word once" in killed.notes[0]
    assert going.parts == killed.parts


def test_an_older_log_says_less_and_is_counted_all_the_same(tmp_path: Path) -> None:
    log = Log()
    log.epoch = 1
    log.event(0, "plan")
    log.epoch, log.attempt = 2, 1
    log.event(10, "start", resumed_step=None, workers=3).step(20, 1, seconds=8).event(21, "end", code=0)
    folder = log.write(tmp_path / "old")
    (folder / "job.yaml").write_text("cluster: {gpus_per_worker: 0.5, cpus_per_worker: 1}\n")
    usage = usage_of("old", open_store(folder))
    assert usage is not None
    assert gpu_seconds(usage) == {"load": 1.5 * 12, "useful": 1.5 * 8, "other": 1.5}
    assert "older log" in usage.notes[0]


def test_torn_lines_and_rows_that_are_none_of_ours(tmp_path: Path) -> None:
    folder = undisturbed().write(tmp_path / "torn")
    whole = usage_of("torn", open_store(folder))
    assert whole is not None
    with (folder / "log.jsonl").open("a") as file:
        file.write('[1, 2]\n"a"\nnull\n{"kind": "step", "time": 1}\n{"kind": "step", "step": 5, "ti')
    damaged = usage_of("torn", open_store(folder))
    assert damaged is not None
    assert damaged.parts == whole.parts
    assert damaged.notes == ["5 torn lines of its log skipped"]


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    undisturbed().write(tmp_path / "runs" / "one")
    undisturbed().write(tmp_path / "runs" / "search" / "trial-1")
    (tmp_path / "runs" / "cache").mkdir()
    assert main(["usage", str(tmp_path / "runs"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [line["name"] for line in told["lines"]] == ["one", "search/trial-1"]
    [total] = told["totals"]
    assert total["exact"]["total"] == 2 * 2 * 60_000 * SHARE == sum(total["exact"]["parts"].values())
    assert total["exact"]["per_hour"] == HOUR
    assert total["hours"] == pytest.approx(4 * 60 / 3600)
    assert total["goodput"] == pytest.approx(13.5 / 60)
    # Half of each: the second 30 s of the first minute.
    window = ["--since", "2023-11-14T22:13:50", "--until", "2023-11-14T22:14:20+00:00"]
    assert main(["usage", str(tmp_path / "runs" / "one"), "--json", *window]) == 0
    assert json.loads(capsys.readouterr().out)["totals"][0]["exact"]["total"] == 2 * 30_000 * SHARE
    assert main(["usage", str(tmp_path / "runs"), "--by", "team"]) == 0
    shown = capsys.readouterr().out
    assert "nlp" in shown
    assert "22.5" in shown
    for wrong in (
        ["nowhere"],
        [str(tmp_path), "--since", "tomorrow"],
        [str(tmp_path), "--since", "2026-01-02", "--until", "2026-01-01"],
    ):
        assert main(["usage", *wrong]) == 2
    assert "no run log" in capsys.readouterr().err


def test_logs_on_an_object_store(s3_bucket: str) -> None:
    """Segments `log/<epoch>-<n>.jsonl`, several runs below one prefix."""
    store = open_store(f"s3://{s3_bucket}/fleet")
    rows = undisturbed().rows
    for name in ("a", "b"):
        store.put(f"{name}/log/1-0.jsonl", "".join(json.dumps(row) + "\n" for row in rows[:4]).encode())
        store.put(f"{name}/log/2-0.jsonl", "".join(json.dumps(row) + "\n" for row in rows[4:]).encode())
    store.put("a/checkpoints/step-4/manifest.json", b"{}")
    found = collect([f"s3://{s3_bucket}/fleet"])
    assert [usage.run for usage in found] == ["a", "b"]
    assert [gpu_seconds(usage) for usage in found] == [gpu_seconds(used(rows))] * 2
    with pytest.raises(JobError, match="no run log"):
        collect([f"s3://{s3_bucket}/elsewhere"])


# -- any log at all ------------------------------------------------------------------------------------------------

TIMES = st.floats(-50, 500, allow_nan=False).map(lambda seconds: round(seconds, 3))
AMOUNTS = st.one_of(st.none(), st.floats(-5, 100, allow_nan=False), st.just(float("inf")))
DEVICES = st.one_of(
    st.none(), st.fixed_dictionaries({"CPU": st.floats(0, 8), "GPU": st.sampled_from([0, 0.25, 1, 8])})
)
ROWS = st.fixed_dictionaries(
    {
        "time": TIMES.map(lambda seconds: T0 + seconds),
        "epoch": st.integers(1, 6),
        "attempt": st.integers(0, 3),
        "kind": st.sampled_from(["step", "step", "eval", "suites", "ledger", "event", "event", "event"]),
        "event": st.sampled_from(["open", "start", "resume", "checkpoint", "placed", "failure", "end"]),
        "step": st.integers(0, 12),
        "resumed_step": st.one_of(st.none(), st.integers(0, 12)),
        "seconds": st.one_of(st.none(), st.dictionaries(st.sampled_from(["forward", "checkpoint"]), AMOUNTS)),
        "took_s": AMOUNTS,
        "waited": st.one_of(
            st.none(), st.lists(TIMES.map(lambda seconds: T0 + seconds), min_size=2, max_size=2)
        ),
        "code": st.sampled_from([0, 2, 8, 9]),
        "began": TIMES.map(lambda seconds: T0 + seconds),
        "devices": DEVICES,
        "user": st.sampled_from(["ann", "bob", ""]),
        "team": st.sampled_from(["nlp", ""]),
        "workers": st.integers(1, 4),
    }
)


def as_written(row: dict[str, Any]) -> dict[str, Any]:
    """Only what a row of its kind has; a step row is no event."""
    drop = {"step": ("event", "resumed_step"), "event": ("seconds", "took_s")}.get(row["kind"], ("event",))
    return {name: value for name, value in row.items() if name not in drop}


@settings(max_examples=150, deadline=None)
@given(st.lists(ROWS, max_size=40), st.lists(TIMES, min_size=2, max_size=2))
def test_parts_of_any_log_sum_to_the_whole(rows: list[dict[str, Any]], window: list[float]) -> None:
    written = usable([as_written(row) for row in rows])
    assert len(written) == len(rows)
    starts = starts_of(written, ONE_CPU)
    assert sum(len(start.rows) for start in starts) == len(rows)
    for start in starts:
        assert_tiled(start)
    if not starts:
        return
    whole = measure("run", starts, since=None, until=None, now=T0)
    assert set(whole.parts) == set(PARTS)
    assert all(amount >= 0 for amount in whole.parts.values())
    assert sum(whole.parts.values()) == sum(
        (span.end - span.start) * (span.devices.gpus if whole.unit == "GPU" else span.devices.cpus)
        for start in starts
        for span in start.spans
    )
    assert whole.wall_ms == sum(start.ended - start.began for start in starts)
    # Windows that touch add up, whatever they cut.
    cuts = [None, *sorted(T0 + cut for cut in window), None]
    pieces = [
        measure("run", starts, since=begin, until=end, now=T0) for begin, end in itertools.pairwise(cuts)
    ]
    assert {part: sum(piece.parts[part] for piece in pieces) for part in PARTS} == whole.parts
    for by in ("run", "user", "team"):
        lines = lines_by([whole], by)
        assert [line.total for line in sums([whole])] == [sum(line.total for line in lines)]
        assert sum(line.parts["useful"] for line in lines) == whole.parts["useful"]


def assert_tiled(start: Start) -> None:
    """The spans lie end to end, from the start's first moment to its last."""
    times = [round(row["time"] * 1000) for row in start.rows]
    opened = [round(row["began"] * 1000) for row in start.rows if row.get("event") == "open"]
    for before, after in itertools.pairwise(start.spans):
        assert before.end == after.start
    assert all(span.start < span.end for span in start.spans)
    assert (start.began, start.ended) == (min([times[0], *opened]), max(times))
    if start.began < start.ended:
        assert (start.spans[0].start, start.spans[-1].end) == (start.began, start.ended)
