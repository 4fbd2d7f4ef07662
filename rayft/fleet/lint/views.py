"""What rules look at: jobs, clusters, groups and pods, whatever kind of object holds them.

Nothing here fails on values of a wrong type: they read as absent, and the schema says what is wrong with them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from rayft.fleet.lint.findings import Document

QUEUE = "kueue.x-k8s.io/queue-name"
ELASTIC = "kueue.x-k8s.io/elastic-job"

#: Where kinds of Kubernetes keep the template of their pods.
_TEMPLATES = {
    "Deployment": "spec.template",
    "StatefulSet": "spec.template",
    "DaemonSet": "spec.template",
    "ReplicaSet": "spec.template",
    "Job": "spec.template",
    "CronJob": "spec.jobTemplate.spec.template",
}


def mapping(value: object) -> dict[str, Any]:
    """The value if it is a mapping, else an empty one."""
    return value if isinstance(value, dict) else {}


def mappings(value: object) -> list[tuple[int, dict[str, Any]]]:
    """The mappings in a list, with their places."""
    return (
        [(place, each) for place, each in enumerate(value) if isinstance(each, dict)]
        if isinstance(value, list)
        else []
    )


def at(value: object, path: str) -> Any:
    """The value at a dotted path of keys; None where there is none."""
    for key in path.split("."):
        value = mapping(value).get(key)
    return value


def texts(value: object) -> list[str]:
    """The texts in a list; whatever else is there is left out."""
    return [each for each in value if isinstance(each, str)] if isinstance(value, list) else []


def integer(value: object) -> int | None:
    """A whole number, else None."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None


@dataclass(frozen=True)
class Container:
    """A container and its path in the object."""

    data: dict[str, Any]
    path: str

    def env(self, name: str) -> dict[str, Any] | None:
        """The last variable of that name, which is the one that counts."""
        found = [each for _, each in mappings(self.data.get("env")) if each.get("name") == name]
        return found[-1] if found else None

    @property
    def takes_unknown_env(self) -> bool:
        """Whether variables come from elsewhere, so that an absent name says nothing."""
        return bool(self.data.get("envFrom"))

    def resources(self, which: str) -> dict[str, Any]:
        """`requests` or `limits`."""
        return {str(name): amount for name, amount in mapping(at(self.data, f"resources.{which}")).items()}


@dataclass(frozen=True)
class Pod:
    """A pod template. `role`: head, worker, submitter, or pod for what is not Ray's."""

    document: Document
    template: dict[str, Any]
    path: str
    role: str = "pod"

    @property
    def spec(self) -> dict[str, Any]:
        return mapping(self.template.get("spec"))

    @property
    def annotations(self) -> dict[str, Any]:
        return mapping(at(self.template, "metadata.annotations"))

    @property
    def containers(self) -> list[Container]:
        path = f"{self.path}.spec.containers"
        return [Container(each, f"{path}[{place}]") for place, each in mappings(self.spec.get("containers"))]

    @property
    def all_containers(self) -> list[Container]:
        """Init containers too."""
        path = f"{self.path}.spec.initContainers"
        first = [
            Container(each, f"{path}[{place}]") for place, each in mappings(self.spec.get("initContainers"))
        ]
        return first + self.containers

    @property
    def ray(self) -> Container | None:
        """The container in which KubeRay starts Ray: the first."""
        return self.containers[0] if self.role in ("head", "worker") and self.containers else None

    def volume(self, name: object) -> dict[str, Any] | None:
        return next(
            (each for _, each in mappings(self.spec.get("volumes")) if each.get("name") == name), None
        )


@dataclass(frozen=True)
class Group:
    """The head group or a group of workers."""

    document: Document
    data: dict[str, Any]
    path: str
    role: str

    @property
    def name(self) -> str:
        return "head" if self.role == "head" else str(self.data.get("groupName", ""))

    @property
    def params(self) -> dict[str, Any]:
        return mapping(self.data.get("rayStartParams"))

    @property
    def pod(self) -> Pod:
        return Pod(self.document, mapping(self.data.get("template")), f"{self.path}.template", self.role)

    @property
    def count(self) -> int:
        """Pods of the group; an absent number is what the API server fills in."""
        if self.role == "head":
            return 1
        return (integer(self.data.get("replicas")) or 0) * (integer(self.data.get("numOfHosts")) or 1)


@dataclass(frozen=True)
class Cluster:
    """The specification of a Ray cluster, on its own or within a RayJob."""

    document: Document
    spec: dict[str, Any]
    path: str
    job: Job | None = field(default=None, repr=False)

    @property
    def head(self) -> Group:
        data = mapping(self.spec.get("headGroupSpec"))
        return Group(self.document, data, f"{self.path}.headGroupSpec", "head")

    @property
    def workers(self) -> list[Group]:
        path = f"{self.path}.workerGroupSpecs"
        groups = mappings(self.spec.get("workerGroupSpecs"))
        return [Group(self.document, each, f"{path}[{place}]", "worker") for place, each in groups]

    @property
    def groups(self) -> list[Group]:
        return [self.head, *self.workers]

    @property
    def autoscaling(self) -> bool:
        return self.spec.get("enableInTreeAutoscaling") is True

    @property
    def autoscaler_v2(self) -> bool:
        return at(self.spec, "autoscalerOptions.version") == "v2"

    @property
    def token(self) -> bool:
        """Whether Ray asks for a token."""
        return at(self.spec, "authOptions.mode") == "token"

    @property
    def queue(self) -> str | None:
        """Name of the Kueue queue, if one is named."""
        return self.document.strings("labels").get(QUEUE)


@dataclass(frozen=True)
class Job:
    """The specification of a RayJob, on its own or within a RayCronJob."""

    document: Document
    spec: dict[str, Any]
    path: str

    @property
    def cluster(self) -> Cluster | None:
        spec = self.spec.get("rayClusterSpec")
        return (
            Cluster(self.document, spec, f"{self.path}.rayClusterSpec", self)
            if isinstance(spec, dict)
            else None
        )

    @property
    def mode(self) -> str:
        return str(self.spec.get("submissionMode") or "K8sJobMode")

    @property
    def selects(self) -> bool:
        """Whether it runs on a cluster that is there already."""
        return bool(self.spec.get("clusterSelector"))

    @property
    def queue(self) -> str | None:
        return self.document.strings("labels").get(QUEUE)


def job_of(document: Document) -> Job | None:
    """The RayJob in an object."""
    if document.group == "ray.io" and document.kind == "RayJob":
        return Job(document, document.spec, "spec")
    if document.group == "ray.io" and document.kind == "RayCronJob":
        return Job(document, mapping(document.spec.get("jobTemplate")), "spec.jobTemplate")
    return None


def cluster_of(document: Document) -> Cluster | None:
    """The Ray cluster in an object."""
    if document.group == "ray.io" and document.kind == "RayCluster":
        return Cluster(document, document.spec, "spec")
    job = job_of(document)
    return job.cluster if job else None


def pods_of(document: Document) -> Iterator[Pod]:
    """Every pod template in an object."""
    cluster, job = cluster_of(document), job_of(document)
    if cluster:
        yield from (group.pod for group in cluster.groups if group.data)
    if job and isinstance(job.spec.get("submitterPodTemplate"), dict):
        yield Pod(document, job.spec["submitterPodTemplate"], f"{job.path}.submitterPodTemplate", "submitter")
    if document.kind == "Pod" and document.api_version == "v1":
        yield Pod(document, document.data, "", "pod")
    path = _TEMPLATES.get(document.kind)
    if path and document.group in ("apps", "batch"):
        yield Pod(document, mapping(at(document.data, path)), path, "pod")
