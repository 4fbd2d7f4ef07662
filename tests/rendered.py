"""Validators for manifests: the resources of KubeRay and Kueue by their published schemas, core objects by Kubernetes' own."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import Any

import jsonschema
import pytest
from kubernetes_validate.utils import all_versions, schema_contents
from referencing import Registry, Resource

from rayft.fleet.lint import lint
from tests.shared import shared_root

KUBERNETES = "1.34"


@functools.cache
def _validator(name: str) -> jsonschema.protocols.Validator:
    path = shared_root() / "schemas" / f"{name}.json"
    if not path.is_file():
        pytest.skip(f"the schemas of KubeRay and Kueue are not at {path.parent} (set RAYFT_SHARED)")
    schema = json.loads(path.read_text())["openAPIV3Schema"]
    return jsonschema.Draft202012Validator(_strict(schema))


def _strict(schema: Any) -> Any:
    """The schema with unknown keys refused, which an API server would drop without a word."""
    if isinstance(schema, list):
        return [_strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: _strict(value) for key, value in schema.items()}
    properties = made.get("properties")
    if isinstance(properties, dict) and isinstance(made.get("type"), str) and made["type"] == "object":
        made.setdefault("additionalProperties", False)
    return made


def wrong(objects: Sequence[dict[str, Any]], *, warnings: bool = True, but: Sequence[str] = ()) -> list[str]:
    """What is wrong with the objects of a run: by their schemas, the CEL rules in these, and the linter's other rules without
    `but`; its warnings too, which a fleet's profile may be the cause of."""
    found = [text for one in objects for text in problems(one)]
    report = lint(objects, schemas=shared_root() / "schemas")
    told = report.findings if warnings else report.errors
    return found + [str(one) for one in told if one.rule not in but] + report.notes


def problems(one: dict[str, Any]) -> list[str]:
    """What is wrong with an object by its schema; pod templates inside a RayJob are looked at as pods."""
    kind, group = one["kind"], one["apiVersion"]
    if group == "ray.io/v1" or group.startswith("kueue.x-k8s.io/"):
        name = f"{group.replace('/', '_')}_{kind}"
        found = [f"{error.json_path}: {error.message}"[:300] for error in _validator(name).iter_errors(one)]
        for pod in pods_of(one):
            found += problems(pod)
        return found
    validator = _core_validator(f"{kind.lower()}-{group.replace('networking.k8s.io/', 'networking-')}")
    return [f"{kind} {error.json_path}: {error.message}"[:300] for error in validator.iter_errors(one)]


@functools.cache
def _core_validator(name: str) -> jsonschema.protocols.Validator:
    """As `kubernetes_validate.validate` makes it, which reads 20 MB of definitions anew for every object."""
    version = next(one for one in all_versions() if one.startswith(f"{KUBERNETES}."))
    folder = f"kubernetes-json-schema/v{version}-local-strict"
    schema = schema_contents(f"{folder}/{name}.json", version)
    definitions = schema_contents(f"{folder}/_definitions.json", version)
    registry = Resource.from_contents(definitions) @ (Resource.from_contents(schema) @ Registry())
    return jsonschema.Draft202012Validator(schema, registry=registry)


def pods_of(one: dict[str, Any]) -> list[dict[str, Any]]:
    """The pods of a RayJob, head first."""
    if one["kind"] != "RayJob":
        return []
    cluster = one["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": f"pod-{number}", **group["template"]["metadata"]},
            "spec": group["template"]["spec"],
        }
        for number, group in enumerate(groups)
    ]
