"""The manifest of a run: RayJob, ConfigMap and NetworkPolicy as plain objects, and as YAML."""

from __future__ import annotations

import base64
import math
from dataclasses import dataclass
from typing import Any

import yaml

from rayft import __version__
from rayft.errors import JobError
from rayft.fleet.attempts import RUN, STORAGE, VERSION
from rayft.fleet.owner import submitter
from rayft.fleet.render.names import rayjob_name
from rayft.fleet.render.network import network_policy, refuse_closed_ports
from rayft.fleet.render.pods import (
    JOB_FOLDER,
    RUN_LABEL,
    Object,
    head_template,
    start_params,
    worker_template,
)
from rayft.fleet.render.secrets import refuse_secrets
from rayft.fleet.render.size import Size
from rayft.spec import dump_job
from rayft.spec.profile import Profile

#: A ConfigMap holds 1 MiB; its object has other lines too.
MOST_CONFIGMAP_BYTES = 1_000_000


class _Plain(yaml.SafeDumper):
    """YAML as people read it: texts of several lines as blocks, nothing by reference."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Plain.add_representer(str, _text)


@dataclass(frozen=True)
class Wishes:
    """What a submitter may say beside job and profile. priority: one of the profile's. hours: longest run."""

    priority: str | None = None
    hours: float | None = None


@dataclass(frozen=True)
class Travelling:
    """The zip of local files: `working_dir` for Ray, and its bytes where they travel in the manifest."""

    working_dir: str
    inline: bytes | None = None


def manifest(size: Size, profile: Profile, wishes: Wishes, travelling: Travelling | None) -> list[Object]:
    """Objects in the order in which they are made. Raises JobError for a priority or time that the profile does not have."""
    name = rayjob_name(size.job.name)
    labels = {
        "app.kubernetes.io/name": "rayft",
        "app.kubernetes.io/managed-by": "rayft",
        RUN_LABEL: size.job.name,
    }
    configmap = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"{name}-job", "namespace": profile.namespace, "labels": labels},
        "data": {"job.yaml": dump_job(size.job)},
    }
    if travelling and travelling.inline is not None:
        configmap["binaryData"] = {"files.zip": base64.b64encode(travelling.inline).decode()}
    _refuse_too_large(configmap)
    objects = [configmap]
    if profile.network_policy.enabled:
        refuse_closed_ports(size.job, profile)
        objects.append(network_policy(name, labels, profile))
    objects.append(_rayjob(name, labels, size, profile, wishes, travelling))
    return objects


def as_yaml(objects: list[Object], size: Size, profile: Profile) -> str:
    """The objects as one YAML file. Raises JobError where it would carry a secret."""
    head = f"# Run {size.job.name} on profile {profile.name}, rendered by rayft {__version__}.\n"
    for one in objects:
        refuse_secrets(one, where=one["kind"])
    return head + yaml.dump_all(objects, Dumper=_Plain, sort_keys=False, allow_unicode=True, width=120)


def _rayjob(
    name: str,
    labels: dict[str, str],
    size: Size,
    profile: Profile,
    wishes: Wishes,
    travelling: Travelling | None,
) -> Object:
    job = size.job
    inline = travelling is not None and travelling.inline is not None
    spec: Object = {
        "submissionMode": "HTTPMode",
        "entrypoint": f"rayft run {JOB_FOLDER}/job.yaml",
        "metadata": {
            RUN: job.name,
            STORAGE: f"{job.storage.rstrip('/')}/{job.name}",
            VERSION: __version__,
            **submitter(),
        },
        "backoffLimit": job.cluster.max_failures + profile.retries.preemptions,
        "activeDeadlineSeconds": _deadline_s(profile, wishes),
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": profile.finished_ttl_s,
    }
    if not profile.queue:
        spec["preRunningDeadlineSeconds"] = profile.limits.start_minutes * 60
    if travelling:
        spec["runtimeEnvYAML"] = yaml.safe_dump({"working_dir": travelling.working_dir})
    cluster: Object = {"rayVersion": profile.ray_version}
    if profile.auth == "token":
        cluster["authOptions"] = {"mode": "token"}
    cluster["headGroupSpec"] = {
        "rayStartParams": start_params(None, profile),
        "template": head_template(profile, labels, f"{name}-job"),
    }
    cluster["workerGroupSpecs"] = [
        {
            "groupName": group.name,
            "replicas": group.pods.count,
            "minReplicas": group.pods.count,
            "maxReplicas": group.pods.count,
            "rayStartParams": start_params(group, profile),
            "template": worker_template(profile, group, labels, f"{name}-job" if inline else None),
        }
        for group in size.groups
    ]
    spec["rayClusterSpec"] = cluster
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {
            "name": name,
            "namespace": profile.namespace,
            "labels": labels | _queue_labels(profile, wishes),
        },
        "spec": spec,
    }


def _queue_labels(profile: Profile, wishes: Wishes) -> dict[str, str]:
    queue = profile.queue
    if queue is None:
        if wishes.priority:
            raise JobError(
                f"Profile {profile.name} has no queue, so there is no priority {wishes.priority!r}.",
                "Leave --priority out.",
            )
        return {}
    labels = {"kueue.x-k8s.io/queue-name": queue.local_queue}
    wanted = wishes.priority or queue.default_priority
    if wanted is not None:
        if wanted not in queue.priorities:
            there = ", ".join(queue.priorities) or "none"
            raise JobError(f"Profile {profile.name} has no priority {wanted!r}.", f"It has: {there}.")
        labels["kueue.x-k8s.io/priority-class"] = queue.priorities[wanted]
    return labels


def _deadline_s(profile: Profile, wishes: Wishes) -> int:
    most = profile.limits.hours
    if wishes.hours is not None and not 0 < wishes.hours <= most:
        raise JobError(
            f"--hours {wishes.hours:g}: profile {profile.name} lets a run last up to {most:g} hours (limits.hours).",
            "A run that needs longer goes on when it is started again under its name.",
        )
    return math.ceil((wishes.hours or most) * 3600)


def _refuse_too_large(configmap: dict[str, Any]) -> None:
    taken = len(yaml.safe_dump(configmap))
    if taken > MOST_CONFIGMAP_BYTES:
        raise JobError(
            f"The job and its local files take {taken / 1e6:.2f} MB, and a ConfigMap holds {MOST_CONFIGMAP_BYTES / 1e6:g} MB.",
            "Put the files where the pods can read them (s3://…, the storage volume) and name them there.",
        )
