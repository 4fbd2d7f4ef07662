"""Whatever is wrong between here and a cluster is one sentence with the right code, and no token is ever in it."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rayft.errors import JobError, RayftError, ResourceError
from rayft.fleet.attempts import Attempt, attempts_of, describe
from rayft.fleet.client import Client, checked_address, find_token
from rayft.fleet.outcome import Outcome, RunFolder, end_in, outcome_of
from rayft.fleet.submit import Submission

MARKER = "tok3n-marker-4f1b"


@pytest.fixture(autouse=True)
def _no_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (
        "RAY_AUTH_MODE",
        "RAY_AUTH_TOKEN",
        "RAY_AUTH_TOKEN_PATH",
        "RAY_ADDRESS",
        "RAY_API_SERVER_ADDRESS",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


class Server:
    """A real HTTP server that answers everything alike and remembers what it was sent."""

    def __init__(self, status: int, body: Any) -> None:
        self.headers: list[dict[str, str]] = []
        seen = self.headers
        text = body if isinstance(body, str) else json.dumps(body)

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                seen.append(dict(self.headers))
                sent = text.replace("TOKEN", self.headers.get("Authorization", ""))
                self.send_response(status)
                self.end_headers()
                self.wfile.write(sent.encode())

            def log_message(self, *_: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def serve() -> Iterator[Any]:
    servers: list[Server] = []

    def start(status: int, body: Any) -> Server:
        servers.append(Server(status, body))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


VERSION = {"version": "4", "ray_version": "2.60.0", "ray_commit": "x", "session_name": "x"}


@pytest.mark.parametrize(
    ("status", "body", "error", "words"),
    [
        (401, "Unauthorized TOKEN", JobError, "refuses the token from RAY_AUTH_TOKEN"),
        (403, "Forbidden TOKEN", JobError, "refuses the token from RAY_AUTH_TOKEN"),
        (404, "nothing TOKEN", JobError, "no Ray job server"),
        (200, "<html>TOKEN</html>", JobError, "no Ray job server"),
        (200, {"hello": "TOKEN"}, JobError, "no Ray job server"),
        (503, "busy TOKEN", ResourceError, "No Ray cluster answers"),
    ],
)
def test_what_a_server_answers(
    serve: Any, monkeypatch: pytest.MonkeyPatch, status: int, body: Any, error: type[RayftError], words: str
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", MARKER)
    with pytest.raises(error, match=words) as caught:
        Client(serve(status, body).address)
    assert MARKER not in str(caught.value)
    assert caught.value.remedy
    assert caught.value.__suppress_context__


def test_no_server_and_no_token(serve: Any) -> None:
    server = serve(401, "Unauthorized")
    with pytest.raises(JobError, match="asks for a token, and there is none here"):
        Client(server.address)
    with pytest.raises(ResourceError, match="No Ray cluster answers") as caught:
        Client("http://127.0.0.1:9")
    assert caught.value.code == 4


def test_the_token_is_found_where_ray_looks(
    serve: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert find_token() is None
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text(f"{MARKER}-home\n")
    (tmp_path / "token").write_text(f"{MARKER}-path\n")
    assert find_token() == (f"{MARKER}-home", str(tmp_path / ".ray" / "auth_token"))
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    assert find_token() == (f"{MARKER}-path", str(tmp_path / "token"))
    server = serve(200, VERSION)
    Client(server.address)
    assert server.headers[0]["Authorization"] == f"Bearer {MARKER}-path"
    monkeypatch.setenv("RAY_AUTH_TOKEN", MARKER)
    assert find_token() == (MARKER, "RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert find_token() is None
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "nothing"))
    with pytest.raises(JobError, match="no token to read"):
        find_token()


def test_another_ray_is_refused(serve: Any) -> None:
    client = Client(serve(200, {**VERSION, "ray_version": "2.9.3"}).address)
    with pytest.raises(JobError, match=r"runs Ray 2\.9\.3, and here is Ray 2\.60"):
        client.refuse_other_ray()


def test_the_typed_address_counts(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    typed, other = serve(200, VERSION), serve(200, VERSION)
    monkeypatch.setenv("RAY_ADDRESS", other.address)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", other.address)
    Client(typed.address)
    assert (len(typed.headers) > 0, len(other.headers)) == (True, 0)
    Client()
    assert other.headers


@pytest.mark.parametrize("address", ["", "ftp://x", "http://", "http://user:secret@host:1", "http://h:port"])
def test_odd_addresses_are_refused(address: str) -> None:
    with pytest.raises(JobError) as caught:
        checked_address(address)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "code", "end", "wanted"),
    [
        ("SUCCEEDED", 0, None, 0),
        ("SUCCEEDED", 0, Outcome(0, "done"), 0),
        ("FAILED", 3, Outcome(3, "row 7"), 3),
        ("FAILED", 2, None, 2),  # before there was a run log to write to
        ("FAILED", -11, Outcome(0, "done"), 0),  # the run was over when its driver crashed
        ("FAILED", 139, None, 9),
        ("FAILED", None, None, 9),
        ("FAILED", None, Outcome(8, "saved"), 8),
        ("FAILED", 1, Outcome(8, "saved"), 8),
        ("STOPPED", None, Outcome(8, "saved"), 8),
        ("STOPPED", None, None, 8),
    ],
)
def test_the_code_of_a_run(status: str, code: int | None, end: Outcome | None, wanted: int) -> None:
    attempt = Attempt("a", 1, "a-1", status, code, 1.0, 2.0, "/x/a", "", "", {})
    assert outcome_of(attempt, end).code == wanted


def test_only_the_end_of_the_attempt_itself_counts(tmp_path: Path) -> None:
    def end(time: float, code: int) -> str:
        return json.dumps(
            {
                "kind": "event",
                "event": "end",
                "time": time,
                "epoch": 1,
                "code": code,
                "message": "m",
                "terminal": False,
            }
        )

    (tmp_path / "log.jsonl").write_text("\n".join([end(10.0, 8), end(20.0, 3)]) + "\n")
    folder = RunFolder(str(tmp_path))
    assert folder.end_since(15.0) == Outcome(3, "m")
    assert folder.end_since(25.0) is None
    assert end_in(folder.rows(), 5.0, 11.0) == Outcome(8, "m")
    assert RunFolder(str(tmp_path / "nothing")).end_since(0.0) is None


def test_attempts_are_those_that_rayft_submitted() -> None:
    class Details:
        def __init__(self, name: str, metadata: dict[str, str] | None) -> None:
            self.submission_id, self.metadata, self.status = name, metadata, "RUNNING"
            self.driver_exit_code, self.start_time, self.end_time = None, 1000, None
            self.entrypoint, self.runtime_env = "", None

    ours = {"rayft.run": "a", "rayft.storage": "/s/a", "rayft.attempt": "2"}
    found = attempts_of([Details("a-2", ours), Details("b-1", None), Details("c-1", {"rayft.run": "c"})])
    assert [(attempt.run, attempt.number, attempt.live) for attempt in found] == [("a", 2, True)]


def test_a_submission_says_whose_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAYFT_USER", "RAYFT_TEAM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOGNAME", "bob")
    made = describe("a", 1, "/s/a", "x")
    assert (made["user"], "team" in made) == ("bob", False)
    monkeypatch.setenv("RAYFT_USER", "ann")
    monkeypatch.setenv("RAYFT_TEAM", "nlp")
    made = describe("a", 1, "/s/a", "x")
    assert (made["user"], made["team"]) == ("ann", "nlp")


def test_the_line_that_is_printed_carries_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", MARKER)
    submission = Submission("a-1", "/folder with space", "python jobs/run.py job.yaml", {"rayft.run": "a"})
    line = submission.line("http://h:1")
    assert MARKER not in line
    assert line.startswith(
        "ray job submit --address http://h:1 --submission-id a-1 --working-dir '/folder with space'"
    )
    assert line.endswith("-- python jobs/run.py job.yaml")
