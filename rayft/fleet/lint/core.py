"""Kinds of Kubernetes itself, and pods within other kinds, against the schemas of `kubernetes-validate`."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from rayft.fleet.lint.findings import Document, Found, structural
from rayft.fleet.lint.messages import dotted, message
from rayft.fleet.lint.views import Pod

CORE = structural(
    "core-schema",
    reason="The API server refuses the object, or kubectl does",
    source="schemas of Kubernetes in the package kubernetes-validate",
)

#: Groups of Kubernetes' own kinds, beside those that end with `.k8s.io`.
_GROUPS = {"", "apps", "batch", "autoscaling", "policy"}


def is_core(document: Document) -> bool:
    """Whether Kubernetes itself defines the kind."""
    group = document.group
    return group in _GROUPS or (group.endswith(".k8s.io") and not group.endswith("x-k8s.io"))


@cache
def available() -> bool:
    """Whether the schemas are installed."""
    try:
        import kubernetes_validate  # noqa: F401
    except ImportError:
        return False
    return True


def check(data: dict[str, Any]) -> list[Found] | None:
    """What is wrong with an object; None for a kind that the schemas do not know."""
    name = f"{str(data.get('kind')).lower()}-{_version(str(data.get('apiVersion')))}"
    schema = _schema(name)
    if schema is None:
        return None
    found: list[Found] = []
    for error in _validator(name).iter_errors(data):
        found += [Found(dotted(each.absolute_path), message(each), "Correct it") for each in _deepest(error)]
    return found


def check_pod(pod: Pod) -> list[Found]:
    """What is wrong with a pod template, whatever object holds it."""
    template = {
        "apiVersion": "v1",
        "kind": "PodTemplate",
        "metadata": {"name": "pod"},
        "template": pod.template,
    }
    found = check(template) or []
    return [each._replace(path=f"{pod.path}{each.path.removeprefix('template')}") for each in found]


def _deepest(error: Any) -> list[Any]:
    """For a choice of schemas, what is wrong with the nearest of them."""
    if not error.context:
        return [error]
    from jsonschema.exceptions import best_match

    return [best_match([error])]


def _version(api_version: str) -> str:
    """As the files are called: `apps-v1`, `networking-v1`, `v1`."""
    group, _, version = api_version.rpartition("/")
    return f"{group.partition('.')[0]}-{version}" if group else version


@cache
def _folder() -> Any:
    """The strict schemas of the newest Kubernetes that is there."""
    from importlib.resources import files

    import kubernetes_validate

    newest = kubernetes_validate.latest_version()
    return files("kubernetes_validate").joinpath("kubernetes-json-schema", f"v{newest}-local-strict")


@cache
def _schema(name: str) -> Any:
    path = _folder().joinpath(f"{name}.json")
    return json.loads(path.read_text()) if "/" not in name and path.is_file() else None


@cache
def _registry() -> Any:
    from referencing import Registry, Resource

    definitions = json.loads(_folder().joinpath("_definitions.json").read_text())
    return Resource.from_contents(definitions) @ Registry()


@cache
def _validator(name: str) -> Any:
    from jsonschema import Draft202012Validator

    return Draft202012Validator(_schema(name), registry=_registry())
