"""Local files of a rendered job on a real Ray: Ray fetches the zip, and every process finds the files by the job's paths."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rayft.fleet.render.files import pack, travelling
from rayft.spec import parse_job
from rayft.storage import open_store
from tests.fleets import profile
from tests.shared import ROOT
from tests.warm.start import as_usual

#: A driver, as the Ray job's is, and a task: both must read the file and import the reward function by the job's own path.
DRIVER = """
import sys, ray
ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20,
         runtime_env={"working_dir": sys.argv[1], "env_vars": {"PYTHONPATH": sys.argv[2]}})

@ray.remote
def look():
    import os
    from pathlib import Path
    from rayft.rlhf.rewards import load_function
    return Path("rows/a.jsonl").read_text(), load_function("reward.py:right")(), os.path.isabs(str(Path("rows").absolute()))

print(ray.get(look.remote(), timeout=120))
"""


@pytest.fixture(scope="module", autouse=True)
def _workers_as_usual() -> Iterator[None]:
    with as_usual():
        yield


@pytest.mark.slow
@pytest.mark.parametrize("where", [pytest.param("configmap", marks=pytest.mark.full), "s3"])
def test_ray_brings_the_files_to_every_process(
    where: str, tmp_path: Path, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "a.jsonl").write_text("row")
    (tmp_path / "reward.py").write_text("def right(): return 7\n")
    monkeypatch.chdir(tmp_path)
    job = parse_job(
        {
            "name": "x",
            "method": "grpo",
            "model": {"path": "org/model"},
            "data": {"train": [{"path": "rows/a.jsonl"}]},
            "rewards": [{"name": "right", "type": "function", "path": "reward.py:right"}],
        }
    )
    fleet = profile("cpu")
    if where == "s3":
        fleet = profile("gpu").model_copy(update={"storage": f"s3://{s3_bucket}/rayft"})
        job = job.model_copy(update={"cluster": job.cluster.model_copy(update={"gpus_per_worker": 0})})
    brought = pack(job, fleet)
    how = travelling(brought, fleet)
    assert how is not None
    if how.inline is not None:
        mounted = tmp_path / "files.zip"  # /etc/rayft/files.zip in a pod
        mounted.write_bytes(how.inline)
        working_dir = f"file://{mounted}"
    else:
        open_store(f"s3://{s3_bucket}/rayft/x").put(brought.key, brought.zipped())
        working_dir = how.working_dir
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    result = subprocess.run(
        [sys.executable, "-c", DRIVER, working_dir, str(ROOT)],
        cwd=elsewhere,
        env={**os.environ, "RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.strip() == "('row', 7, True)"
