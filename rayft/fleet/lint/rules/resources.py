"""CPUs, memory, GPUs and shared memory of pods."""

from __future__ import annotations

from collections.abc import Iterator

from rayft.fleet.lint.findings import Found, rule
from rayft.fleet.lint.quantity import quantity
from rayft.fleet.lint.views import Group, Pod, at, mapping, mappings

SHM = "/dev/shm"


def _extended(name: str) -> bool:
    """Whether a resource is a device such as nvidia.com/gpu."""
    domain, _, _ = name.rpartition("/")
    return bool(domain) and not domain.endswith("kubernetes.io")


@rule(
    "gpu-limits",
    "pod",
    reason="Devices are not shared: the API server refuses requests unlike limits, and Ray counts the limits",
    source="Kubernetes, extended resources; KubeRay pod.go addWellKnownAcceleratorResources reads limits",
)
def gpu_limits(pod: Pod) -> Iterator[Found]:
    """Requests for GPUs equal their limits."""
    for container in pod.all_containers:
        requests, limits = container.resources("requests"), container.resources("limits")
        for name in sorted({key for key in (*requests, *limits) if _extended(str(key))}, key=str):
            wanted, limit = quantity(requests.get(name, limits.get(name))), quantity(limits.get(name))
            if wanted != limit:
                path = f"{container.path}.resources.requests.{name}"
                what = f"{name}: {requests.get(name)} requested, limit {limits.get(name, 'missing')}"
                yield Found(path, what, "Set the same number under requests and limits")


@rule(
    "guaranteed",
    "group",
    severity="warning",
    reason="Only pods whose requests equal their limits, for CPU and memory, are the last to be evicted when a machine runs "
    "short; and Ray counts the limit",
    source="Kubernetes, quality of service classes; KubeRay pod.go generateRayStartCommand",
)
def guaranteed(group: Group) -> Iterator[Found]:
    """Ray's pods have the class Guaranteed."""
    for container in group.pod.all_containers:
        requests, limits = container.resources("requests"), container.resources("limits")
        wrong = []
        for name in ("cpu", "memory"):
            limit = limits.get(name)
            if limit is None:
                wrong.append(f"{name} has no limit")
            elif quantity(requests.get(name, limit)) != quantity(limit):
                wrong.append(f"{name}: {requests[name]} requested, limit {limit}")
        if wrong:
            path = f"{container.path}.resources"
            yield Found(path, "; ".join(wrong), "Set the same CPU and memory under requests and limits")


@rule(
    "shared-memory",
    "group",
    reason="NCCL and data loaders fail in the 64 MiB that a container gets by default, and Ray's object store moves to disk",
    source="KubeRay pod.go: it mounts a memory volume at /dev/shm of the first container, as large as its memory limit, "
    "unless one is mounted or rayStartParams has plasma-directory",
)
def shared_memory(group: Group) -> Iterator[Found]:
    """/dev/shm is memory, bounded, and holds the object store."""
    container = group.pod.ray
    if container is None:
        return
    mounts = [
        each for _, each in mappings(container.data.get("volumeMounts")) if each.get("mountPath") == SHM
    ]
    path = f"{container.path}.volumeMounts"
    if not mounts and "plasma-directory" in group.params:
        yield Found(
            f"{group.path}.rayStartParams.plasma-directory",
            "with plasma-directory KubeRay mounts no shared memory, and none is mounted here",
            f"Mount an emptyDir with medium: Memory at {SHM}, or leave plasma-directory out",
        )
        return
    # Without a mount KubeRay adds one; it takes a volume of this name if the pod has one.
    volume = group.pod.volume(mounts[0].get("name") if mounts else "shared-mem")
    if volume is None:
        return  # KubeRay's own, or the schema says that there is no such volume
    if at(volume, "emptyDir.medium") != "Memory":
        yield Found(path, f"the volume at {SHM} is not memory", "Make it an emptyDir with medium: Memory")
        return
    size = quantity(at(volume, "emptyDir.sizeLimit"))
    if size is None and "memory" not in container.resources("limits"):
        yield Found(
            path, f"nothing bounds the memory at {SHM}", "Set sizeLimit of the volume, or a memory limit"
        )
    store = quantity(group.params.get("object-store-memory"))
    if size is not None and store is not None and store > size:
        yield Found(
            f"{group.path}.rayStartParams.object-store-memory",
            f"the object store is larger than {SHM}, so Ray puts it on disk",
            "Raise sizeLimit of the volume, or lower object-store-memory",
        )


@rule(
    "gpu-selector",
    "group",
    severity="warning",
    reason="On a cluster with several kinds of GPUs, workers of one group land on unlike ones and all wait for the slowest",
    source="Kubernetes schedules a count of nvidia.com/gpu, whatever the model; Kueue's flavors add the selector",
)
def gpu_selector(group: Group) -> Iterator[Found]:
    """Workers with GPUs say which, by a selector or a queue."""
    container = group.pod.ray
    labels = group.document.strings("labels")
    if group.role == "head" or container is None or "kueue.x-k8s.io/queue-name" in labels:
        return
    gpus = [name for name in container.resources("limits") if str(name).endswith("/gpu")]
    affinity = at(group.pod.spec, "affinity.nodeAffinity")
    if gpus and not mapping(group.pod.spec.get("nodeSelector")) and not affinity:
        yield Found(f"{group.pod.path}.spec", f"any machine with {gpus[0]} will do", "Set a nodeSelector")
