"""What an earlier start left behind decides whether this one goes on, ends at once, or is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rayft.errors import JobError, RayftError
from rayft.report.lineage import write_lineage
from rayft.report.log import RunLog
from rayft.spec import Job, dump_job, parse_job
from rayft.storage import LocalStore
from rayft.train.history import already_ended, refuse_other_origin, take_job
from tests import checkpoints

ORIGIN = {"model": {"identity": "m"}, "data": {"identity": "d"}, "tokenizer_and_template": "t"}


def job(**train: Any) -> Job:
    return parse_job(
        {"name": "x", "model": {"path": "m"}, "data": {"train": [{"path": "a"}]}, "train": train}
    )


def ended(store: LocalStore, job: Job, code: int, *, terminal: bool = True, prepared: bool = False) -> None:
    store.put("job.yaml", dump_job(job).encode())
    log = RunLog(store, 1, lambda: True)
    if prepared:
        log.event("plan")
    log.event("end", "the reason.", code=code, terminal=terminal)
    log.close()


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path)


def test_a_new_a_finished_and_a_stopped_run(store: LocalStore) -> None:
    assert not already_ended(store, job(), Console())
    ended(store, job(), 8, terminal=False)
    assert not already_ended(store, job(), Console())
    ended(store, job(), 0, terminal=False)
    assert already_ended(store, job(), Console())


def test_an_unchanged_retry_ends_at_once_and_the_remedy_is_taken(store: LocalStore) -> None:
    checkpoints.save(store, 4)
    ended(store, job(), 7)
    with pytest.raises(RayftError, match=r"unchanged retry cannot cure it: the reason") as caught:
        already_ended(store, job(), Console())
    assert caught.value.code == 7
    assert not already_ended(store, job(micro_batch_size=3), Console())


def test_a_mistake_may_be_corrected_until_there_is_a_checkpoint(store: LocalStore) -> None:
    ended(store, job(), 2)
    store.put("suites-before.json", b"{}")
    assert not already_ended(store, job(), Console()), "the file it names may be there now"
    assert not already_ended(store, job(learning_rate=0.5), Console())
    take_job(store, job(learning_rate=0.5))
    assert not already_ended(store, job(learning_rate=0.5), Console())
    assert not store.exists("suites-before.json"), "it may be another model's"
    checkpoints.save(store, 4)
    with pytest.raises(JobError, match="learning_rate"):
        already_ended(store, job(), Console())
    with pytest.raises(JobError, match="learning_rate"):
        take_job(store, job())


def test_other_rows_or_another_base_model_are_refused_once_there_is_a_checkpoint(store: LocalStore) -> None:
    refuse_other_origin(store, "x", ORIGIN, None)
    write_lineage(store, ORIGIN)
    other = {**ORIGIN, "data": {"identity": "e"}}
    refuse_other_origin(store, "x", other, None)
    checkpoints.save(store, 4)
    refuse_other_origin(store, "x", ORIGIN, None)
    with pytest.raises(JobError, match=r"the rows of data\.train") as caught:
        refuse_other_origin(store, "x", other, None)
    assert not caught.value.terminal
    with pytest.raises(JobError, match="the base model"):
        refuse_other_origin(store, "x", {**ORIGIN, "model": {"identity": "n"}}, None)


@pytest.mark.parametrize("code", [2, 3])
def test_what_lies_outside_of_the_job_is_looked_at_again(store: LocalStore, code: int) -> None:
    """The same error ends a retry after preparing only if it came after preparing, and everything is as it was."""
    write_lineage(store, ORIGIN)
    ended(store, job(), code)
    assert not already_ended(store, job(), Console())
    assert take_job(store, job()) is None, "it never got so far as to look at the rest"
    ended(store, job(), code, prepared=True)
    assert not already_ended(store, job(), Console())
    end = take_job(store, job())
    refuse_other_origin(store, "x", {**ORIGIN, "data": {"identity": "e"}}, end)
    with pytest.raises(RayftError, match="the reason") as caught:
        refuse_other_origin(store, "x", ORIGIN, end)
    assert caught.value.code == code
    ended(store, job(), code, prepared=True)
    assert take_job(store, job(micro_batch_size=3)) is None
