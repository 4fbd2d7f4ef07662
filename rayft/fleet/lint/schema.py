"""Objects against the schemas of their kinds, as an API server does it: defaults first, then structure, then CEL.

Schemas are OpenAPI v3 with Kubernetes' extensions: files of a folder (`{apiVersion, kind, openAPIV3Schema}`), or rayft's
own small ones in `known.py`.
"""

from __future__ import annotations

import copy
import difflib
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from rayft.errors import JobError
from rayft.fleet.lint.findings import Document, Found, structural
from rayft.fleet.lint.known import OBJECT_META, known_schema
from rayft.fleet.lint.messages import dotted, message

SCHEMA = structural(
    "schema",
    reason="The API server refuses the object",
    source="schemas of KubeRay and Kueue (--schemas), or rayft's own",
)
UNKNOWN = structural(
    "unknown-field",
    reason="The API server drops what it does not know, so the setting has no effect; kubectl refuses it",
    source="schemas of KubeRay and Kueue (--schemas), or rayft's own",
)

_INTEGERS = {"int32": 2**31, "int64": 2**63}

Rules = list[tuple[str, dict[str, Any], Any]]


class Schemas:
    """Schemas by apiVersion and kind; `folder` None for rayft's own."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._files = _read(folder) if folder else {}

    def find(self, document: Document) -> dict[str, Any] | None:
        """The schema of an object's kind."""
        return self._files.get((document.api_version, document.kind)) or known_schema(
            document.api_version, document.kind
        )

    def complete(self, document: Document) -> bool:
        """Whether the schema says everything, pods included."""
        return (document.api_version, document.kind) in self._files


@cache
def _read(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    if not folder.is_dir():
        raise JobError(
            f"There is no folder of schemas at {folder}.", "Name one with --schemas or RAYFT_SCHEMAS."
        )
    found = {}
    for path in sorted(folder.glob("*.json")):
        try:
            data = json.loads(path.read_text())
            found[(data["apiVersion"], data["kind"])] = _prepared(data["openAPIV3Schema"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise JobError(
                f"{path} is no schema of a kind: {type(error).__name__}.",
                "It must hold apiVersion, kind and openAPIV3Schema.",
            ) from error
    if not found:
        raise JobError(
            f"The folder {folder} holds no schemas.", "Schemas are *.json files, one for each kind."
        )
    return found


def _prepared(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema with metadata spelt out, and patterns such as Python reads."""
    schema = _patterns(schema)
    schema.setdefault("properties", {})["metadata"] = OBJECT_META
    return schema


def _patterns(value: Any) -> Any:
    if isinstance(value, dict):
        made = {key: _patterns(each) for key, each in value.items()}
        if isinstance(made.get("pattern"), str) and made["pattern"].startswith("^(?i)"):
            made["pattern"] = "(?i)^" + made["pattern"].removeprefix("^(?i)")
        return made
    return [_patterns(each) for each in value] if isinstance(value, list) else value


def check(document: Document, schema: dict[str, Any]) -> tuple[list[tuple[str, Found]], Rules]:
    """Findings, as pairs of rule and what was found; and the CEL rules that apply, each with its path and value."""
    value = copy.deepcopy(document.data)
    rules: Rules = []
    findings = [(UNKNOWN, found) for found in _walk(value, schema, "", rules)]
    validator = _validator()(schema, format_checker=_formats())
    for error in validator.iter_errors(value):
        path = dotted(error.absolute_path)
        findings.append((SCHEMA, Found(path, message(error), "Correct it")))
    return findings, rules


def _walk(value: Any, schema: dict[str, Any], path: str, rules: Rules) -> Iterator[Found]:
    """Fill in defaults, drop nulls, collect CEL rules; yields fields that the schema does not know."""
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        for key in [
            key for key, each in value.items() if each is None and not _of(schema, key).get("nullable")
        ]:
            del value[key]  # the API server drops them before it fills in defaults
        for key, each in properties.items():
            if key not in value and "default" in each:
                value[key] = copy.deepcopy(each["default"])
        rest = schema.get("additionalProperties")
        closed = bool(properties) and not rest and not schema.get("x-kubernetes-preserve-unknown-fields")
        for key, each in value.items():
            here = f"{path}.{key}" if path else str(key)
            if key in properties:
                yield from _walk(each, properties[key], here, rules)
            elif isinstance(rest, dict):
                yield from _walk(each, rest, here, rules)
            elif closed:
                near = difflib.get_close_matches(str(key), properties, 1)
                remedy = (
                    f"Did you mean {near[0]}?" if near else f"Known: {', '.join(sorted(properties)[:12])}"
                )
                yield Found(here, f"there is no field {key!r}", remedy.rstrip("?"))
    elif isinstance(value, list):
        for place, each in enumerate(value):
            yield from _walk(each, schema.get("items", {}), f"{path}[{place}]", rules)
        yield from _twice(value, schema, path)
    for each in schema.get("x-kubernetes-validations", []):
        rules.append((path, each, value))


def _of(schema: dict[str, Any], key: str) -> dict[str, Any]:
    found = schema.get("properties", {}).get(key, schema.get("additionalProperties"))
    return found if isinstance(found, dict) else {}


def _twice(value: list[Any], schema: dict[str, Any], path: str) -> Iterator[Found]:
    """Elements of a set, or keys of a list of mappings, that are there twice."""
    keys = schema.get("x-kubernetes-list-map-keys", [])
    kind = schema.get("x-kubernetes-list-type")
    if kind not in ("set", "map"):
        return
    seen = []
    for place, each in enumerate(value):
        own = [each.get(key) for key in keys] if kind == "map" and isinstance(each, dict) else each
        if own in seen:
            yield Found(f"{path}[{place}]", "the list has it already", "Remove one")
        seen.append(own)


@cache
def _validator() -> Any:
    from jsonschema import Draft202012Validator

    return Draft202012Validator


@cache
def _formats() -> Any:
    from jsonschema import FormatChecker

    checker = FormatChecker(formats=())
    for name, bound in _INTEGERS.items():

        def fits(value: object, bound: int = bound) -> bool:
            return not isinstance(value, int) or isinstance(value, bool) or -bound <= value < bound

        checker.checks(name)(fits)
    return checker
