"""Parts of KubeRay that are off unless switched on, and what the operator refuses in them."""

from __future__ import annotations

import re
from collections.abc import Iterator

from rayft.fleet.lint.findings import Found, rule
from rayft.fleet.lint.views import Cluster, Container, at, mapping, mappings

_REASON = "The operator refuses the cluster: InvalidRayClusterSpec"
_SOURCE = "KubeRay 1.7 controllers/ray/utils/validation.go"
_TLS = ("RAY_USE_TLS", "RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT")

#: Field and the feature gate it needs; all of them are off in KubeRay 1.7.
_GATES = {
    "networkPolicy": "RayClusterNetworkPolicy",
    "tlsOptions": "RayClusterMTLS",
    "historyServerOptions": "RayClusterHistoryServer",
}


@rule(
    "operator-feature-gate",
    "cluster",
    severity="warning",
    reason="An operator without the gate refuses the cluster",
    source="KubeRay 1.7 pkg/features: these gates are off unless the operator is started with them",
)
def feature_gate(cluster: Cluster) -> Iterator[Found]:
    """Nothing needs a gate that is off by default."""
    for key, gate in _GATES.items():
        if cluster.spec.get(key) is not None:
            yield Found(
                f"{cluster.path}.{key}",
                f"{key} needs the feature gate {gate}",
                "See that the operator has it",
            )
    if at(cluster.spec, "gcsFaultToleranceOptions.backend") == "rocksdb":
        path = f"{cluster.path}.gcsFaultToleranceOptions.backend"
        yield Found(
            path,
            "rocksdb needs the feature gate GCSFaultToleranceEmbeddedStorage",
            "See that the operator has it",
        )


@rule("operator-network-policy", "cluster", reason=_REASON, source=f"{_SOURCE} validateNetworkPolicy")
def network_policy(cluster: Cluster) -> Iterator[Found]:
    """Rules of the network policy match its mode and its groups."""
    policy = mapping(cluster.spec.get("networkPolicy"))
    if not policy:
        return
    path = f"{cluster.path}.networkPolicy"
    open_side = {"DenyAllEgress": "ingressRules", "DenyAllIngress": "egressRules"}.get(
        str(policy.get("mode"))
    )
    groups = mappings(policy.get("workerGroups"))
    places = [(f"{path}.{key}", mapping(policy.get(key))) for key in ("head", "worker")]
    for where, part in places + [(f"{path}.workerGroups[{place}]", each) for place, each in groups]:
        if open_side and part.get(open_side):
            yield Found(
                f"{where}.{open_side}", f"mode {policy['mode']} does not restrict that side", "Leave it out"
            )
    names = {group.name for group in cluster.workers}
    for name in sorted(names):
        if not re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", name):
            yield Found(
                f"{cluster.path}.workerGroupSpecs",
                f"{name!r} is no DNS label, which networkPolicy wants",
                "Rename it",
            )
    for place, each in groups:
        if str(each.get("groupName")) not in names:
            where = f"{path}.workerGroups[{place}].groupName"
            yield Found(where, f"there is no group {each.get('groupName')!r}", "Name a worker group")


@rule("operator-tls", "cluster", reason=_REASON, source=f"{_SOURCE} validateTLSOptions")
def tls(cluster: Cluster) -> Iterator[Found]:
    """With tlsOptions the operator alone sets up TLS."""
    options = cluster.spec.get("tlsOptions")
    if not isinstance(options, dict) or options.get("enabled") is False:
        return
    containers = [group.pod.ray for group in cluster.groups]
    autoscaler = Container(
        mapping(cluster.spec.get("autoscalerOptions")), f"{cluster.path}.autoscalerOptions"
    )
    for container in (*containers, autoscaler):
        if container is None:
            continue
        for name in _TLS:
            if container.env(name):
                yield Found(f"{container.path}.env", f"{name} is set beside tlsOptions", "Leave it out")


@rule(
    "operator-gcs",
    "cluster",
    reason=_REASON,
    source=f"{_SOURCE} ValidateRayClusterSpec, validateGcsFaultToleranceBackend",
)
def gcs(cluster: Cluster) -> Iterator[Found]:
    """Fault tolerance of the control store is set in one place."""
    options = cluster.spec.get("gcsFaultToleranceOptions")
    path = f"{cluster.path}.gcsFaultToleranceOptions"
    annotations = cluster.document.strings("annotations")
    params, container = cluster.head.params, cluster.head.pod.ray

    def env(name: str) -> bool:
        return bool(container and container.env(name))

    if params.get("redis-username") or env("REDIS_USERNAME"):
        yield Found(
            path, "the name for Redis is not set in gcsFaultToleranceOptions", "Set redisUsername there"
        )
    if not isinstance(options, dict):
        if env("RAY_REDIS_ADDRESS") and annotations.get("ray.io/ft-enabled", "").lower() != "true":
            yield Found(path, "RAY_REDIS_ADDRESS is set without gcsFaultToleranceOptions", "Write them")
        return
    if annotations.get("ray.io/ft-enabled"):
        yield Found(
            "metadata.annotations.ray.io/ft-enabled", "gcsFaultToleranceOptions are set too", "Leave it out"
        )
    if annotations.get("ray.io/external-storage-namespace"):
        where = "metadata.annotations.ray.io/external-storage-namespace"
        yield Found(where, "gcsFaultToleranceOptions are set too", "Set externalStorageNamespace there")
    if params.get("redis-password") or env("REDIS_PASSWORD") or env("RAY_REDIS_ADDRESS"):
        what = "Redis is set up in rayStartParams or variables, and in gcsFaultToleranceOptions"
        yield Found(path, what, "Keep gcsFaultToleranceOptions")
    rocks = options.get("backend") == "rocksdb"
    foreign = (
        ("redisAddress", "redisUsername", "redisPassword", "externalStorageNamespace")
        if rocks
        else ("storage",)
    )
    for key in foreign:
        if options.get(key):
            backend = options.get("backend", "redis")
            yield Found(f"{path}.{key}", f"{key} does not go with the backend {backend}", "Leave it out")
    storage = mapping(options.get("storage"))
    if rocks and storage.get("claimName") and {"size", "storageClassName", "accessModes"} & storage.keys():
        yield Found(
            f"{path}.storage.claimName",
            "a claim that is there has its own size and class",
            "Keep claimName alone",
        )
    if rocks and (env("RAY_GCS_STORAGE") or env("RAY_GCS_STORAGE_PATH")):
        yield Found(path, "RAY_GCS_STORAGE is the operator's", "Leave the variable out")
