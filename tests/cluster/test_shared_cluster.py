"""Two runs and a search at once on one Ray cluster: none of them notices the others, to the last bit."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from rayft.report.log import read_all
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
    # Room for all workers of both runs and for three trials.
    with ray_nodes(7) as made:
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
    # Of seven CPUs, which is two trials.
    tune = {"space": {RATE: {"grid": [1e-3, 2e-3, 3e-3]}}, "searcher": "grid", "share": 0.3}
    return {
        "run": small_job(
            folder / "sft",
            name="sft",
            storage=storage,
            train={"max_steps": 30},
            cluster={"num_workers": 2},
            zero={"stage": 2},
        ),
        "rl": rewards.rl_job(
            folder / "rl",
            "ppo",
            name="ppo",
            storage=storage,
            rewards=[rewards.function(folder / "rl", "held")],
            train={"max_steps": 6},
        ),
        "tune": search_of(folder / "sft", "search", tune, storage=storage),
    }


def most_at_once(uri: Path) -> int:
    """Of the search's trials, how many were running."""
    now, most = set[str](), 0
    for row in read_all(open_store(uri)):
        if row["kind"] == "trial" and row.get("event") == "running":
            now.add(row["trial"])
            most = max(most, len(now))
        elif row["kind"] == "trial" and row.get("event") == "ended":
            now.discard(row["trial"])
    return most


def test_two_runs_and_a_search_at_once(folder: Path, nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYFT_CACHE", str(folder / "node"))
    kinds = {"run": "run", "rl": "run", "tune": "tune"}
    jobs = jobs_of(folder, "together")
    with ExitStack() as stack:
        started = {}

        def start(kind: str) -> None:
            path = write_job(jobs[kind], folder / f"{kind}.yaml")
            log = folder / f"{kind}.log"
            started[kind] = stack.enter_context(
                rayft(kinds[kind], str(path), log=log, RAY_ADDRESS=nodes.address)
            )

        # PPO's run is held in its first step until the fine-tuning has made one, so that they cannot have taken turns.
        start("rl")
        start("tune")
        wait_until("PPO's first answers", (folder / "rl" / "asked").exists, started["rl"], timeout_s=ALL_S)
        start("run")
        one_step = step_reached(open_store(folder / "together" / "sft"), 1)
        wait_until("a step of the fine-tuning", one_step, started["run"], timeout_s=ALL_S)
        (folder / "rl" / "go").touch()
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
    assert most_at_once(together / "search") == most_at_once(alone / "search") == 2, "more than its share"
    assert {name: curve_of(trial) for name, trial in mine.items()} == {
        name: curve_of(trial) for name, trial in others.items()
    }
