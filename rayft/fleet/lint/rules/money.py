"""Machines that are paid for and do nothing, and runs that end early."""

from __future__ import annotations

from collections.abc import Iterator

from rayft.fleet.lint.findings import Found, rule
from rayft.fleet.lint.quantity import quantity
from rayft.fleet.lint.views import Cluster, Group, Job, at, integer, mapping, mappings

#: Seconds after the end for which keeping a cluster is worth no remark.
_LONG_TTL = 3600


@rule(
    "deadline",
    "job",
    reason="A job that hangs holds its machines until somebody looks",
    source="KubeRay rayjob_types.go: no activeDeadlineSeconds, no deadline",
)
def deadline(job: Job) -> Iterator[Found]:
    """There is a deadline."""
    if job.spec.get("activeDeadlineSeconds") is None:
        yield Found(
            f"{job.path}.activeDeadlineSeconds", "there is no deadline", "Set the seconds it may take at most"
        )


@rule(
    "retry",
    "job",
    reason="Every loss of the head or of the driver is charged to backoffLimit; at 0 the first one ends the run",
    source="KubeRay rayjob_controller.go; every retry is a new cluster, and the run resumes under its name",
)
def retry(job: Job) -> Iterator[Found]:
    """A failure is tried again."""
    if job.selects or job.mode == "InteractiveMode":
        return
    limit = job.spec.get("backoffLimit")
    if limit is None or limit == 0:
        yield Found(
            f"{job.path}.backoffLimit",
            "nothing is tried again" + (" (the default)" if limit is None else ""),
            "Set it to the failures and preemptions that the run may see, 3 or more",
        )


def _deletes(job: Job) -> bool:
    """Whether the cluster goes after success and after failure."""
    strategy = mapping(job.spec.get("deletionStrategy"))
    ends = []
    for _, each in mappings(strategy.get("deletionRules")):
        condition = mapping(each.get("condition"))
        if each.get("policy") in ("DeleteCluster", "DeleteSelf"):
            ends.append(condition.get("jobStatus"))
            # `jobDeploymentStatus: Failed` holds for a job that failed as well as for one that never came so far.
            ends.append("FAILED" if condition.get("jobDeploymentStatus") == "Failed" else None)
    legacy = [at(strategy, f"{key}.policy") for key in ("onSuccess", "onFailure")]
    gone = ("DeleteCluster", "DeleteSelf")
    return all(end in ends for end in ("SUCCEEDED", "FAILED")) or all(each in gone for each in legacy)


@rule(
    "clean-up",
    "job",
    reason="The cluster of a job that has ended keeps its machines",
    source="KubeRay rayjob_types.go: shutdownAfterJobFinishes is false unless set",
)
def clean_up(job: Job) -> Iterator[Found]:
    """The cluster goes when the job ends."""
    # Under Kueue `kueue-clean-up` says so, with what Kueue wants.
    if job.selects or job.queue or job.spec.get("shutdownAfterJobFinishes") is True or _deletes(job):
        return
    yield Found(
        f"{job.path}.shutdownAfterJobFinishes",
        "the cluster stays when the job has ended",
        "Set shutdownAfterJobFinishes: true and ttlSecondsAfterFinished",
    )


@rule(
    "long-ttl",
    "job",
    severity="warning",
    reason="Until the time is over the cluster of a job that has ended keeps its machines; run log and report are in the "
    "run's storage",
    source="KubeRay rayjob_types.go: ttlSecondsAfterFinished counts from the end",
)
def long_ttl(job: Job) -> Iterator[Found]:
    """The cluster does not outlive the job for long."""
    seconds = integer(job.spec.get("ttlSecondsAfterFinished"))
    if seconds is not None and seconds > _LONG_TTL:
        path = f"{job.path}.ttlSecondsAfterFinished"
        yield Found(path, f"the cluster stays for {seconds} s after the end", f"Set {_LONG_TTL} or less")


@rule(
    "head-takes-work",
    "cluster",
    reason="Workers on the head take its memory from the driver and the control store, and the run with them",
    source="Ray 2.60: a head without --num-cpus=0 is scheduled like any node",
)
def head_takes_work(cluster: Cluster) -> Iterator[Found]:
    """The head beside workers has no CPUs or GPUs to give."""
    head = cluster.head
    if not cluster.workers or not head.data:
        return
    given = {str(key).lower(): value for key, value in mapping(head.data.get("resources")).items()}
    cpus = head.params.get("num-cpus", given.get("cpu"))
    if cpus is None or quantity(cpus) != 0:
        said = "is not set" if cpus is None else f"is {cpus!r}"
        yield Found(
            f"{head.path}.rayStartParams.num-cpus",
            f"the head takes work: num-cpus {said}",
            'Set num-cpus: "0"',
        )
    container = head.pod.ray
    gpus = [name for name in container.resources("limits") if name.endswith("/gpu")] if container else []
    if container and gpus and quantity(head.params.get("num-gpus", 1)) != 0:
        path = f"{container.path}.resources.limits.{gpus[0]}"
        yield Found(path, "the head holds GPUs", "Give GPUs to worker groups")


@rule(
    "replicas",
    "group",
    reason="KubeRay starts minReplicas or maxReplicas instead, without a word, and the run waits for workers or lacks them",
    source="KubeRay util.go GetWorkerGroupDesiredReplicas; replicas is 0 unless set",
)
def replicas(group: Group) -> Iterator[Found]:
    """The number of workers is the one that is written."""
    if group.role == "head" or group.data.get("suspend") is True:
        return
    count = integer(group.data.get("replicas"))
    low, high = integer(group.data.get("minReplicas")), integer(group.data.get("maxReplicas"))
    if low is not None and high is not None and low > high:
        return  # operator-replicas says so
    path = f"{group.path}.replicas"
    if count is None and not low:
        yield Found(path, f"{group.name!r} has no replicas, which is none", "Set replicas")
    elif count is not None and high is not None and count > high:
        yield Found(path, f"of {count} replicas only {high} start (maxReplicas)", "Raise maxReplicas")
    elif count is not None and low is not None and count < low:
        yield Found(path, f"instead of {count} replicas {low} start (minReplicas)", "Lower minReplicas")


@rule(
    "pre-running-deadline",
    "job",
    severity="warning",
    reason="A cluster that waits for machines or pulls a large image longer than this ends as failed, and is not retried "
    "as preempted",
    source="KubeRay rayjob_controller.go: counts from the first moment of a cluster to RUNNING",
)
def pre_running(job: Job) -> Iterator[Found]:
    """Waiting for machines has room."""
    seconds = integer(job.spec.get("preRunningDeadlineSeconds"))
    if seconds is not None and seconds < 900 and not job.queue:
        path = f"{job.path}.preRunningDeadlineSeconds"
        yield Found(path, f"the cluster has {seconds} s to come up", "Set 900 or more, or leave it out")


@rule(
    "cluster-without-end",
    "cluster",
    severity="warning",
    reason="Nothing ends a RayCluster, and without autoscaling its workers are paid for while nobody uses them",
    source="KubeRay raycluster_types.go",
)
def cluster_without_end(cluster: Cluster) -> Iterator[Found]:
    """A cluster of its own goes down when it is idle."""
    if cluster.job is None and not cluster.autoscaling and any(group.count for group in cluster.workers):
        yield Found(
            cluster.path,
            "the cluster keeps its workers until it is deleted",
            "Use a RayJob, or set enableInTreeAutoscaling",
        )
