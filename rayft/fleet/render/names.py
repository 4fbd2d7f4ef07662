"""Names of objects from names of runs: what KubeRay and Kubernetes take, the same for the same run, never for two."""

from __future__ import annotations

import hashlib
import re

#: KubeRay makes pod and service names from it and refuses longer ones (validation.go, MaxRayJobNameLength).
LONGEST = 47
_HASH = 6


def rayjob_name(run: str) -> str:
    """The RayJob's name (DNS-1035, at most 47): the run's where that will do, else as much of it as fits and a hash of it all."""
    name = re.sub(r"[^a-z0-9]+", "-", run.lower()).strip("-")
    if not name or not name[0].isalpha():
        name = f"r-{name}".rstrip("-")
    if name == run and len(name) <= LONGEST:
        return name
    digest = hashlib.sha256(run.encode()).hexdigest()[:_HASH]
    return f"{name[: LONGEST - _HASH - 1].rstrip('-')}-{digest}"
