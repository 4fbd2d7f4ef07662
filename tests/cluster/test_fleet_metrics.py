"""A real run on a real cluster, followed as a fleet does: by its metrics over HTTP, and by its log when it is over."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import requests

from rayft.report.log import read_log
from rayft.report.usage_table import collect
from rayft.storage import open_store
from rayft.train.metrics import METRICS
from tests.cluster.steps import prepare_folder, small_job
from tests.nodes import Nodes, ray_nodes
from tests.processes import below
from tests.runs import events, rayft, step_reached, wait_until, write_job

SAMPLE = re.compile(r"^(ray_rayft_\w+)\{(.*)\} (\S+)$", re.MULTILINE)
LABEL = re.compile(r'(\w+)="([^"]*)"')


def scrape(port: int) -> dict[str, tuple[dict[str, str], float]]:
    """Name -> labels and value of what rayft exports, as Prometheus gets it."""
    try:
        text = requests.get(f"http://127.0.0.1:{port}/metrics", timeout=10).text
    except requests.ConnectionError:
        return {}
    return {name: (dict(LABEL.findall(labels)), float(value)) for name, labels, value in SAMPLE.findall(text)}


def train_worker(nodes: Nodes) -> psutil.Process | None:
    """The process of the only rank."""
    [node] = nodes._nodes
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    found = [p for p in below(raylet) if "TrainWorker" in " ".join(p.cmdline())]
    return found[0] if found else None


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_run_in_metrics_and_in_the_accounts(tmp_path: Path) -> None:
    folder = prepare_folder(tmp_path)
    job = small_job(
        folder,
        name="seen",
        train={"max_steps": 1_000_000},
        checkpoint={"every_steps": 20},
        log={"every_steps": 100},
    )
    store = open_store(folder / "runs" / "seen")
    names = {f"ray_{name}" for name in METRICS}
    owner = {"RAYFT_USER": "ann", "RAYFT_TEAM": "nlp"}
    with ray_nodes(1) as nodes:
        port = nodes._cluster.head_node.metrics_export_port
        arguments = ("run", str(write_job(job, folder / "job.yaml")))
        with rayft(*arguments, log=tmp_path / "log", RAY_ADDRESS=nodes.address, **owner) as run:
            wait_until("a checkpoint", lambda: events(store, "checkpoint"), run)

            def exported(
                enough: Callable[[dict[str, float]], bool],
            ) -> dict[str, tuple[dict[str, str], float]]:
                found: dict[str, tuple[dict[str, str], float]] = {}

                def look() -> bool:
                    found.update(scrape(port))
                    return names <= found.keys() and enough(
                        {name: value for name, (_, value) in found.items()}
                    )

                wait_until(f"metrics on port {port}", look, run)
                return found

            first = exported(lambda values: values["ray_rayft_step"] >= 1)
            for labels, _ in first.values():
                assert {tag: labels[tag] for tag in ("run", "user", "team")} == {
                    "run": "seen",
                    "user": "ann",
                    "team": "nlp",
                }
            assert first["ray_rayft_restarts"][1] == 0
            assert 0 <= first["ray_rayft_checkpoint_age_seconds"][1] < 300
            assert first["ray_rayft_tokens_per_second"][1] > 0
            worker = train_worker(nodes)
            assert worker is not None
            worker.kill()
            wait_until("the group to start again", lambda: events(store, "resume"), run)
            again = events(store, "resume")[0]["resumed_step"] + 1
            wait_until(f"step {again}", step_reached(store, again), run)
            exported(lambda values: values["ray_rayft_restarts"] == 1)
            run.process.send_signal(signal.SIGTERM)
            assert run.wait() == 8, run.output()
    assert_accounts(folder)


def assert_accounts(folder: Path) -> None:
    """The cluster is gone; the log says where every second went."""
    [used] = collect([str(folder / "runs")])
    assert (used.run, used.unit, used.state, used.starts, used.attempts) == (
        "seen",
        "CPU",
        "ended with 8",
        1,
        2,
    )
    assert list(used.by_owner) == [("ann", "nlp")]
    for part in ("useful", "load", "restart"):
        assert used.parts[part] > 0, used
    rows = read_log(open_store(folder / "runs" / "seen"))
    begins = [row for row in rows if row.get("event") in ("start", "resume")]
    assert [row["devices"] for row in begins] == [{"CPU": 1.0}] * 2
    assert all(row["waited"][0] <= row["waited"][1] <= row["time"] for row in begins)
    waited_ms = sum(round(1000 * row["waited"][1]) - round(1000 * row["waited"][0]) for row in begins)
    assert used.parts["waiting"] == 10_000 * waited_ms
    # One CPU all the time: what was used is the time from the driver's start to its end.
    opened = next(row for row in rows if row.get("event") == "open")
    assert sum(used.parts.values()) == 10_000 * used.wall_ms
    assert used.wall_ms == pytest.approx(1000 * (rows[-1]["time"] - opened["began"]), abs=1)
    assert not used.notes
