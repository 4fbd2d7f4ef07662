"""Whether a checkpoint fits the time that a node which is taken away has: by the run's own log, else by an estimate."""

from __future__ import annotations

from rayft.errors import RayftError, ResourceError
from rayft.fleet.outcome import RunFolder
from rayft.fleet.render.model import architecture_of_model, scorers_of
from rayft.fleet.render.size import size
from rayft.plan.checkpoint import SaveTime, measured
from rayft.spec import Job
from rayft.spec.profile import Profile


def saving_line(saving: SaveTime | None, profile: Profile) -> str:
    """What people should know. Raises ResourceError where the time is known, does not fit, and the profile refuses that."""
    if saving is None:
        return (
            f"Whether a checkpoint fits the {profile.grace.worker_drain_s} s that a node which is taken away has is not known: "
            "the run has saved none yet, and its model could not be looked at from here."
        )
    if saving.fits:
        return saving.sentence()
    if profile.checkpoint.too_slow == "warn":
        return f"Warning: {saving.sentence()}"
    raise ResourceError(
        f"{saving.sentence()} A run that is evicted would lose what it did since its last checkpoint (profile {profile.name}).",
        "Use more nodes or an adapter, or have the platform team raise grace, checkpoint.node_mb_per_s or set "
        "checkpoint.too_slow to warn.",
    )


def measured_saving(job: Job, profile: Profile) -> SaveTime | None:
    """By the log of the run, where it has saved before and its storage can be read from here."""
    rows = RunFolder(f"{job.storage.rstrip('/')}/{job.name}").rows()
    return measured(rows or [], profile.grace.worker_drain_s)


def saving_on(job: Job, profile: Profile) -> SaveTime | None:
    """Of a run on a standing cluster with nodes as the profile has them; None where nothing is known."""
    found = measured_saving(job, profile)
    if found is not None:
        return found
    try:
        return size(job, profile, architecture_of_model(job.model), scorers_of(job)).saving
    except RayftError:
        return None
