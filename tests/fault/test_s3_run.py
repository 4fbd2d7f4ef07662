"""Whole runs against a real S3 server with a faulty proxy in front: nothing torn is loaded, and the end has its reason."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from rayft.checkpoint import committed_steps, latest
from rayft.storage import open_store
from tests.cluster.steps import prepare_folder, small_job
from tests.runs import assert_same_state, events, losses, rayft, wait_until, write_job
from tests.s3 import FaultyProxy

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

STEPS = 12


def job_file(folder: Path, bucket: str, name: str, kind: str = "sft", **checkpoint: object) -> Path:
    job = small_job(
        folder,
        kind,
        name=name,
        storage=f"s3://{bucket}/runs",
        train={"max_steps": STEPS},
        zero={"stage": 2},
        cluster={"num_workers": 2},
        checkpoint={"every_steps": 3, **checkpoint},
    )
    return write_job(job, folder / f"{name}.yaml")


@pytest.mark.parametrize(
    "kind", ["sft", *(pytest.param(kind, marks=pytest.mark.full) for kind in ("reward", "dpo", "kto"))]
)
def test_run_through_faults_and_a_kill_before_the_manifest(
    kind: str, tmp_path: Path, s3_bucket: str, s3_proxy: FaultyProxy
) -> None:
    """Passing faults are retried; killed between fragments and manifest, the run goes on from the checkpoint before."""
    folder = prepare_folder(tmp_path)
    for fault in ("slow_down", "reset", "truncated_response"):
        s3_proxy.add(fault, times=3)  # type: ignore[arg-type]
    with rayft("run", str(job_file(folder, s3_bucket, "whole", kind)), log=tmp_path / "whole.log") as run:
        assert run.wait() == 0, run.output()
    assert sum(s3_proxy.hits.values()) == 9
    s3_proxy.clear()

    path, uri = job_file(folder, s3_bucket, "killed", kind), f"s3://{s3_bucket}/runs/killed"
    s3_proxy.add("slow", "PUT", "step-6/manifest", seconds=60)
    with rayft("run", str(path), log=tmp_path / "killed.log") as run:
        wait_until("the manifest of step 6 to be under way", lambda: s3_proxy.hits.get("slow"), run)
        run.kill_tree()
    s3_proxy.clear()
    store = open_store(uri)
    assert latest(store) == 3
    assert any("step-6" in entry.key for entry in store.list("checkpoints"))
    with rayft("run", str(path), "--takeover", log=tmp_path / "killed.log") as run:
        assert run.wait() == 0, run.output()
    assert_same_state(uri, f"s3://{s3_bucket}/runs/whole")
    assert losses(store) == losses(open_store(f"s3://{s3_bucket}/runs/whole"))
    assert open_store(uri).exists("model/config.json")


def test_full_storage_ends_the_run_with_5_and_keeps_the_checkpoint_before(
    tmp_path: Path, s3_bucket: str, s3_proxy: FaultyProxy
) -> None:
    folder = prepare_folder(tmp_path)
    path, store = job_file(folder, s3_bucket, "full"), open_store(f"s3://{s3_bucket}/runs/full")
    s3_proxy.add("full", "PUT", "step-6/")
    with rayft("run", str(path), log=tmp_path / "full.log") as run:
        assert run.wait() == 5, run.output()
        assert "full" in run.output() or "space" in run.output()
    # The save that reports the failure of step 6 may itself still be committed while the run ends.
    assert set(committed_steps(store)) - {9} == {3}
    end = events(store, "end")[-1]
    assert (end["code"], end["terminal"]) == (5, False)


@pytest.mark.full
def test_failed_checkpoint_does_not_end_a_run_that_goes_on_until_it_is_asked_to_stop(
    tmp_path: Path, s3_bucket: str, s3_proxy: FaultyProxy
) -> None:
    """And what it saves when asked is committed before it ends, however slow the manifest is."""
    folder = prepare_folder(tmp_path)
    path = job_file(folder, s3_bucket, "goes-on", on_failure="continue", keep=4)
    store = open_store(f"s3://{s3_bucket}/runs/goes-on")
    s3_proxy.add("full", "PUT", "step-6/")
    with rayft("run", str(path), "train.max_steps=100000", log=tmp_path / "goes-on.log") as run:
        wait_until("step 9 to be committed", lambda: 9 in committed_steps(store), run)
        s3_proxy.add("slow", "PUT", "/manifest", seconds=8)
        run.process.send_signal(signal.SIGTERM)
        assert run.wait() == 8, run.output()
    s3_proxy.clear()
    assert 6 not in committed_steps(store)
    assert latest(store) == max(losses(store))
    assert any("checkpoint failed" in event["message"] for event in events(store, "failure"))
