"""The architecture, held by reading the code: rooms import only from lower layers, files stay short."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.shared import ROOT

PACKAGE = ROOT / "rayft"

LAYERS = {
    "errors": 0,
    "spec": 1,
    "storage": 2,
    "plan": 2,
    "data": 3,
    "checkpoint": 3,
    "report": 3,
    "model": 4,
    "generate": 5,
    "objectives": 5,
    "learner": 6,
    "evals": 6,
    "train": 7,
    "rlhf": 8,
    "tune": 9,
    "fleet": 9,
    "rate": 9,
    "cli": 10,
}

#: Rooms that may be imported where torch and its friends are not installed, or before they are wanted.
LIGHT = ["errors", "spec", "plan", "storage", "checkpoint", "report", "fleet", "cli"]
HEAVY = {"torch", "deepspeed", "transformers", "peft", "ray", "datasets", "boto3", "accelerate"}

MAX_LINES = 500
MAX_MEAN_LINES = 200


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(source: str, package: str) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of every import, inside functions too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*parents, *([node.module] if node.module else [])])
            yield node.lineno, module
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def broken_rules(path: Path, source: str) -> list[str]:
    """What a module of the package imports against the rules."""
    own = room(path)
    package = ".".join(path.relative_to(ROOT).parent.parts)
    found = set()
    for line, name in imports(source, package):
        top, _, rest = name.partition(".")
        other = rest.split(".")[0]
        where = f"{path.relative_to(ROOT)}:{line}"
        if top == "rayft" and other in LAYERS and other != own and LAYERS[other] >= LAYERS[own]:
            found.add(f"{where}: {own} (layer {LAYERS[own]}) imports {other} (layer {LAYERS[other]})")
        if top == "deepspeed" and own != "learner":
            found.add(f"{where}: {own} imports deepspeed, only learner may")
    return sorted(found)


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def test_rooms_import_only_from_lower_layers() -> None:
    unknown = {room(path) for path in modules()} - LAYERS.keys()
    assert not unknown, f"give these rooms a layer: {sorted(unknown)}"
    broken = [rule for path in modules() for rule in broken_rules(path, path.read_text())]
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("storage/s3.py", "from rayft.plan import memory"),
        ("spec/job.py", "def f():\n    import rayft.storage"),
        ("plan/gpus.py", "from rayft import report"),
        ("data/order.py", "from ..model import load"),
        ("train/loop.py", "import deepspeed.ops.adam"),
        ("errors.py", "from rayft.spec import Job"),
    ],
)
def test_the_check_finds(module: str, source: str) -> None:
    assert broken_rules(PACKAGE / module, source)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "storage/s3.py",
            "from rayft.storage.local import LocalStore\nfrom rayft.errors import StorageError",
        ),
        ("learner/engine.py", "import deepspeed"),
        ("train/loop.py", "from rayft.learner import Learner"),
        ("storage/s3.py", "from .retry import retry\nfrom rayft import __version__"),
    ],
)
def test_the_check_allows(module: str, source: str) -> None:
    assert not broken_rules(PACKAGE / module, source)


def test_files_are_short() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in ROOT.rglob("*.py") if not _outside(path)}
    long = [
        f"{path.relative_to(ROOT)}: {lines} lines" for path, lines in lengths.items() if lines > MAX_LINES
    ]
    assert not long, f"split what is over {MAX_LINES} lines: {long}"
    package = [lines for path, lines in lengths.items() if path.is_relative_to(PACKAGE)]
    assert sum(package) / len(package) < MAX_MEAN_LINES


def _outside(path: Path) -> bool:
    return any(part.startswith(".") or part in ("build", "dist") for part in path.relative_to(ROOT).parts)


@pytest.mark.parametrize(
    "name", [name for name in LIGHT if (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").exists()]
)
def test_light_rooms_import_nothing_heavy(name: str) -> None:
    """Every module of the room is imported in a fresh interpreter."""
    parts = [path.relative_to(ROOT).with_suffix("").parts for path in modules() if room(path) == name]
    names = [".".join(part for part in dotted if part != "__init__") for dotted in parts]
    program = (
        f"import importlib, sys\nfor name in {names!r}: importlib.import_module(name)\n"
        f"print(*sorted({HEAVY!r} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []
