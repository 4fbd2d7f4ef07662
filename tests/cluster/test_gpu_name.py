"""What nodes say of their GPUs, in a cluster that has some by its own word."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from rayft.spec import parse_job
from tests.nodes import ray_nodes
from tests.runs import ROOT, write_job
from tests.tiny import save_tiny

pytestmark = pytest.mark.slow

LOOK = """
import sys
from pathlib import Path

import ray

from rayft.model.files import job_files
from rayft.spec import load_job
from rayft.train.cluster import reported_gpu
from rayft.train.prepare import decide_stage

ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
job = load_job(sys.argv[2])
print(reported_gpu(), decide_stage(job, job_files(job, Path(sys.argv[3])))[0])
"""


def test_the_stage_is_chosen_for_the_gpu_that_nodes_report(tmp_path: Path) -> None:
    """No job has to name it."""
    cluster = {"num_workers": 2, "gpus_per_worker": 1}
    model = {"path": str(save_tiny(tmp_path / "model"))}
    job = parse_job({"name": "gpus", "model": model, "data": {"train": [{"path": "x"}]}, "cluster": cluster})
    path = write_job(job, tmp_path / "job.yaml")
    with ray_nodes(1) as nodes:
        nodes.add(num_gpus=8, resources={"accelerator_type:H200": 1})
        command = [sys.executable, "-c", LOOK, nodes.address, str(path), str(tmp_path)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["H200-141GB", "0"]
