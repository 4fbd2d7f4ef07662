"""An elastic run on several (local) nodes: a node goes away and comes back, the optimisation does not notice."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayft.report.log import read_log
from rayft.storage import open_store
from tests.cluster.steps import prepare_folder, small_job
from tests.runs import events, losses, rayft, step_reached, wait_until, write_job

pytestmark = [pytest.mark.full, pytest.mark.slow, pytest.mark.timeout(900)]

STEPS = 400


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A head that takes no work and two nodes with one CPU each, on addresses of their own."""
    os.environ["RAY_AUTH_MODE"] = "disabled"
    from ray.cluster_utils import Cluster

    memory = {"object_store_memory": 100 << 20}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **memory})
    cluster.nodes_for_work = [add_node(cluster, number) for number in (2, 3)]
    yield cluster
    cluster.shutdown()


def add_node(cluster: Any, number: int) -> Any:
    return cluster.add_node(num_cpus=1, node_ip_address=f"127.0.0.{number}", object_store_memory=100 << 20)


def test_a_node_goes_and_comes_back(cluster: Any, tmp_path: Path) -> None:
    """[1, 2] workers: 2, then 1, then 2 again; same samples, same global batch, same losses to 1e-4."""
    folder = prepare_folder(
        tmp_path, hidden_size=192, intermediate_size=512, num_hidden_layers=4, head_dim=48
    )
    job = small_job(
        folder,
        name="elastic",
        train={"max_steps": STEPS, "learning_rate": 1e-4},
        zero={"stage": 2},
        cluster={"num_workers": [1, 2], "elastic_interval_s": 5, "max_failures": 5},
        checkpoint={"every_steps": 5},
    )
    store = open_store(folder / "runs" / "elastic")

    def workers_of(event: str) -> list[int]:
        return [row["workers"] for row in events(store, event)]

    with rayft(
        "run", str(write_job(job, folder / "job.yaml")), log=tmp_path / "log", RAY_ADDRESS=cluster.address
    ) as run:
        wait_until("step 8", step_reached(store, 8), run)
        assert workers_of("start") == [2]
        cluster.remove_node(cluster.nodes_for_work[1], allow_graceful=False)
        wait_until("the run to go on with one worker", lambda: 1 in workers_of("resume"), run)
        again = max(losses(store)) + 3
        wait_until(f"step {again}", step_reached(store, again), run)
        add_node(cluster, 4)
        wait_until("the run to grow again", lambda: workers_of("resume")[-1] == 2, run)
        assert run.wait(timeout_s=600) == 0, run.output()
    whole = small_job(
        folder, **{**job.model_dump(mode="json"), "name": "whole", "cluster": {"num_workers": 1}}
    )
    with rayft("run", str(write_job(whole, folder / "whole.yaml")), log=tmp_path / "whole.log") as run:
        assert run.wait(timeout_s=600) == 0, run.output()
    expected, measured = losses(open_store(folder / "runs" / "whole")), losses(store)
    np.testing.assert_allclose(list(measured.values()), [expected[step] for step in measured], rtol=1e-4)
    positions = [row["position"] for row in read_log(store) if row["kind"] == "step"]
    assert positions == [8 * (number + 1) for number in range(STEPS)]
    for resume in events(store, "resume"):
        assert "repeated" in resume, "growing says how many steps are repeated"
