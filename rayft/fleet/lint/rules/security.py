"""What a pod may do to its machine and its cluster."""

from __future__ import annotations

import re
from collections.abc import Iterator

from rayft.fleet.lint.findings import Found, rule
from rayft.fleet.lint.views import Cluster, Container, Pod, at, mapping, mappings, texts

_HOST = ("hostNetwork", "hostPID", "hostIPC")
#: Paths whose owner owns the machine.
_SYSTEM = re.compile(
    r"/+($|(bin|boot|dev|etc|home|lib\w*|proc|root|run|sbin|sys|usr)(/|$)|var/(run|lib/(kubelet|docker|containerd))\b)"
)
_STANDARD = "Kubernetes, Pod Security Standards"


def _security(pod: Pod, container: Container, key: str) -> object:
    """A setting of the container, or the pod's where the container has none."""
    own = at(container.data, f"securityContext.{key}")
    return own if own is not None else at(pod.spec, f"securityContext.{key}")


@rule(
    "privileged",
    "pod",
    reason="A container that may do everything to its machine reaches every other run on it",
    source=f"{_STANDARD}, baseline",
)
def privileged(pod: Pod) -> Iterator[Found]:
    """No privileges, added capabilities, or namespaces and paths of the host."""
    remedy = "Leave it out; training needs none of it"
    for key in _HOST:
        if pod.spec.get(key) is True:
            yield Found(f"{pod.path}.spec.{key}", f"the pod shares the machine's namespaces: {key}", remedy)
    for place, volume in mappings(pod.spec.get("volumes")):
        if _SYSTEM.match(str(at(volume, "hostPath.path") or "")):
            yield Found(
                f"{pod.path}.spec.volumes[{place}]", "the pod mounts a path of the machine's system", remedy
            )
    for container in pod.all_containers:
        path = f"{container.path}.securityContext"
        context = mapping(container.data.get("securityContext"))
        if context.get("privileged") is True:
            yield Found(f"{path}.privileged", "the container is privileged", remedy)
        if context.get("allowPrivilegeEscalation") is True:
            yield Found(f"{path}.allowPrivilegeEscalation", "the container may gain privileges", remedy)
        added = at(context, "capabilities.add")
        if added:
            what = (
                f"the container adds capabilities: {', '.join(map(str, added))}"
                if isinstance(added, list)
                else ""
            )
            yield Found(f"{path}.capabilities.add", what or "the container adds capabilities", remedy)


@rule(
    "host-path",
    "pod",
    severity="warning",
    reason="A namespace with the baseline standard refuses the pod; what is there stays when the pod has gone, for the next",
    source=f"{_STANDARD}, baseline",
)
def host_path(pod: Pod) -> Iterator[Found]:
    """Pods keep what they write in volumes of their own."""
    for place, volume in mappings(pod.spec.get("volumes")):
        path = str(at(volume, "hostPath.path") or "")
        if path and not _SYSTEM.match(path):
            what = f"the pod mounts {path} of the machine"
            yield Found(f"{pod.path}.spec.volumes[{place}]", what, "Use emptyDir, or a volume of local disks")


@rule(
    "root",
    "pod",
    reason="What breaks out of a container that runs as root is root on the machine",
    source=f"{_STANDARD}, restricted; images of rayproject/ray have the user 1000",
)
def root(pod: Pod) -> Iterator[Found]:
    """Nothing runs as root on purpose."""
    for container in pod.all_containers:
        user = _security(pod, container, "runAsUser")
        if (user == 0 and not isinstance(user, bool)) or _security(pod, container, "runAsNonRoot") is False:
            path = f"{container.path}.securityContext"
            yield Found(path, "the container runs as root", "Set runAsUser: 1000 and runAsNonRoot: true")


@rule(
    "hardening",
    "pod",
    severity="warning",
    reason="A namespace with the restricted standard refuses the pod, and others let it do what it never needs",
    source=f"{_STANDARD}, restricted",
)
def hardening(pod: Pod) -> Iterator[Found]:
    """Pods keep to the restricted standard."""
    for container in pod.all_containers:
        missing = []
        if _security(pod, container, "runAsNonRoot") is None:
            missing.append("runAsNonRoot: true")
        if at(container.data, "securityContext.allowPrivilegeEscalation") is None:
            missing.append("allowPrivilegeEscalation: false")
        if "ALL" not in texts(at(container.data, "securityContext.capabilities.drop")):
            missing.append("capabilities.drop: [ALL]")
        if _security(pod, container, "seccompProfile") is None:
            missing.append("seccompProfile.type: RuntimeDefault")
        if missing:
            path = f"{container.path}.securityContext"
            yield Found(path, f"not restricted: {', '.join(missing)} missing", "Add what is missing")


@rule(
    "service-account-token",
    "cluster",
    severity="warning",
    reason="Code of a job could act on the cluster with a token that it does not need; keys for S3 come by a mount of their "
    "own",
    source="Kubernetes, service accounts; only the autoscaler on the head needs the token",
)
def service_account_token(cluster: Cluster) -> Iterator[Found]:
    """Ray's pods do not mount a token of the API server."""
    for group in cluster.groups:
        needs = group.role == "head" and cluster.autoscaling
        if group.data and not needs and group.pod.spec.get("automountServiceAccountToken") is not False:
            path = f"{group.pod.path}.spec.automountServiceAccountToken"
            yield Found(path, f"pods of {group.name!r} get a token of the API server", "Set it to false")


@rule(
    "token",
    "cluster",
    reason="Whoever reaches the dashboard runs what he likes: submitting a job is running a command",
    source="Ray 2.60, token authentication; KubeRay 1.7 authOptions makes and mounts the token",
)
def token(cluster: Cluster) -> Iterator[Found]:
    """Ray asks for a token."""
    if not cluster.token and not _open_ports(cluster):
        path = f"{cluster.path}.authOptions"
        yield Found(path, "the job API takes jobs without a token", "Set authOptions: {mode: token}")


@rule(
    "open-dashboard",
    "cluster",
    reason="The job API runs commands; on a port that others reach it needs a token",
    source="Ray 2.60, security; KubeRay headGroupSpec.serviceType, enableIngress",
)
def open_dashboard(cluster: Cluster) -> Iterator[Found]:
    """Nobody outside reaches the dashboard without a token."""
    if not cluster.token:
        for path, what in _open_ports(cluster):
            yield Found(path, f"{what} opens the job API without a token", "Set authOptions: {mode: token}")


def _open_ports(cluster: Cluster) -> list[tuple[str, str]]:
    """Paths and names of what makes the head's ports reachable from outside."""
    head = cluster.head
    found = []
    if head.data.get("serviceType") in ("NodePort", "LoadBalancer"):
        found.append((f"{head.path}.serviceType", f"a service of type {head.data['serviceType']}"))
    kind = at(head.data, "headService.spec.type")
    if kind in ("NodePort", "LoadBalancer"):
        found.append((f"{head.path}.headService.spec.type", f"a service of type {kind}"))
    if head.data.get("enableIngress") is True:
        found.append((f"{head.path}.enableIngress", "an ingress"))
    return found
