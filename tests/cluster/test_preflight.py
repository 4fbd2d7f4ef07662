"""`rayft preflight` on real nodes, one of them with real faults: an old package, a wrong endpoint, a full disk."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from rayft.storage import open_store
from tests.cluster.steps import prepare_folder, small_job
from tests.nodes import ray_nodes
from tests.runs import events, rayft, write_job
from tests.shared import ROOT
from tests.warm.start import as_usual

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

#: Where nothing listens.
NOWHERE = "http://127.0.0.1:9"
#: A file system that has no byte free.
FULL = "/proc"
LENIENT = ("--min-disk-gb", "0.1", "--min-shm-gb", "0.1")


@pytest.fixture(scope="module", autouse=True)
def _workers_as_usual() -> Iterator[None]:
    with as_usual():
        yield


def preflight(address: str, *arguments: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, what it printed, what it complained of."""
    done = subprocess.run(
        [sys.executable, "-m", "rayft.cli", "preflight", "--address", address, "--json", *arguments],
        cwd=ROOT,
        env={**os.environ, "RAY_AUTH_MODE": "disabled"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout.splitlines()[-1]), done.stderr


def old_package(folder: Path) -> Path:
    """A folder whose packages come before the installed ones."""
    info = folder / "peft-0.1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: peft\nVersion: 0.1.0\n")
    return folder


def assert_a_job_ends_before_it_starts(address: str, tmp_path: Path) -> None:
    """`cluster.preflight` in a job file: code 4, the node in the log, no worker begun."""
    folder = prepare_folder(tmp_path)
    job = small_job(folder, name="looks", cluster={"preflight": True})
    file = str(write_job(job, folder / "job.yaml"))
    with rayft("run", file, log=tmp_path / "log", RAY_ADDRESS=address) as run:
        assert run.wait(200) == 4, run.output()
    assert "127.0.0.3: peft is 0.1.0" in run.output()
    store = open_store(folder / "runs" / "looks")
    [told] = events(store, "preflight")
    assert "127.0.0.3" in told["message"]
    [end] = events(store, "end")
    assert (end["code"], end["terminal"]) == (4, False)
    assert not events(store, "start")


def test_faults_of_one_node(s3_bucket: str, tmp_path: Path) -> None:
    storage = f"s3://{s3_bucket}/runs"
    patient = (*LENIENT, "--timeout-s", "150")
    with ray_nodes(1) as nodes:
        path = os.pathsep.join([str(old_package(tmp_path / "old")), str(ROOT)])
        faults = {"PYTHONPATH": path, "AWS_ENDPOINT_URL": NOWHERE, "RAYFT_CACHE": f"{FULL}/cache"}
        nodes.add(env_vars=faults)
        code, seen, said = preflight(nodes.address, *patient, "--storage", storage)
        assert code == 4, (seen, said)
        found = {(finding["node"], finding["check"]) for finding in seen["findings"]}
        assert found == {("127.0.0.3", "versions"), ("127.0.0.3", "storage"), ("127.0.0.3", "disk")}, seen
        texts = [finding["text"] for finding in seen["findings"]]
        assert any(text.startswith("peft is 0.1.0; on 2 other nodes it is") for text in texts)
        assert any(f"0.0 GB of disk free at {FULL}" in text for text in texts)
        assert "1 of 3 nodes is bad: 127.0.0.3" in said
        told = {node["name"]: node for node in seen["nodes"]}
        assert len(told) == 3
        assert all(abs(node["skew"][0]) <= node["skew"][1] + 0.5 for node in told.values())
        assert seen["bandwidth"] > 0
        assert told["127.0.0.2"]["links"]["127.0.0.3"] > 0
        assert told["127.0.0.2"]["facts"]["storage"]["write"] > 0

        # A storage that no node reaches is no node's fault.
        code, _, said = preflight(nodes.address, *patient, "--storage", "s3://no-such-bucket-here/x")
        assert code == 5, said

        assert_a_job_ends_before_it_starts(nodes.address, tmp_path)


@pytest.mark.full
def test_a_node_that_says_nothing(tmp_path: Path) -> None:
    """Stopped, not dead: Ray takes it for alive for a while. It is named, and nothing waits for it beyond its time."""
    with ray_nodes(1) as nodes:
        stopped = nodes.add()
        raylet = psutil.Process(stopped.all_processes["raylet"][0].process.pid)
        raylet.send_signal(signal.SIGSTOP)
        try:
            code, seen, said = preflight(nodes.address, *LENIENT, "--timeout-s", "40")
        finally:
            raylet.send_signal(signal.SIGCONT)
    assert code == 4, said
    assert [(f["node"], f["check"]) for f in seen["findings"]] == [("127.0.0.3", "answer")], seen
