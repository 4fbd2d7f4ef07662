"""rayft's command as it runs where torch and what needs it are not installed."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.shared import ROOT

_BLOCKED = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "deepspeed", "transformers", "peft", "accelerate", "datasets"}:
            raise ModuleNotFoundError(f"{name} is blocked")
sys.meta_path.insert(0, Blocked())
from rayft.cli import main
sys.exit(main(sys.argv[1:]))
"""


def without_torch(
    *arguments: str, timeout_s: float = 120, **variables: str
) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, with these variables added to the environment."""
    return subprocess.run(
        [sys.executable, "-c", _BLOCKED, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
