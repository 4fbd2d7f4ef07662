"""Every rule of `rayft k8s lint` on a manifest with that one thing wrong."""

from __future__ import annotations

from typing import Any

import pytest

from rayft.fleet.lint import lint
from rayft.fleet.lint.findings import RULES
from tests.manifests import good, patched
from tests.shared import shared_root

DRAIN = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
QUEUE = {"metadata/labels": {"kueue.x-k8s.io/queue-name": "team"}}
TOPOLOGY = "kueue.x-k8s.io/podset-required-topology"

Docs = list[dict[str, Any]]


def job(changes: dict[str, Any]) -> Docs:
    return [patched(changes)]


def env(value: str | None, name: str = DRAIN) -> list[dict[str, Any]]:
    return [{"name": name, **({} if value is None else {"value": value})}]


def more_env(name: str, value: str) -> list[dict[str, Any]]:
    """The head's variables and one more."""
    return [*env("150"), {"name": name, "value": value}]


def cluster(changes: dict[str, Any]) -> Docs:
    """A RayCluster of its own that scales."""
    spec = good()["spec"]["rayClusterSpec"] | {"enableInTreeAutoscaling": True}
    data = {"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": {"name": "c"}, "spec": spec}
    return [patched(changes, data)]


def config_map(data: dict[str, str]) -> Docs:
    return [{"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "job"}, "data": data}]


def shm(volume: dict[str, Any], **params: str) -> Docs:
    return job(
        {
            "pod/volumes": [{"name": "shm", **volume}],
            "ray/volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}],
            "group/rayStartParams": params,
        }
    )


def groups(count: int) -> list[dict[str, Any]]:
    group = good()["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    return [group | {"groupName": f"g{place}"} for place in range(count)]


def kueue(kind: str, name: str, spec: dict[str, Any], **metadata: str) -> dict[str, Any]:
    made = {"apiVersion": "kueue.x-k8s.io/v1beta2", "kind": kind, "metadata": {"name": name, **metadata}}
    return made | {"spec": spec}


def cluster_queue(changes: dict[str, Any] | None = None) -> dict[str, Any]:
    names = ["cpu", "memory", "nvidia.com/gpu"]
    quotas = [{"name": name, "nominalQuota": "100", "lendingLimit": "50"} for name in names]
    spec = {
        "cohortName": "all",
        "preemption": {"reclaimWithinCohort": "Any"},
        "resourceGroups": [{"coveredResources": names, "flavors": [{"name": "h200", "resources": quotas}]}],
    }
    return patched(changes or {}, kueue("ClusterQueue", "research", spec))


def queues(changes: dict[str, Any] | None = None, **local: str) -> Docs:
    queue = {"clusterQueue": "research"} | local
    return [
        cluster_queue(changes),
        kueue("ResourceFlavor", "h200", {"nodeLabels": {"gpu": "h200"}}),
        kueue("LocalQueue", "team", queue, namespace="team"),
        patched(QUEUE),
    ]


def rules(*policies: tuple[str, str, int]) -> list[dict[str, Any]]:
    return [
        {"policy": policy, "condition": {"jobStatus": status, "ttlSeconds": seconds}}
        for policy, status, seconds in policies
    ]


BOTH = rules(("DeleteCluster", "SUCCEEDED", 0), ("DeleteCluster", "FAILED", 0))
NO_SHUTDOWN = {"spec/shutdownAfterJobFinishes": False, "spec/ttlSecondsAfterFinished": 0}
KEY = "AKIA" + "ABCDEFGHIJKLMNOP"

CASES: list[tuple[str, Docs]] = [
    ("grace-drain", job({"pod/terminationGracePeriodSeconds": 110})),
    ("grace-drain", job({"pod/terminationGracePeriodSeconds": None})),
    ("grace-drain", job({"headpod/terminationGracePeriodSeconds": 150})),
    ("grace-drain", job({"pod/terminationGracePeriodSeconds": 30, "ray/env": []})),
    ("head-drain", job({"headray/env/0/value": "110"})),
    ("head-drain", job({"headray/env": None, "ray/env": None})),
    ("drain-off", job({"ray/env": env("0")})),
    ("drain-off", job({"ray/env": env("two minutes")})),
    (
        "pre-stop-ray-stop",
        job({"ray/lifecycle": {"preStop": {"exec": {"command": ["sh", "-c", "ray stop"]}}}}),
    ),
    (
        "pre-stop-ray-stop",
        job({"headray/lifecycle": {"preStop": {"exec": {"command": ["ray", "stop", "-f"]}}}}),
    ),
    ("pre-stop-ray-stop", job({"ray/lifecycle": {"preStop": {"exec": {"command": ["pkill", "raylet"]}}}})),
    ("submitter-follows-log", job({"spec/submissionMode": None})),
    ("submitter-follows-log", job({"spec/submissionMode": "K8sJobMode"})),
    ("submitter-follows-log", job({"spec/submissionMode": "SidecarMode"})),
    ("spot-window", job({"pod/nodeSelector": {"karpenter.sh/capacity-type": "spot"}, "ray/env": env("120")})),
    ("spot-window", job({"pod/nodeSelector": {"cloud.google.com/gke-spot": "true"}})),
    (
        "head-on-spot",
        job({"headpod/nodeSelector": {"karpenter.sh/capacity-type": "spot"}, "headray/env": env("119")}),
    ),
    ("deadline", job({"spec/activeDeadlineSeconds": None})),
    ("retry", job({"spec/backoffLimit": None})),
    ("retry", job({"spec/backoffLimit": 0})),
    ("clean-up", job(NO_SHUTDOWN)),
    ("clean-up", job(NO_SHUTDOWN | {"spec/deletionStrategy": {"deletionRules": BOTH[:1]}})),
    ("long-ttl", job({"spec/ttlSecondsAfterFinished": 86400})),
    ("head-takes-work", job({"head/rayStartParams": {}})),
    ("head-takes-work", job({"head/rayStartParams/num-cpus": "2"})),
    (
        "head-takes-work",
        job({"headray/resources/limits/nvidia.com~1gpu": 1, "headray/resources/requests/nvidia.com~1gpu": 1}),
    ),
    ("replicas", job({"group/replicas": 4})),
    ("replicas", job({"group/replicas": 1})),
    ("replicas", job({"group/replicas": None, "group/minReplicas": 0})),
    ("pre-running-deadline", job({"spec/preRunningDeadlineSeconds": 60})),
    ("cluster-without-end", cluster({"spec/enableInTreeAutoscaling": False})),
    ("gpu-limits", job({"ray/resources/requests/nvidia.com~1gpu": "2"})),
    ("gpu-limits", job({"ray/resources/limits/nvidia.com~1gpu": None})),
    ("guaranteed", job({"ray/resources/requests/cpu": "1"})),
    ("guaranteed", job({"headray/resources/limits/memory": None})),
    ("shared-memory", job({"group/rayStartParams": {"plasma-directory": "/tmp"}})),
    ("shared-memory", shm({"emptyDir": {}})),
    ("shared-memory", shm({"persistentVolumeClaim": {"claimName": "disk"}})),
    (
        "shared-memory",
        shm({"emptyDir": {"medium": "Memory", "sizeLimit": "1Gi"}}, **{"object-store-memory": "2000000000"}),
    ),
    ("shared-memory", job({"pod/volumes": [{"name": "shared-mem", "emptyDir": {}}]})),
    ("gpu-selector", job({"pod/nodeSelector": None})),
    ("image-tag", job({"ray/image": "registry.example:5000/rayft"})),
    ("image-tag", job({"headray/image": "registry.example/rayft:latest"})),
    ("ray-version", job({"ray/image": "rayproject/ray:2.58.0-py311-gpu"})),
    ("ray-version", job({"headray/image": "registry.example/rayft:0.1.0-ray2.59.1-cpu"})),
    ("stable-name", job({"metadata/name": "sft-20261123"})),
    ("stable-name", job({"metadata/name": "sft-2026-11-23-1530"})),
    ("stable-name", job({"metadata/name": "sft-1795449600"})),
    ("stable-name", [patched({"metadata/name": None, "metadata/generateName": "sft-"})]),
    ("stable-name", job({"spec/entrypoint": "rayft run job.yaml name=sft-$(date +%s)"})),
    ("stable-name", job({"spec/entrypoint": "rayft run job.yaml name=sft-20261123-1530"})),
    ("stable-name", config_map({"job.yaml": "name: a-2026-11-23\nmethod: sft\n"})),
    ("name", job({"metadata/name": "x" * 48})),
    ("name", job({"metadata/name": "1st"})),
    ("name", cluster({"metadata/name": "x" * 54})),
    ("group-name", job({"group/groupName": "GPU_workers"})),
    ("label", job({"metadata/labels": {"team": "research and development"}})),
    ("label", job({"group/template/metadata": {"labels": {"team": "x" * 64}}})),
    ("duplicate", [good(), good()]),
    (
        "other-namespace",
        [
            {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "job"}, "data": {}},
            patched({"headpod/volumes": [{"name": "job", "configMap": {"name": "job"}}]}),
        ],
    ),
    ("secret-in-env", job({"ray/env/1": {"name": "HF_TOKEN", "value": "abcdefgh"}})),
    ("secret-in-env", job({"headray/env/1": {"name": "SOME_SETTING", "value": "hf_" + "a" * 34}})),
    ("secret-in-env", job({"ray/env/1": {"name": "DATABASE", "value": "postgres://me:hunter22@db/x"}})),
    ("secret-in-job", job({"spec/runtimeEnvYAML": f"env_vars: {{AWS_ACCESS_KEY_ID: {KEY}}}"})),
    ("secret-in-job", job({"spec/metadata": {"wandb_api_key": "abcdefgh"}})),
    ("secret-in-job", job({"metadata/annotations": {"note": "glpat-" + "a" * 20}})),
    ("secret-in-job", job({"spec/entrypoint": f"env KEY={KEY} python x.py"})),
    ("secret-in-job", job({"head/rayStartParams/redis-password": "abcdefgh"})),
    ("secret-in-job", config_map({"env": f"key={KEY}"})),
    (
        "secret-in-manifest",
        [{"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s"}, "stringData": {"a": "b"}}],
    ),
    ("privileged", job({"ray/securityContext/privileged": True})),
    ("privileged", job({"ray/securityContext/capabilities/add": ["SYS_ADMIN"]})),
    ("privileged", job({"ray/securityContext/allowPrivilegeEscalation": True})),
    ("privileged", job({"pod/hostNetwork": True})),
    ("privileged", job({"pod/volumes": [{"name": "root", "hostPath": {"path": "/"}}]})),
    ("host-path", job({"pod/volumes": [{"name": "cache", "hostPath": {"path": "/mnt/nvme/cache"}}]})),
    ("root", job({"pod/securityContext/runAsUser": 0})),
    ("root", job({"headpod/securityContext/runAsNonRoot": False})),
    ("hardening", job({"pod/securityContext/runAsNonRoot": None})),
    ("hardening", job({"ray/securityContext": None})),
    ("service-account-token", job({"pod/automountServiceAccountToken": None})),
    ("token", job({"cluster/authOptions": None})),
    ("open-dashboard", job({"cluster/authOptions": None, "head/serviceType": "LoadBalancer"})),
    ("open-dashboard", job({"cluster/authOptions/mode": "disabled", "head/enableIngress": True})),
    ("kueue-clean-up", job(QUEUE | NO_SHUTDOWN)),
    (
        "kueue-cluster-selector",
        job(
            QUEUE
            | {
                "spec/clusterSelector": {"ray.io/cluster": "c"},
                "spec/backoffLimit": 0,
                "spec/rayClusterSpec": None,
            }
        ),
    ),
    ("kueue-pre-running-deadline", job(QUEUE | {"spec/preRunningDeadlineSeconds": 3600})),
    ("kueue-autoscaler", job(QUEUE | {"cluster/enableInTreeAutoscaling": True})),
    (
        "kueue-autoscaler",
        job(
            QUEUE
            | {
                "metadata/annotations": {"kueue.x-k8s.io/elastic-job": "true"},
                "cluster/enableInTreeAutoscaling": True,
                "spec/managedBy": "kueue.x-k8s.io/multikueue",
            }
        ),
    ),
    ("kueue-pod-sets", job(QUEUE | {"cluster/workerGroupSpecs": groups(18)})),
    ("kueue-group-name", job(QUEUE | {"group/groupName": "head"})),
    ("kueue-queue-label", job({"metadata/annotations": QUEUE["metadata/labels"]})),
    ("kueue-queue-label", job({"group/template/metadata": {"labels": QUEUE["metadata/labels"]}})),
    ("suspended", job({"spec/suspend": True})),
    (
        "kueue-topology",
        job({"group/template/metadata": {"annotations": {"kueue.x-k8s.io/podset-group-name": "a"}}}),
    ),
    (
        "kueue-topology",
        job(
            {
                "group/template/metadata": {
                    "annotations": {"kueue.x-k8s.io/podset-slice-size": "2", TOPOLOGY: "rack"}
                }
            }
        ),
    ),
    ("kueue-quota", [cluster_queue({"spec/resourceGroups/0/flavors/0/resources/0/lendingLimit": "200"})]),
    ("kueue-quota", [cluster_queue({"spec/cohortName": None})]),
    (
        "kueue-quota",
        [cluster_queue({"spec/resourceGroups/0/coveredResources": ["memory", "cpu", "nvidia.com/gpu"]})],
    ),
    ("kueue-preemption", [cluster_queue({"spec/preemption": None})]),
    ("kueue-reference", queues(clusterQueue="reserch")),
    ("kueue-reference", [*queues()[:3], patched(QUEUE | {"metadata/namespace": "other"})]),
    (
        "kueue-covered",
        queues(
            {
                "spec/resourceGroups/0/coveredResources": ["cpu", "memory"],
                "spec/resourceGroups/0/flavors/0/resources": [
                    {"name": "cpu", "nominalQuota": "100"},
                    {"name": "memory", "nominalQuota": "1Ti"},
                ],
            }
        ),
    ),
    (
        "operator-ttl",
        job({"spec/shutdownAfterJobFinishes": False, "spec/deletionStrategy": {"deletionRules": BOTH}}),
    ),
    ("operator-numbers", job({"spec/activeDeadlineSeconds": 0})),
    ("operator-numbers", job({"spec/backoffLimit": -1})),
    ("operator-cluster", job({"spec/rayClusterSpec": None})),
    ("operator-cluster", job({"spec/rayClusterSpec": None, "spec/clusterSelector": {"ray.io/cluster": "c"}})),
    ("operator-submission", job({"spec/submissionMode": "HttpMode"})),
    ("operator-submission", job({"spec/submissionMode": "InteractiveMode"})),
    ("operator-runtime-env", job({"spec/runtimeEnvYAML": "pip: ["})),
    ("operator-runtime-env", job({"spec/runtimeEnvYAML": "- pip"})),
    ("operator-deletion", job({"spec/deletionStrategy": {"deletionRules": BOTH}})),
    ("operator-deletion", job(NO_SHUTDOWN | {"spec/deletionStrategy": {"deletionRules": [*BOTH, BOTH[0]]}})),
    (
        "operator-deletion",
        job(
            NO_SHUTDOWN
            | {"spec/deletionStrategy": {"deletionRules": [*BOTH, *rules(("DeleteWorkers", "FAILED", 60))]}}
        ),
    ),
    ("operator-k8s-auth", job({"cluster/authOptions/enableK8sTokenAuth": True})),
    ("operator-containers", job({"pod/containers": []})),
    ("operator-resources", job({"head/resources": {"CPU": "0"}})),
    ("operator-labels", job({"group/rayStartParams": {"labels": "a=b"}})),
    ("operator-labels", job({"group/labels": {"a": "not a label"}})),
    ("operator-replicas", job({"group/minReplicas": 3})),
    ("operator-group-names", job({"cluster/workerGroupSpecs": groups(1) * 2})),
    ("operator-autoscaler", job({"headray/env/1": {"name": "RAY_enable_autoscaler_v2", "value": "1"}})),
    (
        "operator-autoscaler",
        cluster(
            {
                "spec/autoscalerOptions": {"version": "v2"},
                "spec/workerGroupSpecs/0/template/spec/restartPolicy": "Always",
            }
        ),
    ),
    ("operator-autoscaler-v2", job({"group/idleTimeoutSeconds": 60})),
    ("operator-autoscaler-v2", job({"group/priority": 1})),
    (
        "operator-token",
        [patched({"cluster/rayVersion": "2.51.0", "headray/image": "r:1", "ray/image": "r:1"})],
    ),
    (
        "operator-token",
        cluster({"spec/authOptions": {"mode": "token", "enableK8sTokenAuth": True, "secretName": "s"}}),
    ),
    ("operator-upgrade", job({"cluster/upgradeStrategy": {"type": "Recreate"}})),
    ("operator-feature-gate", job({"cluster/networkPolicy": {"mode": "DenyAll"}})),
    ("operator-gcs", job({"headray/env/1": {"name": "RAY_REDIS_ADDRESS", "value": "redis:6379"}})),
    (
        "operator-gcs",
        job({"cluster/gcsFaultToleranceOptions": {"redisAddress": "r", "storage": {"size": "1Gi"}}}),
    ),
    ("schema", job({"spec/backoffLimit": "six"})),
    ("schema", job({"spec/rayClusterSpec/headGroupSpec/rayStartParams/num-cpus": 0})),
    ("unknown-field", job({"spec/activeDeadlineSecond": 60})),
    ("unknown-field", [kueue("LocalQueue", "team", {"clusterQueues": "research"}, namespace="team")]),
    ("core-schema", job({"ray/imagePulPolicy": "Always"})),
    (
        "core-schema",
        [
            {
                "apiVersion": "v1",
                "kind": "ResourceQuota",
                "metadata": {"name": "q"},
                "spec": {"hards": {"cpu": 1}},
            }
        ],
    ),
    ("unknown-ignore", job({"metadata/annotations": {"rayft.dev/lint-ignore": "grace"}})),
]

#: Those that always come with another finding, which is named after a `+`.
TOGETHER = [
    ("operator-suspend+kueue-clean-up", job(QUEUE | NO_SHUTDOWN | {"spec/suspend": True})),
    (
        "operator-network-policy+operator-feature-gate",
        job({"cluster/networkPolicy": {"mode": "DenyAllIngress", "head": {"egressRules": [{}]}}}),
    ),
    (
        "operator-tls+operator-feature-gate",
        job({"cluster/tlsOptions": {"enabled": True}, "ray/env/1": {"name": "RAY_USE_TLS", "value": "1"}}),
    ),
]


def found(documents: Docs, **more: Any) -> set[str]:
    return {finding.rule for finding in lint(documents, **more).findings}


def test_good_manifests_have_no_finding() -> None:
    assert found([good()]) == set()
    assert found([patched(QUEUE)]) == set()
    assert found(queues()) == set()
    assert found(cluster({})) == set()
    assert found(job(NO_SHUTDOWN | {"spec/deletionStrategy": {"deletionRules": BOTH}})) == set()


@pytest.mark.parametrize(
    ("rule", "documents"), CASES, ids=[f"{rule}-{place}" for place, (rule, _) in enumerate(CASES)]
)
def test_one_thing_wrong_is_one_finding(rule: str, documents: Docs) -> None:
    assert found(documents) == {rule}


@pytest.mark.parametrize(("names", "documents"), TOGETHER)
def test_things_that_come_together(names: str, documents: Docs) -> None:
    assert found(documents) == set(names.split("+"))


def test_every_rule_has_its_case() -> None:
    cases = {rule for rule, _ in CASES} | {names.split("+")[0] for names, _ in TOGETHER}
    # What schemas carry is tried in test_fleet_lint_schemas.py.
    assert RULES.keys() - cases == {"cel"}


def test_every_rule_says_why_and_where_from() -> None:
    for rule in RULES.values():
        assert len(rule.reason) > 10, rule.id
        assert len(rule.source) > 10, rule.id
        assert rule.check is None or rule.check.__doc__, rule.id


def test_the_same_with_the_schemas_of_the_projects() -> None:
    folder = shared_root() / "schemas"
    if not folder.is_dir():
        pytest.skip(f"schemas are not at {folder} (set RAYFT_SHARED)")
    # Structure is said by those schemas instead, and some rules of the operator are CEL rules of theirs as well.
    other = {"core-schema", "schema", "unknown-field", "cel"}
    for rule, documents in CASES:
        got = found(documents, schemas=folder)
        assert rule in got or (rule in other and got & other), (rule, got)
        assert got <= {rule} | other, (rule, got)
