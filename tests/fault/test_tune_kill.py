"""Kill parts of a search: it ends with the trials and the best one of an undisturbed one, and none is run twice.

The matrix: {driver, a trial's driver, a worker, a node, everything} x {before, during, after a report}, for a grid, for random
values and for ASHA. "before": a step behind the last report has been made; "during": the run has measured and the search has
not written it down; "after": the search has. What is hit when the window of "during" is missed is the next report, so the cell
holds either way.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from rayft.report.log import read_log
from rayft.storage import open_store
from tests.cluster.steps import prepare_folder
from tests.nodes import Nodes, ray_nodes
from tests.runs import Started, rayft, send, wait_until, write_job
from tests.searches import RATE, curve_of, rows_of, search_of, trials_in

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

#: One after another, so that ASHA's decisions rest on the same trials in the same order.
GRID = {"space": {RATE: {"grid": [1e-3, 3e-2, 1e-6]}}, "searcher": "grid", "max_concurrent": 1}
RANDOM = {
    "space": {RATE: {"loguniform": [1e-6, 3e-2]}},
    "searcher": "random",
    "num_trials": 3,
    "max_concurrent": 1,
}
ASHA = {**GRID, "scheduler": "asha", "reduction_factor": 2}
KINDS = {"grid": GRID, "random": RANDOM, "asha": ASHA}
WHEN = ("before", "during", "after")
SEARCH_S = 420
REPORT = 4


class Searches:
    """Search files over one folder and one cluster, and the undisturbed searches."""

    def __init__(self, folder: Path, nodes: Nodes) -> None:
        self.folder, self.nodes = prepare_folder(folder), nodes
        self._whole: dict[str, Path] = {}

    def uri(self, name: str) -> Path:
        return self.folder / "runs" / name

    def start(
        self, name: str, tune: dict[str, Any], *, alone: bool = False
    ) -> contextlib.AbstractContextManager[Started]:
        """alone: on a Ray of its own, which ends with it."""
        job = write_job(search_of(self.folder, name, tune), self.folder / f"{name}.yaml")
        where = {} if alone else {"RAY_ADDRESS": self.nodes.address}
        return rayft("tune", str(job), log=self.folder / f"{name}.log", **where)

    def run_to_end(self, name: str, tune: dict[str, Any], *, alone: bool = False) -> Path:
        with self.start(name, tune, alone=alone) as search:
            assert search.wait(SEARCH_S) == 0, search.output()
        return self.uri(name)

    def whole(self, tune: dict[str, Any]) -> Path:
        """The search that nobody disturbed."""
        name = f"whole-{tune.get('scheduler', tune['searcher'])}"
        if name not in self._whole:
            self._whole[name] = self.run_to_end(name, tune)
        return self._whole[name]


@pytest.fixture(scope="module")
def searches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Searches]:
    with ray_nodes(2) as nodes:
        yield Searches(tmp_path_factory.mktemp("search"), nodes)


def at(uri: Path, trial: str, when: str) -> Callable[[], bool]:
    """Whether the trial is before, in or after its report of step `REPORT`."""
    log = open_store(uri / "trials" / f"{uri.name}-{trial}")

    def reported() -> bool:
        return any(row["trial"] == trial and row["step"] >= REPORT for row in rows_of(uri, "report"))

    def logged(kind: str, step: int) -> bool:
        return any(row["kind"] == kind and row["step"] >= step for row in read_log(log))

    return {
        "before": lambda: logged("step", REPORT - 1),
        "during": lambda: logged("eval", REPORT),
        "after": reported,
    }[when]


def processes(*names: str) -> list[psutil.Process]:
    """Live processes below this one, the cluster's among them, whose title has one of the names."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            title = " ".join(process.cmdline())
            if process.status() != psutil.STATUS_ZOMBIE and any(name in title for name in names):
                found.append(process)
    return found


def strike(what: str, search: Started, searches: Searches) -> None:
    """Kill it. A driver and everything are started again by the caller."""
    if what == "driver":
        os.kill(search.process.pid, signal.SIGKILL)
        search.process.wait(30)
    elif what == "told":
        search.process.send_signal(signal.SIGTERM)
        assert search.wait() == 8, search.output()
    elif what == "everything":
        search.kill_tree()
    elif what == "node":
        [held] = wait_until("a node with a worker", lambda: searches.nodes.holding("RayTrainWorker"), search)
        searches.nodes.take(held)
        searches.nodes.add_again()
    else:
        title = {"trial driver": "ResourceTrainable", "worker": "TrainWorker"}[what]
        found = wait_until(f"a {what}", lambda: processes(title), search)
        send(found[-1], signal.SIGKILL)


def disturb(searches: Searches, name: str, tune: dict[str, Any], blows: list[tuple[str, str, str]]) -> Path:
    """Run a search to its end under blows: what is hit, in which trial, and when."""
    uri = searches.uri(name)
    alone = any(what == "everything" for what, _, _ in blows)
    left = list(blows)
    while True:
        with searches.start(name, tune, alone=alone) as search:
            down = False
            while left and not down:
                what, trial, when = left.pop(0)
                wait_until(f"{trial} {when} a report", at(uri, trial, when), search, SEARCH_S)
                strike(what, search, searches)
                down = what in ("driver", "told", "everything")
            if not down:
                assert search.wait(SEARCH_S) == 0, search.output()
                return uri


def assert_same_search(uri: Path, whole: Path) -> None:
    """The same trials with the same ends and curves, the same best one, and none run twice."""
    own, undisturbed = trials_in(uri), trials_in(whole)
    assert {name: (trial.status, trial.values) for name, trial in own.items()} == {
        name: (trial.status, trial.values) for name, trial in undisturbed.items()
    }
    assert {name: curve_of(trial) for name, trial in own.items()} == {
        name: curve_of(trial) for name, trial in undisturbed.items()
    }
    assert (uri / "best.yaml").read_text().replace(uri.name, "") == (whole / "best.yaml").read_text().replace(
        whole.name, ""
    )
    for event in ("proposed", "segment", "ended"):
        rows = [row["trial"] for row in rows_of(uri, event)]
        assert sorted(rows) == sorted(own), f"{event}: {rows}"
    for trial in own.values():
        reported = [row["step"] for row in rows_of(uri, "report") if row["trial"] == trial.trial]
        assert sorted(set(reported)) == reported, f"{trial.trial} reported {reported}"
    assert sorted(path.name.removeprefix(uri.name) for path in (uri / "trials").iterdir()) == sorted(
        path.name.removeprefix(whole.name) for path in (whole / "trials").iterdir()
    )


def test_one_blow_of_each_kind_changes_nothing(searches: Searches) -> None:
    """ASHA; a worker before a report, a trial's driver after it, the worker's node before one, and the search's driver in it."""
    blows = [
        ("worker", "t0000", "before"),
        ("trial driver", "t0000", "after"),
        ("node", "t0001", "before"),
        ("driver", "t0001", "during"),
    ]
    assert_same_search(disturb(searches, "struck", ASHA, blows), searches.whole(ASHA))


def test_a_search_that_lost_everything_goes_on(searches: Searches) -> None:
    uri = disturb(searches, "dark", ASHA, [("everything", "t0001", "during")])
    assert_same_search(uri, searches.whole(ASHA))


@pytest.mark.full
@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("what", ["driver", "trial driver", "worker", "node", "everything", "told"])
def test_the_matrix(searches: Searches, what: str, when: str, kind: str) -> None:
    tune = KINDS[kind]
    name = f"{what}-{when}-{kind}".replace(" ", "-")
    assert_same_search(disturb(searches, name, tune, [(what, "t0001", when)]), searches.whole(tune))
