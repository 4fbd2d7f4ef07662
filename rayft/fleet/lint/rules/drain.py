"""Work that is lost when a pod is taken away."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from rayft.fleet.lint.findings import Found, rule
from rayft.fleet.lint.views import Cluster, Container, Group, Job, Pod, at, integer, mapping

DRAIN = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
#: Seconds that Ray drains when nothing is said (ray/_private/ray_constants.py), and Kubernetes waits (pod lifecycle).
DEFAULT_DRAIN = 30.0
DEFAULT_GRACE = 30

#: Seconds between a cloud's notice and the end of a spot machine, and the node labels that ask for one.
_SPOT = {
    ("karpenter.sh/capacity-type", "spot"): ("AWS", 120),
    ("eks.amazonaws.com/capacityType", "SPOT"): ("AWS", 120),
    ("cloud.google.com/gke-spot", "true"): ("GKE", 15),
    ("kubernetes.azure.com/scalesetpriority", "spot"): ("Azure", 30),
}

_STOPS_RAY = re.compile(
    r"\bray['\"]?\s+['\"]?stop\b|\b(pkill|killall)\b.*\b(ray|raylet|gcs_server)\b|\bkill\b.*\s1\b|ray-stop|ray\.shutdown"
)


def drain_seconds(container: Container | None) -> float | None:
    """Seconds that Ray drains in this container; None where the value comes from elsewhere or is no number."""
    if container is None:
        return None
    variable = container.env(DRAIN)
    if variable is None:
        return None if container.takes_unknown_env else DEFAULT_DRAIN
    if "valueFrom" in variable:
        return None
    try:
        seconds = float(str(variable.get("value", "")))
    except ValueError:
        return None
    return seconds if math.isfinite(seconds) else None


def _env_path(container: Container) -> str:
    return f"{container.path}.env"


@rule(
    "grace-drain",
    "group",
    reason="Kubernetes kills a pod when its grace is over; a drain that is as long is cut off before the checkpoint "
    "commits",
    source="Ray 2.60 ray/_private/node.py (drain on SIGTERM, 30 s unless set); Kubernetes pod lifecycle (grace 30 s)",
)
def grace_drain(group: Group) -> Iterator[Found]:
    """The grace of a pod is longer than Ray's drain in it, defaults counted."""
    pod = group.pod
    drain = drain_seconds(pod.ray)
    if drain is None or drain <= 0:
        return
    value = pod.spec.get("terminationGracePeriodSeconds")
    grace = DEFAULT_GRACE if value is None else integer(value)
    if grace is not None and grace <= drain:
        said = "" if value is not None else " (the default)"
        yield Found(
            f"{pod.path}.spec.terminationGracePeriodSeconds",
            f"the grace of {grace} s{said} is not longer than Ray's drain of {drain:g} s",
            f"Set it to {math.ceil(drain) + 30} or more, or {DRAIN} to less",
        )


@rule(
    "head-drain",
    "cluster",
    reason="The driver and the controller live on the head: when all pods go at once, a head that drains no longer than "
    "the workers ends before their checkpoint is committed",
    source="Ray 2.60 ray/_private/node.py; Kueue evicts a RayJob with its head",
)
def head_drain(cluster: Cluster) -> Iterator[Found]:
    """The head drains longer than any worker."""
    head = cluster.head.pod.ray
    seconds = drain_seconds(head)
    workers = [(drain_seconds(group.pod.ray), group.name) for group in cluster.workers]
    known = [(drain, name) for drain, name in workers if drain is not None]
    if head is None or seconds is None or seconds <= 0 or not known:
        return
    drain, name = max(known)
    if seconds <= drain:
        yield Found(
            _env_path(head),
            f"the head drains for {seconds:g} s, the workers of {name!r} for {drain:g} s",
            f"Set {DRAIN} of the head to {drain + 30:g} or more",
        )


@rule(
    "drain-off",
    "group",
    reason="Without a drain a SIGTERM kills Ray's processes at once and nobody hears a notice",
    source="Ray 2.60 ray/_private/node.py: a value of 0 or less disables draining",
)
def drain_off(group: Group) -> Iterator[Found]:
    """Draining is on, and its length is a number."""
    container = group.pod.ray
    variable = container.env(DRAIN) if container else None
    if container is None or variable is None or "valueFrom" in variable:
        return
    seconds = drain_seconds(container)
    if seconds is None or seconds <= 0:
        wrong = "is not a number of seconds" if seconds is None else "turns draining off"
        yield Found(_env_path(container), f"{DRAIN}={variable.get('value')!r} {wrong}", "Set it to 120 or so")


@rule(
    "pre-stop-ray-stop",
    "pod",
    reason="`ray stop` ends the raylet before Ray can announce the drain, so no checkpoint is written",
    source="KubeRay issues 5004 and 5005; Ray 2.60 ray/_private/node.py drains on SIGTERM itself",
)
def pre_stop(pod: Pod) -> Iterator[Found]:
    """No preStop hook stops Ray."""
    for container in pod.all_containers:
        hook = mapping(at(container.data, "lifecycle.preStop"))
        command = at(hook, "exec.command")
        text = " ".join(map(str, command)) if isinstance(command, list) else ""
        if _STOPS_RAY.search(text):
            path = f"{container.path}.lifecycle.preStop"
            yield Found(
                path, "the preStop hook stops Ray", "Remove the hook; Ray drains by itself on SIGTERM"
            )


@rule(
    "submitter-follows-log",
    "job",
    reason="A submitter that follows the log fails with its connection, or is evicted, and takes the healthy job with it",
    source="KubeRay issues 2314, 3257, 4921, 5100",
)
def submitter(job: Job) -> Iterator[Found]:
    """KubeRay submits by HTTP and follows the status, not the log."""
    if job.mode in ("K8sJobMode", "SidecarMode"):
        said = "" if "submissionMode" in job.spec else " (the default)"
        yield Found(
            f"{job.path}.submissionMode",
            f"in {job.mode}{said} a submitter follows the job's log, and its end is taken for the job's",
            "Set submissionMode: HTTPMode",
        )


@rule(
    "spot-window",
    "group",
    severity="warning",
    reason="A drain that is longer than the cloud's notice ends with the machine, not with the checkpoint",
    source="AWS spot notice 120 s; GKE spot 15 s for pods of users; Azure spot 30 s",
)
def spot_window(group: Group) -> Iterator[Found]:
    """On spot machines, the drain fits the notice."""
    pod = group.pod
    drain = drain_seconds(pod.ray)
    spot = _spot(pod)
    if spot and drain is not None and drain >= spot[1]:
        yield Found(
            f"{pod.path}.spec",
            f"Ray drains for {drain:g} s, and {spot[0]} gives a spot machine {spot[1]} s",
            f"Set {DRAIN} below {spot[1]}, and see that a checkpoint takes less",
        )


@rule(
    "head-on-spot",
    "cluster",
    severity="warning",
    reason="A run survives the loss of workers in place, but not of the head, where its driver lives",
    source="Ray Train's controller is pinned to the driver's node",
)
def head_on_spot(cluster: Cluster) -> Iterator[Found]:
    """The head is not on a spot machine."""
    pod = cluster.head.pod
    if cluster.workers and _spot(pod):
        yield Found(
            f"{pod.path}.spec.nodeSelector", "the head asks for a spot machine", "Let the head run on demand"
        )


def _spot(pod: Pod) -> tuple[str, int] | None:
    """The cloud and the seconds of its notice, if the pod selects spot machines."""
    selected = mapping(pod.spec.get("nodeSelector"))
    return next((cloud for (key, value), cloud in _SPOT.items() if str(selected.get(key)) == value), None)
