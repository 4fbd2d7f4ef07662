"""The verbs of a client need neither torch nor deepspeed, and `--help` imports next to nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.shared import ROOT

#: Any import of these ends the program, as where they are not installed; what asked for them is named.
BLOCK = """
import importlib.abc, sys, traceback
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "deepspeed", "transformers", "peft", "accelerate", "datasets", "trl"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
from rayft.cli import main
"""


def run(program: str, *arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {
        "PATH": "/usr/bin:/bin",
        "PYTHONPATH": str(ROOT),
        "HOME": str(cwd),
        "RAY_AUTH_MODE": "disabled",
    }
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
        timeout=120,
        check=False,
    )


def test_help_imports_neither_ray_nor_anything_heavy() -> None:
    heavy = {
        "ray",
        "torch",
        "deepspeed",
        "transformers",
        "pydantic",
        "numpy",
        "rich",
        "yaml",
        "requests",
        "boto3",
    }
    program = (
        "import contextlib, io, sys\nfrom rayft.cli import main\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit): main(['--help'])\n"
        f"print(*sorted({heavy!r} & set(sys.modules)))"
    )
    result = run(program)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--help"], 0, "submit"),
        (["schema"], 0, "properties"),
        (
            ["submit", "job.yaml", "--address", "http://127.0.0.1:9", "storage=/shared"],
            4,
            "No Ray cluster answers",
        ),
        (["list", "--address", "http://127.0.0.1:9"], 4, "No Ray cluster answers"),
        (["status", "a", "--address", "http://127.0.0.1:9"], 4, "No Ray cluster answers"),
        (["logs", "a", "--follow", "--address", "http://127.0.0.1:9"], 4, "No Ray cluster answers"),
        (["stop", "a", "--address", "http://127.0.0.1:9"], 4, "No Ray cluster answers"),
        (["resume", "a", "--address", "http://127.0.0.1:9"], 4, "No Ray cluster answers"),
        (["list"], 2, "No cluster is named"),
    ],
)
def test_client_verbs_run_without_torch(tmp_path: Path, arguments: list[str], code: int, words: str) -> None:
    (tmp_path / "job.yaml").write_text(
        "name: a\nmodel: {path: org/model}\ndata: {train: [{path: org/rows}]}\n"
    )
    result = run(BLOCK + "sys.exit(main(sys.argv[1:]))", *arguments, cwd=tmp_path)
    assert result.returncode == code, result.stderr
    assert words in result.stdout + result.stderr


def test_every_module_of_the_room_is_importable_without_torch() -> None:
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in sorted((ROOT / "rayft" / "fleet").rglob("*.py"))
    ]
    result = run(BLOCK + f"import importlib\nfor name in {names!r}: importlib.import_module(name)")
    assert result.returncode == 0, result.stderr


def test_the_block_blocks() -> None:
    assert "No module named 'torch'" in run(BLOCK + "import torch").stderr
