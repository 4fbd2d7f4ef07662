"""What pods name: accounts, files, volumes, in the namespace they run in."""

from __future__ import annotations

from collections.abc import Iterator

from rayft.fleet.lint.findings import Document, Found, rule
from rayft.fleet.lint.views import Pod, at, mappings, pods_of

#: Kinds that a volume names, and where.
_VOLUMES = {
    "ConfigMap": "configMap.name",
    "Secret": "secret.secretName",
    "PersistentVolumeClaim": "persistentVolumeClaim.claimName",
}


def _named(pod: Pod) -> Iterator[tuple[str, object, str]]:
    """Kind, name and path of what a pod needs from its namespace."""
    if name := pod.spec.get("serviceAccountName"):
        yield "ServiceAccount", name, f"{pod.path}.spec.serviceAccountName"
    for place, volume in mappings(pod.spec.get("volumes")):
        for kind, path in _VOLUMES.items():
            if name := at(volume, path):
                yield kind, name, f"{pod.path}.spec.volumes[{place}]"
    for container in pod.all_containers:
        for place, variable in mappings(container.data.get("env")):
            for kind, key in (("ConfigMap", "configMapKeyRef"), ("Secret", "secretKeyRef")):
                if name := at(variable, f"valueFrom.{key}.name"):
                    yield kind, name, f"{container.path}.env[{place}]"


@rule(
    "other-namespace",
    "set",
    reason="Pods see only what is in their own namespace, and wait for the rest without an end",
    source="Kubernetes, namespaces; looked up among the objects that are checked together",
)
def other_namespace(documents: list[Document]) -> Iterator[tuple[Document, Found]]:
    """What a pod names is in its namespace, if it is among the objects at all."""
    places: dict[tuple[str, str], set[str]] = {}
    for document in documents:
        places.setdefault((document.kind, document.name), set()).add(document.namespace)
    for document in documents:
        for pod in pods_of(document):
            for kind, name, path in _named(pod):
                found = places.get((kind, str(name)), set())
                if found and document.namespace not in found:
                    there = ", ".join(sorted(each or "no namespace" for each in found))
                    what = f"{kind} {name} is in {there}, the pod in {document.namespace or 'no namespace'}"
                    yield document, Found(path, what, "Give both one namespace")
