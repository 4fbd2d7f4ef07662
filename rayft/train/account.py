"""What a run log tells `rayft usage`: whose run it is, and what it holds of the cluster."""

from __future__ import annotations

import getpass
import os

from rayft.spec import Job
from rayft.train.cluster import worker_resources
from rayft.train.submitted import metadata_of_submission


def owner_of_run() -> dict[str, str]:
    """`user` and `team`: of RAYFT_USER and RAYFT_TEAM, else of the submitted job's metadata, else the account's name and no team."""
    metadata = metadata_of_submission()
    user = os.environ.get("RAYFT_USER") or metadata.get("user") or _account()
    return {"user": str(user), "team": str(os.environ.get("RAYFT_TEAM") or metadata.get("team") or "")}


def devices_of(job: Job, workers: int) -> dict[str, float]:
    """What so many workers hold, as Ray resources."""
    return {name: amount * workers for name, amount in worker_resources(job.cluster).items()}


def placing_s() -> float | None:
    """Seconds until the placement group that this worker is in had its room, as Ray measured; None where it does not say."""
    import ray
    from ray.util.placement_group import get_current_placement_group

    try:
        group = get_current_placement_group()
        stats = ray.util.placement_group_table(group)["stats"]
        return max(0.0, float(stats["end_to_end_creation_latency_ms"]) / 1000)
    except Exception:  # an account is not worth a run
        return None


def _account() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's number without a name
        return str(os.getuid())
