"""Kueue's own objects: quotas, flavors, queues, and whether they fit together."""

from __future__ import annotations

from collections.abc import Iterator

from rayft.fleet.lint.findings import Document, Found, rule
from rayft.fleet.lint.quantity import quantity
from rayft.fleet.lint.views import at, cluster_of, mappings, texts

_WEBHOOK = "Kueue 0.19 clusterqueue_webhook.go"
_KUEUE = "kueue.x-k8s.io"


def _kinds(documents: list[Document], kind: str) -> list[Document]:
    return [each for each in documents if each.group == _KUEUE and each.kind == kind]


@rule(
    "kueue-quota",
    "document",
    reason="Kueue refuses the queue",
    source=_WEBHOOK,
)
def kueue_quota(document: Document) -> Iterator[Found]:
    """Quotas name their resources in order, once, and lend no more than they have."""
    if document.group != _KUEUE or document.kind not in ("ClusterQueue", "Cohort"):
        return
    parent = document.spec.get("cohortName" if document.kind == "ClusterQueue" else "parentName")
    resources: set[str] = set()
    flavors: set[str] = set()
    for place, group in mappings(document.spec.get("resourceGroups")):
        path = f"spec.resourceGroups[{place}]"
        covered = texts(group.get("coveredResources"))
        twice = resources & set(covered) or {each for each in covered if covered.count(each) > 1}
        if twice:
            yield Found(
                f"{path}.coveredResources", f"covered twice: {', '.join(sorted(twice))}", "Name it once"
            )
        resources |= set(covered)
        for number, flavor in mappings(group.get("flavors")):
            here, name = f"{path}.flavors[{number}]", str(flavor.get("name"))
            if name in flavors:
                yield Found(f"{here}.name", f"the flavor {name!r} is there twice", "Name it once")
            flavors.add(name)
            quotas = mappings(flavor.get("resources"))
            if [str(each.get("name")) for _, each in quotas] != covered:
                what = f"resources of {name!r} are not the covered ones, in their order"
                yield Found(f"{here}.resources", what, f"Write {', '.join(covered)}")
            for index, each in quotas:
                yield from _limits(each, f"{here}.resources[{index}]", document.kind, parent)


def _limits(each: dict[str, object], path: str, kind: str, parent: object) -> Iterator[Found]:
    nominal, lending = quantity(each.get("nominalQuota")), quantity(each.get("lendingLimit"))
    for key in ("nominalQuota", "lendingLimit", "borrowingLimit"):
        number = quantity(each.get(key))
        if number is not None and number < 0:
            yield Found(f"{path}.{key}", f"{key} is negative", "Write 0 or more")
    if kind == "ClusterQueue" and lending is not None and nominal is not None and lending > nominal:
        yield Found(f"{path}.lendingLimit", "more is lent than there is", "Lower lendingLimit")
    if lending is not None and not parent:
        yield Found(f"{path}.lendingLimit", "there is no cohort to lend to", "Name one, or leave it out")


@rule(
    "kueue-preemption",
    "document",
    severity="warning",
    reason="A queue that lends and never takes back waits until others are done with its quota",
    source="Kueue, ClusterQueue: reclaimWithinCohort is Never unless set",
)
def preemption(document: Document) -> Iterator[Found]:
    """A queue in a cohort takes back what it lent."""
    if document.group != _KUEUE or document.kind != "ClusterQueue" or not document.spec.get("cohortName"):
        return
    if at(document.spec, "preemption.reclaimWithinCohort") in (None, "Never"):
        path = "spec.preemption.reclaimWithinCohort"
        yield Found(
            path, "the queue lends its quota and never takes it back", "Set it to Any or LowerPriority"
        )


@rule(
    "kueue-reference",
    "set",
    severity="warning",
    reason="A queue that names what is not there stays inactive, and its jobs wait without an end",
    source="Kueue: conditions of ClusterQueue and LocalQueue; looked up among the objects that are checked together",
)
def reference(documents: list[Document]) -> Iterator[tuple[Document, Found]]:
    """Queues, flavors and topologies name each other rightly, where the others are among the objects."""
    names = {
        kind: {each.name for each in _kinds(documents, kind)}
        for kind in ("ClusterQueue", "ResourceFlavor", "Topology")
    }

    def missing(kind: str, name: object, path: str) -> Iterator[Found]:
        if names[kind] and isinstance(name, str) and name not in names[kind]:
            known = ", ".join(sorted(names[kind]))
            yield Found(path, f"there is no {kind} {name!r}", f"Name one of {known}")

    for document in documents:
        if document.group == _KUEUE and document.kind == "LocalQueue":
            for found in missing("ClusterQueue", document.spec.get("clusterQueue"), "spec.clusterQueue"):
                yield document, found
        if document.group == _KUEUE and document.kind == "ResourceFlavor":
            for found in missing("Topology", document.spec.get("topologyName"), "spec.topologyName"):
                yield document, found
        if document.group == _KUEUE and document.kind == "ClusterQueue":
            for place, group in mappings(document.spec.get("resourceGroups")):
                for number, flavor in mappings(group.get("flavors")):
                    path = f"spec.resourceGroups[{place}].flavors[{number}].name"
                    for found in missing("ResourceFlavor", flavor.get("name"), path):
                        yield document, found
    queues = {(each.namespace, each.name) for each in _kinds(documents, "LocalQueue")}
    for document in documents:
        cluster = cluster_of(document)
        if queues and cluster and cluster.queue and (document.namespace, cluster.queue) not in queues:
            here = ", ".join(sorted(name for space, name in queues if space == document.namespace)) or "none"
            what = f"there is no LocalQueue {cluster.queue!r} in the namespace {document.namespace!r}"
            yield document, Found("metadata.labels.kueue.x-k8s.io/queue-name", what, f"There is: {here}")


@rule(
    "kueue-covered",
    "set",
    reason="Kueue never admits a job that asks for a resource which its queue does not cover",
    source="Kueue: coveredResources of the ClusterQueue; looked up among the objects that are checked together",
)
def covered(documents: list[Document]) -> Iterator[tuple[Document, Found]]:
    """A queue covers what its jobs ask for."""
    cluster_queues = {each.name: each for each in _kinds(documents, "ClusterQueue")}
    queues = {(each.namespace, each.name): each for each in _kinds(documents, "LocalQueue")}
    for document in documents:
        cluster = cluster_of(document)
        local = queues.get((document.namespace, cluster.queue or "")) if cluster else None
        queue = cluster_queues.get(str(local.spec.get("clusterQueue"))) if local else None
        if not cluster or not queue:
            continue
        groups = mappings(queue.spec.get("resourceGroups"))
        known = {name for _, group in groups for name in texts(group.get("coveredResources"))}
        for group in cluster.groups:
            for container in group.pod.all_containers:
                asked = {**container.resources("limits"), **container.resources("requests")}
                lacking = sorted(
                    name for name, value in asked.items() if name not in known and quantity(value)
                )
                if lacking:
                    what = f"the queue {queue.name!r} does not cover {', '.join(lacking)}"
                    yield (
                        document,
                        Found(f"{container.path}.resources", what, "Add it to coveredResources, or drop it"),
                    )
