"""What a job that learns from rewards comes to, over seeds: `python -m tests.bench.learning jobs/grpo.yaml --seeds 0 1 2`.

Runs the job once a seed (`rayft run`, as a user does), and keeps the curves of its held-out prompts and of its steps as
`tests/bench/curves/NAME.json`, seed by seed: seeds of the same job file that are there already stay, so that they can be run one
at a time. Prints one line a seed, and the mean over seeds with its standard error.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import yaml

from rayft.report.log import read_log
from rayft.spec import load_job
from rayft.storage import open_store

ROOT = Path(__file__).resolve().parents[2]
CURVES = Path(__file__).parent / "curves"


def run(job: Path, seed: int, overrides: list[str]) -> dict[str, Any]:
    """The run of one seed, and its curves; a run that is done already is read only."""
    name = f"{load_job(job).name}-seed{seed}"
    command = [sys.executable, "-m", "rayft.cli", "run", str(job), f"name={name}", f"seed={seed}", *overrides]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "RAY_AUTH_MODE": "disabled"}, check=True)
    store = open_store(load_job(job).storage).child(name)
    log = read_log(store)
    held_out = [{"step": row["step"], **row["metrics"]} for row in log if row["kind"] == "eval"]
    shown = ("score", "length", "truncated", "kl", "uniform_groups")
    steps = [
        {"step": row["step"], **{key: row["metrics"][key] for key in shown if key in row["metrics"]}}
        for row in log
        if row["kind"] == "step"
    ]
    suites = {when: json.loads(store.get(f"suites-{when}.json")) for when in ("before", "after")}
    end = [row for row in log if row["kind"] == "step"]
    return {
        "seed": seed,
        "held_out": held_out,
        "steps": steps,
        "suites": suites,
        "minutes": round((end[-1]["time"] - end[0]["time"]) / 60, 1),
    }


def before(path: Path, measured: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """The seeds that were measured already, of this very job."""
    if not path.exists():
        return {}
    there = json.loads(path.read_text())
    same = all(there.get(key) == value for key, value in measured.items())
    return {one["seed"]: one for one in there["seeds"]} if same else {}


def line(found: dict[str, Any]) -> str:
    """Start and end of one seed's held-out curve."""
    first, last = found["held_out"][0], found["held_out"][-1]
    parts = [f"seed {found['seed']}: score {first['score']:.3f} -> {last['score']:.3f}"]
    parts += [f"(deviation at the start {first['score_std']:.3f})"]
    parts += [f"{key} {last[key]:.3f}" for key in last if key.startswith("win_rate/") or key == "kl"]
    parts += [f"length {first['length']:.1f} -> {last['length']:.1f}", f"{found['minutes']} minutes"]
    return ", ".join(parts)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.learning", description=__doc__)
    parser.add_argument("job", type=Path)
    parser.add_argument("overrides", nargs="*", help="group.key=value, as for rayft run")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    arguments = parser.parse_args(argv)
    measured = {
        "job": str(arguments.job),
        "settings": yaml.safe_load(arguments.job.read_text()),
        "overrides": arguments.overrides,
    }
    path = CURVES / f"{arguments.job.stem}.json"
    by_seed = before(path, measured)
    for seed in arguments.seeds:
        by_seed[seed] = run(arguments.job, seed, arguments.overrides)
        found = [by_seed[seed] for seed in sorted(by_seed)]
        path.write_text(json.dumps({**measured, "seeds": found}, indent=1) + "\n")
    for one in found:
        print(line(one))
    rises = [one["held_out"][-1]["score"] - one["held_out"][0]["score"] for one in found]
    if len(rises) > 1:
        print(f"rise {mean(rises):.3f} ± {stdev(rises) / len(rises) ** 0.5:.3f}")


if __name__ == "__main__":
    main()
