"""What a rank's process starts with: tensors lie in huge pages where the kernel gives them to those who ask."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rayft.spec import Job, parse_job
from rayft.train.group import worker_environment

MODE = Path("/sys/kernel/mm/transparent_hugepage/enabled")

#: Prints how many bytes of a process with 64 MB of tensors lie in huge pages.
TENSORS = """
import torch
tensors = [torch.ones(1 << 20) for _ in range(16)]
rollup = open("/proc/self/smaps_rollup").read().split()
print(int(rollup[rollup.index("AnonHugePages:") + 1]) << 10)
"""

#: Most of the 64 MB.
MOST = 50 << 20


def job(**cluster: int) -> Job:
    return parse_job(
        {"name": "a", "model": {"path": "m"}, "data": {"train": [{"path": "r"}]}, "cluster": cluster}
    )


def in_huge_pages(environment: dict[str, str]) -> int:
    """Bytes of TENSORS' process in huge pages, in this process's environment and what is given."""
    done = subprocess.run(
        [sys.executable, "-c", TENSORS],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.fixture(autouse=True)
def _no_tunables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)


@pytest.mark.skipif(
    not MODE.exists() or "[madvise]" not in MODE.read_text(),
    reason=f"{MODE} is not madvise: what a process asks for makes no difference",
)
def test_tensors_lie_in_huge_pages_since_the_process_asks_for_them() -> None:
    environment = worker_environment(job(), stage=2)
    assert in_huge_pages(environment) > MOST
    assert in_huge_pages({**environment, "GLIBC_TUNABLES": ""}) < MOST


def test_where_memory_is_short_nothing_asks_for_huge_pages() -> None:
    assert "GLIBC_TUNABLES" not in worker_environment(job(), stage=3)


def test_the_allocator_of_gpu_ranks_is_left_alone() -> None:
    assert set(worker_environment(job(gpus_per_worker=1), stage=0)) == {
        "TOKENIZERS_PARALLELISM",
        "OMP_NUM_THREADS",
    }


def test_tunables_of_the_jobs_own_environment_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.tcache_count=0")
    assert "GLIBC_TUNABLES" not in worker_environment(job(), stage=2)
