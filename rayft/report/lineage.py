"""`lineage.json`: what a run was made from and with - hashes of data, template and model; versions, code, hardware.

Every start under other circumstances than the last (new versions, another machine) adds an entry to `starts`.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from rayft.storage import ObjectNotFound, Store

LINEAGE_KEY = "lineage.json"

PACKAGES = (
    "rayft",
    "ray",
    "torch",
    "deepspeed",
    "transformers",
    "tokenizers",
    "peft",
    "datasets",
    "safetensors",
    "numpy",
    "bitsandbytes",
    "vllm",
)


def write_lineage(store: Store, origin: dict[str, Any]) -> None:
    """Write or extend `lineage.json`. origin: hashes and names of data, template and model, as the caller knows them."""
    starts = (read_lineage(store) or {}).get("starts", [])
    now = circumstances()
    if not starts or {**starts[-1], "time": None} != {**now, "time": None}:
        starts.append(now)
    store.put(LINEAGE_KEY, json.dumps({**origin, "starts": starts}, indent=1).encode())


def read_lineage(store: Store) -> dict[str, Any] | None:
    """What `write_lineage` wrote; None where there is none."""
    try:
        return json.loads(store.get(LINEAGE_KEY))
    except ObjectNotFound:
        return None


def circumstances() -> dict[str, Any]:
    """This process's versions, code and machine."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "python": platform.python_version(),
        "git": git_state(Path.cwd()),
        "hardware": hardware(),
    }


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit of the repository around `folder` and whether files differ from it; None outside of one."""
    commit = _output(["git", "-C", str(folder), "rev-parse", "HEAD"])
    if not commit:
        return None
    return {"commit": commit, "dirty": bool(_output(["git", "-C", str(folder), "status", "--porcelain"]))}


def hardware() -> dict[str, Any]:
    """CPU, memory in GB (1e9 bytes) and GPUs of this machine."""
    import psutil

    gpus = _output(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"])
    return {
        "host": platform.node(),
        "cpu": _cpu_name(),
        "cpus": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "gpus": gpus.splitlines(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _output(command: list[str]) -> str:
    """What a command prints; nothing where it does not exist or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
