"""What pydantic found wrong with a job or a profile, said in the file's own words: key, value, remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, get_args, get_origin

from pydantic import BaseModel

from rayft.spec.job import Job

#: What other trainers call it: our key.
ELSEWHERE = {
    "lr": "train.learning_rate",
    "epochs": "train.num_train_epochs",
    "batch_size": "train.global_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size",
    "per_device_train_batch_size": "train.micro_batch_size",
    "model_name_or_path": "model.path",
    "lora_rank": "adapter.lora_r",
    "max_seq_length": "data.max_length",
    "max_seq_len": "data.max_length",
    "num_samples": "tune.num_trials",
    "n_trials": "tune.num_trials",
    "search_alg": "tune.searcher",
    "grace_period": "tune.grace_steps",
    "perturbation_interval": "tune.perturb_steps",
    "quantile_fraction": "tune.quantile",
}


def explain(problems: Iterable[Any], root: type[BaseModel] = Job) -> list[str]:
    """One phrase per wrong key; the branches of a union that all refused a value make one phrase. root: what was read."""
    phrases: dict[str, list[str]] = {}
    for problem in problems:
        subject, phrase = _explain(problem, root)
        said = phrases.setdefault(subject, [])
        if phrase not in said:
            said.append(phrase)
    return [f"{subject}{', or '.join(said)}" for subject, said in phrases.items()]


def _explain(problem: Any, root: type[BaseModel]) -> tuple[str, str]:
    """Subject (key and value) and what is wrong with it."""
    loc, kind, value = problem["loc"], problem["type"], problem["input"]
    if kind == "extra_forbidden":
        parents, model = _walk(loc[:-1], root)
        return (
            f"unknown key {'.'.join([*parents, str(loc[-1])])!r} ",
            f"({_suggestion(str(loc[-1]), model, root)})",
        )
    key = ".".join(_walk(loc, root)[0])
    message = problem["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if kind == "missing":
        return f"{key!r} is missing", ""
    if kind == "value_error":
        return "", f"{key}: {message}" if key and not message.startswith(key) else message
    if kind == "string_pattern_mismatch":
        message = "may only hold lower-case letters, digits, '-', '_' and '.', at most 63, no '-', '_' or '.' at its ends"
    if kind in ("model_type", "dict_type"):
        message = "should be a mapping of keys to values"
    return f"{key} = {value!r}: ", message[0].lower() + message[1:]


def _suggestion(leaf: str, here: type[BaseModel], root: type[BaseModel]) -> str:
    """The key that was meant: misspelt, in another group, or as other trainers call it."""
    known = list(here.model_fields)
    near = difflib.get_close_matches(leaf, known, n=1, cutoff=0.7)
    if near:
        return f"did you mean {near[0]!r}?"
    elsewhere = {
        name: f"{group}.{name}" for group, model in _groups(root) for name in reversed(model.model_fields)
    }
    meant = elsewhere.get(leaf) or (ELSEWHERE.get(leaf) if root is Job else None)
    if meant:
        return f"did you mean {meant!r}?"
    near = difflib.get_close_matches(leaf, known, n=1, cutoff=0.5)
    if near:
        return f"did you mean {near[0]!r}?"
    near = difflib.get_close_matches(leaf, elsewhere, n=1, cutoff=0.8)
    return f"did you mean {elsewhere[near[0]]!r}?" if near else f"known here: {', '.join(known)}"


def _groups(root: type[BaseModel]) -> list[tuple[str, type[BaseModel]]]:
    found = [(name, _model_in(field.annotation)) for name, field in root.model_fields.items()]
    return [(name, model) for name, model in found if model]


def _walk(loc: tuple[Any, ...], root: type[BaseModel]) -> tuple[list[str], type[BaseModel]]:
    """The parts of a location that are keys or indices (not the names of a union's branches), and the model there."""
    parts: list[str] = []
    model: type[BaseModel] = root
    inside: Any = root  # annotation of what the next part selects from
    for part in loc:
        if isinstance(part, int) and get_origin(inside) is not tuple:
            parts.append(str(part))
        elif _is_mapping(inside):
            parts.append(str(part))
            inside = get_args(inside)[1]
        elif part in model.model_fields and _model_in(inside) is model:
            parts.append(str(part))
            inside = model.model_fields[part].annotation
            model = _model_in(inside) or model
    return parts, model


def _is_mapping(annotation: Any) -> bool:
    return get_origin(annotation) is dict


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in get_args(annotation):
        found = _model_in(inner)
        if found:
            return found
    return None
