"""What KubeRay's operator refuses in a RayJob. A refused job has the status ValidationFailed and starts nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml

from rayft.fleet.lint.findings import Found, rule
from rayft.fleet.lint.views import Job, at, integer, mapping, mappings

_REASON = "The operator refuses the job: ValidationFailed"
_SOURCE = "KubeRay 1.7 controllers/ray/utils/validation.go"


@rule("operator-suspend", "job", reason=_REASON, source=f"{_SOURCE} ValidateRayJobSpec")
def suspend(job: Job) -> Iterator[Found]:
    """What may be suspended shuts its cluster down and owns it."""
    if job.spec.get("suspend") is not True:
        return
    path = f"{job.path}.suspend"
    if job.selects:
        yield Found(path, "a job with clusterSelector cannot be suspended", "Leave suspend out")
    elif job.spec.get("shutdownAfterJobFinishes") is not True:
        yield Found(
            path, "a job that keeps its cluster cannot be suspended", "Set shutdownAfterJobFinishes: true"
        )


@rule("operator-ttl", "job", reason=_REASON, source=f"{_SOURCE} validateDeletionConfiguration")
def ttl(job: Job) -> Iterator[Found]:
    """A time to live belongs to a cluster that is shut down."""
    seconds = integer(job.spec.get("ttlSecondsAfterFinished"))
    path = f"{job.path}.ttlSecondsAfterFinished"
    if seconds is not None and seconds < 0:
        yield Found(path, "the time to live is negative", "Write 0 or more")
    elif seconds and job.spec.get("shutdownAfterJobFinishes") is not True:
        yield Found(
            path,
            "the cluster is never shut down, so it has no time to live",
            "Set shutdownAfterJobFinishes: true",
        )


@rule("operator-numbers", "job", reason=_REASON, source=f"{_SOURCE} ValidateRayJobSpec")
def numbers(job: Job) -> Iterator[Found]:
    """Deadlines are positive, retries not negative."""
    for key, least in (("activeDeadlineSeconds", 1), ("preRunningDeadlineSeconds", 1), ("backoffLimit", 0)):
        value = integer(job.spec.get(key))
        if value is not None and value < least:
            yield Found(f"{job.path}.{key}", f"{key} is {value}", f"Write {least} or more")


@rule("operator-cluster", "job", reason=_REASON, source=f"{_SOURCE} ValidateRayJobSpec")
def cluster(job: Job) -> Iterator[Found]:
    """A job has a cluster of its own, or names one, which then goes without retries."""
    path = f"{job.path}.clusterSelector"
    if not job.selects:
        if "rayClusterSpec" not in job.spec:
            yield Found(
                f"{job.path}.rayClusterSpec", "there is no cluster", "Write rayClusterSpec or clusterSelector"
            )
        return
    if not at(job.spec, "clusterSelector") or not mapping(job.spec.get("clusterSelector")).get(
        "ray.io/cluster"
    ):
        yield Found(path, "clusterSelector names no cluster", "Set ray.io/cluster")
    if job.mode == "SidecarMode":
        yield Found(path, "SidecarMode needs a cluster of its own", "Use HTTPMode")
    if (integer(job.spec.get("backoffLimit")) or 0) > 0:
        yield Found(
            f"{job.path}.backoffLimit", "a job with clusterSelector is not tried again", "Leave it out"
        )


@rule("operator-submission", "job", reason=_REASON, source=f"{_SOURCE} ValidateRayJobSpec")
def submission(job: Job) -> Iterator[Found]:
    """The way of submission is one that there is, with what belongs to it."""
    path = f"{job.path}.submissionMode"
    if job.mode not in ("K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode"):
        yield Found(path, f"there is no mode {job.mode!r}", "Write HTTPMode")
    if job.mode == "InteractiveMode" and (integer(job.spec.get("backoffLimit")) or 0) > 0:
        yield Found(f"{job.path}.backoffLimit", "InteractiveMode is not tried again", "Leave it out")
    if job.mode == "SidecarMode":
        for key in ("submitterPodTemplate", "submitterConfig"):
            if job.spec.get(key) is not None:
                yield Found(f"{job.path}.{key}", f"SidecarMode takes no {key}", "Leave it out")
        policy = at(job.spec, "rayClusterSpec.headGroupSpec.template.spec.restartPolicy")
        if policy not in (None, "", "Never"):
            where = f"{job.path}.rayClusterSpec.headGroupSpec.template.spec.restartPolicy"
            yield Found(where, f"SidecarMode takes no head with restartPolicy {policy}", "Set Never")


@rule("operator-runtime-env", "job", reason=_REASON, source=f"{_SOURCE} UnmarshalRuntimeEnvYAML")
def runtime_env(job: Job) -> Iterator[Found]:
    """The runtime environment is YAML, and a mapping."""
    text = job.spec.get("runtimeEnvYAML")
    if not isinstance(text, str):
        return
    path = f"{job.path}.runtimeEnvYAML"
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        yield Found(path, "the runtime environment is not YAML", "Mend it")
        return
    if value is not None and not isinstance(value, dict):
        yield Found(path, "the runtime environment is not a mapping", "Write keys such as env_vars")


_ORDER = ["DeleteWorkers", "DeleteCluster", "DeleteSelf"]


@rule(
    "operator-deletion",
    "job",
    reason=_REASON,
    source=f"{_SOURCE} validateDeletionConfiguration, validateDeletionRules",
)
def deletion(job: Job) -> Iterator[Found]:
    """A deletion strategy is whole, of one kind, and fits the rest of the job."""
    strategy = job.spec.get("deletionStrategy")
    if not isinstance(strategy, dict):
        return
    path = f"{job.path}.deletionStrategy"
    rules = mappings(strategy.get("deletionRules"))
    shuts = job.spec.get("shutdownAfterJobFinishes") is True
    legacy = [at(strategy, f"{key}.policy") for key in ("onSuccess", "onFailure")]
    if rules and shuts:
        yield Found(path, "deletionRules and shutdownAfterJobFinishes exclude each other", "Keep one")
    # That both kinds, or none, are written is said by the CEL rules of the schema as well.
    if rules and any(legacy):
        yield Found(path, "deletionRules and onSuccess or onFailure exclude each other", "Keep deletionRules")
    elif not rules and None in legacy:
        yield Found(path, "the strategy is not whole", "Write deletionRules, or both onSuccess and onFailure")
    elif not rules and shuts and "DeleteNone" in legacy:
        yield Found(path, "shutdownAfterJobFinishes and DeleteNone exclude each other", "Keep one")
    for where, policy in _policies(path, rules, legacy):
        if job.selects and policy in ("DeleteCluster", "DeleteWorkers"):
            yield Found(
                where, f"{policy} is not for a job with clusterSelector", "Write DeleteSelf or DeleteNone"
            )
        elif policy == "DeleteWorkers" and job.cluster and job.cluster.autoscaling:
            yield Found(where, "DeleteWorkers does not go with autoscaling", "Write DeleteCluster")
    yield from _order(path, rules)


def _policies(
    path: str, rules: list[tuple[int, dict[str, Any]]], legacy: list[Any]
) -> Iterator[tuple[str, object]]:
    yield from ((f"{path}.deletionRules[{place}].policy", each.get("policy")) for place, each in rules)
    for key, policy in zip(("onSuccess", "onFailure"), legacy, strict=True):
        yield f"{path}.{key}.policy", policy


def _order(path: str, rules: list[tuple[int, dict[str, Any]]]) -> Iterator[Found]:
    """Of one end: every policy once, workers before the cluster, the cluster before the job."""
    ends: dict[tuple[str, str], dict[str, int]] = {}
    for place, each in rules:
        condition, policy = mapping(each.get("condition")), str(each.get("policy"))
        where = f"{path}.deletionRules[{place}]"
        keys = [key for key in ("jobStatus", "jobDeploymentStatus") if condition.get(key) is not None]
        if len(keys) != 1:
            yield Found(where, "a rule has one of jobStatus and jobDeploymentStatus", "Keep one")
            continue
        seconds = integer(condition.get("ttlSeconds")) or 0
        if seconds < 0:
            yield Found(where, "ttlSeconds is negative", "Write 0 or more")
        end = ends.setdefault((keys[0], str(condition[keys[0]])), {})
        if policy in end:
            yield Found(where, f"{policy} is there twice for {condition[keys[0]]}", "Remove one")
        end[policy] = seconds
    for (_, status), policies in ends.items():
        times = [policies[policy] for policy in _ORDER if policy in policies]
        if times != sorted(times):
            yield Found(
                f"{path}.deletionRules",
                f"after {status} the order is not {', '.join(_ORDER)}",
                "Raise ttlSeconds",
            )


@rule("operator-k8s-auth", "job", reason=_REASON, source=f"{_SOURCE} ValidateRayJobSpec")
def k8s_auth(job: Job) -> Iterator[Found]:
    """A RayJob has Ray's own token, not one of Kubernetes."""
    if at(job.spec, "rayClusterSpec.authOptions.enableK8sTokenAuth") is True:
        path = f"{job.path}.rayClusterSpec.authOptions.enableK8sTokenAuth"
        yield Found(path, "a RayJob does not take tokens of Kubernetes", "Leave it out")
