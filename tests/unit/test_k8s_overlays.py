"""The manifests in k8s/: every overlay is built, linted, validated and held to a golden file.

`RAYFT_GOLDEN=write` writes the golden files anew; read what changed before you commit it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from rayft.fleet.lint import lint
from rayft.fleet.lint.findings import Document
from rayft.fleet.lint.quantity import quantity
from rayft.fleet.lint.read import read
from rayft.fleet.lint.views import Group, cluster_of
from rayft.fleet.render.names import rayjob_name
from rayft.fleet.render.run import render
from rayft.spec import load_job
from tests.fleets import job, large, profile, small
from tests.shared import ROOT, shared_root

K8S = ROOT / "k8s"
GOLDEN = ROOT / "tests" / "golden" / "k8s"
OVERLAYS = sorted(path.name for path in (K8S / "overlays").iterdir())
BUILT = [*(f"overlays/{name}" for name in OVERLAYS), "base", "queues"]

_built: dict[str, list[Document]] = {}


def built(folder: str) -> list[Document]:
    """What kubectl makes of a kustomization; once for all tests."""
    if folder not in _built:
        (_built[folder],) = read([str(K8S / folder)])
    return _built[folder]


def the(folder: str, kind: str) -> Document:
    (found,) = [each for each in built(folder) if each.kind == kind]
    return found


def test_the_overlays_are_those_that_the_readme_speaks_of() -> None:
    assert OVERLAYS == ["aws", "cpu", "gpu", "kueue", "spot"]
    readme = (K8S / "README.md").read_text()
    assert [name for name in OVERLAYS if f"overlays/{name}" not in readme and f"`{name}`" not in readme] == []
    assert len(readme.splitlines()) <= 80


@pytest.mark.parametrize("folder", BUILT)
def test_nothing_is_wrong_with_them(folder: str) -> None:
    """By rayft's rules and schemas and those of Kubernetes."""
    report = lint(built(folder))
    assert [str(finding) for finding in report.findings] == []
    # Everything has a schema, and nothing is silenced.
    assert report.notes == [
        "kinds of KubeRay and Kueue are checked against rayft's own small schemas: no --schemas given"
    ]


@pytest.mark.parametrize("folder", BUILT)
def test_they_fit_the_schemas_of_kuberay_and_kueue(folder: str) -> None:
    """With their CEL rules."""
    schemas = shared_root() / "schemas"
    if not schemas.is_dir():
        pytest.skip(f"schemas are not at {schemas} (set RAYFT_SHARED)")
    report = lint(built(folder), schemas=schemas)
    assert [str(finding) for finding in report.findings] == []
    assert report.notes == []


@pytest.mark.parametrize("folder", BUILT)
def test_they_are_what_they_were(folder: str) -> None:
    golden = GOLDEN / f"{folder.removeprefix('overlays/')}.yaml"
    text = yaml.safe_dump_all([document.data for document in built(folder)], sort_keys=False, width=120)
    if os.environ.get("RAYFT_GOLDEN") == "write":
        golden.parent.mkdir(parents=True, exist_ok=True)
        golden.write_text(text)
    assert golden.read_text() == text, f"RAYFT_GOLDEN=write writes {golden.name} anew"


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_job_in_them_is_a_job(name: str, tmp_path: Path) -> None:
    """And what it asks for is what the cluster beside it has."""
    data = the(f"overlays/{name}", "ConfigMap").data["data"]
    path = tmp_path / "job.yaml"
    path.write_text(data["job.yaml"])
    job = load_job(str(path), [])
    run = the(f"overlays/{name}", "RayJob")
    assert job.name == run.name
    cluster = cluster_of(run)
    assert cluster
    (workers,) = cluster.workers
    container = workers.pod.ray
    assert container
    limits = container.resources("limits")
    has = {key: workers.count * int(limits.get(key, 0)) for key in ("cpu", "nvidia.com/gpu")}
    assert job.cluster.num_workers * job.cluster.cpus_per_worker <= has["cpu"]  # type: ignore[operator]
    assert job.cluster.num_workers * job.cluster.gpus_per_worker == has["nvidia.com/gpu"]  # type: ignore[operator]
    for row in job.data.train:
        local = str(row.path).startswith("/")
        assert not local or Path(str(row.path)).name in data, row.path


@pytest.mark.parametrize("name", OVERLAYS)
def test_no_job_file_is_taken_for_the_run_that_an_overlay_starts(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The READMEs go on from an overlay to `rayft k8s render` of a file of jobs/, in the same namespace and storage."""
    monkeypatch.chdir(ROOT)
    files = (ROOT / "jobs").glob("*.yaml")
    names = {rayjob_name(yaml.safe_load(path.read_text())["name"]) for path in files}
    assert the(f"overlays/{name}", "RayJob").name not in names
    own = {(each.kind, each.name, each.namespace) for each in built(f"overlays/{name}")}
    run = job("demo", "model.path=HuggingFaceTB/SmolLM2-135M-Instruct")
    made = render(run, profile("cpu"), architecture=small(), scorers={}).objects
    assert own.isdisjoint(
        (one["kind"], one["metadata"]["name"], one["metadata"]["namespace"]) for one in made
    )


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_cache_holds_the_model_and_its_volume_the_cache(name: str) -> None:
    """Of head and workers: the driver looks at the model's weights too."""
    data = the(f"overlays/{name}", "ConfigMap").data["data"]
    sizes = {"Qwen/Qwen3-8B": large(), "HuggingFaceTB/SmolLM2-135M-Instruct": small()}
    model = sizes[yaml.safe_load(data["job.yaml"])["model"]["path"]]
    cluster = cluster_of(the(f"overlays/{name}", "RayJob"))
    assert cluster
    for group in cluster.groups:
        ray = group.pod.ray
        assert ray
        has = {one["name"]: one["value"] for one in ray.data["env"]}
        mounts = {one["name"]: one["mountPath"] for one in ray.data["volumeMounts"]}
        assert has["RAYFT_CACHE"] == mounts["cache"]
        assert has["HF_HOME"].startswith(mounts["cache"] + "/")
        limits = {
            one["name"]: int(quantity(one["emptyDir"]["sizeLimit"]) or 0)
            for one in group.pod.spec["volumes"]
            if "emptyDir" in one and one["emptyDir"].get("medium") != "Memory"
        }
        bound = float(has["RAYFT_CACHE_GB"]) * 1e9
        assert 0.7 * limits["cache"] < bound < 0.95 * limits["cache"]
        assert 2 * model.total < bound, "weights in 16 bits"
        assert sum(limits.values()) <= (quantity(ray.resources("limits")["ephemeral-storage"]) or 0)


@pytest.mark.parametrize("name", OVERLAYS)
def test_everything_is_in_one_namespace(name: str) -> None:
    """But for what is of the whole cluster, which has none."""
    whole = {"Namespace", "ClusterQueue", "ResourceFlavor", "Topology", "WorkloadPriorityClass"}
    namespace = the(f"overlays/{name}", "Namespace").name
    for document in built(f"overlays/{name}"):
        assert document.namespace == ("" if document.kind in whole else namespace), document.title


@pytest.mark.parametrize("name", OVERLAYS)
def test_pods_run_as_an_account_that_is_there_and_belong_to_the_policy(name: str) -> None:
    folder = f"overlays/{name}"
    account = the(folder, "ServiceAccount")
    policies = [each.spec for each in built(folder) if each.kind == "NetworkPolicy"]
    cluster = cluster_of(the(folder, "RayJob"))
    assert cluster
    for group in cluster.groups:
        assert group.pod.spec["serviceAccountName"] == account.name
        labels = group.pod.template["metadata"]["labels"]
        chosen = [
            policy
            for policy in policies
            if policy["podSelector"].get("matchLabels", {}).items() <= labels.items()
        ]
        assert len(chosen) == 2, "the one that denies, and the run's own"


def test_the_account_of_aws_has_a_role_and_no_key() -> None:
    account = the("overlays/aws", "ServiceAccount")
    assert account.strings("annotations")["eks.amazonaws.com/role-arn"].startswith("arn:aws:iam::")
    texts = yaml.safe_dump_all([document.data for document in built("overlays/aws")])
    assert "AWS_SECRET_ACCESS_KEY" not in texts
    assert "secretKeyRef" not in texts


def test_spot_workers_go_within_the_notice_and_the_head_stays() -> None:
    cluster = cluster_of(the("overlays/spot", "RayJob"))
    assert cluster
    (workers,) = cluster.workers
    assert workers.pod.spec["terminationGracePeriodSeconds"] < 120
    capacity = "eks.amazonaws.com/capacityType"
    assert workers.pod.spec["nodeSelector"][capacity] == "SPOT"
    assert cluster.head.pod.spec["nodeSelector"][capacity] == "ON_DEMAND"


def fits(flavor: dict[str, Any], labels: dict[str, str], group: Group) -> bool:
    """Whether a flavor agrees with the selector of a group's pods and has room for all of them."""
    container = group.pod.ray
    assert container
    selector: dict[str, Any] = group.pod.spec["nodeSelector"]
    quota = {each["name"]: quantity(each["nominalQuota"]) or 0 for each in flavor["resources"]}
    asked = container.resources("requests")
    agree = all(selector.get(key, value) == value for key, value in labels.items())
    return agree and all((quantity(each) or 0) * group.count <= quota[key] for key, each in asked.items())


@pytest.mark.parametrize("name", ["kueue", "spot"])
def test_a_queue_has_room_for_the_run_that_waits_in_it(name: str) -> None:
    documents = built(f"overlays/{name}")
    cluster = cluster_of(the(f"overlays/{name}", "RayJob"))
    assert cluster
    queue = next(each for each in documents if each.kind == "LocalQueue" and each.name == cluster.queue)
    whole = next(
        each for each in documents if each.kind == "ClusterQueue" and each.name == queue.spec["clusterQueue"]
    )
    labels = {each.name: each.spec["nodeLabels"] for each in documents if each.kind == "ResourceFlavor"}
    (resources,) = whole.spec["resourceGroups"]
    for group in cluster.groups:
        flavors = [each["name"] for each in resources["flavors"] if fits(each, labels[each["name"]], group)]
        assert flavors, group.name


@pytest.mark.parametrize(("profile", "overlay"), [("cpu", "cpu"), ("gpu", "kueue"), ("aws-spot", "spot")])
def test_fleet_profiles_name_what_is_there(profile: str, overlay: str) -> None:
    """Namespace, account, queue, priorities and claim of a profile are those of its overlay."""
    path = ROOT / "cluster" / "profiles" / f"{profile}.yaml"
    if not path.is_file():
        pytest.skip(f"there is no {path}")
    data = yaml.safe_load(path.read_text())
    documents = built(f"overlays/{overlay}")
    names = {(each.kind, each.name) for each in documents}
    queue = data.get("queue") or {}
    wanted = {
        ("Namespace", data["namespace"]),
        ("ServiceAccount", data.get("service_account")),
        ("LocalQueue", queue.get("local_queue")),
        ("PersistentVolumeClaim", data.get("storage_claim")),
        *(("WorkloadPriorityClass", name) for name in (queue.get("priorities") or {}).values()),
    }
    assert {(kind, name) for kind, name in wanted if name} - names == set()
    # The namespace refuses paths of a node.
    assert "host_path" not in (data.get("cache") or {})
