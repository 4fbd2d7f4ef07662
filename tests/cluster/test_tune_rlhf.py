"""Searches over jobs that learn from rewards."""

from __future__ import annotations

from pathlib import Path

import pytest

from rayft.cli import main
from rayft.report.log import read_log
from rayft.spec import load_job
from rayft.storage import open_store
from tests.cluster.rewards import prepare_folder, rl_job
from tests.runs import write_job
from tests.searches import curve_of, trials_in

pytestmark = [pytest.mark.slow, pytest.mark.full, pytest.mark.timeout(1200)]


@pytest.mark.parametrize("method", ["grpo", "ppo"])
def test_a_search_over_a_method_that_learns_from_rewards(
    method: str, tmp_path: Path, local_ray: None
) -> None:
    """Where the second trial scores less on held-out prompts at its first report than the first one did it is stopped there."""
    folder = prepare_folder(tmp_path)
    prompts = {"path": str(folder / "prompts.jsonl")}
    job = rl_job(
        folder,
        method,
        name="search",
        data={"train": [prompts], "eval": [{**prompts, "limit": 4}]},
        eval={"every_steps": 2},
        cluster={"num_workers": 1},
        tune={
            "space": {
                "train.learning_rate": {"grid": [1e-2, 1e-7]},
                "rl.kl_coef": {"choice": [0.0, 0.01] if method == "grpo" else [0.01, 0.02]},
            },
            "metric": "eval.score",
            "mode": "max",
            "scheduler": "asha",
            "reduction_factor": 2,
            "max_concurrent": 1,
        },
    )
    assert main(["tune", str(write_job(job, folder / "search.yaml"))]) == 0
    uri = folder / "runs" / "search"
    trials = trials_in(uri)
    assert trials["t0000"].status == "done"
    assert [step for step, _ in curve_of(trials["t0000"], "eval.score")] == [2, 4]
    (_, whole), (_, other) = (curve_of(trials[name], "eval.score")[0] for name in ("t0000", "t0001"))
    assert trials["t0001"].status == ("stopped" if other < whole else "done")
    begun: dict[bool, list[tuple[dict[str, float], bool]]] = {}
    for name, trial in trials.items():
        log = read_log(open_store(uri / "trials" / f"search-{name}"))
        measured = {row["step"]: row["metrics"]["score"] for row in log if row["kind"] == "eval"}
        assert all(measured[step] == value for step, value in curve_of(trial, "eval.score"))
        own = load_job(uri / "trials" / f"search-{name}" / "job.yaml", [])
        first = next(row for row in log if row["kind"] == "eval")
        begun.setdefault(own.reference is not None, []).append((first["metrics"], "took_s" in first))
    # Where all trials measure the same before training, with or without a reference, one does it for them.
    for metrics, itself in (zip(*own, strict=True) for own in begun.values()):
        assert all(one == metrics[0] for one in metrics)
        assert sum(itself) == 1
    best = load_job(uri / "best.yaml", [])
    assert (best.method, best.tune) == (method, None)
    assert (uri / "model" / "config.json").exists()
