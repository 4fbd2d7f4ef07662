"""SIGTERM to real `ray start --block`s under a submitted run: to a node that works, to all at once, ten times at random moments."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.local import LocalCluster, Node
from rayft.cli import main
from rayft.spec import Job
from rayft.storage import Store, open_store
from tests.cluster import rewards
from tests.cluster.steps import prepare_folder, small_job
from tests.fault.test_rlhf_kill import facts
from tests.runs import ROOT, assert_same_state, events, losses, rayft, step_reached, wait_until, write_job
from tests.warm.start import as_usual

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

WAIT_S = 400
#: Seconds that a node drains, its pod's grace but a little.
DRAIN_S = 60
#: Processes that hold a rank: of Ray Train, of the policy.
RANKS = ("ray::RayTrainWorker", "ray::PolicyActor")


@pytest.fixture(scope="module", autouse=True)
def _workers_as_usual() -> Iterator[None]:
    with as_usual():
        yield


class Run:
    """One job of a kind, submitted again and again under its name, and the undisturbed run it must equal."""

    def __init__(self, kind: str, folder: Path, steps: int) -> None:
        self.kind, self.folder = kind, folder
        make = rewards.prepare_folder if kind == "rlhf" else prepare_folder
        make(folder)
        self.whole, self.uri = folder / "runs" / "whole", folder / "runs" / "taken"
        self._whole = write_job(self._job("whole", steps), folder / "whole.yaml")
        self._taken = write_job(self._job("taken", steps), folder / "taken.yaml")

    @property
    def store(self) -> Store:
        """Where the disturbed run lies."""
        return open_store(self.uri)

    def undisturbed(self) -> None:
        """Make the run that nobody disturbs."""
        with rayft("run", str(self._whole), log=self.folder / "whole.log") as run:
            assert run.wait(WAIT_S) == 0, run.output()

    def submit(self, cluster: LocalCluster, *arguments: str) -> int:
        """Submit the disturbed one."""
        return main(["submit", str(self._taken), "--address", cluster.address, *arguments])

    def assert_same(self) -> None:
        """Its end is the undisturbed run's, and nothing was charged or repeated."""
        assert_same_state(self.uri, self.whole)
        if self.kind == "rlhf":
            assert facts(self.uri) == facts(self.whole)
        else:
            assert losses(self.store) == losses(open_store(self.whole))
        assert events(self.store, "failure") == []
        assert {event["repeated"] for event in events(self.store, "resume")} <= {0}

    def _job(self, name: str, steps: int) -> Job:
        common: dict[str, Any] = {
            "name": name,
            # No failure is forgiven: being moved is none. No checkpoint is due before the last step.
            "cluster": {"num_workers": 2, "max_failures": 0, "wait_s": WAIT_S},
            "checkpoint": {"every_steps": 1000},
            "zero": {"stage": 2},
        }
        if self.kind == "sft":
            return small_job(
                self.folder, train={"max_steps": steps, "precision": "bf16", "micro_batch_size": 1}, **common
            )
        return rewards.rl_job(
            self.folder,
            "grpo",
            rewards=[rewards.function(self.folder, "slow")],
            adapter={"type": "lora", "lora_r": 4},
            rl={"num_generations": 4, "kl_target": 1.0},
            # Most of a step is drawing answers, in many units.
            rollout={"max_new_tokens": 80, "unit_prompts": 1},
            data={"train": [{"path": str(self.folder / "prompts.jsonl")}], "max_length": 192},
            train={"max_steps": steps, "global_batch_size": 8, "learning_rate": 1e-3, "precision": "bf16"},
            **common,
        )


@contextmanager
def cluster_of(nodes: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalCluster]:
    """A head without work and nodes of one CPU, and this process as a shell with its token."""
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    from ray._raylet import get_authentication_mode

    get_authentication_mode()  # Ray keeps what it reads first; tests after these start Rays without a token here
    with LocalCluster(
        nodes, 1, drain_s=DRAIN_S, environment={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ) as cluster:
        for name, value in cluster.client_environment.items():
            monkeypatch.setenv(name, value)
        yield cluster


def working(cluster: LocalCluster) -> list[Node]:
    """Nodes on which ranks live."""
    homes = set()
    for process in cluster.processes():
        try:
            if process.cmdline() and process.cmdline()[0].startswith(RANKS):
                homes.add(process.environ()["RAY_TMPDIR"])
        except psutil.Error:
            continue
    return [node for node in cluster.nodes if str(cluster.folder / node.ip.rpartition(".")[2]) in homes]


def take(node: Node) -> None:
    """What a kubelet does to the pod of a node that is taken away."""
    node.process.send_signal(signal.SIGTERM)


@pytest.mark.parametrize(
    ("kind", "last"),
    [
        ("sft", "head"),
        *(
            pytest.param(*cell, marks=pytest.mark.full)
            for cell in (("sft", "all"), ("rlhf", "head"), ("rlhf", "all"))
        ),
    ],
)
def test_a_node_and_then_its_cluster(
    kind: str, last: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In mid-training, or while answers are drawn: the run moves to the node to spare; then the head goes alone, or all nodes go at
    once, and on another cluster the same submission finishes it."""
    run = Run(kind, tmp_path, 60 if kind == "sft" else 5)
    run.undisturbed()
    store = run.store
    with cluster_of(3, monkeypatch) as cluster:
        assert run.submit(cluster, "--no-wait") == 0
        wait_until("step 2", step_reached(store, 2), timeout_s=WAIT_S)
        victim = working(cluster)[0]
        told = time.time()
        take(victim)
        wait_until("the other nodes", lambda: events(store, "resume"), timeout_s=WAIT_S)
        saved = events(store, "checkpoint")[0]["time"] - told
        assert saved < DRAIN_S, "it was not saved inside the drain window"
        victim.process.wait(timeout=WAIT_S)
        assert victim not in working(cluster)
        here = max(losses(store))
        wait_until("a step there", step_reached(store, here + 1), timeout_s=WAIT_S)
        told = time.time()
        if last == "head":
            assert cluster.head is not None
            take(cluster.head)
            wait_until("the end", lambda: events(store, "end"), timeout_s=WAIT_S)
            cluster.head.process.wait(timeout=DRAIN_S + 30)
        else:
            cluster.stop(patience_s=DRAIN_S + 30)
    [end] = events(store, "end")
    assert end["code"] == 8, end
    assert "the driver's node" in end["message"]
    assert end["time"] - told < DRAIN_S, "the checkpoint was not committed inside the drain window"
    with cluster_of(2, monkeypatch) as cluster:
        assert run.submit(cluster) == 0
    assert len(events(store, "resume")) == 2
    run.assert_same()


@pytest.mark.full
@pytest.mark.parametrize("kind", ["sft", "rlhf"])
def test_ten_notices_at_random_moments(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever they hit, while it starts, loads, trains, saves or moves: no more than one step is lost, and the end is the same.
    The third, sixth, ninth and tenth are to all nodes at once."""
    steps = 3000 if kind == "sft" else 36
    run = Run(kind, tmp_path, steps)
    run.undisturbed()
    store, rng, given = run.store, random.Random(0), 0
    while given < 10:
        with cluster_of(3, monkeypatch) as cluster:
            assert run.submit(cluster, "--no-wait") == 0
            while True:
                if rng.random() < 0.5:  # on a busy machine all of them would come while it starts
                    here = max(losses(store), default=0)
                    wait_until("a step", step_reached(store, here + 1), timeout_s=WAIT_S)
                # On a quiet machine the run would be done before the last of them.
                until, latest = time.monotonic() + rng.uniform(0, 40), steps * (given + 1) // 11
                while time.monotonic() < until and not step_reached(store, latest)():
                    time.sleep(0.2)
                given += 1
                assert all(event["code"] for event in events(store, "end")), f"done before notice {given}"
                if given % 3 == 0 or given == 10:
                    cluster.stop(patience_s=DRAIN_S + 30)
                    break
                nodes = working(cluster) or cluster.nodes
                alive = [node for node in nodes if node.process.poll() is None]
                take(rng.choice(alive))
                cluster.add_node()
    with cluster_of(2, monkeypatch) as cluster:
        assert run.submit(cluster) == 0
    assert {event["code"] for event in events(store, "end")} <= {0, 8}, "a notice was taken for a failure"
    resumed = events(store, "resume")
    assert resumed, "no notice came while it trained"
    assert all(event["repeated"] <= 1 for event in resumed), resumed
    assert_same_state(run.uri, run.whole)
