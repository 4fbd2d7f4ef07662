"""Pod templates of head and workers: what they may do, what they may write to, and how long they have when they must go.

Facts they rest on: KubeRay runs `ray start --block` as the container's first process, which on SIGTERM drains its node for
RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S and then ends; a preStop hook would come before it (Ray `_private/node.py`, KubeRay
`common/pod.go`). KubeRay copies security context, environment and mounts of the container to the one that waits for the head.
"""

from __future__ import annotations

import math
from typing import Any

from rayft import __version__
from rayft.checkpoint.stop import STOP_WAIT_S
from rayft.fleet.render.cache import BESIDE_GIB, CACHE, CacheVolume, head_cache, worker_cache
from rayft.fleet.render.size import Group
from rayft.fleet.version import SUBMITTER_VERSION
from rayft.spec.profile import NodeType, Profile, Toleration

HOME = "/home/rayft"
JOB_FOLDER = "/etc/rayft"
RUN_LABEL = "rayft.dev/run"
#: Port of the agent that answers probes (KubeRay constant.go); it serves /api/healthz from Ray 2.53 on.
AGENT_PORT = 52365
#: Shared memory beside the object store: NCCL, gloo and torch between processes of a pod.
SHARED_MEMORY_GIB = 2
HEAD_OBJECT_STORE_GIB = 0.5

Object = dict[str, Any]


def head_template(profile: Profile, labels: dict[str, str], configmap: str) -> Object:
    """The head's: it carries the job file."""
    head = profile.head
    amounts = {
        "cpu": str(head.cpus),
        "memory": _memory(int(head.memory_gib * 1024)),
        "ephemeral-storage": f"{head.scratch_gib}Gi",
    }
    cache = head_cache(profile)
    container = _container("ray-head", profile, amounts, profile.grace.head_drain_s, cache)
    container["ports"] = [
        {"containerPort": 6379, "name": "gcs-server"},
        {"containerPort": 8265, "name": "dashboard"},
        {"containerPort": 10001, "name": "client"},
    ]
    # KubeRay's own gives up after 50 s of a loaded head, which then leaves its service; five minutes without the job API fail
    # the whole run, and that end is not retried.
    container["readinessProbe"] = _probe(failures=30)
    shared = HEAD_OBJECT_STORE_GIB + 0.5
    spec = _pod(profile, container, head.selector, head.tolerations, profile.grace.head_s)
    _volumes(spec, profile, shared, head.scratch_gib, configmap, cache)
    return {"metadata": {"labels": labels}, "spec": spec}


def worker_template(profile: Profile, group: Group, labels: dict[str, str], configmap: str | None) -> Object:
    """A worker group's. configmap: where local files travel in it."""
    node, room = group.node, group.pods.room
    part = room.gpus / node.gpus if node.gpus else min(1.0, room.cpus / node.cpus)
    cache = worker_cache(profile)
    scratch = max((cache.gib if cache.own else 0) + BESIDE_GIB, math.ceil(node.scratch_gib * part))
    amounts = {
        "cpu": str(room.cpus),
        "memory": _memory(room.memory_mib),
        "ephemeral-storage": f"{scratch}Gi",
    }
    if room.gpus:
        amounts[node.gpu_resource] = str(room.gpus)
    amounts |= {name: str(max(1, int(count * part))) for name, count in node.resources.items()}
    container = _container("ray-worker", profile, amounts, profile.grace.worker_drain_s, cache)
    spec = _pod(profile, container, node.selector, node.tolerations, profile.grace.worker_s)
    shared = profile.object_store_gib + SHARED_MEMORY_GIB
    _volumes(spec, profile, shared, scratch, configmap, cache)
    metadata: Object = {"labels": labels}
    if annotations := _topology(node):
        metadata["annotations"] = annotations
    return {"metadata": metadata, "spec": spec}


def start_params(group: Group | None, profile: Profile) -> dict[str, str]:
    """Arguments of `ray start`. None: the head's, which offers no CPU, so that nothing of the run lands there."""
    if group is None:
        return {
            "num-cpus": "0",
            "num-gpus": "0",
            "object-store-memory": str(int(HEAD_OBJECT_STORE_GIB * 2**30)),
        }
    return {
        "num-cpus": str(group.pods.room.cpus),
        "object-store-memory": str(int(profile.object_store_gib * 2**30)),
    }


def _container(
    name: str, profile: Profile, amounts: dict[str, str], drain_s: int, cache: CacheVolume
) -> Object:
    return {
        "name": name,
        "image": profile.image,
        "imagePullPolicy": "IfNotPresent",
        "env": _environment(profile, drain_s, cache),
        "resources": {"requests": dict(amounts), "limits": dict(amounts)},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
    }


def _environment(profile: Profile, drain_s: int, cache: CacheVolume) -> list[Object]:
    values = {
        "HOME": HOME,
        **cache.environment,
        SUBMITTER_VERSION: __version__,
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(drain_s),
        # A RayJob that is deleted stops its submission first, and Ray kills a driver that has not saved by then; 3 s otherwise.
        "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S),
        "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    plain = [{"name": name, "value": value} for name, value in {**values, **profile.environment}.items()]
    named = [
        {"name": name, "valueFrom": {"secretKeyRef": {"name": key.secret, "key": key.key}}}
        for name, key in profile.secrets.items()
    ]
    return [*plain, *named]


def _pod(
    profile: Profile,
    container: Object,
    selector: dict[str, str],
    tolerations: list[Toleration],
    grace_s: int,
) -> Object:
    spec: Object = {
        "terminationGracePeriodSeconds": grace_s,
        # A pod's role in S3 comes from a token of its own, which this does not switch off.
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": profile.user_id,
            "runAsGroup": profile.user_id,
            "fsGroup": profile.user_id,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container],
    }
    if profile.service_account:
        spec["serviceAccountName"] = profile.service_account
    if profile.image_pull_secrets:
        spec["imagePullSecrets"] = [{"name": name} for name in profile.image_pull_secrets]
    if selector:
        spec["nodeSelector"] = dict(selector)
    if tolerations:
        spec["tolerations"] = [toleration.model_dump(exclude_none=True) for toleration in tolerations]
    return spec


def _volumes(
    spec: Object,
    profile: Profile,
    shared_gib: float,
    scratch_gib: int,
    configmap: str | None,
    cache: CacheVolume,
) -> None:
    """What a pod may write to beside its root, which it may not; and the job's files."""
    limit = {"sizeLimit": f"{scratch_gib}Gi"}
    wanted: list[tuple[str, str, Object, bool]] = [
        (
            "shared-mem",
            "/dev/shm",
            {"emptyDir": {"medium": "Memory", "sizeLimit": _memory(int(shared_gib * 1024))}},
            False,
        ),
        ("tmp", "/tmp", {"emptyDir": limit}, False),
        ("home", HOME, {"emptyDir": limit}, False),
        ("cache", CACHE, cache.source, False),
    ]
    if configmap:
        wanted.append(("job", JOB_FOLDER, {"configMap": {"name": configmap}}, True))
    if profile.storage_claim:
        claim = {"persistentVolumeClaim": {"claimName": profile.storage_claim}}
        wanted.append(("storage", profile.storage, claim, False))
    spec["volumes"] = [{"name": name, **source} for name, _, source, _ in wanted]
    spec["containers"][0]["volumeMounts"] = [
        {"name": name, "mountPath": path, **({"readOnly": True} if read_only else {})}
        for name, path, _, read_only in wanted
    ]


def _probe(failures: int) -> Object:
    return {
        "httpGet": {"path": "/api/healthz", "port": AGENT_PORT},
        "initialDelaySeconds": 10,
        "periodSeconds": 10,
        "timeoutSeconds": 10,
        "failureThreshold": failures,
    }


def _topology(node: NodeType) -> dict[str, str]:
    """Kueue's annotations of a pod set."""
    if node.topology is None:
        return {}
    name = f"kueue.x-k8s.io/podset-{node.topology.mode}-topology"
    return {name: node.topology.level or "true"}


def _memory(mib: int) -> str:
    return f"{mib // 1024}Gi" if mib % 1024 == 0 else f"{mib}Mi"
