"""What KubeRay's operator refuses in a Ray cluster."""

from __future__ import annotations

import re
from collections.abc import Iterator

from rayft.fleet.lint.findings import Found, rule
from rayft.fleet.lint.views import Cluster, Group, at, integer, mapping, mappings

_REASON = "The operator refuses the cluster: InvalidRayClusterSpec"
_SOURCE = "KubeRay 1.7 controllers/ray/utils/validation.go"
_V2 = "RAY_enable_autoscaler_v2"
_VERSION = re.compile(r"v?(\d+)\.(\d+)(?:\.(\d+))?")


def version(text: object) -> tuple[int, ...] | None:
    """A version's numbers; None where there are none."""
    match = _VERSION.match(str(text)) if text else None
    return tuple(int(part or 0) for part in match.groups()) if match else None


def _head_env(cluster: Cluster, name: str) -> dict[str, object] | None:
    container = cluster.head.pod.ray
    return container.env(name) if container else None


def _v2(cluster: Cluster) -> bool:
    variable = _head_env(cluster, _V2)
    return cluster.autoscaler_v2 or bool(variable and variable.get("value") in ("1", "true"))


@rule("operator-containers", "group", reason=_REASON, source=f"{_SOURCE} ValidateRayClusterSpec")
def containers(group: Group) -> Iterator[Found]:
    """Every group has a container."""
    if not group.pod.containers:
        yield Found(
            f"{group.pod.path}.spec.containers", f"{group.name!r} has no container", "Add one for Ray"
        )


@rule("operator-resources", "group", reason=_REASON, source=f"{_SOURCE} validateRayGroupResources")
def resources(group: Group) -> Iterator[Found]:
    """What Ray counts is said once."""
    both = [key for key in ("num-cpus", "num-gpus", "memory", "resources") if group.params.get(key)]
    if both and mapping(group.data.get("resources")):
        what = f"{group.name!r} has resources and {', '.join(both)} in rayStartParams"
        yield Found(f"{group.path}.resources", what, "Keep one of them")


@rule("operator-labels", "group", reason=_REASON, source=f"{_SOURCE} validateRayGroupLabels")
def labels(group: Group) -> Iterator[Found]:
    """Labels of Ray nodes stand in the group's labels and are such as Kubernetes takes."""
    if "labels" in group.params:
        path = f"{group.path}.rayStartParams.labels"
        yield Found(path, "labels are not taken from rayStartParams", f"Move them to {group.path}.labels")
    for key, value in mapping(group.data.get("labels")).items():
        good = re.fullmatch(
            r"([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-\w.]{0,61}[A-Za-z0-9])?", str(key)
        )
        if not good or not re.fullmatch(r"([A-Za-z0-9]([-\w.]{0,61}[A-Za-z0-9])?)?", str(value)):
            yield Found(
                f"{group.path}.labels.{key}",
                "key or value is none that a label may have",
                "Shorten or rename it",
            )


@rule("operator-replicas", "group", reason=_REASON, source=f"{_SOURCE} ValidateRayClusterSpec")
def replicas(group: Group) -> Iterator[Found]:
    """Bounds of a group are not negative, and in order."""
    low, high = integer(group.data.get("minReplicas")), integer(group.data.get("maxReplicas"))
    for key, value in (("minReplicas", low), ("maxReplicas", high)):
        if value is not None and value < 0:
            yield Found(f"{group.path}.{key}", f"{key} is negative", "Write 0 or more")
    if low is not None and high is not None and 0 <= high < low:
        yield Found(f"{group.path}.minReplicas", f"minReplicas {low} is over maxReplicas {high}", "Swap them")


@rule(
    "operator-group-names", "cluster", reason=_REASON, source="KubeRay 1.7 webhooks/v1/raycluster_webhook.go"
)
def group_names(cluster: Cluster) -> Iterator[Found]:
    """No two worker groups share a name."""
    names = [group.name for group in cluster.workers]
    for place, group in enumerate(cluster.workers):
        if group.name in names[:place]:
            yield Found(f"{group.path}.groupName", f"two groups are called {group.name!r}", "Rename one")


@rule("operator-autoscaler", "cluster", reason=_REASON, source=f"{_SOURCE} ValidateRayClusterSpec")
def autoscaler(cluster: Cluster) -> Iterator[Found]:
    """What the autoscaler is told agrees with itself."""
    options = f"{cluster.path}.autoscalerOptions"
    variable = _head_env(cluster, _V2)
    if variable and not cluster.autoscaling and variable.get("value") in ("1", "true"):
        yield Found(
            f"{cluster.head.path}.template",
            f"{_V2} is set and autoscaling is off",
            "Set enableInTreeAutoscaling",
        )
    if variable and cluster.autoscaling and at(cluster.spec, "autoscalerOptions.version") is not None:
        yield Found(f"{options}.version", f"the version is set here and by {_V2}", "Keep this one")
    if cluster.autoscaling and cluster.autoscaler_v2:
        for group in cluster.groups:
            if group.pod.spec.get("restartPolicy") not in (None, "", "Never"):
                path = f"{group.pod.path}.spec.restartPolicy"
                yield Found(
                    path, "autoscaler v2 takes only pods that are not restarted", "Set Never, or leave it out"
                )
    if cluster.autoscaling:
        for group in cluster.workers:
            if group.data.get("suspend") is True:
                yield Found(
                    f"{group.path}.suspend", "the autoscaler takes no suspended group", "Leave it out"
                )
    idle = integer(at(cluster.spec, "autoscalerOptions.idleTimeoutSeconds"))
    if idle is not None and idle < 0:
        yield Found(f"{options}.idleTimeoutSeconds", "idleTimeoutSeconds is negative", "Write 0 or more")
    own = "KUBERAY_GEN_AUTOSCALER_START_CMD"
    if own in [each.get("name") for _, each in mappings(at(cluster.spec, "autoscalerOptions.env"))]:
        yield Found(f"{options}.env", f"{own} is the operator's", "Leave it out")


@rule(
    "operator-autoscaler-v2",
    "cluster",
    reason=_REASON,
    source=f"{_SOURCE} validateWorkerGroupIdleTimeout, …Priority",
)
def autoscaler_v2(cluster: Cluster) -> Iterator[Found]:
    """What only autoscaler v2 knows is used with it."""
    for group in cluster.workers:
        idle, priority = group.data.get("idleTimeoutSeconds"), group.data.get("priority")
        remedy = "Set autoscalerOptions.version: v2"
        if idle is not None and ((integer(idle) or 0) < 0 or not _v2(cluster)):
            path = f"{group.path}.idleTimeoutSeconds"
            yield Found(
                path, f"{group.name!r} has idleTimeoutSeconds without autoscaler v2, or below 0", remedy
            )
        if priority:
            if not _v2(cluster):
                yield Found(
                    f"{group.path}.priority", f"{group.name!r} has a priority without autoscaler v2", remedy
                )
            elif (version(cluster.spec.get("rayVersion")) or (0,)) < (2, 56, 0):
                yield Found(f"{group.path}.priority", "priority of groups needs Ray 2.56", "Raise rayVersion")


@rule("operator-token", "cluster", reason=_REASON, source=f"{_SOURCE} ValidateRayClusterSpec, IsAuthEnabled")
def token(cluster: Cluster) -> Iterator[Found]:
    """Tokens are for versions of Ray that know them."""
    path, ray = f"{cluster.path}.authOptions", version(cluster.spec.get("rayVersion"))
    of_k8s = at(cluster.spec, "authOptions.enableK8sTokenAuth") is True
    if cluster.token and (ray or (0,)) < (2, 52, 0):
        yield Found(f"{path}.mode", "tokens need rayVersion 2.52.0 or later", "Set rayVersion")
    if of_k8s and cluster.job is None:  # of a RayJob operator-k8s-auth says that it takes none
        if not cluster.token:
            yield Found(f"{path}.enableK8sTokenAuth", "it needs mode: token", "Set authOptions.mode: token")
        elif (ray or (0,)) < (2, 55, 0):
            yield Found(
                f"{path}.enableK8sTokenAuth", "it needs rayVersion 2.55.0 or later", "Raise rayVersion"
            )
        elif at(cluster.spec, "authOptions.secretName"):
            yield Found(f"{path}.secretName", "there are two kinds of tokens", "Leave secretName out")


@rule("operator-upgrade", "cluster", reason=_REASON, source=f"{_SOURCE} ValidateRayClusterUpgradeOptions")
def upgrade(cluster: Cluster) -> Iterator[Found]:
    """The cluster of a job is not upgraded."""
    kind = at(cluster.spec, "upgradeStrategy.type")
    path = f"{cluster.path}.upgradeStrategy.type"
    if kind is not None and cluster.job is not None:
        yield Found(path, "the cluster of a RayJob has no upgradeStrategy", "Leave it out")
