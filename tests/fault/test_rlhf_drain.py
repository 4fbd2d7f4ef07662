"""Runs that learn from rewards on nodes that are taken away with notice, and asked to stop while answers are drawn."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rayft.checkpoint import committed_steps
from rayft.storage import open_store
from tests.cluster.rewards import function, prepare_folder, rl_job
from tests.fault.test_rlhf_kill import facts
from tests.nodes import Nodes, ray_nodes
from tests.runs import assert_same_state, events, rayft, step_reached, wait_until, write_job

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

#: Most of a step is drawing answers, in many units.
LONG = {"max_new_tokens": 80, "unit_prompts": 1}
GRPO = {"adapter": {"type": "lora", "lora_r": 4}, "rl": {"num_generations": 4, "kl_target": 1.0}}
#: Name -> method, groups, nodes that the run has processes on.
KINDS: dict[str, tuple[str, dict[str, Any], int]] = {
    "grpo": ("grpo", {**GRPO, "rollout": LONG, "zero": {"stage": 3}}, 2),
    "ppo_apart": ("ppo", {"rollout": {**LONG, "engines": 1}, "zero": {"stage": 2}}, 2),
    "ppo_ahead": ("ppo", {"rollout": {**LONG, "engines": 1, "lag": 1}, "zero": {"stage": 2}}, 2),
}


def job_file(folder: Path, kind: str, name: str, **cluster: Any) -> tuple[Path, Path]:
    method, groups, _ = KINDS[kind]
    job = rl_job(
        folder,
        method,
        name=name,
        rewards=[function(folder, "slow")],
        data={"train": [{"path": str(folder / "prompts.jsonl")}], "max_length": 192},
        train={"max_steps": 5, "global_batch_size": 8, "learning_rate": 1e-3, "precision": "bf16"},
        # No failure is forgiven: moving is none. No checkpoint is due in all the run but the last.
        cluster={"num_workers": 2, "max_failures": 0, **cluster},
        checkpoint={"every_steps": 1000},
        **groups,
    )
    return write_job(job, folder / f"{name}.yaml"), folder / "runs" / name


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    with ray_nodes(3) as made:
        yield made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_folder(tmp_path_factory.mktemp("drain"))


@pytest.fixture(scope="module")
def wholes() -> dict[str, Path]:
    """Undisturbed runs, by kind."""
    return {}


def whole_of(kind: str, folder: Path, wholes: dict[str, Path]) -> Path:
    if kind not in wholes:
        path, uri = job_file(folder, kind, f"{kind}-whole")
        with rayft("run", str(path), log=folder / f"{kind}-whole.log") as run:
            assert run.wait() == 0, run.output()
        wholes[kind] = uri
    return wholes[kind]


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=pytest.mark.full) for kind in KINDS])
def test_it_goes_on_elsewhere(kind: str, folder: Path, wholes: dict[str, Path], nodes: Nodes) -> None:
    """Two of three nodes are in use; two are taken away one after another, and one comes."""
    whole = whole_of(kind, folder, wholes)
    path, moved = job_file(folder, kind, f"{kind}-moved")
    store = open_store(moved)
    with rayft("run", str(path), log=folder / f"{kind}-moved.log", RAY_ADDRESS=nodes.address) as run:
        wait_until("step 2", step_reached(store, 2), run)
        for node in nodes.ids[:2]:
            nodes.drain(node, 120)
        nodes.add()
        assert run.wait() == 0, run.output()
    assert_same_state(moved, whole)
    assert facts(moved) == facts(whole)
    assert events(store, "failure") == []
    assert len(events(store, "drain")) == len(events(store, "moving")) == len(events(store, "resume")) >= 1
    assert {event["repeated"] for event in events(store, "resume")} == {0}


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=pytest.mark.full) for kind in KINDS])
def test_asked_to_stop_it_keeps_the_answers_that_are_there(
    kind: str, folder: Path, wholes: dict[str, Path]
) -> None:
    whole = whole_of(kind, folder, wholes)
    path, stopped = job_file(folder, kind, f"{kind}-stopped")
    store = open_store(stopped)
    with rayft("run", str(path), log=folder / f"{kind}-stopped.log") as run:
        wait_until("step 2", step_reached(store, 2), run)
        time.sleep(1)  # into the next step, most of which is drawing and scoring answers
        run.process.send_signal(signal.SIGTERM)
        assert run.wait() == 8, run.output()
    [end] = events(store, "end")
    if KINDS[kind][1]["rollout"].get("lag") != 1:
        said = re.search(r"is saved at step 2, with (\d+) answers of the next", end["message"])
        assert said, end["message"]
        assert 0 < int(said[1]) <= 32
    with rayft("run", str(path), log=folder / f"{kind}-stopped.log") as run:
        assert run.wait() == 0, run.output()
    assert events(store, "resume")[-1]["repeated"] == 0
    assert_same_state(stopped, whole)
    assert facts(stopped) == facts(whole)


def test_told_to_end_while_a_reward_hangs(folder: Path) -> None:
    """It does not wait for the scores; the answers they were for are kept."""
    job = rl_job(
        folder,
        "grpo",
        name="hanging",
        rewards=[function(folder, "held", timeout_s=600)],
        checkpoint={"every_steps": 1000},
    )
    path, uri = write_job(job, folder / "hanging.yaml"), folder / "runs" / "hanging"
    store = open_store(uri)
    asked, go = folder / "asked", folder / "go"
    go.touch()
    with rayft("run", str(path), log=folder / "hanging.log") as run:
        wait_until("step 1", step_reached(store, 1), run)
        go.unlink()
        asked.unlink(missing_ok=True)
        wait_until("a reward that hangs", asked.exists, run)
        run.process.send_signal(signal.SIGTERM)
        assert run.wait(60) == 8, run.output()
    [end] = events(store, "end")
    assert re.search(r"is saved at step \d, with 24 answers of the next", end["message"]), end["message"]
    go.touch()
    with rayft("run", str(path), log=folder / "hanging.log") as run:
        assert run.wait() == 0, run.output()
    assert events(store, "resume")[-1]["repeated"] == 0
    calm = rl_job(folder, "grpo", name="calm", checkpoint={"every_steps": 1000})
    with rayft("run", str(write_job(calm, folder / "calm.yaml")), log=folder / "calm.log") as run:
        assert run.wait() == 0, run.output()
    assert_same_state(uri, folder / "runs" / "calm")


@pytest.mark.full
@pytest.mark.parametrize("how", ["nobody", "signal", "another"])
def test_an_engine_that_waits_for_room(how: str, folder: Path, nodes: Nodes) -> None:
    """Its node is lost without a word in the middle of a step, and no other comes: the step before is saved. signal: told to end
    meanwhile. another: a node comes in its place, and the step goes on."""
    groups = {**GRPO, "rollout": {**LONG, "engines": 1}, "zero": {"stage": 2}}
    job = rl_job(
        folder,
        "grpo",
        name=f"roomless-{how}",
        cluster={"num_workers": 2, "max_failures": 3, "wait_s": 15 if how == "nobody" else 1000},
        train={"max_steps": 5, "global_batch_size": 8, "learning_rate": 1e-3, "precision": "bf16"},
        data={"train": [{"path": str(folder / "prompts.jsonl")}], "max_length": 192},
        checkpoint={"every_steps": 1000},
        placement={"rollout": {"apart": True}},
        **groups,
    )
    path, uri = write_job(job, folder / f"{job.name}.yaml"), folder / "runs" / job.name
    store = open_store(uri)
    with rayft("run", str(path), log=folder / f"{job.name}.log", RAY_ADDRESS=nodes.address) as run:
        wait_until("step 2", step_reached(store, 2), run)
        [where] = nodes.holding("EngineActor")
        nodes.take(where)
        wait_until("its wait", lambda: "waiting for" in run.output(), run)
        if how == "another":
            nodes.add_again()
            assert run.wait() == 0, run.output()
            # Before that, perhaps, of one that was started on the lost node, which the cluster did not know yet.
            recovery = events(store, "recovery")[-1]
            assert "A process of the role rollout died in `generate`" in recovery["message"]
            assert not events(store, "failure")
            return
        if how == "signal":
            run.process.send_signal(signal.SIGTERM)
        assert run.wait(120) == 8, run.output()
    [end] = events(store, "end")
    assert ("No nodes came" in end["message"]) is (how == "nobody"), end["message"]
    assert committed_steps(store), "what was whole is saved"


@pytest.mark.full
def test_without_a_place_to_go_it_ends_resumable(folder: Path, wholes: dict[str, Path], nodes: Nodes) -> None:
    whole = whole_of("grpo", folder, wholes)
    path, nowhere = job_file(folder, "grpo", "nowhere", wait_s=10)
    store = open_store(nowhere)
    with rayft("run", str(path), log=folder / "nowhere.log", RAY_ADDRESS=nodes.address) as run:
        wait_until("step 2", step_reached(store, 2), run)
        for node in nodes.ids[:2]:
            nodes.drain(node, 300)
        assert run.wait() == 8, run.output()
        assert "waiting for 2 x 1 CPU (policy); free: 1 CPU" in run.output()
    [end] = events(store, "end")
    assert "No nodes came in the place of those that are gone" in end["message"]
    with rayft("run", str(path), log=folder / "nowhere.log") as run:
        assert run.wait() == 0, run.output()
    assert_same_state(nowhere, whole)


@pytest.mark.parametrize("how", ["node", pytest.param("signal", marks=pytest.mark.full)])
def test_told_to_end_while_it_waits_for_room(how: str, folder: Path, nodes: Nodes) -> None:
    """It has saved, nothing of it runs, and it may wait for long: it ends at once, and says how."""
    path, waiting = job_file(folder, "grpo", f"waiting-{how}", wait_s=1000)
    store = open_store(waiting)
    with rayft("run", str(path), log=folder / f"waiting-{how}.log", RAY_ADDRESS=nodes.address) as run:
        wait_until("step 1", step_reached(store, 1), run)
        for node in nodes.ids[:2]:
            nodes.drain(node, 300)
        wait_until("its wait", lambda: "waiting for 2 x 1 CPU (policy)" in run.output(), run)
        if how == "node":
            nodes.drain(nodes.head, 300)
        else:
            run.process.send_signal(signal.SIGTERM)
        assert run.wait() == 8, run.output()
    [end] = events(store, "end")
    assert "before its processes were there" in end["message"]
    assert ("the driver's node" in end["message"]) is (how == "node")
