"""A trial that runs out of memory, for real: its workers may take only so much more than they have when they begin."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from rayft.spec import load_job
from rayft.storage import open_store
from tests.cluster.steps import prepare_folder
from tests.runs import events, losses, rayft, wait_until, write_job
from tests.searches import RATE, search_of, trials_in
from tests.warm.start import as_usual

pytestmark = [pytest.mark.slow, pytest.mark.full, pytest.mark.timeout(900)]

SEARCH_S = 600
#: What a worker may take beyond what it has when its first step begins: such a step takes 2.7 GiB with 4 of these rows in a
#: micro-batch, 2.8 with 8 and 3.7 with 16.
MORE = 3300 << 20
#: Python imports a module of this name at its start. What only workers import is changed as it is imported.
CUSTOM = """
import importlib.abc, importlib.util, resource, sys

class Limit(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "rayft.learner.learner":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            limit(module.Learner)

        spec.loader.exec_module = exec_module
        return spec

def limit(learner):
    step = learner.step

    def limited(self, *args, **kwargs):
        learner.step = step
        with open("/proc/self/status") as status:
            used = next(int(line.split()[1]) << 10 for line in status if line.startswith("VmData"))
        resource.setrlimit(resource.RLIMIT_DATA, (used + MORE, used + MORE))
        return self.step(*args, **kwargs)

    learner.step = limited

if "default_worker.py" in " ".join(sys.orig_argv):
    sys.meta_path.insert(0, Limit())
"""


@pytest.fixture(scope="module", autouse=True)
def _workers_as_usual() -> Iterator[None]:
    """Each imports on its own, so that it takes the limit."""
    with as_usual():
        yield


@pytest.mark.parametrize("killed", [False, True])
def test_a_trial_out_of_memory_goes_on_with_a_smaller_micro_batch(killed: bool, tmp_path: Path) -> None:
    """The same global batch, until it fits. killed: everything, when a run has said that it ran out of memory and the trial has not
    begun the next."""
    folder = prepare_folder(tmp_path, intermediate_size=1 << 16)
    (folder / "custom").mkdir()
    (folder / "custom" / "sitecustomize.py").write_text(CUSTOM.replace("MORE", str(MORE)))
    train = {"max_steps": 4, "global_batch_size": 16, "micro_batch_size": 16}
    tune = {"space": {RATE: {"grid": [1e-3, 2e-3]}}, "searcher": "grid", "max_concurrent": 1}
    job = search_of(folder, "large", tune, train=train, eval={"batch_size": 1})
    path, uri = write_job(job, folder / "large.yaml"), folder / "runs" / "large"
    if killed:
        first = open_store(uri / "trials" / "large-t0000")
        with rayft("tune", str(path), log=folder / "large.log", PYTHONPATH=str(folder / "custom")) as search:
            wait_until("the end of the first run", lambda: events(first, "end"), search, SEARCH_S)
            search.kill_tree()
        assert events(first, "end")[-1]["code"] == 7
        assert len(trials_in(uri)["t0000"].segments) == 1, "killed too late for what is to be shown"
    with rayft("tune", str(path), log=folder / "large.log", PYTHONPATH=str(folder / "custom")) as search:
        assert search.wait(SEARCH_S) == 0, search.output()
        assert "out of memory: micro_batch_size 16 -> 8" in search.output()
    for trial in trials_in(uri).values():
        assert trial.status == "done"
        reasons = [segment.reason for segment in trial.segments]
        assert reasons[:2] == ["", "out of memory: micro_batch_size 16 -> 8"]
        last = load_job(uri / "trials" / str(trial.run) / "job.yaml", [])
        assert last.train.micro_batch_size in (8, 4)
        assert last.train.global_batch_size == 16
        assert sorted(losses(open_store(uri / "trials" / str(trial.run)))) == [1, 2, 3, 4]
