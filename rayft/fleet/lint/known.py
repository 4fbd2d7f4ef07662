"""rayft's own small schemas of the kinds that it writes: field names, types, choices. Used where no --schemas are given.

Pods are left to `core.py`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

TEXT: dict[str, Any] = {"type": "string"}
NUMBER: dict[str, Any] = {"type": "number"}
FLAG: dict[str, Any] = {"type": "boolean"}
ANY: dict[str, Any] = {"x-kubernetes-preserve-unknown-fields": True}
INT: dict[str, Any] = {"type": "integer", "format": "int32"}
QUANTITY: dict[str, Any] = {
    "anyOf": [{"type": "integer"}, {"type": "string"}],
    "pattern": r"^[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)(([KMGTPE]i)|[numkMGTPE]|([eE][+-]?[0-9]+))?$",
}
#: A pod template or another part that Kubernetes defines.
PART: dict[str, Any] = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}


def fields(**known: Any) -> dict[str, Any]:
    """A mapping with these fields; a trailing `_` marks one that must be there."""
    properties = {name.removesuffix("_"): schema for name, schema in known.items()}
    schema: dict[str, Any] = {"type": "object", "properties": properties}
    if required := [name.removesuffix("_") for name in known if name.endswith("_")]:
        schema["required"] = required
    return schema


def choice(*texts: str) -> dict[str, Any]:
    """One of some texts."""
    return {"type": "string", "enum": list(texts)}


def some(schema: dict[str, Any], *, key: str | None = None) -> dict[str, Any]:
    """A list; no two of its elements share the value of `key`."""
    made: dict[str, Any] = {"type": "array", "items": schema}
    if key:
        made |= {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": [key]}
    return made


def named(schema: dict[str, Any]) -> dict[str, Any]:
    """A mapping from names of the user's own."""
    return {"type": "object", "additionalProperties": schema}


TEXTS = named(TEXT)

OBJECT_META = fields(
    name=TEXT,
    generateName=TEXT,
    namespace=TEXT,
    labels=TEXTS,
    annotations=TEXTS,
    finalizers=some(TEXT),
    ownerReferences=some(PART),
    creationTimestamp=ANY,
    deletionTimestamp=ANY,
    deletionGracePeriodSeconds=ANY,
    resourceVersion=TEXT,
    generation={"type": "integer"},
    uid=TEXT,
    selfLink=TEXT,
    managedFields=some(PART),
)


def _group(**more: Any) -> dict[str, Any]:
    """A group of Ray nodes."""
    return fields(template_=PART, rayStartParams=TEXTS, labels=TEXTS, resources=named(QUANTITY), **more)


_REDIS = fields(value=TEXT, valueFrom=PART)
_RULES = fields(ingressRules=some(PART), egressRules=some(PART))

RAY_CLUSTER = fields(
    rayVersion=TEXT,
    headGroupSpec_=_group(
        serviceType=TEXT,
        headService=PART,
        enableIngress=FLAG,
        ingressOptions=fields(
            host=TEXT, path=TEXT, pathType=choice("Exact", "Prefix", "ImplementationSpecific"), tls=some(PART)
        ),
    ),
    workerGroupSpecs=some(
        _group(
            groupName_=TEXT,
            replicas=INT | {"default": 0},
            minReplicas=INT | {"default": 0},
            maxReplicas=INT | {"default": 2**31 - 1},
            numOfHosts=INT | {"default": 1},
            idleTimeoutSeconds=INT,
            priority=INT,
            suspend=FLAG,
            scaleStrategy=fields(workersToDelete=some(TEXT)),
        )
    ),
    enableInTreeAutoscaling=FLAG,
    autoscalerOptions=fields(
        version=choice("v1", "v2"),
        idleTimeoutSeconds=INT,
        upscalingMode=choice("Default", "Aggressive", "Conservative"),
        image=TEXT,
        imagePullPolicy=TEXT,
        resources=PART,
        env=some(PART),
        envFrom=some(PART),
        volumeMounts=some(PART),
        securityContext=PART,
        command=some(TEXT),
        args=some(TEXT),
    ),
    authOptions=fields(mode=choice("disabled", "token"), secretName=TEXT, enableK8sTokenAuth=FLAG),
    gcsFaultToleranceOptions=fields(
        backend=choice("redis", "rocksdb"),
        redisAddress=TEXT,
        redisUsername=_REDIS,
        redisPassword=_REDIS,
        externalStorageNamespace=TEXT,
        storage=fields(
            size=QUANTITY,
            storageClassName=TEXT,
            accessModes=some(TEXT),
            claimName=TEXT,
            subPath=TEXT,
            deletionPolicy=choice("DeleteWithCluster", "Retain"),
        ),
    ),
    networkPolicy=fields(
        mode=TEXT,
        head=_RULES,
        worker=_RULES,
        workerGroups=some(fields(groupName_=TEXT, ingressRules=some(PART), egressRules=some(PART))),
    ),
    tlsOptions=fields(enabled=FLAG),
    historyServerOptions=PART,
    headServiceAnnotations=TEXTS,
    managedBy=TEXT,
    suspend=FLAG,
    upgradeStrategy=fields(type=choice("Recreate", "None")),
)

_POLICY = choice("DeleteCluster", "DeleteWorkers", "DeleteSelf", "DeleteNone")

RAY_JOB = fields(
    entrypoint=TEXT,
    entrypointNumCpus=NUMBER,
    entrypointNumGpus=NUMBER,
    entrypointResources=TEXT,
    runtimeEnvYAML=TEXT,
    metadata=TEXTS,
    jobId=TEXT,
    submissionMode=TEXT,
    submitterPodTemplate=PART,
    submitterConfig=fields(backoffLimit=INT),
    backoffLimit=INT,
    activeDeadlineSeconds=INT,
    preRunningDeadlineSeconds=INT | {"minimum": 1},
    shutdownAfterJobFinishes=FLAG,
    ttlSecondsAfterFinished=INT,
    deletionStrategy=fields(
        onSuccess=fields(policy=_POLICY),
        onFailure=fields(policy=_POLICY),
        deletionRules=some(
            fields(
                policy_=_POLICY,
                condition_=fields(
                    jobStatus=choice("SUCCEEDED", "FAILED"),
                    jobDeploymentStatus=choice("Failed"),
                    ttlSeconds=INT | {"minimum": 0},
                ),
            )
        ),
    ),
    suspend=FLAG,
    managedBy=TEXT,
    clusterSelector=TEXTS,
    rayClusterSpec=RAY_CLUSTER,
)

_QUOTA = fields(name_=TEXT, nominalQuota_=QUANTITY, borrowingLimit=QUANTITY, lendingLimit=QUANTITY)
_RESOURCE_GROUPS = some(
    fields(
        coveredResources_=some(TEXT),
        flavors_=some(fields(name_=TEXT, resources_=some(_QUOTA, key="name")), key="name"),
    )
)
_SHARE = fields(weight=QUANTITY)
_STOP = choice("None", "Hold", "HoldAndDrain")
_TAINT = fields(key_=TEXT, effect_=TEXT, value=TEXT, timeAdded=ANY)
_TOLERATION = fields(key=TEXT, operator=TEXT, value=TEXT, effect=TEXT, tolerationSeconds={"type": "integer"})

_KUEUE: dict[str, dict[str, Any]] = {
    "ClusterQueue": fields(
        cohortName=TEXT,
        namespaceSelector=PART,
        resourceGroups=_RESOURCE_GROUPS,
        queueingStrategy=choice("StrictFIFO", "BestEffortFIFO"),
        preemption=fields(
            withinClusterQueue=choice("Never", "LowerPriority", "LowerOrNewerEqualPriority"),
            reclaimWithinCohort=choice("Never", "LowerPriority", "Any"),
            borrowWithinCohort=fields(policy=choice("Never", "LowerPriority"), maxPriorityThreshold=INT),
        ),
        flavorFungibility=fields(
            whenCanBorrow=choice("MayStopSearch", "TryNextFlavor"),
            whenCanPreempt=choice("MayStopSearch", "TryNextFlavor"),
            preference=choice("BorrowingOverPreemption", "PreemptionOverBorrowing"),
        ),
        fairSharing=_SHARE,
        stopPolicy=_STOP,
        admissionChecksStrategy=fields(
            admissionChecks_=some(fields(name_=TEXT, onFlavors=some(TEXT)), key="name")
        ),
        admissionScope=PART,
        concurrentAdmissionPolicy=PART,
    ),
    "Cohort": fields(parentName=TEXT, resourceGroups=_RESOURCE_GROUPS, fairSharing=_SHARE),
    "LocalQueue": fields(clusterQueue=TEXT, stopPolicy=_STOP, fairSharing=_SHARE),
    "ResourceFlavor": fields(
        nodeLabels=TEXTS, nodeTaints=some(_TAINT), tolerations=some(_TOLERATION), topologyName=TEXT
    ),
    "Topology": fields(levels_=some(fields(nodeLabel_=TEXT))),
    "AdmissionCheck": fields(controllerName_=TEXT, parameters=fields(apiGroup_=TEXT, kind_=TEXT, name_=TEXT)),
}


def _object(**more: Any) -> dict[str, Any]:
    return fields(apiVersion_=TEXT, kind_=TEXT, metadata_=OBJECT_META, status=ANY, **more)


@cache
def known_schema(api_version: str, kind: str) -> dict[str, Any] | None:
    """rayft's own schema of a kind; None for kinds that it does not know."""
    if api_version == "ray.io/v1" and kind == "RayJob":
        return _object(spec_=RAY_JOB)
    if api_version == "ray.io/v1" and kind == "RayCluster":
        return _object(spec_=RAY_CLUSTER)
    if api_version == "ray.io/v1" and kind == "RayCronJob":
        return _object(spec_=PART | fields(schedule_=TEXT, timeZone=TEXT, suspend=FLAG, jobTemplate_=RAY_JOB))
    if api_version == "kueue.x-k8s.io/v1beta2" and kind == "WorkloadPriorityClass":
        return _object(value_=INT, description=TEXT)
    if api_version == "kueue.x-k8s.io/v1beta2" and kind in _KUEUE:
        return _object(spec=_KUEUE[kind])
    return None
