"""An elastic run on several (local) nodes: a node goes away and comes back, the optimisation does not notice."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from rayft.report.log import read_log
from rayft.spec import Job
from rayft.storage import open_store
from tests.cluster.steps import (
    learner_of,
    plan_of,
    prepare_folder,
    reference_losses,
    small_job,
    state_of,
)
from tests.nodes import Nodes, ray_nodes
from tests.ranks import run_ranks
from tests.runs import events, losses, rayft, step_reached, wait_until, write_job

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    with ray_nodes(2) as made:
        yield made


def trained_from(folder: Path, job: Job) -> dict[str, np.ndarray]:
    """The parameters before the first step, new score heads and all."""
    learner = learner_of(plan_of(job, folder, stage=0, packed=True), folder)
    return {name: data for (name, what), data in state_of(learner).items() if what == "param"}


@pytest.mark.parametrize(
    "kind", ["sft", *(pytest.param(kind, marks=pytest.mark.full) for kind in ("reward", "dpo", "kto"))]
)
def test_a_node_goes_and_comes_back(kind: str, nodes: Nodes, tmp_path: Path) -> None:
    """[1, 2] workers: 2, then 1, then 2 again; same samples, same global batch, losses of a plain loop to 1e-4 (of rows known by
    heart, 1e-6)."""
    folder = prepare_folder(
        tmp_path, hidden_size=192, intermediate_size=512, num_hidden_layers=4, head_dim=48
    )
    job = small_job(
        folder,
        kind,
        name="elastic",
        # Until it is asked to stop; KTO looks at the reference of every step before the first.
        train={"max_steps": 400 if kind == "kto" else 100_000, "learning_rate": 1e-4},
        zero={"stage": 2},
        cluster={"num_workers": [1, 2], "elastic_interval_s": 3, "max_failures": 5},
        checkpoint={"every_steps": 5},
    )
    store = open_store(folder / "runs" / "elastic")

    def workers_of(event: str) -> list[int]:
        return [row["workers"] for row in events(store, event)]

    def three_more() -> None:
        again = max(losses(store)) + 3
        wait_until(f"step {again}", step_reached(store, again), run)

    with rayft(
        "run", str(write_job(job, folder / "job.yaml")), log=tmp_path / "log", RAY_ADDRESS=nodes.address
    ) as run:
        wait_until("step 8", step_reached(store, 8), run)
        assert workers_of("start") == [2]
        nodes.take_last()
        wait_until("the run to go on with one worker", lambda: 1 in workers_of("resume"), run)
        three_more()
        nodes.add()
        wait_until("the run to grow again", lambda: workers_of("resume")[-1] == 2, run)
        three_more()
        run.process.send_signal(signal.SIGTERM)
        assert run.wait() == 8, run.output()
    measured = losses(store)
    assert list(measured) == list(range(1, len(measured) + 1))
    start = run_ranks(trained_from, 1, folder, job)[0] if kind == "reward" else None
    plan = plan_of(job, folder, stage=0, packed=True)
    expected, _ = reference_losses(plan, folder, len(measured), start, kind)
    np.testing.assert_allclose(list(measured.values()), expected, rtol=1e-4, atol=1e-6)
    positions = [row["position"] for row in read_log(store) if row["kind"] == "step"]
    assert positions == [8 * step for step in measured]
    # What was saved is never older than a checkpoint under way and the one before it.
    assert all(resume["repeated"] <= 2 * 5 for resume in events(store, "resume")), events(store, "resume")
