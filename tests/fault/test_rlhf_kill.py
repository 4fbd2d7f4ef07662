"""Runs that learn from rewards, killed in the middle: the result is the undisturbed run's, to the last bit."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from rayft.checkpoint import latest
from rayft.report.log import read_all, read_log
from rayft.storage import open_store
from tests.cluster.rewards import function, prepare_folder, rl_job
from tests.runs import (
    assert_same_state,
    events,
    rayft,
    send,
    step_reached,
    wait_until,
    write_job,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

STEPS = 10
LORA = {"type": "lora", "lora_r": 4, "target_modules": "all-linear"}

AHEAD = {"rollout": {"max_new_tokens": 12, "unit_prompts": 2, "engines": 1, "lag": 1}}
PPO = {"rl": {"kl_target": 1.0, "num_mini_batches": 2, "num_epochs": 2}, "zero": {"stage": 2}}
GRPO = {"adapter": LORA, "rl": {"num_generations": 4, "kl_target": 1.0}, "zero": {"stage": 2}}

#: Name -> method, groups, and the learners of which a process is killed one after another, each once steps are taken again.
KINDS: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "ppo": ("ppo", PPO, ["PolicyActor", "CriticActor"]),
    "ppo_ahead": ("ppo", {**PPO, **AHEAD}, ["CriticActor", "PolicyActor"]),
    "grpo_lora": ("grpo", GRPO, ["PolicyActor"]),
    "grpo_lora_ahead": ("grpo", {**GRPO, **AHEAD}, ["PolicyActor"]),
    "reinforce": ("reinforce++", {"zero": {"stage": 0}}, ["PolicyActor"]),
}


def job_file(folder: Path, kind: str, name: str) -> tuple[Path, Path]:
    method, groups, _ = KINDS[kind]
    model = {"name": "model", "type": "model", "path": str(folder / "scorer"), "weight": 0.5}
    job = rl_job(
        folder,
        method,
        name=name,
        seed=3,
        rewards=[function(folder, "slow"), model],
        train={"max_steps": STEPS, "global_batch_size": 8, "learning_rate": 1e-3, "precision": "bf16"},
        checkpoint={"every_steps": 2},
        **groups,
    )
    return write_job(job, folder / f"{name}.yaml"), folder / "runs" / name


def facts(uri: Path | str) -> list[Any]:
    """What the log says of every step, but for times and memory."""
    kinds = ("issued", "generated", "step", "ledger")
    rows = [row for row in read_log(open_store(uri)) if row["kind"] in kinds]
    rows.sort(
        key=lambda row: (row["step"], kinds.index(row["kind"]))
    )  # one step ahead is told beside the step
    changing = {
        "time",
        "epoch",
        "attempt",
        "seconds",
        "tokens_per_s",
        "trained_tokens_per_s",
        "peak_memory_gb",
        "ahead_seconds",
        "sync",
    }
    return [{key: value for key, value in row.items() if key not in changing} for row in rows]


def at_work(uri: Path, attempts: int) -> bool:
    """Whether the newest of so many attempts has taken a step."""
    rows = read_all(open_store(uri))
    begun = [row["epoch"] for row in rows if row["kind"] == "event" and row["event"] in ("start", "resume")]
    steps = [row["epoch"] for row in rows if row["kind"] == "step"]
    return len(begun) == attempts and bool(steps) and max(steps) == max(begun)


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=pytest.mark.full) for kind in KINDS])
def test_killed_runs_change_nothing(kind: str, tmp_path: Path) -> None:
    """Everything killed and started again, then a process of each learner, whatever it is at."""
    folder = prepare_folder(tmp_path)
    path, whole = job_file(folder, kind, "whole")
    with rayft("run", str(path), log=folder / "whole.log") as run:
        assert run.wait() == 0, run.output()
    path, killed = job_file(folder, kind, "killed")
    with rayft("run", str(path), log=folder / "killed.log") as run:
        wait_until("step 3", step_reached(open_store(killed), 3), run)
        run.kill_tree()
    roles = KINDS[kind][2]
    with rayft("run", str(path), log=folder / "killed.log") as run:
        for number, role in enumerate(roles):
            wait_until(f"attempt {number + 2} at work", lambda n=number: at_work(killed, n + 2), run)
            send(run.actors(f"ray::{role}")[-1], signal.SIGKILL)
        assert run.wait() == 0, run.output()
    assert len(events(open_store(killed), "failure")) == len(roles)
    assert len(events(open_store(killed), "resume")) == len(roles) + 1
    assert_same_state(killed, whole)
    assert facts(killed) == facts(whole)


def test_a_signal_saves_and_ends_with_8(tmp_path: Path) -> None:
    folder = prepare_folder(tmp_path)
    path, uri = job_file(folder, "reinforce", "stopped")
    with rayft("run", str(path), log=folder / "stopped.log") as run:
        wait_until("step 1", step_reached(open_store(uri), 1), run)
        run.process.send_signal(signal.SIGTERM)
        assert run.wait() == 8, run.output()
    step = latest(open_store(uri))
    assert step is not None
    assert 1 <= step < STEPS
    assert f"is saved at step {step}" in (folder / "stopped.log").read_text()
