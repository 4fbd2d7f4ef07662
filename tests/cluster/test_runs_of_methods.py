"""Short runs of every method through Ray Train, from the job file to the exported model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rayft.cli import main
from rayft.report.log import read_log
from rayft.report.usage_table import collect
from rayft.storage import open_store
from tests.cluster.steps import prepare_folder, small_job
from tests.runs import read_json, write_job

pytestmark = pytest.mark.slow

LORA = {"type": "lora", "lora_r": 4}
#: Method -> adapter, ZeRO stage, and what its log must show.
CELLS: dict[str, tuple[dict[str, Any], int, set[str]]] = {
    "kto": ({}, 3, {"kl", "good_reward", "bad_reward"}),
    "dpo": (LORA, 2, {"accuracy", "margin", "chosen_reward", "rejected_reward", "nll"}),
    "reward_ranked": (LORA, 3, {"accuracy", "margin", "mean_score", "disagreement"}),
    "simpo": ({}, 0, {"accuracy", "margin"}),
    "reward_labels": ({}, 1, {"accuracy", "margin", "mean_score"}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_folder(tmp_path_factory.mktemp("methods"))


@pytest.mark.parametrize(
    "kind", [*list(CELLS)[:2], *(pytest.param(kind, marks=pytest.mark.full) for kind in list(CELLS)[2:])]
)
def test_a_run_trains_evaluates_and_exports(kind: str, folder: Path, local_ray: None) -> None:
    adapter, stage, shown = CELLS[kind]
    name = kind.replace("_", "-")
    rows = str(small_job(folder, kind).data.train[0].path)
    suite = {"name": "same rows", "type": "preference", "path": rows, "limit": 12}
    job = small_job(
        folder,
        kind,
        name=name,
        adapter=adapter,
        data={"train": [{"path": rows}], "eval": [{"path": rows, "limit": 20}], "max_length": 256},
        train={"max_steps": 6, "global_batch_size": 8, "learning_rate": 3e-3},
        zero={"stage": stage},
        cluster={"num_workers": 2},
        eval={"every_steps": 3, "suites": [suite]},
    )
    assert main(["run", str(write_job(job, folder / f"{name}.yaml"))]) == 0
    run = folder / "runs" / name
    log = read_log(open_store(run))
    steps, evals = ([row for row in log if row["kind"] == what] for what in ("step", "eval"))
    assert [row["step"] for row in evals] == [3, 6]
    [used] = collect([str(run)])
    assert used.parts["evaluation"] >= 10_000 * 2 * sum(1000 * row["took_s"] for row in evals) * 0.99
    assert sum(used.parts.values()) == 10_000 * 2 * used.wall_ms
    for row in (*steps, *evals):
        assert shown <= row["metrics"].keys()
    assert all(row["rows"] == 20 for row in evals)
    assert evals[-1]["loss"] < evals[0]["loss"]
    before, after = (read_json(run / f"suites-{when}.json")["same rows"] for when in ("before", "after"))
    assert before["rows"] == after["rows"] == 12
    assert before != after
    kind_of_model: Any = (
        AutoModelForSequenceClassification if job.method == "reward" else AutoModelForCausalLM
    )
    if not adapter:
        model = kind_of_model.from_pretrained(run / "model", dtype=torch.float32)
        assert type(model).__name__ in read_json(run / "model" / "config.json")["architectures"]
    else:
        assert (run / "model" / "adapter_model.safetensors").exists()
    assert (run / "report.html").stat().st_size > 10_000
