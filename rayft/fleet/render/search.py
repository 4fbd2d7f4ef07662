"""A search on a fleet: how many of its trials a cluster of its own holds at a time, and what no cluster can be sized for."""

from __future__ import annotations

import math

from rayft.errors import JobError
from rayft.spec import Job
from rayft.spec.profile import Profile
from rayft.spec.tune import FORKING, Tune

#: Host memory of the process that drives a trial: libraries, and the rows that it prepares.
DRIVER_MIB = 1024
#: Schedulers that compare a population: all of its trials have their drivers, whoever's turn it is.
POPULATIONS = (*FORKING, "hyperband")
#: Groups that say how many processes a trial has, and where.
SIZES = ("cluster", "placement", "rollout.engines")


def share_of(job: Job, profile: Profile) -> float:
    """Part of the profile's limits that the job may take: all of it for a run, what job and profile grant for a search."""
    return min(job.tune.share, profile.search_share) if job.tune else 1.0


def granted(limit: int, job: Job, profile: Profile) -> int:
    """So many GPUs or workers of a limit may the job have."""
    return int(limit * share_of(job, profile) + 1e-9)


def trials_in(tune: Tune) -> int:
    """How many trials the search has at most."""
    crossed = (one.count for one in tune.space.values() if one.grid is not None or tune.searcher == "grid")
    return math.prod(crossed) * tune.num_trials


def trials_at_once(job: Job, profile: Profile, gpus: float) -> int:
    """How many trials of so many GPUs each the limits allow, and the search wants; 1 for a run, and where even one is too many."""
    if job.tune is None:
        return 1
    most = [trials_in(job.tune), granted(profile.limits.workers, job, profile) // job.cluster.max_workers]
    if job.tune.max_concurrent:
        most.append(job.tune.max_concurrent)
    if gpus:
        most.append(int(granted(profile.limits.gpus, job, profile) / gpus + 1e-9))
    return max(1, min(most))


def drivers_mib(job: Job, at_once: int) -> int:
    """Host memory of the processes that drive trials, for each trial that there is room for."""
    if job.tune is None:
        return 0
    waiting = trials_in(job.tune) if job.tune.scheduler in POPULATIONS else at_once
    return DRIVER_MIB * math.ceil(max(waiting, at_once) / at_once)


def refuse_other_sizes(job: Job) -> None:
    """Raise JobError where trials would differ in size: the cluster is made for the job's own."""
    for key in job.tune.space if job.tune else ():
        if key.startswith(SIZES):
            raise JobError(
                f"tune.space.{key}: a rendered cluster is sized for trials that are alike, and this key makes them differ.",
                "Leave it out of the space, or search on a standing cluster (rayft submit).",
            )


def on_its_own(job: Job, profile: Profile, trials: int) -> tuple[Job, list[str]]:
    """The search as it is on a cluster of its own, all of which it may take, and what people should know of it."""
    assert job.tune is not None
    notes = [
        f"A search: its cluster holds {trials} of {trials_in(job.tune)} trials at a time, within {share_of(job, profile):g} of what "
        f"profile {profile.name} lets a run have (the least of search_share and tune.share).",
        "Stage and memory are planned for the job's own values, not for those of tune.space.",
    ]
    return job.model_copy(update={"tune": job.tune.model_copy(update={"share": 1.0})}), notes
