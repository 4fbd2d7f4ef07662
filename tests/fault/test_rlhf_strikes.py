"""Every process of a run that learns from rewards is lost at some point: the result is the undisturbed run's, to the last bit."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rayft.storage import open_store
from tests.cluster.rewards import function, prepare_folder, rl_job
from tests.fault.strike import PHASES
from tests.fault.test_rlhf_kill import facts
from tests.nodes import Nodes, ray_nodes
from tests.runs import ROOT, assert_same_state, events, rayft, write_job

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

STEPS = 20
#: Layout -> rollout group, roles that hold nothing of their own, phases.
LAYOUTS: dict[str, dict[str, Any]] = {
    "apart": {"engines": 2, "lag": 1},
    "inside": {},
}
#: One of every row, in one run.
SHORT = [
    ["rollout", "generation"],
    ["reward", "update"],
    ["reference", "scoring"],
    ["critic", "checkpoint"],
    ["policy", "sync"],
    ["driver", "update"],
    ["node", "generation"],
]
ROWS = ["rollout", "reward", "reference", "critic", "policy", "driver", "node"]


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    # Of which one is to spare.
    with ray_nodes(3) as made:
        yield made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_folder(tmp_path_factory.mktemp("strikes"))


def job_file(folder: Path, layout: str, name: str) -> Path:
    job = rl_job(
        folder,
        "ppo",
        name=name,
        rewards=[function(folder, "slow")],
        rollout={"max_new_tokens": 12, "unit_prompts": 1, "bucket_mb": 0.02, **LAYOUTS[layout]},
        rl={"num_mini_batches": 2, "num_epochs": 2, "kl_target": 1.0},
        train={"max_steps": STEPS, "global_batch_size": 8, "learning_rate": 1e-3, "precision": "bf16"},
        cluster={"num_workers": 2, "max_failures": 9},
        checkpoint={"every_steps": 2},
        zero={"stage": 2},
    )
    return write_job(job, folder / f"{name}.yaml")


@pytest.fixture(scope="module")
def whole(folder: Path, nodes: Nodes) -> Any:
    """Undisturbed runs by their layout, made when they are first asked for."""
    made: dict[str, Path] = {}

    def run(layout: str) -> Path:
        if layout not in made:
            name = f"whole-{layout}"
            path = job_file(folder, layout, name)
            with rayft("run", str(path), log=folder / f"{name}.log", RAY_ADDRESS=nodes.address) as run:
                assert run.wait() == 0, run.output()
            made[layout] = folder / "runs" / name
        return made[layout]

    return run


def strike(folder: Path, path: Path, strikes: list[list[str]], nodes: Nodes) -> str:
    """Run a job through the strikes, starting it again whenever the driver is killed; a lost node is replaced. Returns what was
    struck."""
    file, log, output = folder / "strikes.json", folder / "struck.txt", folder / f"{path.stem}.log"
    file.write_text(json.dumps(strikes))
    log.write_text("")
    lost, deadline = 0, time.monotonic() + 1200
    environment = {**os.environ, "RAY_ADDRESS": nodes.address, "OMP_NUM_THREADS": "1"}
    while True:
        with output.open("ab") as out:
            driver = subprocess.Popen(
                [sys.executable, "-m", "tests.fault.strike", str(path), str(file), str(log)],
                cwd=ROOT,
                env=environment,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        try:
            while driver.poll() is None:
                assert time.monotonic() < deadline, output.read_text()
                if log.read_text().count("node") > lost:
                    lost += 1
                    nodes.add()
                time.sleep(0.2)
        finally:
            with contextlib.suppress(ProcessLookupError):
                driver.kill()
            driver.wait(timeout=30)
        if driver.returncode == 0:
            return log.read_text()
        assert driver.returncode == -9, output.read_text()


def check(folder: Path, layout: str, strikes: list[list[str]], name: str, nodes: Nodes, whole: Any) -> None:
    path = job_file(folder, layout, name)
    struck = strike(folder, path, strikes, nodes)
    assert struck.split() == [word for pair in strikes for word in pair], "not every strike was made"
    uri = folder / "runs" / name
    assert_same_state(uri, whole(layout))
    assert facts(uri) == facts(whole(layout))
    ledger = [row["trained"] for row in facts(uri) if row["kind"] == "ledger"]
    assert [len(rows) for rows in ledger] == [8] * STEPS
    seen = sorted(row for rows in ledger[:3] for row in rows)
    assert seen == list(range(24)), "a prompt of the first epoch is lost or doubled"
    said = " ".join(
        row["message"] for what in ("recovery", "failure") for row in events(open_store(uri), what)
    )
    rebuilt = sum(whom in ("policy", "critic", "node") for whom, _ in strikes)
    assert len(events(open_store(uri), "failure")) <= rebuilt, "a loss was charged for more than once"
    again = [whom in ("policy", "critic", "node", "driver") for whom, _ in strikes]
    resumes = len(events(open_store(uri), "resume"))
    starts = len(events(open_store(uri), "start")) + resumes
    assert starts >= 1 + sum(again), "a new start is not in the log"
    assert resumes >= sum(again[1:]), "only the first strike comes before there is a checkpoint"
    for whom, _ in strikes:
        if whom not in ("driver", "node"):
            assert f"the role {whom}" in said, said


def test_one_of_every_row(folder: Path, nodes: Nodes, whole: Any) -> None:
    check(folder, "apart", SHORT, "short", nodes, whole)


@pytest.mark.full
@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_kill_anything(row: str, layout: str, folder: Path, nodes: Nodes, whole: Any) -> None:
    """A row of the matrix: the same process lost in every phase there is, one strike after another."""
    if layout == "inside" and row == "rollout":
        pytest.skip("there are no engines of their own")
    phases = [phase for phase in PHASES if layout == "apart" or phase != "sync"]
    check(folder, layout, [[row, phase] for phase in phases], f"{row}-{layout}", nodes, whole)
