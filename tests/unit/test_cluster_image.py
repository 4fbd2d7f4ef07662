"""The image: a linter reads its Dockerfile, and its install commands run in a fresh virtual environment."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rayft import __version__
from rayft.spec.profile import load_profile
from tests.shared import ROOT

DOCKERFILE = ROOT / "cluster" / "Dockerfile"
INSTALL_TIMEOUT_S = 1500


def stages() -> dict[str, list[tuple[str, str]]]:
    """Instructions of each stage, continuation lines joined, comments left out."""
    text = re.sub(r"(?m)^#.*\n", "", DOCKERFILE.read_text())
    found: dict[str, list[tuple[str, str]]] = {"": []}
    stage = ""
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        if not line.strip():
            continue
        word, _, rest = line.partition(" ")
        if word == "FROM":
            stage = rest.split()[-1]
            found[stage] = [("FROM", rest.split()[0])]
        else:
            found[stage].append((word, rest))
    return found


#: Beside the interpreter, which need not be on the PATH.
HADOLINT = str(Path(sys.executable).parent / "hadolint")


def test_linter_finds_nothing() -> None:
    result = subprocess.run(
        [HADOLINT, "--no-color", "--failure-threshold", "warning", str(DOCKERFILE)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_linter_would_find_something(tmp_path: Path) -> None:
    bad = tmp_path / "Dockerfile"
    bad.write_text(DOCKERFILE.read_text().replace(":3.11.14-slim-bookworm", ":latest"))
    result = subprocess.run(
        [HADOLINT, "--no-color", "--failure-threshold", "warning", str(bad)],
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 1


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_target_is_not_root_and_pinned(target: str) -> None:
    instructions = stages()[target]
    assert [rest for word, rest in instructions if word == "USER"][-1] == "1000:1000"
    assert not [word for word, _ in instructions if word == "ADD"]
    copied = {name for word, rest in instructions if word == "COPY" for name in rest.split()[:-1]}
    assert copied == {"constraints.txt", "pyproject.toml", "README.md", "LICENSE", "rayft"}
    for word, rest in instructions:
        if word == "RUN" and "pip install" in rest:
            unpinned = [
                name for name in rest.split("install")[1].split() if name[0].isalpha() and "==" not in name
            ]
            assert "--constraint constraints.txt" in rest or not unpinned, rest


def test_versions_are_those_that_are_tested() -> None:
    """Images of the profiles are named by versions that are the package's own; the linter of manifests goes by the tag."""
    ray = re.search(r"(?m)^ray==(.*)$", (ROOT / "constraints.txt").read_text())
    assert ray is not None
    for name in ("cpu", "gpu", "aws-spot"):
        profile = load_profile(ROOT / "cluster" / "profiles" / f"{name}.yaml")
        assert profile.ray_version == ray[1]
        assert f":{__version__}-ray{ray[1]}-" in profile.image
        assert profile.user_id == 1000
    assert f"rayft:{__version__}-ray{ray[1]}-gpu" in DOCKERFILE.read_text()


def test_context_lets_in_only_code() -> None:
    lines = [
        line
        for line in (ROOT / "cluster" / "Dockerfile.dockerignore").read_text().splitlines()
        if line[:1] != "#"
    ]
    assert lines[0] == "*"
    assert {line[1:] for line in lines if line.startswith("!")} == {
        "constraints.txt",
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "rayft",
    }
    # And the package itself holds neither weights nor rows.
    suffixes = {
        path.suffix
        for path in (ROOT / "rayft").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert suffixes <= {".py", ".css", ".js", ".html"}


def default(stage: str, argument: str) -> str:
    """What a build argument of a stage is where nobody gives another."""
    [found] = [rest for word, rest in stages()[stage] if word == "ARG" and rest.startswith(f"{argument}=")]
    return found.partition("=")[2]


@pytest.mark.full
@pytest.mark.timeout(INSTALL_TIMEOUT_S + 60)
def test_install_commands_of_the_cpu_image_run(tmp_path: Path) -> None:
    """In a fresh environment, in order, in a folder that holds what COPY brought. torch comes from this machine's own index."""
    environment = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True, timeout=120)
    source = tmp_path / "src"
    source.mkdir()
    shell_environment = {
        **{name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")},
        "PATH": f"{environment / 'bin'}:{os.environ['PATH']}",
        "TORCH_INDEX": "",
        "EXTRAS": default("cpu", "EXTRAS"),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    ran = 0
    for word, rest in stages()["cpu"]:
        if word == "COPY":
            *names, _ = rest.split()
            for name in names:
                if (ROOT / name).is_dir():
                    shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(ROOT / name, source / name)
        if word == "RUN" and rest.startswith(("pip ", "rayft ")):
            result = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", rest.replace("--no-cache-dir ", "")],
                cwd=source,
                env=shell_environment,
                capture_output=True,
                text=True,
                timeout=INSTALL_TIMEOUT_S,
                check=False,
            )
            assert result.returncode == 0, f"{rest}\n{result.stdout[-2000:]}\n{result.stderr[-2000:]}"
            ran += 1
    assert ran == 4
    shutil.rmtree(source / "rayft")
    check = "import rayft, smart_open, deepspeed, torch; print(rayft.__version__, rayft.__file__)"
    result = subprocess.run(
        [str(environment / "bin" / "python"), "-c", check],
        cwd=source,
        env=shell_environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[0:1] == [__version__] or __version__ in result.stdout
    assert str(environment) in result.stdout


def test_vm_cluster_is_one_that_ray_takes() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    text = (ROOT / "cluster" / "aws.yaml").read_text()
    config = yaml.safe_load(text)
    validate_config(prepare_config(config))
    types = config["available_node_types"]
    assert types[config["head_node_type"]]["resources"] == {"CPU": 0, "GPU": 0}
    assert "--dashboard-host=127.0.0.1" in text
    assert "RAY_AUTH_MODE=token" in text
    assert config["rsync_exclude"][:2] == [".git", ".venv"]
