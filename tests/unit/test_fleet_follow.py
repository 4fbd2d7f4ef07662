"""Following a run: what the log stream brings, and the run log where the stream ends before the run does."""

from __future__ import annotations

import io
import json
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from rayft.errors import ResourceError
from rayft.fleet import follow as following
from rayft.fleet import show, stop, stream
from rayft.fleet.attempts import Attempt
from rayft.fleet.client import NoAnswer

ROW = {"kind": "event", "event": "fork", "message": "from step 3", "time": 20.0, "epoch": 1, "attempt": 1}
END = ROW | {"event": "end", "message": "done", "code": 0, "terminal": False}


class Cluster:
    """As the job API looks to who follows: every stream brings what was printed and ends; the run ends when `over` says so."""

    address = "http://h:1"

    def __init__(self, folder: Path, streams: list[str]) -> None:
        self.folder, self.streams, self.asked = folder, streams, 0
        self.stopped = False

    def over(self) -> bool:
        return self.stopped

    def info(self, submission: str) -> Any:
        metadata = {"rayft.run": "a", "rayft.storage": str(self.folder), "rayft.attempt": "1"}
        return SimpleNamespace(
            metadata=metadata,
            submission_id=submission,
            status="SUCCEEDED" if self.over() else "RUNNING",
            driver_exit_code=0 if self.over() else None,
            start_time=10_000,
            end_time=None,
            entrypoint="",
            runtime_env=None,
        )

    def all(self) -> list[Any]:
        return [self.info("a-1")]

    async def tail(self, submission: str) -> AsyncIterator[str]:
        text = self.streams[min(self.asked, len(self.streams) - 1)]
        self.asked += 1
        yield text

    def logs(self, submission: str) -> str:
        raise NoAnswer("No Ray cluster answers at http://h:1.", "Start it.")

    def stop(self, submission: str) -> None:
        self.stopped = True


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "PAUSE_S", 0.0)
    for name in ("POLL_S", "LOOK_S"):
        monkeypatch.setattr(following, name, 0.001)
    monkeypatch.setattr(stop, "POLL_S", 0.001)


def attempt(folder: Path) -> Attempt:
    return Attempt("a", 1, "a-1", "RUNNING", None, 10.0, None, str(folder), "", "", {})


def test_a_stream_that_ends_in_mid_run_is_taken_up_again(tmp_path: Path) -> None:
    """It begins at the beginning each time, and what was shown is not shown twice."""
    cluster, shown = Cluster(tmp_path, ["one\n", "one\ntwo\n", "one\ntwo\nthree\n"]), io.StringIO()
    cluster.over = lambda: cluster.asked == 3  # type: ignore[method-assign]
    followed = stream.LogStream(cluster, "a-1", shown.write)  # type: ignore[arg-type]
    followed.close(timeout_s=60)
    assert (shown.getvalue(), followed.lost) == ("one\ntwo\nthree\n", False)


def test_the_run_log_is_shown_where_the_stream_ends_before_the_run(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text(json.dumps(ROW) + "\n" + json.dumps(END) + "\n")
    cluster, said = Cluster(tmp_path, ["printed\n"]), io.StringIO()
    cluster.over = lambda: "from step 3" in said.getvalue()  # type: ignore[method-assign]
    console = Console(file=said, width=200)
    assert following.follow(cluster, attempt(tmp_path), console) == 0  # type: ignore[arg-type]
    out = said.getvalue()
    assert out.count("printed") == 1
    assert "the stream of what the job prints is lost, which does not matter to the job" in out
    assert "a-1 ended with code 0, done" in out


def test_logs_come_from_the_run_log_where_the_cluster_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "log.jsonl").write_text(json.dumps(ROW) + "\n" + json.dumps(END) + "\n")
    cluster, said = Cluster(tmp_path, [""]), io.StringIO()
    cluster.stopped = True
    monkeypatch.setattr(show, "Client", lambda _: cluster)
    assert show.show_logs("a", None, follow_on=False, console=Console(file=said, width=200)) == 0
    assert "What follows is from the run log." in said.getvalue()
    assert "from step 3" in said.getvalue()
    cluster.folder = tmp_path / "elsewhere"
    with pytest.raises(ResourceError, match="No Ray cluster answers"):
        show.show_logs("a", None, follow_on=False, console=Console(file=said, width=200))


def test_a_run_whose_storage_is_not_here_is_stopped_by_its_submission(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster, said = Cluster(tmp_path / "elsewhere", [""]), io.StringIO()
    monkeypatch.setattr(stop, "Client", lambda _: cluster)
    assert stop.stop("a", None, timeout_s=60, console=Console(file=said, width=200)) == 0
    assert cluster.stopped
    out = said.getvalue()
    assert f"cannot be asked through {tmp_path / 'elsewhere'} (it is not a folder of this machine)" in out
