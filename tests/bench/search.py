"""What a search costs and what it saves.

    python -m tests.bench.search overhead          8 trials as a search, against the same 8 by `rayft run`, on one running cluster
    python -m tests.bench.search optimum           Optuna with ASHA against random without stopping, over 5 seeds

Overhead is CPU time of the whole machine (user and system), so nothing else should run; search and runs take turns, in pairs.

The optimum is that of one learning rate over seven decades for a tiny model: it is looked up first, by a grid of 29 rates, each a
run of its own. A search has found it when its best finished trial lies within a factor of 2 of it; what counts is how many
optimizer steps all its trials together had done by then. It is stopped there, or after as many trials as it may have. Steps are
counted and not timed, so Ray's workers are forked as in the tests.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from rayft.report.log import read_all
from rayft.spec import load_job
from rayft.storage import open_store
from tests.cluster.steps import prepare_folder
from tests.nodes import ray_nodes
from tests.runs import rayft, write_job
from tests.searches import RATE, search_of, trials_in
from tests.warm.start import start

TRIALS = 8
SEARCH_S = 3600
DECADES = (1e-6, 1e1)
GRID_POINTS = 29
WITHIN = 2.0
STEPS = 12


def cpu_seconds() -> float:
    """User and system time of the machine since it began."""
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system)


def command(verb: str, job: Path, log: Path, address: str) -> float:
    """CPU seconds of the machine for one command, to its end."""
    before = cpu_seconds()
    with rayft(verb, str(job), log=log, RAY_ADDRESS=address) as started:
        assert started.wait(SEARCH_S) == 0, started.output()
    return cpu_seconds() - before


def overhead(folder: Path, rounds: int) -> dict[str, Any]:
    """Medians over rounds of CPU seconds of a search and of its trials alone, and how often the data was prepared."""
    rates = [round(10 ** (-4 + number / 4), 9) for number in range(TRIALS)]
    tune = {"space": {RATE: {"grid": rates}}, "searcher": "grid", "max_concurrent": 1}
    searched, alone, prepared = [], [], []
    with ray_nodes(2) as nodes:
        for number in range(rounds):
            name = f"search-{number}"
            job = write_job(search_of(folder, name, tune), folder / f"{name}.yaml")
            searched.append(command("tune", job, folder / f"{name}.log", nodes.address))
            rows = read_all(open_store(folder / "runs" / name))
            prepared.append(sum(row.get("event") == "data" for row in rows))
            total = 0.0
            for trial in trials_in(folder / "runs" / name).values():
                own = load_job(folder / "runs" / name / "trials" / str(trial.run) / "job.yaml", [])
                # A data cache of their own, and once more what the search shares.
                data = own.data.model_copy(update={"cache": str(folder / f"cache-{number}")})
                lone = own.model_copy(update={"storage": str(folder / f"alone-{number}"), "data": data})
                path = write_job(lone, folder / f"{lone.name}.yaml")
                total += command("run", path, folder / f"{lone.name}.log", nodes.address)
            alone.append(total)
    return {
        "bench": "search overhead",
        "trials": TRIALS,
        "rounds": rounds,
        "search_cpu_s": round(statistics.median(searched), 1),
        "runs_cpu_s": round(statistics.median(alone), 1),
        "ratio": round(statistics.median(one / other for one, other in zip(searched, alone, strict=True)), 3),
        "data_prepared": prepared,
    }


def optimum(folder: Path, seeds: list[int], trials: int) -> dict[str, Any]:
    """Steps until the optimum is found, by seed: of random without stopping, and of Optuna with ASHA."""
    start()
    low, high = DECADES
    grid = [float(f"{low * (high / low) ** (n / (GRID_POINTS - 1)):.6g}") for n in range(GRID_POINTS)]
    ranged = {"space": {RATE: {"loguniform": [low, high]}}, "num_trials": trials}
    kinds = {
        "random": {**ranged, "searcher": "random"},
        "optuna, asha": {**ranged, "searcher": "optuna", "scheduler": "asha"},
    }
    steps: dict[str, list[int]] = {kind: [] for kind in kinds}
    missed = dict.fromkeys(kinds, 0)
    with ray_nodes(2) as nodes:

        def run(name: str, tune: dict[str, Any], seed: int, best: float | None = None) -> Path:
            """To the end, or until the optimum is found."""
            job = search_of(folder, name, tune, seed=seed, train={"max_steps": STEPS, "warmup_steps": 0})
            path, uri = write_job(job, folder / f"{name}.yaml"), folder / "runs" / name
            with rayft("tune", str(path), log=folder / f"{name}.log", RAY_ADDRESS=nodes.address) as started:
                while started.process.poll() is None:
                    time.sleep(1)
                    if best is not None and (uri / "log.jsonl").exists() and steps_to(uri, best)[1]:
                        started.process.send_signal(signal.SIGTERM)
                        break
                assert started.wait(SEARCH_S) in (0, 8), started.output()
            return uri

        looked_up = trials_in(run("grid", {"space": {RATE: {"grid": grid}}, "searcher": "grid"}, 0))
        losses = {
            t.values[RATE]: t.points("eval.loss")[-1][1] for t in looked_up.values() if t.status == "done"
        }
        best = min(losses, key=lambda rate: losses[rate])
        print(
            json.dumps(
                {"optimum": best, "losses": {f"{rate:.2g}": round(loss, 3) for rate, loss in losses.items()}}
            ),
            flush=True,
        )
        for seed in seeds:
            for kind, tune in kinds.items():
                uri = run(f"{kind.replace(', ', '-')}-{seed}", tune, seed, best)
                taken, found = steps_to(uri, best)
                steps[kind].append(taken)
                missed[kind] += not found
                begun = len(trials_in(uri))
                row = {"seed": seed, "search": kind, "steps": taken, "trials": begun, "found": found}
                print(json.dumps(row), flush=True)
    sums = {kind: sum(values) for kind, values in steps.items()}
    return {
        "bench": "search optimum",
        "seeds": seeds,
        "trials": trials,
        "within a factor": WITHIN,
        "optimum": best,
        "steps": steps,
        "not found": missed,
        "fewer": round(1 - sums["optuna, asha"] / sums["random"], 3),
    }


def steps_to(uri: Path, best: float) -> tuple[int, bool]:
    """Steps of all trials of a search until its best finished one lies near the optimum, and whether one ever did."""
    done: dict[str, int] = {}
    leader: tuple[float, float] | None = None
    trials = trials_in(uri)
    last: dict[str, float] = {}
    for row in read_all(open_store(uri)):
        if row["kind"] != "trial":
            continue
        trial = row["trial"]
        if row["event"] == "report":
            done[trial] = max(done.get(trial, 0), row["step"])
            loss = row["metrics"].get("eval.loss")
            if loss is not None:
                last[trial] = loss
        elif row["event"] == "ended" and row["status"] == "done" and trial in last:
            found = (last[trial], trials[trial].values[RATE])
            leader = found if leader is None else min(leader, found)
            if max(leader[1] / best, best / leader[1]) <= WITHIN:
                return sum(done.values()), True
    return sum(done.values()), False


def main() -> None:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("what", choices=["overhead", "optimum"])
    arguments.add_argument("--rounds", type=int, default=2)
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    arguments.add_argument("--trials", type=int, default=40)
    arguments.add_argument("--folder", type=Path)
    given = arguments.parse_args()
    folder = prepare_folder(given.folder or Path(tempfile.mkdtemp(prefix="search-")))
    found = (
        overhead(folder, given.rounds)
        if given.what == "overhead"
        else optimum(folder, given.seeds, given.trials)
    )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
