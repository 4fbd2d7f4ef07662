"""RayJobs and RayClusters that wait in a Kueue queue."""

from __future__ import annotations

from collections.abc import Iterator

from rayft.fleet.lint.findings import Document, Found, rule
from rayft.fleet.lint.views import ELASTIC, QUEUE, Cluster, Group, Job, cluster_of, job_of, mapping

_WEBHOOK = "Kueue 0.19 rayjob_webhook.go"
_CLUSTER_WEBHOOK = "Kueue 0.19 raycluster/common.go"
_MOST_POD_SETS = 18
_TOPOLOGY = ("podset-required-topology", "podset-preferred-topology", "podset-unconstrained-topology")
_PREFIX = "kueue.x-k8s.io/"


@rule(
    "kueue-clean-up",
    "job",
    reason="A cluster that stays keeps its share of the queue; Kueue refuses the job",
    source=_WEBHOOK,
)
def clean_up(job: Job) -> Iterator[Found]:
    """A job in a queue shuts its cluster down."""
    if job.queue and not job.selects and job.spec.get("shutdownAfterJobFinishes") is not True:
        path = f"{job.path}.shutdownAfterJobFinishes"
        yield Found(path, "the job is in a queue and keeps its cluster", "Set shutdownAfterJobFinishes: true")


@rule(
    "kueue-cluster-selector",
    "job",
    reason="Kueue refuses a job on a cluster that is there already, or lets it pass the queue by",
    source=_WEBHOOK,
)
def cluster_selector(job: Job) -> Iterator[Found]:
    """A job in a queue brings its own cluster."""
    if job.queue and job.selects:
        path = f"{job.path}.clusterSelector"
        yield Found(
            path, "the job is in a queue and runs on another's cluster", "Use rayClusterSpec, or no queue"
        )


@rule(
    "kueue-pre-running-deadline",
    "job",
    reason="After admission Kueue waits for pods itself and gives the place back; this ends the job as failed instead",
    source="KubeRay rayjob_controller.go (deadline from a cluster's first moment); Kueue waitForPodsReady",
)
def pre_running(job: Job) -> Iterator[Found]:
    """A job in a queue may wait."""
    if job.queue and job.spec.get("preRunningDeadlineSeconds") is not None:
        path = f"{job.path}.preRunningDeadlineSeconds"
        yield Found(
            path,
            "the job is in a queue and may not wait for its pods",
            "Leave it to Kueue's waitForPodsReady",
        )


@rule(
    "kueue-autoscaler",
    "cluster",
    reason="Kueue counts what a job asks for when it comes; it refuses a cluster that grows by itself, unless it is an "
    "elastic job",
    source=f"{_CLUSTER_WEBHOOK}; elastic jobs need the gate ElasticJobsViaWorkloadSlices, and not topology or MultiKueue",
)
def autoscaler(cluster: Cluster) -> Iterator[Found]:
    """The autoscaler runs in a queue only as an elastic job."""
    if not cluster.queue or not cluster.autoscaling:
        return
    path = f"{cluster.path}.enableInTreeAutoscaling"
    if cluster.document.strings("annotations").get(ELASTIC) != "true":
        what = "the cluster is in a queue and grows by itself"
        yield Found(path, what, f'Leave autoscaling off, or set the annotation {ELASTIC}: "true"')
        return
    managed = (cluster.job.spec if cluster.job else cluster.spec).get("managedBy")
    if managed == "kueue.x-k8s.io/multikueue":
        yield Found(path, "MultiKueue does not take elastic jobs", "Leave autoscaling off")
    if any(_topology(group) for group in cluster.groups):
        yield Found(path, "an elastic job cannot ask for a topology", "Leave one of them out")


@rule(
    "kueue-pod-sets",
    "cluster",
    reason="Kueue refuses the workload, or never makes one",
    source="Kueue 0.19 jobframework/constants.go: 18 pod sets, the head and a submitter among them",
)
def pod_sets(cluster: Cluster) -> Iterator[Found]:
    """A job in a queue has no more groups than Kueue takes."""
    submitter = bool(cluster.job and cluster.job.mode == "K8sJobMode")
    count = len(cluster.groups) + submitter
    if cluster.queue and count > _MOST_POD_SETS:
        path = f"{cluster.path}.workerGroupSpecs"
        yield Found(
            path, f"the job has {count} pod sets, Kueue takes {_MOST_POD_SETS}", "Merge worker groups"
        )


@rule(
    "kueue-group-name",
    "cluster",
    reason="Kueue's pod sets go by the names of groups, and two of them are taken",
    source=f"{_CLUSTER_WEBHOOK}: head; rayjob_controller.go: submitter",
)
def group_name(cluster: Cluster) -> Iterator[Found]:
    """No worker group in a queue is called head or submitter."""
    submits = cluster.job is not None and cluster.job.mode == "K8sJobMode"
    taken = {"head", "submitter"} if submits else {"head"}
    for group in cluster.workers if cluster.queue else []:
        if group.name in taken:
            yield Found(
                f"{group.path}.groupName",
                f"Kueue keeps the name {group.name!r} for itself",
                "Rename the group",
            )


@rule(
    "kueue-queue-label",
    "document",
    reason="Without the label on the job itself it does not wait in any queue and takes machines from those who do",
    source="Kueue: kueue.x-k8s.io/queue-name is a label of the RayJob, not an annotation, not of its pods",
)
def queue_label(document: Document) -> Iterator[Found]:
    """The queue is named by a label of the object."""
    if QUEUE in document.strings("labels") or not (cluster := cluster_of(document)):
        return
    remedy = "Make it a label in metadata.labels of the object"
    if QUEUE in document.strings("annotations"):
        yield Found(f"metadata.annotations.{QUEUE}", "the queue is named by an annotation", remedy)
    for group in cluster.groups:
        if QUEUE in mapping(mapping(group.pod.template.get("metadata")).get("labels")):
            yield Found(
                f"{group.pod.path}.metadata.labels.{QUEUE}", "the queue is named on pods only", remedy
            )


@rule(
    "suspended",
    "document",
    severity="warning",
    reason="Nobody resumes it",
    source="KubeRay rayjob_types.go: suspend; Kueue sets it itself",
)
def suspended(document: Document) -> Iterator[Found]:
    """What is suspended waits in a queue."""
    job = job_of(document)
    if job and job.spec.get("suspend") is True and not job.queue:
        yield Found(f"{job.path}.suspend", "the job is suspended and in no queue", f"Set the label {QUEUE}")


def _topology(group: Group) -> list[str]:
    """The topology that a group asks for, by annotation."""
    return [key for key in _TOPOLOGY if _PREFIX + key in group.pod.annotations]


@rule(
    "kueue-topology",
    "cluster",
    reason="Kueue refuses the job",
    source="Kueue 0.19 jobframework/tas_validation.go",
)
def topology(cluster: Cluster) -> Iterator[Found]:
    """Annotations about topology agree."""
    pairs: dict[str, list[Group]] = {}
    for group in cluster.groups:
        annotations = group.pod.annotations
        path = f"{group.pod.path}.metadata.annotations"
        asked = _topology(group)
        if len(asked) > 1:
            yield Found(path, f"{group.name!r} asks for {' and '.join(asked)}", "Keep one")
        name = annotations.get(_PREFIX + "podset-group-name")
        if name is not None:
            pairs.setdefault(str(name), []).append(group)
            if not set(asked) & set(_TOPOLOGY[:2]):
                yield Found(
                    path,
                    f"{group.name!r} is in a pod set group and asks for no topology",
                    f"Add {_TOPOLOGY[0]}",
                )
        slices = {key for key in annotations if str(key).startswith(_PREFIX + "podset-slice-")}
        both = {_PREFIX + "podset-slice-required-topology", _PREFIX + "podset-slice-size"}
        if len(slices & both) == 1:
            yield Found(path, f"{group.name!r} has one of {', '.join(sorted(both))}", "Set both")
        if name is not None and slices:
            yield Found(path, f"{group.name!r} is in a pod set group and has slices", "Keep one")
    for name, groups in pairs.items():
        path = f"{groups[0].pod.path}.metadata.annotations"
        if len(groups) != 2:
            yield Found(
                path, f"{len(groups)} groups share the pod set group {name!r}", "Kueue takes exactly two"
            )
        elif all(group.count != 1 for group in groups):
            yield Found(
                path,
                f"no group of the pod set group {name!r} is one pod",
                "Pair the head with one worker group",
            )
        elif (
            len(
                {
                    tuple(str(group.pod.annotations.get(_PREFIX + key)) for key in _TOPOLOGY[:2])
                    for group in groups
                }
            )
            > 1
        ):
            yield Found(
                path,
                f"groups of the pod set group {name!r} ask for unlike topologies",
                "Write the same twice",
            )
