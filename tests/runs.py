"""Start `rayft run` as a user does, in a process tree of its own, look at its run folder, and kill parts of it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml

from rayft.checkpoint import CheckpointReader, latest
from rayft.report.log import read_log
from rayft.spec import Job
from rayft.storage import Store, open_store
from tests.processes import below

ROOT = Path(__file__).resolve().parent.parent
START_S = 180
RUN_S = 280


class Started:
    """A `rayft` process and everything below it."""

    def __init__(self, arguments: list[str], environment: dict[str, str], log: Path) -> None:
        self.log = log
        self._file = log.open("ab")
        inherited = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        env = {**inherited, "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1", **environment}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "rayft.cli", *arguments],
            cwd=ROOT,
            env=env,
            stdout=self._file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._seen: dict[int, psutil.Process] = {}

    def tree(self) -> list[psutil.Process]:
        """The live processes of the tree, also those that outlived their parent."""
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(self.process.pid)
            for process in [root, *below(root)]:
                self._seen[process.pid] = process
        return [p for p in self._seen.values() if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]

    def actors(self, sign: str) -> list[psutil.Process]:
        """Live processes of Ray with a sign in their title, such as an actor's class."""
        found = []
        for process in self.tree():
            with contextlib.suppress(psutil.NoSuchProcess):
                if sign in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def workers(self) -> list[psutil.Process]:
        """Ray Train's worker processes of the current group."""
        return self.actors("TrainWorker")

    def kill_tree(self) -> None:
        """SIGKILL everything at once, as a node that loses power."""
        tree = self.tree()
        for process in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.suspend()  # so that nothing reacts to its neighbour's death
        for process in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait(timeout=30)

    def wait(self, timeout_s: float = RUN_S) -> int:
        """Exit code; fails with the output when the time is over."""
        try:
            return self.process.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"rayft did not end within {timeout_s} s:\n{self.output()}") from None

    def output(self) -> str:
        """What it printed."""
        return self.log.read_text(errors="replace")


@contextlib.contextmanager
def rayft(*arguments: str, log: Path, **environment: str) -> Iterator[Started]:
    """Run `rayft ARGUMENTS` in the background; whatever is left of it is killed at the end."""
    started = Started(list(arguments), environment, log)
    try:
        yield started
    finally:
        started.tree()
        with contextlib.suppress(subprocess.TimeoutExpired):
            if started.process.poll() is None:
                started.kill_tree()
        for process in started.tree():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def write_job(job: Job, path: Path) -> Path:
    """The job as a file."""
    path.write_text(yaml.safe_dump(job.model_dump(mode="json")))
    return path


def wait_until(
    what: str, condition: Callable[[], Any], started: Started | None = None, timeout_s: float = START_S
) -> Any:
    """The first true value of `condition`; fails when the time is over or the process has ended."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if value := condition():
            return value
        if started and started.process.poll() is not None:
            raise AssertionError(
                f"rayft ended with {started.process.returncode} before: {what}\n{started.output()}"
            )
        time.sleep(0.05)
    raise AssertionError(f"waited {timeout_s} s for: {what}\n{started.output() if started else ''}")


def step_reached(store: Store, step: int) -> Callable[[], bool]:
    """Whether the run log has a row of `step` or later."""

    def reached() -> bool:
        return any(row["kind"] == "step" and row["step"] >= step for row in read_log(store))

    return reached


def losses(store: Store) -> dict[int, float]:
    """Loss of every step, as the run log counts them."""
    return {row["step"]: row["loss"] for row in read_log(store) if row["kind"] == "step"}


def events(store: Store, name: str) -> list[dict[str, Any]]:
    """Events of one name."""
    return [row for row in read_log(store) if row["kind"] == "event" and row["event"] == name]


def final_state(uri: str | Path) -> tuple[int, dict[tuple[str, str], np.ndarray], dict[str, Any]]:
    """Step, tensors and JSON state of the newest checkpoint."""
    store = open_store(uri)
    step = latest(store)
    assert step is not None
    reader = CheckpointReader(store, step)
    tensors = {
        (name, kind): reader.read(name, kind) for kind in reader.kinds() for name in reader.names(kind)
    }
    return step, tensors, reader.state


def assert_same_state(one: str | Path, other: str | Path) -> None:
    """Weights, moments and counters of two runs are equal to the last bit."""
    step, tensors, state = final_state(one)
    other_step, other_tensors, other_state = final_state(other)
    assert (step, state) == (other_step, other_state)
    assert tensors.keys() == other_tensors.keys()
    different = [key for key in tensors if not np.array_equal(tensors[key], other_tensors[key])]
    assert not different, f"{len(different)} of {len(tensors)} tensors differ, such as {different[0]}"


def send(process: psutil.Process, number: signal.Signals) -> None:
    """Send a signal to a process that may be gone."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)


def read_json(path: Path) -> Any:
    """A JSON file."""
    return json.loads(path.read_text())
