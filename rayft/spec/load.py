"""Read a job file: YAML, `group.key=value` overrides, validation with suggestions."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from rayft.errors import JobError
from rayft.spec.explain import explain
from rayft.spec.job import Job
from rayft.spec.secrets import secret_in, texts_of


class _Loader(yaml.SafeLoader):
    """Safe YAML as people write job files: 1e-4 is a number, 2026-11-22 is a name, no key stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for number, key in enumerate(keys):
            if key in keys[:number]:
                mark = node.value[number][0].start_mark
                raise yaml.MarkedYAMLError(problem=f"the key {key!r} stands twice", problem_mark=mark)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(  # YAML 1.1 wants a point and a sign: 1.0e-4, 1.0e+5
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def load_job(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Job:
    """Read and validate a job file. Raises JobError naming file, key and remedy."""
    path = Path(path)
    values = read_mapping(path, "job", example="jobs/demo.yaml")
    for override in overrides:
        apply_override(values, override)
    return parse_job(values, where=str(path))


def read_mapping(path: Path, what: str, *, example: str) -> dict[str, Any]:
    """The mapping in a YAML file. what: it should hold; example: one to start from. Raises JobError."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1)
        hint = (
            f"Did you mean {path.parent / near[0]}?"
            if near
            else f"Give the path of a {what} file such as {example}."
        )
        raise JobError(f"There is no {what} file {path}.", hint) from None
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(
            f"The {what} file {path} cannot be read: {error}.", f"A {what} file is a UTF-8 YAML text file."
        ) from None
    try:
        values = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not valid YAML"
        raise JobError(f"{path} is not valid YAML{where}: {problem}.", "Correct that line.") from None
    if not isinstance(values, dict):
        raise JobError(
            f"{path} holds no {what}: the top level must be a mapping of groups.", f"Start from {example}."
        )
    return values


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set one `group.key=value` (value read as YAML) in the raw mapping; list items by index, `data.train.0.path=…`."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise JobError(
            f"The override {override!r} is not of the form group.key=value.",
            "Write for example train.learning_rate=1e-4.",
        )
    set_key(values, key, _override_value(text), said=f"The override {override!r}")


def set_key(values: dict[str, Any], key: str, value: Any, said: str) -> None:
    """Set a dotted key in the raw mapping. said: what is being done, for the errors. Raises JobError."""
    node: Any = values
    *parents, leaf = key.split(".")
    for depth, part in enumerate(parents):
        node = _descend(node, part, ".".join(parents[: depth + 1]))
    if isinstance(node, list):
        node[_index(node, leaf, key)] = value
    elif isinstance(node, dict):
        node[leaf] = value
    else:
        raise JobError(
            f"{said} reaches into {key.rpartition('.')[0]!r}, which is a plain value.",
            "`rayft schema` lists every key.",
        )


def _override_value(text: str) -> Any:
    """YAML where it is a scalar or in brackets; else plain text, such as a sentence with a colon in it."""
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError:
        return text
    return text if isinstance(value, dict | list) and text.lstrip()[0] not in "[{" else value


def parse_job(values: dict[str, Any], where: str = "the job") -> Job:
    """Validate a raw mapping. Raises JobError that lists every wrong key, and for a secret: the job is written in plain text into
    run folders, packages and reports."""
    _refuse_secrets(values, where)
    try:
        # a group whose every line is commented out reads as null
        return Job.model_validate({key: value for key, value in values.items() if value is not None})
    except ValidationError as error:
        raise JobError(
            f"{where}: {'; '.join(explain(error.errors()))}.",
            "`rayft schema` lists every key with its meaning.",
        ) from None


def _refuse_secrets(values: dict[str, Any], where: str) -> None:
    for key, text in texts_of(values):
        if found := secret_in(text):
            raise JobError(
                f"{where}: {key or 'a key'} holds {found[0]}, and a job is stored in plain text.",
                "Give it in the environment (HF_TOKEN, AWS_*, MLFLOW_TRACKING_USERNAME and _PASSWORD, WANDB_API_KEY …).",
            )


def dump_job(job: Job) -> str:
    """The resolved job as YAML, every default written out."""
    return yaml.safe_dump(job.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def job_schema() -> dict[str, Any]:
    """JSON schema of a job file, for editors and validators."""
    return Job.model_json_schema()


#: Keys that may differ between two starts of one run: they do not change what is computed.
RESUMABLE_KEYS = (
    "cluster.",
    "log.",
    "checkpoint.every_steps",
    "checkpoint.keep",
    "checkpoint.backlog",
    "checkpoint.commit_timeout_s",
    "checkpoint.on_failure",
    "zero.",
    "deepspeed.",
    "train.micro_batch_size",
    "train.gradient_checkpointing",
    "train.logits_chunk",
    "rollout.batch_size",
    "rollout.engines",
    "rollout.bucket_mb",
    "placement.",
    "eval.batch_size",
    "eval.suites",
    "eval.before",
    "storage",
    "data.cache",
    "tune.num_trials",
    "tune.max_concurrent",
    "tune.share",
    "tune.time_budget_s",
    "tune.gpu_hours",
    "tune.oom_retries",
    "tune.constraints",
)


def changed_keys(old: Job, new: Job) -> list[str]:
    """Keys whose change makes it another run, as `key: old -> new`."""
    before, after = _flatten(old.model_dump(mode="json")), _flatten(new.model_dump(mode="json"))
    return [
        f"{key}: {before.get(key)!r} -> {after.get(key)!r}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
        and not key.startswith(RESUMABLE_KEYS)
        and not key.endswith(".timeout_s")
    ]


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    items = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    )
    if items is None:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in items:
        flat.update(_flatten(inner, f"{prefix}.{key}" if prefix else str(key)))
    return flat


def _descend(node: Any, part: str, so_far: str) -> Any:
    if isinstance(node, list):
        return node[_index(node, part, so_far)]
    if isinstance(node, dict):
        if node.get(part) is None:
            node[part] = {}
        return node[part]
    raise JobError(
        f"The override key {so_far!r} reaches into a plain value.", "`rayft schema` lists every key."
    )


def _index(node: list[Any], part: str, key: str) -> int:
    if not part.isdigit() or int(part) >= len(node):
        raise JobError(
            f"The override key {key!r}: {part!r} is no index of a list of {len(node)}.",
            "Count list items from 0.",
        )
    return int(part)
