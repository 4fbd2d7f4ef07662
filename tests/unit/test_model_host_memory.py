"""Freed memory stays in the process: asked of the kernel, in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

_PROGRAM = """
import numpy as np, resource, sys
from rayft.model.host_memory import keep_freed_memory
if sys.argv[1] == "keep" and not keep_freed_memory():
    print("unsupported")
    raise SystemExit
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(8_000_000)  # 64 MB, touched and freed
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


def page_faults(mode: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, mode], capture_output=True, text=True, timeout=120, check=True
    )
    if "unsupported" in done.stdout:
        pytest.skip("this C library has no mallopt")
    return int(done.stdout)


def test_big_arrays_are_not_mapped_again() -> None:
    assert page_faults("keep") < page_faults("default") / 10
