"""Submit a manifest: local files to storage, then everything to the cluster by kubectl."""

from __future__ import annotations

import json
import shutil
import subprocess
from typing import Any

from rayft.errors import JobError, ResourceError, StorageError
from rayft.fleet.render.files import Packed
from rayft.fleet.render.pods import Object
from rayft.spec.profile import Profile
from rayft.storage import open_store

TIMEOUT_S = 120
#: States in which KubeRay has done with a RayJob (rayjob_types.go).
ENDED = ("Complete", "Failed", "ValidationFailed")


def apply(text: str, rayjob: Object, packed: Packed, profile: Profile) -> list[str]:
    """Upload and submit; says what was done. A RayJob of that name that has ended is replaced, so that the run goes on.

    Raises JobError without kubectl and for a run that is under way, ResourceError where the cluster refuses, StorageError.
    """
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        raise JobError(
            "There is no kubectl here to submit with.",
            "Install it, or write the manifest with --out and let someone apply it who has it.",
        )
    said = []
    name = rayjob["metadata"]["name"]
    where = [kubectl, "--namespace", profile.namespace]
    ended = refuse_under_way(where, name)
    if packed.files and profile.in_s3:
        said.append(upload(packed))
    if ended:
        _run(
            [*where, "delete", "rayjob", name, "--wait=true", f"--timeout={TIMEOUT_S}s"],
            f"Deleting the ended RayJob {name}",
        )
        said.append(f"The RayJob {name} of an earlier submission ({ended}) is replaced; the run goes on.")
    # By the server: kubectl's own way keeps a copy of each object in an annotation, which holds a quarter of a ConfigMap.
    command = [*where, "apply", "--server-side", "--force-conflicts", "-f", "-"]
    said.append(_run(command, "Submitting the manifest", text).strip())
    return said


def refuse_under_way(where: list[str], name: str) -> str:
    """The state of an ended RayJob of that name, or nothing where there is none. Raises JobError for one that is under way."""
    found = _run(
        [*where, "get", "rayjob", name, "--ignore-not-found", "-o", "json"], f"Looking for the RayJob {name}"
    )
    if not found.strip():
        return ""
    status: Any = json.loads(found).get("status") or {}
    state = str(status.get("jobDeploymentStatus") or "New")
    if state not in ENDED:
        raise JobError(
            f"The RayJob {name} is under way ({state}).",
            f"Wait for it, or end it with `kubectl -n {where[-1]} delete rayjob {name}`; the run can go on afterwards.",
        )
    return state


def upload(packed: Packed) -> str:
    """Put the zip of local files into the run folder, once. Raises StorageError."""
    store, key = open_store(packed.job.storage).child(packed.job.name), packed.key
    if store.exists(key):
        return f"{store.where(key)} is there already."
    try:
        store.put(key, packed.zipped())
    except StorageError as error:
        raise StorageError(
            f"The job's local files could not be put on storage: {error.message}", error.remedy
        ) from error
    return f"The local files ({len(packed.files)}) are at {store.where(key)}."


def _run(command: list[str], doing: str, text: str | None = None) -> str:
    try:
        done = subprocess.run(
            command, input=text, capture_output=True, text=True, timeout=TIMEOUT_S + 30, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ResourceError(f"{doing} failed: {type(error).__name__}.", "Is the cluster reachable?") from None
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ResourceError(
            f"{doing} failed: {reason}", "Check `kubectl config current-context` and your rights there."
        )
    return done.stdout
