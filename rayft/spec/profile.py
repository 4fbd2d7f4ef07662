"""A fleet profile: what the platform team says about its fleet, once, so that a job names a profile and never a manifest.

Each key, its unit and its default stand here only. Names and amounts are checked as Kubernetes would check them, since a
profile is refused at once and a manifest only by the cluster. Secrets are named here, never given.
"""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, ValidationError, field_validator, model_validator

from rayft.errors import JobError
from rayft.spec.explain import explain
from rayft.spec.groups import Fraction, Group
from rayft.spec.kubernetes import (
    EnvName,
    GroupName,
    Image,
    Label,
    LabelKey,
    LabelMap,
    Namespace,
    ObjectName,
    Version,
)
from rayft.spec.load import read_mapping
from rayft.spec.secrets import looks_secret

#: Set by rayft in every pod; a profile that set them too would break what they hold together.
OWN_VARIABLES = (
    "HF_HOME",
    "HOME",
    "RAYFT_CACHE",
    "RAYFT_CACHE_GB",
    "RAYFT_SUBMITTER_VERSION",
    "RAY_ADDRESS",
    "RAY_AUTH_MODE",
    "RAY_AUTH_TOKEN",
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S",
    "RAY_JOB_STOP_WAIT_TIME_S",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S",
)


class Toleration(Group):
    """A taint that the pods put up with."""

    key: LabelKey | None = None
    operator: Literal["Equal", "Exists"] = "Equal"
    value: Label | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None

    @model_validator(mode="after")
    def _agrees(self) -> Toleration:
        if self.key is None and self.operator != "Exists":
            raise ValueError("a toleration without a key tolerates everything; say operator: Exists")
        if self.operator == "Exists" and self.value is not None:
            raise ValueError("operator Exists takes no value")
        return self


class Topology(Group):
    """Kueue's topology-aware placement of a worker group."""

    mode: Literal["required", "preferred", "unconstrained"] = "preferred"
    level: LabelKey | None = Field(None, description="Node label of the level that pods should share.")

    @model_validator(mode="after")
    def _level_is_said(self) -> Topology:
        if (self.level is None) != (self.mode == "unconstrained"):
            raise ValueError("give `level` for modes required and preferred, and none for unconstrained")
        return self


class NodeType(Group):
    """One kind of node, by what pods can have of it (allocatable, not what the data sheet says)."""

    gpus: int = Field(0, ge=0)
    gpu: str | None = Field(None, description="GPU type for the memory plan, such as H100-80GB.")
    gpu_resource: LabelKey = Field("nvidia.com/gpu", description="Resource name of its GPUs.")
    cpus: PositiveInt
    memory_gib: PositiveFloat
    scratch_gib: PositiveInt = Field(
        50,
        description="Disk of a pod on the whole node: temporary files, and the cache unless it is a claim.",
    )
    most: PositiveInt = Field(1, description="Nodes of this type that one run may take.")
    selector: LabelMap = Field(default_factory=dict, description="Node labels.")
    tolerations: list[Toleration] = Field(default_factory=list)
    topology: Topology | None = Field(None, description="Of worker groups on these nodes; needs `queue`.")
    resources: dict[LabelKey, PositiveInt] = Field(
        default_factory=dict,
        description="Further resources of the whole node, such as vpc.amazonaws.com/efa; a pod gets its share.",
    )

    @model_validator(mode="after")
    def _gpus_are_named(self) -> NodeType:
        if bool(self.gpus) != bool(self.gpu):
            raise ValueError("give `gpus` and their type `gpu` together, or neither")
        if not self.gpu_resource.endswith("gpu"):
            raise ValueError(f"gpu_resource {self.gpu_resource!r} must end with gpu, or Ray does not see it")
        if clash := self.resources.keys() & {self.gpu_resource, "cpu", "memory", "ephemeral-storage"}:
            raise ValueError(f"resources: {min(clash)!r} has a key of its own")
        return self


class Head(Group):
    """The head node: driver, run log, job API. It takes no work of the run."""

    cpus: PositiveInt = 2
    memory_gib: Annotated[float, Field(ge=2)] = 8.0
    scratch_gib: PositiveInt = Field(
        50,
        description="Disk: temporary files (5 GiB, or half of less than 10), and the cache for the model, which it looks at too.",
    )
    selector: LabelMap = Field(default_factory=dict, description="Best nodes that are not taken away.")
    tolerations: list[Toleration] = Field(default_factory=list)


class Grace(Group):
    """Seconds between notice and end of a pod, and how many of them Ray gives a run to save itself.

    Spot machines cap them: AWS says 120 s before.
    """

    worker_s: PositiveInt = Field(150, description="terminationGracePeriodSeconds of workers.")
    worker_drain_s: PositiveInt = Field(120, description="Of these, for the run.")
    head_s: PositiveInt = 180
    head_drain_s: PositiveInt = 150

    @model_validator(mode="after")
    def _nobody_is_killed_while_saving(self) -> Grace:
        for role in ("worker", "head"):
            grace, drain = getattr(self, f"{role}_s"), getattr(self, f"{role}_drain_s")
            if drain >= grace:
                raise ValueError(
                    f"{role}_drain_s {drain} must be less than {role}_s {grace}, or the kubelet kills what is still saving"
                )
        if self.head_s <= self.worker_s or self.head_drain_s <= self.worker_drain_s:
            raise ValueError(
                "the head must have longer than the workers: it holds the driver that they report to"
            )
        return self


class CheckpointTime(Group):
    """What a checkpoint may take before a node goes."""

    node_mb_per_s: PositiveFloat = Field(200.0, description="MB/s that one node writes to storage.")
    too_slow: Literal["refuse", "warn"] = Field(
        "refuse",
        description="What a checkpoint that does not fit the workers' drain time does; one whose time is not known never refuses.",
    )


class Queue(Group):
    """Kueue."""

    local_queue: ObjectName
    priorities: dict[str, ObjectName] = Field(
        default_factory=dict, description="Names users say (--priority) to WorkloadPriorityClasses."
    )
    default_priority: str | None = None

    @model_validator(mode="after")
    def _default_is_there(self) -> Queue:
        if self.default_priority is not None and self.default_priority not in self.priorities:
            raise ValueError(f"default_priority {self.default_priority!r} is not among priorities")
        return self


class Limits(Group):
    """The most that one run may take."""

    gpus: int = Field(64, ge=0)
    workers: PositiveInt = 64
    hours: PositiveFloat = Field(
        72.0,
        description="Longest attempt at a run; KubeRay counts anew after an eviction or a failure (rayjob_controller.go).",
    )
    start_minutes: PositiveInt = Field(
        60, description="Longest wait for pods; under a queue, waiting is what the queue is for."
    )
    upload_mb: PositiveFloat = Field(100.0, description="Local files that a job may bring along.")


class Retries(Group):
    """KubeRay counts every end but success against one number: the job's failures and these."""

    preemptions: int = Field(20, ge=0, description="How often a run may be evicted.")


class NetworkPolicy(Group):
    """Who may talk to a run's pods, and to whom they may talk. Pods of one run always reach each other."""

    enabled: bool = True
    operator_namespace: Namespace = Field(
        "kuberay-system", description="Where KubeRay runs; it needs the job API."
    )
    client_namespaces: list[Namespace] = Field(
        default_factory=list, description="May reach job API and dashboard."
    )
    metrics_namespaces: list[Namespace] = Field(default_factory=list, description="May scrape metrics.")
    egress_ports: list[Annotated[int, Field(ge=1, le=65535)]] = Field(
        default=[443], description="TCP ports open to the outside: storage, model hub."
    )
    egress_cidrs: list[str] = Field(default=["0.0.0.0/0"], description="To where; the nodes' metadata never.")

    @field_validator("egress_cidrs")
    @classmethod
    def _are_networks(cls, cidrs: list[str]) -> list[str]:
        return [str(ipaddress.ip_network(cidr)) for cidr in cidrs]


class Cache(Group):
    """Models and data of a node, kept while its pods live, or longer where a claim or a folder of the node holds them."""

    gib: PositiveInt = Field(
        20, description="Bound of the cache; without claim or host_path it is part of the pod's disk."
    )
    claim: ObjectName | None = Field(None, description="PersistentVolumeClaim (ReadWriteMany) instead.")
    host_path: str | None = Field(
        None,
        description="Folder of the worker's node instead, such as /mnt/nvme/rayft; it must be there and writable by `user_id`.",
    )

    @model_validator(mode="after")
    def _one_place(self) -> Cache:
        if self.claim and self.host_path:
            raise ValueError("give claim or host_path, not both")
        if self.host_path is not None and (
            not self.host_path.startswith("/") or ".." in self.host_path.split("/") or self.host_path == "/"
        ):
            raise ValueError(f"host_path {self.host_path!r} is no absolute path of a folder")
        return self


class SecretKey(Group):
    """One key of a Secret in the namespace."""

    secret: ObjectName
    key: Label


class Profile(Group):
    """A whole profile."""

    name: Label
    address: str | None = Field(
        None, description="Job API of a standing cluster, for `rayft submit --profile`."
    )
    namespace: Namespace = "default"
    image: Image
    image_pull_secrets: list[ObjectName] = Field(default_factory=list)
    ray_version: Version = Field(description="Of the image, exactly.")
    user_id: PositiveInt = Field(1000, description="The image's user; never root.")
    storage: str = Field(description="s3:// prefix, or absolute path on `storage_claim`, for run folders.")
    storage_claim: ObjectName | None = Field(None, description="PersistentVolumeClaim mounted at `storage`.")
    packages: list[str] = Field(
        default_factory=list, description="Python packages with models (`package:NAME`) that the image holds."
    )
    service_account: ObjectName | None = Field(
        None, description="Its role gives access to S3 without keys (IRSA, workload identity)."
    )
    auth: Literal["token", "disabled"] = Field(
        "token", description="Of dashboard and job API; disabled needs network_policy."
    )
    queue: Queue | None = Field(None, description="Kueue's; without, pods are scheduled as they come.")
    nodes: dict[GroupName, NodeType] = Field(min_length=1)
    head: Head = Field(default_factory=Head)
    limits: Limits = Field(default_factory=Limits)
    retries: Retries = Field(default_factory=Retries)
    grace: Grace = Field(default_factory=Grace)
    checkpoint: CheckpointTime = Field(default_factory=CheckpointTime)
    network_policy: NetworkPolicy = Field(default_factory=NetworkPolicy)
    cache: Cache = Field(default_factory=Cache)
    object_store_gib: PositiveFloat = Field(2.0, description="Ray's object store in each worker pod.")
    finished_ttl_s: int = Field(60, ge=0, description="Seconds that a finished run's pods stay.")
    environment: dict[EnvName, str] = Field(default_factory=dict, description="No secrets.")
    secrets: dict[EnvName, SecretKey] = Field(
        default_factory=dict, description="Variables from Secrets, such as HF_TOKEN."
    )
    search_share: Fraction = Field(0.5, gt=0, description="Part of the fleet that a search may take.")

    @model_validator(mode="after")
    def _agrees(self) -> Profile:
        for name, node in self.nodes.items():
            if node.topology and not self.queue:
                raise ValueError(f"nodes.{name}.topology is Kueue's; give `queue`")
        for name, value in self.environment.items():
            if looks_secret(name, value):
                raise ValueError(
                    f"environment.{name} looks like a secret; name a Secret's key under `secrets`"
                )
        both = self.environment.keys() & self.secrets.keys()
        if both:
            raise ValueError(f"{min(both)} stands under environment and under secrets")
        if own := (self.environment.keys() | self.secrets.keys()) & set(OWN_VARIABLES):
            raise ValueError(f"{min(own)} is set by rayft; what it holds has a key of its own")
        if self.auth == "disabled" and not self.network_policy.enabled:
            raise ValueError("auth disabled without network_policy would leave the job API open to all pods")
        return self

    @model_validator(mode="after")
    def _storage_is_shared(self) -> Profile:
        remote = self.storage.startswith("s3://") and bool(self.storage.removeprefix("s3://").split("/")[0])
        parts = self.storage.split("/")
        path = self.storage.startswith("/") and len(self.storage) > 1 and ".." not in parts
        if not remote and not path:
            raise ValueError(f"storage {self.storage!r} is neither s3://BUCKET/PREFIX nor an absolute path")
        if remote == bool(self.storage_claim):
            raise ValueError("storage on a path needs `storage_claim`, which s3:// storage does not")
        if remote and "@" in parts[2]:
            raise ValueError("storage must not hold credentials; use `service_account` or `secrets`")
        return self

    @property
    def in_s3(self) -> bool:
        """Whether the submitter can reach storage too."""
        return self.storage.startswith("s3://")


def load_profile(name: str | Path) -> Profile:
    """The profile in a file, or of that name in `$RAYFT_PROFILES` or `cluster/profiles`. Raises JobError naming file and key."""
    path = Path(name)
    if not path.suffix and not path.exists():
        path = Path(os.environ.get("RAYFT_PROFILES", "cluster/profiles")) / f"{path}.yaml"
    return parse_profile(read_mapping(path, "profile", example="cluster/profiles/gpu.yaml"), str(path))


def parse_profile(values: dict[str, Any], where: str = "the profile") -> Profile:
    """Validate a raw mapping. Raises JobError that lists every wrong key."""
    try:
        return Profile.model_validate({key: value for key, value in values.items() if value is not None})
    except ValidationError as error:
        raise JobError(
            f"{where}: {'; '.join(explain(error.errors(), Profile))}.",
            "rayft/spec/profile.py lists every key with its meaning.",
        ) from None
