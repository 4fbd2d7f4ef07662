"""Whose run it is: told by the environment, else by what the job was submitted with, else by the account."""

from __future__ import annotations

import getpass
import json

import pytest

from rayft.train.account import owner_of_run
from rayft.train.submitted import SUBMITTED_WITH


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAYFT_USER", "RAYFT_TEAM", SUBMITTED_WITH):
        monkeypatch.delenv(name, raising=False)


def test_the_account_of_who_runs_it() -> None:
    assert owner_of_run() == {"user": getpass.getuser(), "team": ""}


def test_metadata_of_a_submitted_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(
        SUBMITTED_WITH, json.dumps({"metadata": {"user": "ann", "team": "nlp", "job_name": "x"}})
    )
    assert owner_of_run() == {"user": "ann", "team": "nlp"}
    monkeypatch.setenv("RAYFT_TEAM", "speech")
    monkeypatch.setenv("RAYFT_USER", "bob")
    assert owner_of_run() == {"user": "bob", "team": "speech"}


@pytest.mark.parametrize("text", ["{", "[]", '{"metadata": null}', "null"])
def test_metadata_of_another_kind_is_passed_over(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SUBMITTED_WITH, text)
    assert owner_of_run()["user"] == getpass.getuser()


def test_a_container_without_an_account(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> str:
        raise OSError("no username set")

    monkeypatch.setattr(getpass, "getuser", nobody)
    assert owner_of_run()["user"].isdigit()
