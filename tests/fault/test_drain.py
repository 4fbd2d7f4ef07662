"""Nodes that are taken away with notice: the run saves, and goes on elsewhere or ends resumable; nothing is lost or charged."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rayft.report.log import read_log
from rayft.storage import open_store
from tests.cluster.steps import prepare_folder, small_job
from tests.nodes import Nodes, ray_nodes
from tests.runs import ROOT, assert_same_state, events, losses, rayft, step_reached, wait_until, write_job
from tests.searches import RATE, search_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

STEPS = 40


class Runs:
    """Job files over one folder, and the undisturbed run."""

    def __init__(self, folder: Path) -> None:
        self.folder = prepare_folder(
            folder, hidden_size=192, intermediate_size=512, num_hidden_layers=4, head_dim=48
        )

    def job(self, name: str, **groups: Any) -> Path:
        job = small_job(
            self.folder,
            name=name,
            train={"max_steps": STEPS, "precision": "bf16", "micro_batch_size": 1},
            zero={"stage": 2},
            # No failure is forgiven: moving is none. No checkpoint is due in all the run but the last.
            cluster={"num_workers": 2, "max_failures": 0, **groups.pop("cluster", {})},
            checkpoint={"every_steps": 1000},
            **groups,
        )
        return write_job(job, self.folder / f"{name}.yaml")

    def uri(self, name: str) -> Path:
        return self.folder / "runs" / name

    def start(self, path: Path, **environment: str):  # type: ignore[no-untyped-def]
        return rayft("run", str(path), log=self.folder / f"{path.stem}.log", **environment)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    made = Runs(tmp_path_factory.mktemp("drain"))
    with made.start(made.job("whole")) as run:
        assert run.wait() == 0, run.output()
    return made


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    with ray_nodes(3) as made:
        yield made


def test_a_node_that_is_taken_away_is_left_in_time(runs: Runs, nodes: Nodes) -> None:
    """Two of three nodes are used; one of them is drained, and then one of those that it goes on with, a new one coming each time."""
    store = open_store(runs.uri("moved"))
    with runs.start(runs.job("moved"), RAY_ADDRESS=nodes.address) as run:
        for number in range(2):
            reached = max(losses(store), default=0) + 3
            wait_until(f"step {reached}", step_reached(store, reached), run)
            nodes.drain(nodes.holding("RayTrainWorker")[0], 60)
            nodes.add()
            wait_until("the notice", lambda n=number: len(events(store, "drain")) > n, run)
            wait_until("the other nodes", lambda n=number: len(events(store, "resume")) > n, run)
        assert run.wait() == 0, run.output()
    assert_same_state(runs.uri("moved"), runs.uri("whole"))
    assert losses(store) == losses(open_store(runs.uri("whole")))
    told, resumed = events(store, "drain"), events(store, "resume")
    assert len(told) == len(resumed) == 2
    assert all("is taken away within" in event["message"] for event in told)
    assert [event["repeated"] for event in resumed] == [0, 0]
    assert events(store, "failure") == []


@pytest.mark.full
def test_without_a_place_to_go_it_ends_resumable(runs: Runs, nodes: Nodes) -> None:
    """One node is left of three; wait_s later the run ends with 8, and goes on elsewhere under the same name."""
    store, path = open_store(runs.uri("nowhere")), runs.job("nowhere", cluster={"wait_s": 12})
    with runs.start(path, RAY_ADDRESS=nodes.address) as run:
        wait_until("step 3", step_reached(store, 3), run)
        for node in nodes.ids[:2]:
            nodes.drain(node, 300)
        assert run.wait() == 8, run.output()
        assert "waiting for 2 x 1 CPU; free: 1 CPU" in run.output()
    [end] = events(store, "end")
    assert end["code"] == 8
    assert "No nodes came within 12 s" in end["message"]
    with runs.start(path) as run:
        assert run.wait() == 0, run.output()
    assert events(store, "resume")[-1]["repeated"] == 0
    assert_same_state(runs.uri("nowhere"), runs.uri("whole"))


@pytest.mark.full
def test_the_drivers_node_takes_the_run_with_it(runs: Runs, nodes: Nodes) -> None:
    store, path = open_store(runs.uri("ended")), runs.job("ended")
    with runs.start(path, RAY_ADDRESS=nodes.address) as run:
        wait_until("step 3", step_reached(store, 3), run)
        nodes.drain(nodes.head, 60)
        assert run.wait() == 8, run.output()
    [end] = events(store, "end")
    assert end["code"] == 8
    assert "the driver's node" in end["message"]
    with runs.start(path) as run:
        assert run.wait() == 0, run.output()
    assert events(store, "resume")[-1]["repeated"] == 0
    assert_same_state(runs.uri("ended"), runs.uri("whole"))


@pytest.mark.full
def test_the_driver_of_a_searchs_node_takes_the_trials_with_it(runs: Runs, nodes: Nodes) -> None:
    """Its trials are on other nodes, and save."""
    uri = runs.uri("searched")
    tune = {"space": {RATE: {"grid": [1e-3]}}, "searcher": "grid", "scheduler": "none"}
    groups = {"train": {"max_steps": 400}, "eval": {"every_steps": 400}, "checkpoint": {"every_steps": 400}}
    path = write_job(search_of(runs.folder, "searched", tune, **groups), runs.folder / "searched.yaml")
    trial = open_store(uri / "trials" / "searched-t0000")
    with rayft("tune", str(path), log=runs.folder / "searched.log", RAY_ADDRESS=nodes.address) as search:
        wait_until("step 3", step_reached(trial, 3), search)
        nodes.drain(nodes.head, 60)
        assert search.wait() == 8, search.output()
    [end] = events(open_store(uri), "end")
    assert "the driver's node" in end["message"]
    assert events(open_store(uri), "failure") == []
    assert events(trial, "end")[-1]["code"] == 8
    assert events(trial, "checkpoint"), "the trial has saved"


@pytest.mark.full
def test_an_evaluation_is_given_up_and_measured_by_the_next_start(runs: Runs) -> None:
    """Evaluations are far longer than steps; the notice comes in one of them."""
    groups: dict[str, Any] = {
        "data": {
            "train": [{"path": str(runs.folder / "rows.jsonl")}],
            "eval": [{"path": str(runs.folder / "rows.jsonl")}] * 4,
            "packing": False,
            "max_length": 256,
        },
        "eval": {"every_steps": 1},
    }
    ends: dict[str, list[Any]] = {}
    for name in ("measured", "measured-whole"):
        job = small_job(
            runs.folder,
            name=name,
            train={
                "max_steps": 4,
                "precision": "bf16",
                "micro_batch_size": 1,
                "global_batch_size": 16,
                "early_stopping_patience": 4,
            },
            zero={"stage": 2},
            cluster={"num_workers": 2, "max_failures": 0},
            checkpoint={"every_steps": 1000},
            **groups,
        )
        store, path = open_store(runs.uri(name)), write_job(job, runs.folder / f"{name}.yaml")
        while name == "measured" and not events(store, "unmeasured"):
            reached = max(losses(store), default=0) + 1
            with runs.start(path) as run:
                wait_until(f"step {reached}", step_reached(store, reached), run)
                # Into the next evaluation, half as long as the one before took; a notice that comes in the step gives that up.
                time.sleep([row["took_s"] for row in read_log(store) if row["kind"] == "eval"][-1] / 2)
                run.process.send_signal(signal.SIGTERM)
                assert run.wait() == 8, run.output()
        with runs.start(path) as run:
            assert run.wait() == 0, run.output()
        ends[name] = [
            (row["step"], row["loss"], row["metrics"]) for row in read_log(store) if row["kind"] == "eval"
        ]
    assert [step for step, _, _ in ends["measured"]] == [1, 2, 3, 4]
    assert ends["measured"] == ends["measured-whole"]
    assert events(open_store(runs.uri("measured")), "resume")[-1]["repeated"] == 0
    assert_same_state(runs.uri("measured"), runs.uri("measured-whole"))


GOING = """
import sys

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rayft.errors import JobError, LeaseLost, ResourceError, WorkerError
from rayft.train.draining import as_taken_away
from tests.nodes import drain

ERRORS = [WorkerError("a"), ResourceError("b"), JobError("c"), LeaseLost("d")]


class Here:
    def ready(self):
        return True


def start():
    there = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(Here).options(num_cpus=0, scheduling_strategy=there).remote()
    assert ray.get(actor.ready.remote(), timeout=60)
    return actor


ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
kept = start()
print(*(as_taken_away(error).code for error in ERRORS))
drain(sys.argv[1], ray.get_runtime_context().get_node_id(), 60)
print(*(as_taken_away(error).code for error in ERRORS))
try:
    start()
except ray.exceptions.RayError as error:
    print(type(error).__name__, as_taken_away(error).code, as_taken_away(error))
"""


def test_what_cannot_start_on_a_node_that_goes_is_no_failure(nodes: Nodes) -> None:
    """Nor what dies with it; a mistake in the job and another driver stay what they are."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", GOING, nodes.address],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    before, after, late = done.stdout.splitlines()
    assert before.split() == ["9", "4", "2", "9"]
    assert after.split() == ["8", "8", "2", "9"]
    assert late.startswith("ActorUnschedulableError 8 The driver's node "), late
    assert " is taken away within " in late


@pytest.mark.parametrize("verb", ["run", pytest.param("tune", marks=pytest.mark.full)])
def test_the_drivers_node_goes_before_training_begins(verb: str, runs: Runs, nodes: Nodes) -> None:
    name = f"early-{verb}"
    store, path = open_store(runs.uri(name)), runs.job(name)
    if verb == "tune":
        job = search_of(runs.folder, name, {"space": {RATE: {"grid": [1e-3]}}, "searcher": "grid"})
        path = write_job(job, runs.folder / f"{name}.yaml")
    with rayft(verb, str(path), log=runs.folder / f"{name}.log", RAY_ADDRESS=nodes.address) as run:
        wait_until("its beginning", lambda: events(store, "open"), run)
        nodes.drain(nodes.head, 60)
        assert run.wait() == 8, run.output()
    assert events(store, "failure") == []


@pytest.mark.full
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_step_is_given_up_between_micro_batches(stage: int, runs: Runs) -> None:
    """Steps of 150 micro-batches: asked to stop in the middle of the second, it ends with the state of the first."""
    name = f"long-{stage}"
    groups = {
        "data": {"train": [{"path": str(runs.folder / "rows.jsonl")}], "max_length": 256, "packing": False},
        "zero": {"stage": stage},
        "train": {
            "max_steps": 2,
            "precision": "bf16",
            "micro_batch_size": 1,
            "global_batch_size": 300,
            "learning_rate": 1e-3,
        },
    }
    paths = []
    for suffix in ("", "-whole"):
        job = small_job(
            runs.folder,
            name=name + suffix,
            cluster={"num_workers": 2},
            checkpoint={"every_steps": 1000},
            **groups,
        )
        paths.append(write_job(job, runs.folder / f"{name}{suffix}.yaml"))
    path, whole = paths
    store = open_store(runs.uri(name))
    with runs.start(path) as run:
        wait_until("step 1", step_reached(store, 1), run)
        run.process.send_signal(signal.SIGTERM)
        assert run.wait() == 8, run.output()
    assert list(losses(store)) == [1]
    assert "is saved at step 1" in events(store, "end")[0]["message"]
    for other in (path, whole):
        with runs.start(other) as run:
            assert run.wait() == 0, run.output()
    assert_same_state(runs.uri(name), runs.uri(f"{name}-whole"))
