"""Whether a checkpoint fits the grace time: measured before estimated, said by plan, render and submit, refused as the profile says."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from rayft.cli import main
from rayft.errors import ResourceError
from rayft.fleet.render.run import render
from rayft.fleet.saving import saving_line
from rayft.fleet.submit import submit
from rayft.plan.checkpoint import measured
from rayft.spec import Job, parse_job
from rayft.spec.profile import Profile
from tests.fleets import SMOLLM2, profile, small

GIVEN_S = 120


def committed(*took: float | None) -> list[dict[str, Any]]:
    """Rows of a run log: checkpoints that took so long, None for one of which nobody knows."""
    row = {"kind": "event", "event": "checkpoint", "message": "m", "time": 1.0, "epoch": 1, "attempt": 1}
    return [row | ({} if one is None else {"took_s": one}) for one in took]


def in_folder(storage: Path, **checkpoint: Any) -> Profile:
    """The profile without GPUs, whose storage can be looked at here."""
    found = profile("cpu").model_copy(deep=True, update={"storage": str(storage)})
    found.checkpoint = found.checkpoint.model_copy(update=checkpoint)
    return found


def asked(folder: Path) -> Job:
    data = {"train": [{"path": "s3://b/rows.jsonl"}], "max_length": 128}
    return parse_job({"name": "mine", "storage": str(folder), "model": {"path": "org/m"}, "data": data})


def save_log(storage: Path, *took: float) -> None:
    (storage / "mine").mkdir(parents=True)
    (storage / "mine" / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in committed(*took)))


def test_the_longest_of_the_last_checkpoints_counts() -> None:
    assert measured([], GIVEN_S) is None
    assert measured(committed(None, None), GIVEN_S) is None
    found = measured(
        [*committed(900.0, 4.0, 7.5, 5.0, None), {"kind": "step"}, *committed(3.0, 2.0)], GIVEN_S
    )
    assert found is not None
    assert (found.needed_s, found.given_s, found.fits) == (7.5, GIVEN_S, True)
    assert "the longest of this run's last 5, measured" in found.sentence()


def test_a_measured_time_takes_the_place_of_the_estimate(tmp_path: Path) -> None:
    there = in_folder(tmp_path)

    def said() -> list[str]:
        lines = render(asked(tmp_path), there, architecture=small(), scorers={}, history=True).lines
        return [line for line in lines if "checkpoint" in line]

    assert "estimated" in said()[0]
    save_log(tmp_path, 200.0)
    assert said() == [
        "Warning: A checkpoint takes about 200 s (this run's only one so far, measured) and 3 s until all ranks know; it does not "
        "fit the 120 s that a node which is taken away has."
    ]
    strict = in_folder(tmp_path, too_slow="refuse")
    with pytest.raises(ResourceError, match=r"about 200 s .*measured.*A run that is evicted would lose"):
        render(asked(tmp_path), strict, architecture=small(), scorers={}, history=True)


def test_what_is_not_known_is_said_and_never_refused() -> None:
    said = "Whether a checkpoint fits the 120 s that a node which is taken away has is not known"
    assert saving_line(None, in_folder(Path("/nowhere"), too_slow="refuse")).startswith(said)
    made = render(asked(Path("/nowhere")), profile("cpu"))  # of a model that cannot be looked at
    assert any(line.startswith(said) for line in made.lines)


@pytest.fixture
def address() -> Iterator[str]:
    """A server that looks like a cluster's and knows of nothing, so that nothing can be sent."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path.endswith("/version") else 503)
            self.end_headers()
            known = {"version": "4", "ray_version": "2.60.0", "ray_commit": "x", "session_name": "x"}
            self.wfile.write(json.dumps(known).encode())

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_submit_has_address_and_storage_of_the_profile_and_says_or_refuses(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAYFT_CACHE", str(tmp_path / "node"))
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(SMOLLM2))
    values = asked(tmp_path).model_dump(mode="json")
    values |= {"storage": "runs", "model": {"path": "model"}}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(values))
    storage = tmp_path / "shared"
    there = in_folder(storage, too_slow="refuse").model_copy(update={"address": address})
    (tmp_path / "fleet.yaml").write_text(yaml.safe_dump(there.model_dump(mode="json", exclude_none=True)))
    command = ["submit", "job.yaml", "--profile", "fleet.yaml", "--no-wait"]
    assert main(command) == 4
    out = "".join(capfd.readouterr())
    assert "it fits the 120 s that a node which is taken away has" in out
    assert f"No Ray cluster answers at {address}" in out, "it was going to be sent"
    save_log(storage, 500.0)
    with pytest.raises(ResourceError, match=r"about 500 s \(this run's only one so far, measured\)"):
        submit("job.yaml", [], None, wait=False, profile="fleet.yaml", console=Console())
