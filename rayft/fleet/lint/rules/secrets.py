"""Secrets in plain sight. What is found is named, never shown."""

from __future__ import annotations

import re
from collections.abc import Iterator

import yaml

from rayft.fleet.lint.findings import Document, Found, rule
from rayft.fleet.lint.views import Pod, cluster_of, job_of, mapping, mappings, texts

_NAME = re.compile(
    r"(^|[_\-.])(SECRET|TOKEN|PASSWORD|PASSWD|PASSPHRASE|PWD|API_?KEY|ACCESS_?KEY(_ID)?|SECRET_?KEY|PRIVATE_?KEY|"
    r"CREDENTIALS?|AUTH_?KEY|CONNECTION_?STRING)($|[_\-.])",
    re.IGNORECASE,
)
#: Words after which a name speaks of a secret and does not hold one.
_ABOUT = re.compile(
    r"[_\-.](PATH|FILE|DIR|NAME|MODE|URL|URI|ARN|TTL|TIMEOUT|S|SECONDS|LIMIT|LENGTH|COUNT|TYPE|ENABLED|EXPIRATION)$",
    re.IGNORECASE,
)
_VALUE = re.compile(
    r"AKIA[0-9A-Z]{16}|ASIA[0-9A-Z]{16}|\bhf_[A-Za-z0-9]{20,}|\bgh[pousr]_[A-Za-z0-9]{30,}|\bgithub_pat_\w{30,}|"
    r"\bsk-[A-Za-z0-9_-]{20,}|\bxox[abprs]-[A-Za-z0-9-]{10,}|\bglpat-[\w-]{18,}|\bAIza[\w-]{35}|-----BEGIN [A-Z ]*PRIVATE KEY|"
    r"\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.|[a-z][a-z0-9+]*://[^\s/:@$]+:[^\s/@$]+@"
)
_PLAIN = re.compile(r"\s*|\d+(\.\d+)?|true|false|none|null", re.IGNORECASE)
_REFERENCE = re.compile(r"\$[({]?\w+[)}]?|/\S*")

_SOURCE = "rayft: no secret in a manifest, log or run folder; AWS, Hugging Face and GitHub document their key formats"


def looks_secret(name: str, value: object) -> bool:
    """Whether a value is a credential, by its name or its own look."""
    text = str(value) if value is not None else ""
    if _VALUE.search(text):
        return True
    named = _NAME.search(name) and not _ABOUT.search(name)
    return bool(named) and not _PLAIN.fullmatch(text) and not _REFERENCE.fullmatch(text)


@rule(
    "secret-in-env",
    "pod",
    reason="Whoever may read pods, or the repository, reads the secret",
    source=_SOURCE,
)
def secret_in_env(pod: Pod) -> Iterator[Found]:
    """Variables take secrets from a Secret, not from the manifest."""
    for container in pod.all_containers:
        for place, variable in mappings(container.data.get("env")):
            if looks_secret(str(variable.get("name", "")), variable.get("value")):
                yield Found(
                    f"{container.path}.env[{place}]",
                    f"{variable.get('name')} holds a secret",
                    "Use valueFrom.secretKeyRef; for S3 a service account",
                )
        for part in ("command", "args"):
            if _VALUE.search(" ".join(texts(container.data.get(part)))):
                path = f"{container.path}.{part}"
                yield Found(path, "the command holds a secret", "Take it from a variable with secretKeyRef")


@rule(
    "secret-in-job",
    "document",
    reason="Ray shows entrypoint, runtime environment and metadata on its dashboard and writes them to logs",
    source=_SOURCE,
)
def secret_in_job(document: Document) -> Iterator[Found]:
    """No secret in what a job or a ConfigMap says."""
    remedy = "Take it from a variable with secretKeyRef"
    for key, value in document.strings("annotations").items():
        if looks_secret(key.rpartition("/")[2], value):
            yield Found(f"metadata.annotations.{key}", "an annotation holds a secret", remedy)
    if document.kind == "ConfigMap" and document.api_version == "v1":
        for key, value in mapping(document.data.get("data")).items():
            if looks_secret(str(key), value):
                yield Found(f"data.{key}", "a ConfigMap holds a secret", "Use a Secret")
    job, cluster = job_of(document), cluster_of(document)
    if job:
        if _VALUE.search(str(job.spec.get("entrypoint") or "")):
            yield Found(f"{job.path}.entrypoint", "the command holds a secret", remedy)
        for key, value in mapping(job.spec.get("metadata")).items():
            if looks_secret(str(key), value):
                yield Found(f"{job.path}.metadata.{key}", "the job's metadata holds a secret", remedy)
        for name, text in _runtime_env(job.spec.get("runtimeEnvYAML")):
            if looks_secret(name, text):
                yield Found(
                    f"{job.path}.runtimeEnvYAML",
                    f"{name or 'a part'} of the runtime environment is a secret",
                    remedy,
                )
    for group in cluster.groups if cluster else []:
        for key, value in group.params.items():
            if looks_secret(str(key), value):
                path = f"{group.path}.rayStartParams.{key}"
                yield Found(path, "the command line of Ray holds a secret", remedy)


def _runtime_env(text: object) -> Iterator[tuple[str, object]]:
    """Names and texts within a runtime environment."""
    if not isinstance(text, str):
        return
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return  # operator-runtime-env says so
    variables = mapping(mapping(value).get("env_vars"))
    yield from ((str(key), each) for key, each in variables.items())
    rest = {key: each for key, each in mapping(value).items() if key != "env_vars"}
    yield "", yaml.safe_dump(rest)


@rule(
    "secret-in-manifest",
    "document",
    severity="warning",
    reason="base64 hides nothing: whoever reads the manifest reads the secret",
    source="Kubernetes, good practices for Secrets",
)
def secret_in_manifest(document: Document) -> Iterator[Found]:
    """Values of Secrets are not written in manifests."""
    if document.kind != "Secret" or document.api_version != "v1":
        return
    for part in ("data", "stringData"):
        if mapping(document.data.get(part)):
            remedy = "Create it with kubectl or an external secret store"
            yield Found(part, "the manifest holds the values of a Secret", remedy)
