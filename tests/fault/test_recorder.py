"""The process that writes a run's log is lost: the run says so, ends resumable, and goes on to the undisturbed run's end."""

from __future__ import annotations

import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from rayft.spec import Job
from rayft.storage import open_store
from tests.cluster import rewards, steps
from tests.runs import assert_same_state, losses, rayft, send, step_reached, wait_until, write_job

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def sft(folder: Path) -> Callable[..., Job]:
    # Wide enough that steps last.
    steps.prepare_folder(folder, hidden_size=192, intermediate_size=512, num_hidden_layers=4, head_dim=48)
    return partial(steps.small_job, folder, train={"max_steps": 60})


def grpo(folder: Path) -> Callable[..., Job]:
    rewards.prepare_folder(folder)
    train = {"max_steps": 16, "global_batch_size": 4}
    return partial(rewards.rl_job, folder, "grpo", rewards=[rewards.function(folder, "slow")], train=train)


@pytest.mark.parametrize("make", [sft, pytest.param(grpo, marks=pytest.mark.full)])
def test_it_ends_with_9_and_goes_on(make: Any, tmp_path: Path) -> None:
    job = make(tmp_path)

    def start(name: str) -> Any:
        made = job(name=name, checkpoint={"every_steps": 4}, cluster={"num_workers": 1})
        return rayft("run", str(write_job(made, tmp_path / f"{name}.yaml")), log=tmp_path / f"{name}.log")

    store = open_store(tmp_path / "runs" / "lost")
    with start("lost") as run:
        wait_until("step 5", step_reached(store, 5), run)
        [recorder] = run.actors("ray::Recorder")
        send(recorder, signal.SIGKILL)
        assert run.wait() == 9, run.output()
        [sentence] = [line for line in run.output().splitlines() if line.startswith("rayft run:")]
        assert "writes the run's log died" in sentence
        assert "Traceback" not in run.output()
    for name in ("lost", "whole"):
        with start(name) as run:
            assert run.wait() == 0, run.output()
    assert_same_state(store.uri, tmp_path / "runs" / "whole")
    assert losses(store) == losses(open_store(tmp_path / "runs" / "whole"))
