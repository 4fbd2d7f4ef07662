"""A wish to stop that lies in the run folder reaches its driver as the first SIGTERM would, and nobody else."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from rayft.checkpoint.stop import STOP_KEY, forget_old_requests, request_stop, requested_stop
from rayft.errors import PreemptedError
from rayft.storage import LocalStore, Store, open_store
from rayft.train import requests
from rayft.train.requests import StopRequests
from rayft.train.signals import StopSignals
from rayft.train.submitted import SUBMISSION, SUBMITTED_WITH


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """A run folder of either kind."""
    if request.param == "local":
        return LocalStore(tmp_path / "run")
    bucket: str = request.getfixturevalue("s3_bucket")
    return open_store(f"s3://{bucket}/run")


def test_a_wish_is_for_one_submission(store: Store) -> None:
    assert requested_stop(store, "a-1") is None
    request_stop(store, "rayft stop", "a-1")
    assert requested_stop(store, "a-1") == "rayft stop"
    assert requested_stop(store, "a-2") is None
    assert requested_stop(store, None) is None
    request_stop(store, "somebody")
    assert requested_stop(store, None) == requested_stop(store, "a-1") == "somebody"


def test_an_old_wish_does_not_end_a_new_start(store: Store) -> None:
    for mine, left in (("a-2", False), (None, False), ("a-1", True)):
        request_stop(store, "rayft stop", "a-1")
        forget_old_requests(store, mine)
        assert store.exists(STOP_KEY) is left
    store.put(STOP_KEY, b"no JSON")
    assert requested_stop(store, "a-1") is None
    forget_old_requests(store, "a-1")
    assert not store.exists(STOP_KEY)


def test_the_driver_hears_a_wish_while_it_trains_and_before(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requests, "LOOK_EVERY_S", 0.05)
    monkeypatch.setenv(SUBMITTED_WITH, json.dumps({"metadata": {SUBMISSION: "a-1"}}))
    heard: list[str] = []
    told = threading.Event()

    def ask(reason: str) -> None:
        heard.append(reason)
        told.set()

    request_stop(store, "old", "a-0")
    with StopSignals() as signals, StopRequests(store, signals), signals.asking(ask):
        assert not store.exists(STOP_KEY)
        request_stop(store, "rayft stop", "a-1")
        assert told.wait(30), "waited 30 s for the wish to be heard"
    assert heard == ["rayft stop"]
    # Another cluster calls its first submission a-1 again.
    assert not store.exists(STOP_KEY)
    request_stop(store, "rayft stop", "a-1")
    with (
        StopSignals() as signals,
        pytest.raises(PreemptedError, match="rayft stop"),
        StopRequests(store, signals),
    ):
        threading.Event().wait(30)  # nothing is trained yet, so it ends at once
