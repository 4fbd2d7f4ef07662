"""A trial that runs out of memory, for real: its workers may take only so much more than they have when they begin."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from string import ascii_lowercase

import numpy as np
import pytest

from rayft.data.order import Order
from rayft.spec import load_job
from rayft.storage import open_store
from tests.cluster.steps import prepare_folder
from tests.runs import events, losses, rayft, wait_until, write_job
from tests.searches import RATE, search_of, trials_in
from tests.warm.start import as_usual

pytestmark = [pytest.mark.slow, pytest.mark.full, pytest.mark.timeout(900)]

SEARCH_S = 600
#: Rows of a step, steps, and the length of an answer, of which each character is a token (the tokenizer's are bytes).
ROWS, STEPS, CHARACTERS = 16, 4, 150
#: What a worker may take beyond what it has when its first step begins: measured, such steps take 2.5 GiB with 4 of these rows in a
#: micro-batch, 4.2 with 8 and 9.0 with 16.
MORE = 6400 << 20
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


def write_long_rows(path: Path, first: int) -> None:
    """Rows of one length from step `first` on, in the order in which a run of seed 0 reads them, and short ones before."""
    count = ROWS * STEPS
    order = Order(0, [[count]], weights=[None]).ids(0, count)
    rng = random.Random(0)
    with path.open("w") as file:
        for at in np.argsort(order):
            answer = "".join(rng.choices(ascii_lowercase, k=CHARACTERS if at >= ROWS * (first - 1) else 9))
            messages = [{"role": "user", "content": "write"}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}) + "\n")


@pytest.mark.parametrize(("heavy", "killed"), [(1, False), (1, True), (3, False)])
def test_a_trial_out_of_memory_goes_on_with_a_smaller_micro_batch(
    heavy: int, killed: bool, tmp_path: Path
) -> None:
    """The same global batch, until it fits, from the checkpoint before the step that did not. heavy: that step. killed: everything,
    when a run has said that it ran out of memory and the trial has not begun the next."""
    folder = prepare_folder(tmp_path, intermediate_size=1 << 16)
    write_long_rows(folder / "rows.jsonl", heavy)
    (folder / "custom").mkdir()
    (folder / "custom" / "sitecustomize.py").write_text(CUSTOM.replace("MORE", str(MORE)))
    train = {"max_steps": STEPS, "global_batch_size": ROWS, "micro_batch_size": ROWS}
    tune = {"space": {RATE: {"grid": [1e-3, 2e-3]}}, "searcher": "grid", "max_concurrent": 1}
    data = {
        "train": [{"path": str(folder / "rows.jsonl")}],
        "eval": [{"path": str(folder / "rows.jsonl"), "limit": 4}],
        "max_length": CHARACTERS + 50,
    }
    job = search_of(folder, "large", tune, train=train, data=data, eval={"batch_size": 1})
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
        assert trial.segments[1].start == 2 * (heavy // 2), "from the last checkpoint"
        last = load_job(uri / "trials" / str(trial.run) / "job.yaml", [])
        assert last.train.micro_batch_size in (8, 4)
        assert last.train.global_batch_size == 16
        taken = sorted(losses(open_store(uri / "trials" / str(trial.run))))
        assert taken == list(range(trial.segments[-1].start + 1, STEPS + 1))
