"""Schemas and the CEL rules they carry: a small one of the test's own, and those of KubeRay and Kueue."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from rayft.fleet.lint import Report, lint
from rayft.fleet.lint.known import known_schema
from tests.manifests import good, patched
from tests.shared import shared_root

OWN: dict[str, Any] = {
    "type": "object",
    "required": ["spec"],
    "properties": {
        "apiVersion": {"type": "string"},
        "kind": {"type": "string"},
        "metadata": {"type": "object"},
        "spec": {
            "type": "object",
            "required": ["low"],
            "properties": {
                "low": {"type": "integer", "format": "int32", "default": 3},
                "high": {"type": "integer"},
                "mode": {"type": "string", "enum": ["a", "b"]},
                "size": {"anyOf": [{"type": "integer"}, {"type": "string"}], "pattern": "^[0-9]+$"},
                "list": {
                    "type": "array",
                    "x-kubernetes-list-type": "map",
                    "x-kubernetes-list-map-keys": ["name"],
                    "items": {"type": "object", "properties": {"name": {"type": "string"}}},
                },
                "word": {"type": "string", "pattern": "^(?i)[a-z]+$"},
            },
            "x-kubernetes-validations": [
                {"rule": "!has(self.high) || self.low <= self.high", "message": "low is over high"},
                {"rule": "self.low == oldSelf.low", "message": "low never changes"},
            ],
        },
    },
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    data = {"apiVersion": "example.com/v1", "kind": "Thing", "openAPIV3Schema": OWN}
    (tmp_path / "thing.json").write_text(json.dumps(data))
    return tmp_path


def look(folder: Path, spec: Any) -> Report:
    thing = {"apiVersion": "example.com/v1", "kind": "Thing", "metadata": {"name": "x"}, "spec": spec}
    return lint([thing], schemas=folder)


@pytest.mark.parametrize(
    ("spec", "rule", "said"),
    [
        ({"high": 2}, "cel", "low is over high"),  # low is 3 by default
        ({"low": 5, "high": 4}, "cel", "low is over high"),
        ({"low": "5"}, "schema", "must be a whole number, is a text"),
        ({"low": 2**31}, "schema", "int32"),
        ({"mode": "c"}, "schema", "is not one of"),
        ({"size": "1x"}, "schema", "does not match"),
        ({"word": "a1"}, "schema", "does not match"),
        ({"lo": 1}, "unknown-field", "there is no field 'lo'"),
        ({"list": [{"name": "a"}, {"name": "a"}]}, "unknown-field", "the list has it already"),
    ],
)
def test_what_an_api_server_refuses(folder: Path, spec: Any, rule: str, said: str) -> None:
    (finding,) = look(folder, spec).findings
    assert finding.rule == rule
    assert said in finding.what


def test_what_an_api_server_takes(folder: Path) -> None:
    """Defaults are filled in first, nulls are nothing, and letters match in any case where the pattern says so."""
    report = look(
        folder, {"high": 3, "mode": None, "size": 7, "word": "ABC", "list": [{"name": "a"}, {"name": "b"}]}
    )
    assert report.findings == []
    assert report.transitions == 1


def test_rules_that_compare_with_an_older_object_are_skipped_and_said_so(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from rayft.fleet.lint.run import lint_files

    path = tmp_path / "thing.yaml"
    path.write_text("apiVersion: example.com/v1\nkind: Thing\nspec: {}\n")
    assert lint_files([str(path)], schemas=str(folder)) == 0
    assert "1 CEL rules compare with an older object (oldSelf): skipped" in capsys.readouterr().out


def test_an_expression_that_fails_counts_as_false(tmp_path: Path) -> None:
    rules = [{"rule": "self.a.b == 1"}]
    broken = {
        "type": "object",
        "properties": {**OWN["properties"], "spec": {"type": "object", "x-kubernetes-validations": rules}},
    }
    data = {"apiVersion": "example.com/v1", "kind": "Thing", "openAPIV3Schema": broken}
    (tmp_path / "thing.json").write_text(json.dumps(data))
    thing = {"apiVersion": "example.com/v1", "kind": "Thing", "spec": {}}
    findings = lint([thing], schemas=tmp_path).findings
    assert [finding.rule for finding in findings if finding.rule == "cel"] == ["cel"]


def kueue(kind: str, spec: dict[str, Any]) -> dict[str, Any]:
    return {"apiVersion": "kueue.x-k8s.io/v1beta2", "kind": kind, "metadata": {"name": "x"}, "spec": spec}


def queue(**spec: Any) -> dict[str, Any]:
    quota = {"name": "cpu", "nominalQuota": "1", **spec.pop("quota", {})}
    flavors = [{"name": "x", "resources": [quota]}]
    covered = spec.pop("covered", ["cpu"])
    return kueue(
        "ClusterQueue", {"resourceGroups": [{"coveredResources": covered, "flavors": flavors}], **spec}
    )


def flavor(*tolerations: dict[str, Any], **spec: Any) -> dict[str, Any]:
    return kueue("ResourceFlavor", {"tolerations": list(tolerations), **spec} if tolerations else spec)


def topology(*labels: str) -> dict[str, Any]:
    return kueue("Topology", {"levels": [{"nodeLabel": label} for label in labels]})


def strategy(**value: Any) -> dict[str, Any]:
    return patched(
        {
            "spec/shutdownAfterJobFinishes": False,
            "spec/ttlSecondsAfterFinished": 0,
            "spec/deletionStrategy": value,
        }
    )


POLICY = {"policy": "DeleteCluster"}

#: Every CEL rule of KubeRay's and Kueue's schemas that speaks of one object, by its message, and an object that breaks it.
BROKEN: list[tuple[str, dict[str, Any]]] = [
    ("borrowingLimit must be nil when cohort is empty", queue(quota={"borrowingLimit": "1"})),
    (
        "preference can only be set when both",
        queue(flavorFungibility={"preference": "BorrowingOverPreemption"}),
    ),
    (
        "reclaimWithinCohort=Never and borrow",
        queue(preemption={"borrowWithinCohort": {"policy": "LowerPriority"}}),
    ),
    ("flavors must have the same number of resources", queue(covered=["cpu", "memory"])),
    ("at least one nodeLabel is required when topology is set", flavor(topologyName="fleet")),
    ("supported taint effect values", flavor(nodeTaints=[{"key": "a", "effect": "Never"}])),
    ("operator must be Exists when 'key' is empty", flavor({"operator": "Equal", "value": "a"})),
    (
        "effect must be 'NoExecute' when",
        flavor({"key": "a", "operator": "Exists", "tolerationSeconds": 5, "effect": "NoSchedule"}),
    ),
    ("supported toleration values", flavor({"key": "a", "operator": "In"})),
    (
        "a value must be empty when 'operator' is 'Exists'",
        flavor({"key": "a", "operator": "Exists", "value": "b"}),
    ),
    ("supported taint effect values", flavor({"key": "a", "operator": "Exists", "effect": "Never"})),
    ("must be unique", topology("a", "a")),
    ("hostname label can only be used at the lowest level", topology("kubernetes.io/hostname", "a")),
    ("managedBy field value must be either", patched({"spec/managedBy": "me"})),
    ("managedBy field value must be either", patched({"cluster/managedBy": "me"})),
    (
        "legacy policies (onSuccess/onFailure) and deletionRules",
        strategy(
            onSuccess=POLICY,
            onFailure=POLICY,
            deletionRules=[POLICY | {"condition": {"jobStatus": "FAILED"}}],
        ),
    ),
    ("deletionStrategy requires either BOTH", strategy(onSuccess=POLICY)),
    (
        "JobStatus and JobDeploymentStatus cannot be used together",
        strategy(
            deletionRules=[POLICY | {"condition": {"jobStatus": "FAILED", "jobDeploymentStatus": "Failed"}}]
        ),
    ),
    (
        "requires either the JobStatus or the JobDeploymentStatus",
        strategy(deletionRules=[POLICY | {"condition": {}}]),
    ),
]


def schemas() -> Path:
    path = shared_root() / "schemas"
    if not path.is_dir():
        pytest.skip(f"schemas are not at {path} (set RAYFT_SHARED)")
    return path


@pytest.mark.parametrize(("message", "data"), BROKEN, ids=[str(place) for place in range(len(BROKEN))])
def test_cel_rules_of_kuberay_and_kueue(message: str, data: dict[str, Any]) -> None:
    said = [finding.what for finding in lint([data], schemas=schemas()).findings if finding.rule == "cel"]
    assert any(message in what for what in said), said


def test_every_cel_rule_of_the_schemas_has_its_case() -> None:
    found = set()
    for path in sorted(schemas().glob("*.json")):
        for rules in re.findall(r'"x-kubernetes-validations":\s*(\[.*?\}\s*\])', path.read_text(), re.DOTALL):
            found |= {each["message"] for each in json.loads(rules) if "oldSelf" not in each["rule"]}
    # RayCluster's own is the one of RayJob's cluster.
    assert {message for message in found if not any(part in message for part, _ in BROKEN)} == set()
    assert len(found) > 14


def test_our_own_schemas_know_the_fields_of_the_projects() -> None:
    """Field names of rayft's small schemas are those of KubeRay and Kueue: all of them, and no others."""

    def names(schema: dict[str, Any], path: str = "") -> set[str]:
        found = set()
        for key, each in schema.get("properties", {}).items():
            found |= {f"{path}.{key}", *names(each, f"{path}.{key}")}
        items = schema.get("items")
        return found | (names(items, path) if isinstance(items, dict) else set())

    for file in sorted(schemas().glob("*.json")):
        data = json.loads(file.read_text())
        own = known_schema(data["apiVersion"], data["kind"])
        assert own, data["kind"]
        ours = {name for name in names(own) if not name.startswith((".metadata", ".status"))}
        theirs = {
            name for name in names(data["openAPIV3Schema"]) if not name.startswith((".metadata", ".status"))
        }
        assert ours - theirs == set(), data["kind"]
        # Below these, Kubernetes says what there is, or rayft does not look.
        parts = [name for name in ours if not any(other.startswith(f"{name}.") for other in ours)]
        missing = {name for name in theirs - ours if not any(name.startswith(f"{part}.") for part in parts)}
        assert missing == set(), data["kind"]


def test_the_good_job_fits_the_schemas() -> None:
    assert lint([good()], schemas=schemas()).findings == []
