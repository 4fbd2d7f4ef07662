"""Job files with a search, and what is said of those that are refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from rayft.errors import JobError
from rayft.spec import Job, parse_job

R, A = "adapter.lora_r", "adapter.lora_alpha"
BASE: dict[str, Any] = {
    "name": "search",
    "model": {"path": "m"},
    "adapter": {"type": "lora"},
    "data": {"train": [{"path": "a.jsonl"}], "eval": [{"path": "b.jsonl"}]},
    "train": {"max_steps": 100},
    "eval": {
        "every_steps": 10,
        "suites": [{"name": "general text", "type": "bits_per_byte", "path": "t.jsonl"}],
    },
}
RL: dict[str, Any] = {
    "method": "grpo",
    "data": {"train": [{"path": "a.jsonl"}], "eval": [{"path": "b.jsonl"}]},
    "rewards": [
        {"name": "right", "type": "function", "path": "a.py:b"},
        {"name": "kind", "type": "function", "path": "a.py:c"},
    ],
}
RATE = {"train.learning_rate": {"loguniform": [1e-5, 1e-3]}}


def search(space: dict[str, Any] | None = None, groups: dict[str, Any] | None = None, **tune: Any) -> Job:
    tune = {"metric": "eval.loss", **tune} if "objectives" not in tune else tune
    values = {**copy.deepcopy(BASE), **(groups or {})}
    return parse_job(values | {"tune": {"space": RATE if space is None else space, **tune}})


def refused(space: dict[str, Any] | None = None, groups: dict[str, Any] | None = None, **tune: Any) -> str:
    with pytest.raises(JobError) as caught:
        search(space, groups, **tune)
    assert caught.value.code == 2
    return caught.value.message
