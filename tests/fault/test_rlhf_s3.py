"""Runs that learn from rewards, in S3 whose storage is full for a while: nothing is lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from rayft.checkpoint import committed_steps
from rayft.storage import open_store
from tests.cluster.rewards import prepare_folder, rl_job
from tests.fault.test_rlhf_kill import facts
from tests.runs import assert_same_state, events, rayft, write_job
from tests.s3 import FaultyProxy

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def job_file(folder: Path, bucket: str, name: str) -> Path:
    job = rl_job(
        folder,
        "grpo",
        name=name,
        storage=f"s3://{bucket}/runs",
        rollout={"max_new_tokens": 12, "unit_prompts": 2, "engines": 1, "lag": 1},
        train={"max_steps": 6, "global_batch_size": 6, "learning_rate": 1e-3, "precision": "fp32"},
        checkpoint={"every_steps": 2},
    )
    return write_job(job, folder / f"{name}.yaml")


@pytest.mark.full
def test_full_storage_during_a_dump_ends_the_run_with_5_and_it_goes_on_later(
    tmp_path: Path, s3_bucket: str, s3_proxy: FaultyProxy
) -> None:
    folder = prepare_folder(tmp_path)
    path, uri = job_file(folder, s3_bucket, "full"), f"s3://{s3_bucket}/runs/full"
    s3_proxy.add("full", "PUT", "rollouts/step-000004")
    with rayft("run", str(path), log=tmp_path / "full.log") as run:
        assert run.wait() == 5, run.output()
        [sentence] = [line for line in run.output().splitlines() if line.startswith("rayft run:")]
        assert "rollouts/step-000004" in sentence
        assert "full" in sentence
        assert "Traceback" not in run.output()
    store = open_store(uri)
    assert committed_steps(store) == [2]
    end = events(store, "end")[-1]
    assert (end["code"], end["terminal"]) == (5, False)
    s3_proxy.clear()
    with rayft("run", str(path), log=tmp_path / "full.log") as run:
        assert run.wait() == 0, run.output()
    with rayft("run", str(job_file(folder, s3_bucket, "whole")), log=tmp_path / "whole.log") as run:
        assert run.wait() == 0, run.output()
    assert_same_state(uri, f"s3://{s3_bucket}/runs/whole")
    assert facts(uri) == facts(f"s3://{s3_bucket}/runs/whole")
