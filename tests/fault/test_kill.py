"""Kill, stop and replace parts of real runs: the result is the undisturbed run's, to the last bit.

Several kills at different steps of one run stand for several cells of the matrix, and all runs share one folder of
data and one undisturbed run to compare with.
"""

from __future__ import annotations

import signal
import time
from pathlib import Path

import numpy as np
import pytest

from rayft.checkpoint import latest
from rayft.report.log import read_log
from rayft.storage import open_store
from tests.cluster.steps import plan_of, prepare_folder, reference_losses, small_job
from tests.runs import (
    Started,
    assert_same_state,
    events,
    losses,
    rayft,
    send,
    step_reached,
    wait_until,
    write_job,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

STEPS = 36
LORA = {"type": "lora", "lora_r": 4, "lora_dropout": 0.2}


class Runs:
    """Job files over one folder, and the undisturbed run."""

    def __init__(self, folder: Path) -> None:
        # Wide enough that a step and a checkpoint last long enough to be hit.
        self.folder = prepare_folder(
            folder, hidden_size=192, intermediate_size=512, num_hidden_layers=4, head_dim=48
        )
        self.whole = self.run_to_end("whole")

    def job(self, name: str, **cluster: float) -> Path:
        job = small_job(
            self.folder,
            name=name,
            seed=3,
            adapter=LORA,
            train={"max_steps": STEPS, "max_grad_norm": 0.5, "precision": "bf16"},
            zero={"stage": 2},
            cluster={"num_workers": 2, "hang_timeout_s": 60, **cluster},
            checkpoint={"every_steps": 4},
        )
        return write_job(job, self.folder / f"{name}.yaml")

    def uri(self, name: str) -> Path:
        return self.folder / "runs" / name

    def start(self, name: str, *extra: str, **cluster: float):  # type: ignore[no-untyped-def]
        return rayft("run", str(self.job(name, **cluster)), *extra, log=self.folder / f"{name}.log")

    def run_to_end(self, name: str, *extra: str) -> Path:
        with self.start(name, *extra) as run:
            assert run.wait() == 0, run.output()
        return self.uri(name)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("kill"))


def uncommitted(uri: Path, beyond: int) -> bool:
    """Whether a checkpoint after step `beyond` has data but no manifest."""
    for folder in (uri / "checkpoints").glob("step-*"):
        names = {path.name for path in folder.iterdir()}
        if int(folder.name.split("-")[1]) > beyond and any(n.endswith(".bin") for n in names):
            return not any(n.startswith("manifest") for n in names)
    return False


def kill_a_worker(run: Started) -> None:
    workers = wait_until("the workers", run.workers, run)
    send(workers[-1], signal.SIGKILL)


def test_killed_worker_and_killed_trees_change_nothing(runs: Runs) -> None:
    """A worker in mid-step, everything in mid-checkpoint, everything in mid-step."""
    store = open_store(runs.uri("killed"))
    with runs.start("killed") as run:
        wait_until("step 6", step_reached(store, 6), run)
        kill_a_worker(run)
        wait_until("the group to resume", lambda: events(store, "resume"), run)
        # The window between fragments and manifest is short; whoever misses it all the way is killed at step 20.
        late = step_reached(store, 20)
        wait_until("a checkpoint in the making", lambda: uncommitted(runs.uri("killed"), 8) or late(), run)
        run.kill_tree()
    with runs.start("killed") as run:
        wait_until("step 22", step_reached(store, 22), run)
        run.kill_tree()
    runs.run_to_end("killed")
    assert_same_state(runs.uri("killed"), runs.whole)
    assert losses(store) == losses(open_store(runs.whole))
    assert len(events(store, "resume")) == 3


@pytest.mark.full
def test_stopped_worker_is_noticed_and_the_group_restarted(runs: Runs) -> None:
    """SIGSTOP in mid-step: noticed after cluster.hang_timeout_s, stacks of all ranks kept, the result unchanged."""
    store = open_store(runs.uri("stopped"))
    with runs.start("stopped", hang_timeout_s=10) as run:
        wait_until("step 6", step_reached(store, 6), run)
        send(wait_until("the workers", run.workers, run)[-1], signal.SIGSTOP)
        hang = wait_until("the hang to be noticed", lambda: events(store, "hang"), run)[0]
        assert run.wait() == 0, run.output()
    assert "made no progress" in hang["message"]
    stacks = sorted((runs.uri("stopped") / "stacks").rglob("rank-*.txt"))
    assert [path.name for path in stacks] == ["rank-0.txt", "rank-1.txt"]
    assert any("train (rayft/train/worker.py" in path.read_text() for path in stacks), stacks[0].read_text()
    assert_same_state(runs.uri("stopped"), runs.whole)


@pytest.mark.full
def test_second_driver_is_refused_by_a_living_one_and_replaces_a_stopped_one(runs: Runs) -> None:
    """Refused with 4 while the first lives. SIGSTOP it, start a second, SIGCONT it: one history, and it says so."""
    store = open_store(runs.uri("replaced"))
    with runs.start("replaced") as first:
        wait_until("the run to begin", lambda: store.exists("job.yaml"), first)
        with rayft("run", str(runs.job("replaced")), log=runs.folder / "refused.log") as second:
            assert second.wait() == 4, second.output()
            assert "is being written by" in second.output()
        wait_until("step 6", step_reached(store, 6), first)
        for process in first.tree():
            send(process, signal.SIGSTOP)
        with rayft("run", str(runs.job("replaced")), log=runs.folder / "second.log") as second:
            wait_until("the second driver to train", lambda: events(store, "resume"), second)
            for process in first.tree():
                send(process, signal.SIGCONT)
            assert second.wait() == 0, second.output()
        assert first.wait() == 9, first.output()
        assert "taken over" in first.output()
    assert_same_state(runs.uri("replaced"), runs.whole)
    assert losses(store) == losses(open_store(runs.whole))


def test_a_signal_before_training_ends_a_run_with_8(runs: Runs) -> None:
    """While it prepares, it ends at once, with the code of a run that can be resumed."""
    store = open_store(runs.uri("early"))
    with runs.start("early") as run:
        wait_until("the run to prepare", lambda: store.exists("job.yaml"), run)
        time.sleep(2)  # anywhere in the start of Ray, the imports and the data
        run.process.send_signal(signal.SIGTERM)
        assert run.wait(timeout_s=60) == 8, run.output()
        assert "interrupted" in run.output() or "asked to stop" in run.output()


#: The other methods: a cell in `make test`, the rest in `make test-full`.
OTHERS = [pytest.param(kind, marks=pytest.mark.full) for kind in ("dpo", "reward", "kto", "orpo")]


@pytest.mark.parametrize("kind", OTHERS)
def test_killed_trees_change_nothing_in_other_methods(kind: str, tmp_path: Path) -> None:
    """Everything killed in mid-step and started again, with an evaluation on held-out rows."""
    folder = prepare_folder(tmp_path)
    uris = {}
    for name in ("whole", "killed"):
        job = small_job(
            folder,
            kind,
            name=name,
            seed=3,
            train={"max_steps": 12, "precision": "bf16"},
            zero={"stage": 2},
            cluster={"num_workers": 2},
            checkpoint={"every_steps": 2},
        )
        held_out = job.data.model_copy(update={"eval": job.data.train})
        job = job.model_copy(
            update={"data": held_out, "eval": job.eval.model_copy(update={"every_steps": 6})}
        )
        uris[name] = folder / "runs" / name
        path = str(write_job(job, folder / f"{name}.yaml"))
        if name == "killed":
            with rayft("run", path, log=folder / "killed.log") as run:
                wait_until("step 4", step_reached(open_store(uris[name]), 4), run)
                run.kill_tree()
        with rayft("run", path, log=folder / f"{name}.log") as run:
            assert run.wait() == 0, run.output()
    assert_same_state(uris["killed"], uris["whole"])
    logs = {name: read_log(open_store(uri)) for name, uri in uris.items()}
    for what in ("step", "eval"):
        seen = {
            name: [(row["step"], row["loss"], row["metrics"]) for row in rows if row["kind"] == what]
            for name, rows in logs.items()
        }
        assert seen["killed"] == seen["whole"]
        assert seen["whole"][-1][0] == 12
    assert len(events(open_store(uris["killed"]), "resume")) == 1


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(("cluster.num_workers=1", "zero.stage=0"), marks=pytest.mark.full),
        pytest.param(("zero.stage=3",), marks=pytest.mark.full),
    ],
)
def test_other_ranks_and_stage_continue_the_curve(runs: Runs, overrides: tuple[str, ...]) -> None:
    """Asked to stop (code 8) on 2 ranks with ZeRO-2, resumed otherwise: the losses go on as a plain loop's do."""
    name = f"moved-{len(overrides)}"
    store = open_store(runs.uri(name))
    job = small_job(
        runs.folder,
        name=name,
        train={"max_steps": STEPS},
        zero={"stage": 2},
        cluster={"num_workers": 2},
        checkpoint={"every_steps": 4},
    )
    path = write_job(job, runs.folder / f"{name}.yaml")
    with rayft("run", str(path), log=runs.folder / f"{name}.log") as run:
        wait_until("step 6", step_reached(store, 6), run)
        run.process.send_signal(signal.SIGTERM)
        assert run.wait() == 8, run.output()
    assert latest(store) == max(losses(store)) < STEPS
    with rayft("run", str(path), *overrides, log=runs.folder / f"{name}.log") as run:
        assert run.wait() == 0, run.output()
    measured = losses(store)
    assert list(measured) == list(range(1, STEPS + 1))
    expected, _ = reference_losses(plan_of(job, runs.folder, stage=0, packed=True), runs.folder, STEPS)
    np.testing.assert_allclose(list(measured.values()), expected, rtol=1e-4)
