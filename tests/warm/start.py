"""One zygote for the tests of a process: started by the first that asks, told to Ray by its hook for runtime environments."""

from __future__ import annotations

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
#: Libraries start no threads of their own, which a fork would lose.
SINGLE = {
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
}


def start() -> None:
    """Have Ray's workers forked in this process and in those it starts, unless RAYFT_TEST_FORK is 0."""
    if os.environ.get("RAYFT_TEST_FORK") == "0" or "RAYFT_TEST_ZYGOTE" in os.environ:
        return
    folder = tempfile.mkdtemp(prefix="rayft-zygote-")
    zygote = subprocess.Popen(
        [sys.executable, "-m", "tests.warm.zygote", folder],
        cwd=ROOT,
        env={**os.environ, **SINGLE},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert zygote.stdout is not None
    assert zygote.stdout.readline() == b"ready\n", "the zygote did not start"
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["RAYFT_TEST_ZYGOTE"] = folder
    os.environ["RAY_RUNTIME_ENV_HOOK"] = "tests.warm.start.hook"


@contextmanager
def as_usual() -> Iterator[None]:
    """Inside, Ray starts workers of new drivers itself: for drivers that run elsewhere than in this folder."""
    hook = os.environ.pop("RAY_RUNTIME_ENV_HOOK", None)
    try:
        yield
    finally:
        if hook is not None:
            os.environ["RAY_RUNTIME_ENV_HOOK"] = hook


def hook(runtime_env: dict[str, Any] | None) -> dict[str, Any]:
    """Called by `ray.init`."""
    client = f"{sys.executable} -I -S {Path(__file__).parent / 'client.py'}"
    return {**(runtime_env or {}), "py_executable": client}
