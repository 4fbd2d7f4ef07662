"""Names: of runs, objects, labels."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

from rayft.fleet.lint.findings import Document, Found, rule
from rayft.fleet.lint.views import Job, cluster_of, job_of, mapping, pods_of

#: A date, with or without a time, or seconds since 1970; and a shell or template that puts one in.
_STAMP = re.compile(
    r"(?<!\d)20[2-9]\d[-_.]?(0[1-9]|1[0-2])[-_.]?(0[1-9]|[12]\d|3[01])([-_.tT]?\d{4,6})?(?!\d)|(?<!\d)1[6-9]\d{8}(\d{3})?(?!\d)"
)
_MADE = re.compile(
    r"\$\(\s*date\b|`\s*date\b|\$(RANDOM|EPOCHSECONDS)\b|\$\(\s*uuidgen|strftime|%Y%m%d|time\.time\(\)"
)
_RUN_NAME = re.compile(r"(?:^|[\s'\"])(?:--)?(?:run[-_])?name[=\s]\s*([^\s'\"]+)")

_LIMITS = {"RayJob": 47, "RayCluster": 53, "RayCronJob": 36}
_DNS_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?")
_LABEL_KEY = re.compile(r"([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?")


def _run_names(document: Document, job: Job | None) -> Iterator[tuple[str, str]]:
    """Path and text of everything that names a run."""
    if job:
        yield "metadata.name", document.name
        for key, value in mapping(job.spec.get("metadata")).items():
            if "name" in str(key) or "run" in str(key):
                yield f"{job.path}.metadata.{key}", str(value)
        for found in _RUN_NAME.finditer(str(job.spec.get("entrypoint") or "")):
            yield f"{job.path}.entrypoint", found[1]
    if document.kind == "ConfigMap" and document.api_version == "v1":
        for key, text in mapping(document.data.get("data")).items():
            job_file = _job_file(str(key), text)
            if job_file:
                yield f"data.{key}", str(job_file["name"])


def _job_file(key: str, text: object) -> dict[str, Any] | None:
    """The job file in an entry of a ConfigMap, if it is one."""
    if not key.endswith((".yaml", ".yml")) or not isinstance(text, str):
        return None
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and "name" in value and "method" in value else None


@rule(
    "stable-name",
    "document",
    reason="A run resumes under its name; a name with the time in it starts from nothing whenever it is submitted again",
    source="rayft and Ray Train both find checkpoints by the run's name",
)
def stable_name(document: Document) -> Iterator[Found]:
    """Names of runs and of RayJobs hold no time and no chance."""
    job = job_of(document)
    if job and not document.name and document.metadata.get("generateName"):
        yield Found("metadata.generateName", "every submission gets another name", "Set metadata.name")
    for path, text in _run_names(document, job):
        if _STAMP.search(text) or _MADE.search(text):
            yield Found(path, f"the name {text!r} has the time in it", "Give the run one name and keep it")
    if job and _MADE.search(str(job.spec.get("entrypoint") or "")) and not _stamped_name(job):
        yield Found(
            f"{job.path}.entrypoint", "the command makes a name of its own", "Write the run's name out"
        )


def _stamped_name(job: Job) -> bool:
    found = _RUN_NAME.findall(str(job.spec.get("entrypoint") or ""))
    return any(_STAMP.search(text) or _MADE.search(text) for text in found)


@rule(
    "name",
    "document",
    reason="The operator appends to the name and refuses what would not fit in 63 characters",
    source="KubeRay constant.go: RayJob 47, RayCluster 53, RayCronJob 36 characters, DNS-1035 labels",
)
def name(document: Document) -> Iterator[Found]:
    """Names are short enough, of lower-case letters, digits and dashes, and begin with a letter."""
    limit = _LIMITS.get(document.kind) if document.group == "ray.io" else None
    if limit is None or not document.name:
        return
    if len(document.name) > limit:
        what = f"the name has {len(document.name)} characters, the operator takes {limit}"
        yield Found("metadata.name", what, "Shorten it")
    elif not _DNS_LABEL.fullmatch(document.name):
        what = f"{document.name!r} is no DNS label"
        yield Found("metadata.name", what, "Use lower-case letters, digits and dashes, a letter first")


@rule(
    "group-name",
    "document",
    severity="warning",
    reason="The name of a group becomes part of pod names and of labels",
    source="KubeRay pod names are cut at 50 characters; Kueue's pod sets take DNS labels",
)
def group_name(document: Document) -> Iterator[Found]:
    """Names of worker groups are short DNS labels."""
    cluster = cluster_of(document)
    for group in cluster.workers if cluster else []:
        if not _DNS_LABEL.fullmatch(group.name) or len(group.name) > 40:
            path = f"{group.path}.groupName"
            yield Found(
                path,
                f"{group.name!r} is no short DNS label",
                "Use up to 40 lower-case letters, digits, dashes",
            )


@rule(
    "label",
    "document",
    reason="The API server refuses the object",
    source="Kubernetes, labels: 63 characters, letters, digits, dashes, dots, underscores",
)
def label(document: Document) -> Iterator[Found]:
    """Keys and values of labels are such as Kubernetes takes."""
    places = [("metadata.labels", mapping(document.metadata.get("labels")))]
    for pod in pods_of(document):
        if pod.path:
            labels = mapping(mapping(pod.template.get("metadata")).get("labels"))
            places.append((f"{pod.path}.metadata.labels", labels))
    for path, labels in places:
        for key, value in labels.items():
            short = str(key).rpartition("/")[2]
            good_key = _LABEL_KEY.fullmatch(str(key)) and len(short) <= 63
            if (
                not good_key
                or not isinstance(value, str)
                or len(value) > 63
                or not _LABEL_VALUE.fullmatch(value)
            ):
                yield Found(
                    f"{path}.{key}",
                    "key or value is none that a label may have",
                    "Use 63 letters, digits, -, _, . at most",
                )


@rule(
    "duplicate",
    "set",
    reason="The second takes the place of the first",
    source="kubectl apply",
)
def duplicate(documents: list[Document]) -> Iterator[tuple[Document, Found]]:
    """No object is there twice."""
    seen: dict[tuple[str, str, str, str], Document] = {}
    for document in documents:
        key = (document.group, document.kind, document.namespace, document.name)
        if document.name and key in seen:
            first = seen[key]
            what = f"the same object is in {first.source}#{first.index}"
            yield document, Found("metadata.name", what, "Remove one")
        seen.setdefault(key, document)
