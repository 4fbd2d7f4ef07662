"""Epochs of which nobody knows the number of steps yet: training starts, drops what is too long, and ends with the rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from rayft.cli import main
from rayft.learner.schedule import learning_rate
from rayft.report.log import read_log
from rayft.storage import open_store
from tests.cluster.steps import prepare_folder, small_job

pytestmark = pytest.mark.slow

LONG = {"messages": [{"role": "user", "content": "x" * 400}, {"role": "assistant", "content": "y"}]}


def test_dropped_rows_make_fewer_steps_and_the_schedule_still_ends(
    tmp_path: Path, local_ray: None, capfd: pytest.CaptureFixture[str]
) -> None:
    """Two epochs of 48 rows of which 12 are too long, in 24 shards: 72 rows, read once per epoch, in 9 steps, not 12."""
    folder = prepare_folder(tmp_path)
    rows = (folder / "rows.jsonl").read_text().splitlines()
    for number in range(0, 48, 4):
        rows[number] = json.dumps(LONG)
    (folder / "rows.jsonl").write_text("\n".join(rows) + "\n")
    job = small_job(
        folder,
        name="epochs",
        data={"train": [{"path": str(folder / "rows.jsonl")}], "max_length": 256, "shard_rows": 2},
        train={"max_steps": None, "num_train_epochs": 2},
    )
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(job.model_dump(mode="json")))
    assert main(["run", str(path)]) == 0, capfd.readouterr().err
    assert "shards are prepared while training runs" in " ".join(capfd.readouterr().out.split())
    steps = [row for row in read_log(open_store(folder / "runs" / "epochs")) if row["kind"] == "step"]
    assert [row["rows"] for row in steps] == [8] * 9
    assert all(row["position"] <= 96 for row in steps)
    starts = [0, *(row["position"] for row in steps[:-1])]
    assert [row["learning_rate"] for row in steps] == [learning_rate(job.train, at / 8, 12) for at in starts]
    assert steps[-1]["learning_rate"] < 0.15 * job.train.learning_rate
    assert main(["run", str(path)]) == 0
    assert "is done" in capfd.readouterr().out
