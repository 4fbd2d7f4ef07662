"""Documents, findings, and the rules that make them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

Severity = Literal["error", "warning"]

IGNORE = "rayft.dev/lint-ignore"


@dataclass(frozen=True)
class Document:
    """One Kubernetes object: where it comes from, and its place there, counted from 1."""

    data: dict[str, Any]
    source: str = "manifest"
    index: int = 1

    @property
    def kind(self) -> str:
        return _text(self.data.get("kind"))

    @property
    def api_version(self) -> str:
        return _text(self.data.get("apiVersion"))

    @property
    def group(self) -> str:
        """API group without the version; empty for the core group."""
        return self.api_version.rpartition("/")[0]

    @property
    def metadata(self) -> dict[str, Any]:
        value = self.data.get("metadata")
        return value if isinstance(value, dict) else {}

    @property
    def spec(self) -> dict[str, Any]:
        value = self.data.get("spec")
        return value if isinstance(value, dict) else {}

    @property
    def name(self) -> str:
        return _text(self.metadata.get("name"))

    @property
    def namespace(self) -> str:
        return _text(self.metadata.get("namespace"))

    @property
    def title(self) -> str:
        """What people call it: `RayJob/name`."""
        name = self.name or (f"{_text(self.metadata.get('generateName'))}…")
        return f"{self.kind}/{name}"

    def strings(self, key: str) -> dict[str, str]:
        """Labels or annotations; values that are not strings are left out."""
        value = self.metadata.get(key)
        if not isinstance(value, dict):
            return {}
        return {str(name): text for name, text in value.items() if isinstance(text, str)}

    @property
    def ignored(self) -> list[str]:
        """Ids of the rules that the object's annotation silences."""
        return [
            name.strip() for name in self.strings("annotations").get(IGNORE, "").split(",") if name.strip()
        ]


class Found(NamedTuple):
    """What a rule yields: path in the object, what is wrong, what to do."""

    path: str
    what: str
    remedy: str


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with one object."""

    rule: str
    severity: Severity
    document: Document
    path: str
    what: str
    remedy: str
    silenced: bool = False

    def __str__(self) -> str:
        where = f"{self.document.source}#{self.document.index} {self.document.title}"
        level = f"silenced {self.severity}" if self.silenced else self.severity
        line = f"{where} {self.path}: {level} [{self.rule}] {self.what}. {self.remedy}."
        # Names come from the manifest: no line breaks, and nothing that a terminal obeys.
        return "".join(letter if letter.isprintable() else " " for letter in line)


@dataclass
class Report:
    """All findings of some documents; `notes` say what was not checked."""

    documents: list[Document] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    #: CEL rules that compare with an older object, and were skipped.
    transitions: int = 0

    def add(self, other: Report) -> None:
        """Take the findings of other documents over."""
        self.documents += other.documents
        self.findings += other.findings
        self.notes += [note for note in other.notes if note not in self.notes]
        self.transitions += other.transitions

    @property
    def errors(self) -> list[Finding]:
        return [each for each in self.findings if each.severity == "error" and not each.silenced]

    @property
    def warnings(self) -> list[Finding]:
        return [each for each in self.findings if each.severity == "warning" and not each.silenced]

    @property
    def silenced(self) -> list[Finding]:
        return [each for each in self.findings if each.silenced]


#: Yields `Found`; a rule of scope `set` sees all documents and yields each with the one it speaks of.
Check = Callable[..., Iterator[Any]]


@dataclass(frozen=True)
class Rule:
    """A rule: `scope` says what its function is called with (see `run.py`)."""

    id: str
    scope: str
    severity: Severity
    reason: str
    source: str
    check: Check | None = None


#: Every rule by its id, in the order of their definition.
RULES: dict[str, Rule] = {}


def rule(
    name: str, scope: str, *, reason: str, source: str, severity: Severity = "error"
) -> Callable[[Check], Check]:
    """Register a function as the rule `name`."""

    def register(check: Check) -> Check:
        assert name not in RULES, f"two rules are called {name}"
        RULES[name] = Rule(name, scope, severity, reason, source, check)
        return check

    return register


def structural(name: str, *, reason: str, source: str, severity: Severity = "error") -> str:
    """Register a rule that is checked by code of its own, not by a function of one scope."""
    RULES[name] = Rule(name, "structure", severity, reason, source)
    return name


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""
