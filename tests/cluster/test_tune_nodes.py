"""A search on a cluster of three nodes: trials of two workers where there is room for five."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from rayft.storage import open_store
from tests.cluster.steps import prepare_folder
from tests.nodes import Nodes, ray_nodes
from tests.runs import events, rayft, wait_until, write_job
from tests.searches import RATE, rows_of, search_of, trials_in

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SEARCH_S = 600


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with ray_nodes(1) as nodes:
        for _ in range(2):
            nodes.add(num_cpus=2)
        yield nodes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_folder(tmp_path_factory.mktemp("nodes"))


def test_trials_of_two_workers_share_five_slots(folder: Path, nodes: Nodes) -> None:
    """Two run at a time, the third waits and says for what; the fifth slot stays free, and all come to their end."""
    tune = {"space": {RATE: {"grid": [1e-3, 2e-3, 3e-3]}}, "searcher": "grid"}
    # Long enough that the second begins before the first ends, however late its processes are.
    job = search_of(
        folder, "slots", tune, cluster={"num_workers": 2}, zero={"stage": 2}, train={"max_steps": 30}
    )
    path, uri = write_job(job, folder / "slots.yaml"), folder / "runs" / "slots"
    most = 0
    with rayft("tune", str(path), log=folder / "slots.log", RAY_ADDRESS=nodes.address) as search:
        deadline = time.monotonic() + SEARCH_S
        while search.process.poll() is None and time.monotonic() < deadline:
            most = max(most, nodes.alive("RayTrainWorker"))
            time.sleep(0.2)
        assert search.wait(1) == 0, search.output()
    assert most == 4, f"{most} workers at once"
    trials = trials_in(uri)
    assert Counter(trial.status for trial in trials.values()) == {"done": 3}
    spans = [
        (row["time"], end["time"])
        for row in rows_of(uri, "running")
        for end in rows_of(uri, "ended")
        if row["trial"] == end["trial"]
    ]
    assert len(spans) == 3
    assert max(sum(begin <= at < end for begin, end in spans) for at, _ in spans) == 2
    for name in trials:
        assert not events(open_store(uri / "trials" / f"slots-{name}"), "restart")


def test_a_trial_that_no_node_can_hold_is_refused_with_the_arithmetic(folder: Path, nodes: Nodes) -> None:
    tune = {"space": {RATE: {"grid": [1e-3]}}, "searcher": "grid"}
    job = search_of(folder, "large", tune, cluster={"num_workers": 6}, train={"global_batch_size": 12})
    path = write_job(job, folder / "large.yaml")
    with rayft("tune", str(path), log=folder / "large.log", RAY_ADDRESS=nodes.address) as search:
        assert search.wait() == 4, search.output()
        assert "a trial asks for 6 x 1 CPU" in search.output()


@pytest.mark.full
def test_a_trial_beyond_the_share_waits_and_says_for_what(folder: Path, nodes: Nodes) -> None:
    """Of five CPUs the search may take half: one trial of two workers at a time."""
    tune = {
        "space": {RATE: {"grid": [1e-3, 2e-3]}},
        "searcher": "grid",
        "share": 0.5,
        "scheduler": "hyperband",
    }
    job = search_of(
        folder,
        "share",
        {
            **tune,
            "scheduler": "pbt",
            "searcher": "random",
            "num_trials": 2,
            "space": {RATE: {"choice": [1e-3, 2e-3]}},
        },
        cluster={"num_workers": 2},
    )
    path, uri = write_job(job, folder / "share.yaml"), folder / "runs" / "share"
    with rayft("tune", str(path), log=folder / "share.log", RAY_ADDRESS=nodes.address) as search:
        waiting = wait_until("a trial to wait", lambda: rows_of(uri, "waiting"), search)
        assert any("trials hold their part of 2.5 CPU" in row["reason"] for row in waiting), waiting
        assert search.wait(SEARCH_S) == 0, search.output()
        assert "waiting" in search.output()


@pytest.mark.full
def test_a_trial_that_waits_for_the_autoscaler_says_so_and_goes_on(folder: Path, nodes: Nodes) -> None:
    """The cluster says that it has an autoscaler, as one does; the node that this one would add is added by the test."""
    from ray._raylet import GcsClient

    GcsClient(address=nodes.address).internal_kv_put(b"__autoscaler_v2_enabled", b"1", True, b"__autoscaler")
    tune = {"space": {RATE: {"grid": [1e-3]}}, "searcher": "grid"}
    job = search_of(folder, "grows", tune, cluster={"num_workers": 6}, train={"global_batch_size": 12})
    path, uri = write_job(job, folder / "grows.yaml"), folder / "runs" / "grows"
    with rayft("tune", str(path), log=folder / "grows.log", RAY_ADDRESS=nodes.address) as search:
        [row] = wait_until("the trial to wait", lambda: rows_of(uri, "waiting"), search)
        assert row["reason"] == "nodes that the autoscaler may add: 6 x 1 CPU, and 5 CPU free"
        nodes.add()
        assert search.wait(SEARCH_S) == 0, search.output()
        assert "nodes that the autoscaler may add" in search.output()
    assert [row["trial"] for row in rows_of(uri, "running")] == ["t0000"]
    assert trials_in(uri)["t0000"].status == "done"
