"""All rules on some documents, and the verb `rayft k8s lint`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rayft.errors import JobError
from rayft.fleet.lint import cel, core, rules  # noqa: F401 - importing the rules registers them
from rayft.fleet.lint.findings import (
    IGNORE,
    RULES,
    Document,
    Finding,
    Found,
    Report,
    Rule,
    structural,
)
from rayft.fleet.lint.read import read
from rayft.fleet.lint.schema import Schemas, check
from rayft.fleet.lint.views import cluster_of, job_of, pods_of

UNKNOWN_IGNORE = structural(
    "unknown-ignore",
    severity="warning",
    reason="A rule that does not exist cannot be silenced, and the one that was meant is not",
    source=f"the annotation {IGNORE}",
)

#: What the function of a rule is called with, by the rule's scope: the parts of one document.
_PARTS: dict[str, Callable[[Document], Iterable[Any]]] = {
    "document": lambda document: [document],
    "job": lambda document: filter(None, [job_of(document)]),
    "cluster": lambda document: filter(None, [cluster_of(document)]),
    "group": lambda document: (
        [group for group in cluster.groups if group.data] if (cluster := cluster_of(document)) else []
    ),
    "pod": pods_of,
}


def lint(
    documents: Iterable[Document | Mapping[str, Any]],
    *,
    schemas: Path | str | None = None,
    source: str = "manifest",
) -> Report:
    """Every finding of some objects, which are seen together: queues are looked up among them.

    `schemas`: folder of the schemas of KubeRay and Kueue; without it rayft's own are used, which carry no CEL rules.
    """
    found = [
        each if isinstance(each, Document) else Document(dict(each), source, index)
        for index, each in enumerate(documents, 1)
    ]
    report = Report(found)
    known = Schemas(Path(schemas) if schemas else None)
    for document in found:
        _add(report, document, _structure(document, known, report))
        for each in RULES.values():
            if each.check and each.scope in _PARTS:
                for part in _PARTS[each.scope](document):
                    _add(report, document, ((each.id, one) for one in each.check(part)))
        unknown = [name for name in document.ignored if name not in RULES]
        _add(report, document, ((UNKNOWN_IGNORE, _no_such_rule(name)) for name in unknown))
    for each in RULES.values():
        if each.check and each.scope == "set":
            for owner, one in each.check(found):
                _add(report, owner, [(each.id, one)])
    places = {id(document): place for place, document in enumerate(found)}
    report.findings.sort(key=lambda finding: places[id(finding.document)])
    return report


def _no_such_rule(name: str) -> Found:
    return Found(f"metadata.annotations.{IGNORE}", f"there is no rule {name!r}", "See rayft k8s lint --rules")


def _add(report: Report, document: Document, pairs: Iterable[tuple[str, Found]]) -> None:
    for name, (path, what, remedy) in pairs:
        rule = RULES[name]
        silenced = name in document.ignored
        finding = Finding(name, rule.severity, document, path.lstrip("."), what, remedy, silenced)
        if finding not in report.findings:
            report.findings.append(finding)


def _structure(document: Document, schemas: Schemas, report: Report) -> Iterator[tuple[str, Found]]:
    """Findings of schemas; what cannot be checked becomes a note."""
    if core.is_core(document):
        found = core.check(document.data) if core.available() else []
        if found is None:
            _note(
                report,
                f"{document.api_version} {document.kind} is not in the schemas of Kubernetes: not checked",
            )
        if not core.available():
            _note(report, f"kinds and pods of Kubernetes are not checked against its schemas: {cel.INSTALL}")
        yield from ((core.CORE, each) for each in found or [])
        return
    schema = schemas.find(document)
    if schema is None:
        _note(
            report,
            f"there is no schema of {document.api_version} {document.kind}: its fields are not checked",
        )
    else:
        findings, expressions = check(document, schema)
        yield from findings
        transitions = sum(cel.transition(each) for _, each, _ in expressions)
        report.transitions += transitions
        if len(expressions) > transitions and not cel.available():
            _note(report, f"CEL rules of the schemas are not checked: {cel.INSTALL}")
        elif not findings:  # as an API server: expressions only of what fits the schema
            yield from ((cel.CEL, each) for each in cel.check(expressions))
        if not schemas.complete(document):
            _note(
                report,
                "kinds of KubeRay and Kueue are checked against rayft's own small schemas: no --schemas given",
            )
    if not schemas.complete(document):
        if core.available():
            yield from ((core.CORE, each) for pod in pods_of(document) for each in core.check_pod(pod))
        elif any(pods_of(document)):
            _note(report, f"kinds and pods of Kubernetes are not checked against its schemas: {cel.INSTALL}")


def _note(report: Report, text: str) -> None:
    if text not in report.notes:
        report.notes.append(text)


def lint_files(paths: list[str], *, schemas: str | None = None, say: Callable[[str], object] = print) -> int:
    """The verb: one line for each finding, then notes and a sum; 2 if there is an error, else 0."""
    if not paths:
        raise JobError(
            "rayft k8s lint needs a file.", "Name manifests, folders, or - for stdin; --rules lists rules."
        )
    report = Report()
    for documents in read(paths):
        report.add(lint(documents, schemas=schemas or os.environ.get("RAYFT_SCHEMAS") or None))
    for finding in report.findings:
        say(str(finding))
    for note in report.notes:
        say(f"note: {note}")
    if report.transitions:
        say(f"note: {report.transitions} CEL rules compare with an older object (oldSelf): skipped")
    counts = [f"{len(report.errors)} errors", f"{len(report.warnings)} warnings"]
    if report.silenced:
        names = ", ".join(sorted({finding.rule for finding in report.silenced}))
        counts.append(f"{len(report.silenced)} silenced by {IGNORE} ({names})")
    say(f"{len(report.documents)} objects: {', '.join(counts)}")
    return JobError.code if report.errors else 0


def show_rules(say: Callable[[str], object] = print) -> int:
    """The verb with --rules: every rule, its reason and where that comes from."""
    for rule in RULES.values():
        say(f"{rule.id} ({rule.severity}): {_summary(rule)}\n    {rule.reason}.\n    Source: {rule.source}")
    return 0


def _summary(rule: Rule) -> str:
    text = ((rule.check.__doc__ if rule.check else "") or "").strip().splitlines()
    return text[0] if text else "The object fits the schema of its kind."
