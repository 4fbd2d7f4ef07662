"""Two runs and a search at once on one Ray cluster: none of them notices the others, to the last bit."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from rayft.report.log import read_log
from rayft.spec import Job
from rayft.storage import open_store
from tests.cluster import rewards
from tests.cluster.steps import prepare_folder, small_job
from tests.fault.test_rlhf_kill import facts
from tests.nodes import Nodes, ray_nodes
from tests.runs import assert_same_state, events, losses, rayft, step_reached, wait_until, write_job
from tests.searches import RATE, curve_of, search_of, trials_in

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ALL_S = 700


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    # Room for all workers of both runs and for two trials.
    with ray_nodes(6) as made:
        yield made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder and one node cache for all, as users of a fleet have them."""
    folder = tmp_path_factory.mktemp("shared")
    prepare_folder(folder / "sft")
    rewards.prepare_folder(folder / "rl")
    return folder


def jobs_of(folder: Path, when: str) -> dict[str, Job]:
    """The three jobs, in the storage of that name."""
    storage = str(folder / when)
    tune = {"space": {RATE: {"grid": [1e-3, 2e-3, 3e-3]}}, "searcher": "grid", "max_concurrent": 2}
    return {
        "run": small_job(
            folder / "sft",
            name="sft",
            storage=storage,
            train={"max_steps": 30},
            cluster={"num_workers": 2},
            zero={"stage": 2},
        ),
        "rl": rewards.rl_job(folder / "rl", "ppo", name="ppo", storage=storage, train={"max_steps": 6}),
        "tune": search_of(folder / "sft", "search", tune, storage=storage),
    }


def test_two_runs_and_a_search_at_once(folder: Path, nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYFT_CACHE", str(folder / "node"))
    kinds = {"run": "run", "rl": "run", "tune": "tune"}
    with ExitStack() as stack:
        started = {}
        for kind, job in jobs_of(folder, "together").items():
            path = write_job(job, folder / f"{kind}.yaml")
            log = folder / f"{kind}.log"
            started[kind] = stack.enter_context(
                rayft(kinds[kind], str(path), log=log, RAY_ADDRESS=nodes.address)
            )
        for one in ("sft", "ppo"):
            wait_until(
                f"a step of {one}", step_reached(open_store(folder / "together" / one), 1), timeout_s=ALL_S
            )
        deadline = time.monotonic() + ALL_S
        for one in started.values():
            assert one.wait(max(1.0, deadline - time.monotonic())) == 0, one.output()
    for kind, job in jobs_of(folder, "alone").items():
        path = write_job(job, folder / f"{kind}-alone.yaml")
        with rayft(
            kinds[kind], str(path), log=folder / f"{kind}-alone.log", RAY_ADDRESS=nodes.address
        ) as run:
            assert run.wait(ALL_S) == 0, run.output()
    together, alone = folder / "together", folder / "alone"
    for name in ("sft", "ppo"):
        assert_same_state(together / name, alone / name)
        assert events(open_store(together / name), "failure") == []
        assert events(open_store(together / name), "recovery") == []
    assert losses(open_store(together / "sft")) == losses(open_store(alone / "sft"))
    assert facts(together / "ppo") == facts(alone / "ppo")
    mine, others = trials_in(together / "search"), trials_in(alone / "search")
    assert [trial.status for trial in mine.values()] == ["done"] * 3
    assert {name: curve_of(trial) for name, trial in mine.items()} == {
        name: curve_of(trial) for name, trial in others.items()
    }
    spans = [
        [row["time"] for row in read_log(open_store(together / name)) if row["kind"] == "step"]
        for name in ("sft", "ppo")
    ]
    assert max(min(times) for times in spans) < min(max(times) for times in spans), "they took turns"
