"""Runs that wait after each report until somebody lets them go on, or has them stop."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from rayft.checkpoint import committed_steps
from rayft.cli import main
from rayft.errors import PreemptedError
from rayft.report.log import read_log
from rayft.spec import Job
from rayft.storage import open_store
from rayft.train import watch
from rayft.tune.leftover import give_back_leftovers
from tests.cluster.rewards import prepare_folder as prepare_prompts
from tests.cluster.rewards import rl_job
from tests.cluster.steps import prepare_folder, small_job
from tests.linked import Linked
from tests.runs import assert_same_state, events, losses, wait_until, write_job

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_folder(tmp_path_factory.mktemp("link"))


def job(folder: Path, name: str, **groups: Any) -> Job:
    """Six steps, a report after every second one; checkpoints at other steps."""
    values: dict[str, Any] = {
        "data": {"eval": [{"path": str(folder / "rows.jsonl"), "limit": 8}]},
        "eval": {"every_steps": 2},
        "checkpoint": {"every_steps": 5, "keep": 5},
        "train": {"max_steps": 6},
    }
    return small_job(folder, name=name, **{**values, **groups})


@pytest.fixture(scope="module")
def whole(folder: Path, local_ray: None) -> Path:
    """The same run without a link."""
    assert main(["run", str(write_job(job(folder, "whole"), folder / "whole.yaml"))]) == 0
    return folder / "runs" / "whole"


def test_a_gate_holds_until_it_is_released(folder: Path, whole: Path) -> None:
    """Everything of the report is there before, nothing comes after, and the result is the same to the last bit."""
    store = open_store(folder / "runs" / "held")
    run = Linked(job(folder, "held"))
    for step in (2, 4):
        run.gate(step)
        log = read_log(store)
        assert {"step", "eval"} <= {row["kind"] for row in log if row.get("step") == step}
        assert committed_steps(store)[-1] == step
        assert run.more(1.5) == []
        assert max(losses(store)) == step
        run.link.release(step)
    assert run.end() is None
    assert run.steps("gate") == [2, 4]
    assert run.steps() == [1, 2, 3, 4, 5, 6]
    assert run.rows[-1]["event"] == "end"
    assert run.link.rows(5.0) == []
    assert_same_state(store.uri, whole)
    assert losses(store) == losses(open_store(whole))
    assert [row for row in read_log(store) if row["kind"] == "gate"] == []


@pytest.mark.full
def test_a_stop_at_a_gate_ends_with_8_and_the_next_start_waits_there_again(folder: Path, whole: Path) -> None:
    uri = folder / "runs" / "stopped"
    run = Linked(job(folder, "stopped"))
    run.gate(2)
    run.link.stop("another one is better")
    error = run.end()
    assert isinstance(error, PreemptedError)
    assert error.code == 8
    assert "another one is better" in error.message
    assert "saved at step 2" in error.message
    assert committed_steps(open_store(uri)) == [2]
    again = Linked(job(folder, "stopped"))
    again.gate(2)
    assert again.more(1.0) == []
    assert again.steps() == []
    again.link.release(100)
    assert again.end() is None
    assert again.steps() == [3, 4, 5, 6]
    assert_same_state(uri, whole)


@pytest.mark.full
def test_a_stop_between_reports_is_heard(folder: Path, local_ray: None) -> None:
    """And what was released before the start stays so."""
    run = Linked(job(folder, "between", train={"max_steps": 100_000}, eval={"every_steps": 50_000}))
    run.until("step 3", lambda row: row["kind"] == "step" and row["step"] >= 3)
    run.link.stop("the time is over")
    error = run.end()
    assert isinstance(error, PreemptedError)
    assert "the time is over" in error.message
    assert committed_steps(open_store(folder / "runs" / "between"))[-1] == max(run.steps())


def test_a_stop_before_training_starts_no_worker(folder: Path, local_ray: None) -> None:
    run = Linked(job(folder, "early"))
    run.link.stop("not wanted any more")
    error = run.end()
    assert isinstance(error, PreemptedError)
    assert "not wanted any more" in error.message
    assert events(open_store(folder / "runs" / "early"), "start") == []


@pytest.mark.full
def test_a_worker_killed_at_a_gate_comes_back_and_still_waits(folder: Path, whole: Path) -> None:
    uri = folder / "runs" / "killed"
    run = Linked(job(folder, "killed"))
    run.link.release(2)
    run.gate(4)
    ranks = ray.get(run.link._recorder.silent.remote(), timeout=30)
    os.kill(ranks[0]["pid"], signal.SIGKILL)
    run.gate(4)
    assert run.more(1.0) == []
    assert run.steps() == [1, 2, 3, 4]
    [resume] = events(open_store(uri), "resume")
    assert (resume["resumed_step"], resume["repeated"]) == (4, 0)
    run.link.release(4)
    assert run.end() is None
    assert_same_state(uri, whole)


@pytest.mark.full
def test_waiting_long_is_no_hang(folder: Path, local_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Linked(job(folder, "long", cluster={"num_workers": 2, "hang_timeout_s": 12}))
    run.gate(2)
    monkeypatch.setattr(watch, "SLOW_PHASE_S", 1.0)
    assert run.more(20.0) == [], "the run did something else than wait"
    run.link.stop("enough")
    assert isinstance(run.end(), PreemptedError)


def processes(name: str) -> list[psutil.Process]:
    """Live processes of Ray below this one with this in their title."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            title = " ".join(process.cmdline())
            if title.startswith("ray::") and name in title and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


class Driver:
    """Drives a linked run in a thread of an actor, as a trial of a search does."""

    def start(self, job: Job) -> int:
        """Start the run; returns the process."""
        self._run = Linked(job)
        return os.getpid()

    def gate(self, step: int) -> bool:
        """Wait for a gate. Returns whether this is the main thread."""
        self._run.gate(step)
        return threading.current_thread() is threading.main_thread()

    def release(self, step: int) -> str:
        """Let it go on to its end; returns what it raised."""
        self._run.link.release(step)
        return repr(self._run.end())


@pytest.mark.full
def test_a_run_in_an_actor_ends_with_it(folder: Path, whole: Path) -> None:
    """Its workers die where they wait; under the same name it goes on."""
    wait_until("workers of other tests to be gone", lambda: not processes("TrainWorker"))
    store = open_store(folder / "runs" / "driven")
    driver = ray.remote(Driver).options(num_cpus=0).remote()
    pid = ray.get(driver.start.remote(job(folder, "driven")), timeout=60)
    ray.get(driver.gate.remote(2), timeout=240)
    assert processes("TrainWorker")
    os.kill(pid, signal.SIGKILL)
    wait_until("the workers to die with it", lambda: not processes("TrainWorker"), timeout_s=60)
    assert max(losses(store)) == 2
    # As a search does, since Ray does not: the next tests need this room.
    wait_until("the room that it held to be given back", lambda: give_back_leftovers() == 1, timeout_s=60)
    driver = ray.remote(Driver).options(num_cpus=0).remote()
    ray.get(driver.start.remote(job(folder, "driven")), timeout=60)
    ray.get(driver.gate.remote(2), timeout=240)
    assert ray.get(driver.release.remote(6), timeout=240) == "None"
    assert_same_state(store.uri, whole)


@pytest.mark.full
def test_a_run_that_learns_from_rewards_waits_too(tmp_path: Path, local_ray: None) -> None:
    folder = prepare_prompts(tmp_path)
    made = rl_job(
        folder,
        "grpo",
        name="rl",
        data={
            **rl_job(folder, "grpo").data.model_dump(exclude_unset=True),
            "eval": [{"path": str(folder / "prompts.jsonl"), "limit": 4}],
        },
        cluster={"num_workers": 1},
        train={"max_steps": 3, "global_batch_size": 4},
        eval={"every_steps": 1},
        checkpoint={"every_steps": 3, "keep": 5},
    )
    store = open_store(folder / "runs" / "rl")
    run = Linked(made)
    run.gate(1)
    assert [row["step"] for row in read_log(store) if row["kind"] == "eval"] == [0, 1]
    assert committed_steps(store) == [1]
    assert run.more(1.5) == []
    run.link.stop("not good")
    error = run.end()
    assert isinstance(error, PreemptedError)
    assert "saved at step 1" in error.message
    again = Linked(made)
    again.gate(1)
    assert again.more(1.0) == []
    assert again.steps() == []
    again.link.release(1)
    again.gate(2)
    again.link.release(2)
    assert again.end() is None
    assert again.steps() == [2, 3]
    assert again.steps("gate") == [1, 2]
