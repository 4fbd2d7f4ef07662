"""Every value and every combination a job refuses, and that the sentence names the key."""

from __future__ import annotations

from typing import Any

import pytest

from rayft.errors import JobError
from rayft.spec import Job, parse_job

SOURCE = {"path": "a.jsonl"}


def job(**groups: Any) -> Job:
    return parse_job({"name": "run", "model": {"path": "m"}, "data": {"train": [SOURCE]}, **groups})


def refused(**groups: Any) -> str:
    with pytest.raises(JobError) as caught:
        job(**groups)
    return str(caught.value)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"seed": -1}, "seed = -1: should be greater than or equal to 0"),
        ({"seed": "abc"}, "seed = 'abc': should be a valid integer"),
        ({"method": "trpo"}, "method = 'trpo'"),
        ({"train": {"learning_rate": 0}}, "train.learning_rate = 0"),
        ({"train": {"learning_rate": "fast"}}, "train.learning_rate = 'fast'"),
        ({"train": {"learning_rate": float("inf")}}, "train.learning_rate = inf: should be a finite number"),
        ({"train": {"max_loss": float("nan")}}, "train.max_loss = nan"),
        ({"train": {"max_steps": 1.5}}, "train.max_steps = 1.5"),
        ({"train": {"warmup_ratio": 1.1}}, "train.warmup_ratio = 1.1"),
        ({"train": {"lr_scheduler": "poly"}}, "should be 'constant', 'linear', 'cosine' or 'wsd'"),
        ({"train": 3}, "train = 3: should be a mapping"),
        ({"zero": {"stage": 4}}, "should be 'auto', 0, 1, 2 or 3"),
        ({"cluster": {"num_workers": 0}}, "cluster.num_workers = 0: should be greater than 0, or "),
        ({"cluster": {"num_workers": [2, 1]}}, "cluster.num_workers: [min, max] has min 2 > max 1"),
        ({"cluster": {"num_workers": [1, 2, 3]}}, "cluster.num_workers"),
        ({"cluster": {"max_failures": -1}}, "cluster.max_failures = -1"),
        ({"data": {"train": []}}, "data.train = []: list should have at least 1 item"),
        ({"data": {"train": "a.jsonl"}}, "data.train = 'a.jsonl': should be a valid list"),
        ({"data": {"train": ["a.jsonl"]}}, "data.train.0 = 'a.jsonl': should be a mapping"),
        ({"data": {"train": [{"path": "a", "format": "xml"}]}}, "data.train.0.format = 'xml'"),
        ({"data": {"train": [SOURCE], "packing": "maybe"}}, "data.packing = 'maybe'"),
        ({"data": {"train": [SOURCE], "too_long": "cut"}}, "should be 'drop', 'truncate' or 'error'"),
        ({"adapter": {"type": "lora", "target_modules": 3}}, "adapter.target_modules = 3"),
        ({"eval": {"suites": [{"name": "a"}]}}, "'eval.suites.0.type' is missing"),
        ({"model": {}}, "'model.path' is missing"),
        ({"deepspeed": {1: 2}}, "deepspeed"),
    ],
)
def test_wrong_values(groups: dict[str, Any], message: str) -> None:
    assert message in refused(**groups)


@pytest.mark.parametrize("name", ["My Run", "-a", "a-", "", "a/b", "x" * 64, "ü"])
def test_run_names_that_no_folder_or_kubernetes_object_could_have(name: str) -> None:
    assert "lower-case letters" in refused(name=name)


@pytest.mark.parametrize("name", ["a", "triage-2", "v1.2_b", "x" * 63, "2026-11-22"])
def test_run_names(name: str) -> None:
    assert job(name=name).name == name


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (
            {"train": {"global_batch_size": 8, "tokens_per_step": 100}},
            "train: give global_batch_size or tokens_per_step",
        ),
        ({"train": {"warmup_steps": 9, "max_steps": 8}}, "warmup_steps 9 is more than max_steps 8"),
        ({"train": {"lr_scheduler": "wsd", "warmup_ratio": 0.9}}, "warmup_ratio and decay_ratio"),
        ({"train": {"early_stopping_patience": 2}}, "train.early_stopping_patience needs data.eval"),
        ({"eval": {"every_steps": 5}}, "eval.every_steps needs data.eval"),
        ({"eval": {"suites": [{"name": "a", "type": "qa", "path": "p"}] * 2}}, "two suites are named 'a'"),
        ({"adapter": {"type": "qlora"}}, "needs a GPU"),
        ({"adapter": {"lora_r": 8}}, "lora_r does nothing without `type: lora`"),
        (
            {"train": {"precision": "pure_bf16"}, "zero": {"offload_optimizer": True}},
            "contradicts train.precision",
        ),
        ({"zero": {"stage": 0, "offload_optimizer": True}}, "offload_optimizer needs stage 1, 2 or 3"),
        (
            {"model": {"path": "m", "attention": "sdpa"}, "data": {"train": [SOURCE], "packing": True}},
            "model.attention sdpa mixes the documents",
        ),
        ({"data": {"train": [{"path": "a", "weight": 1}, {"path": "b"}]}}, "missing for 'b'"),
        (
            {"data": {"train": [{"path": "a", "replay": True, "weight": 1}]}},
            "at least one source must not be `replay`",
        ),
        (
            {"data": {"train": [{"path": "a"}, {"path": "b", "replay": True}]}},
            "needs a `weight` on every source",
        ),
    ],
)
def test_contradictions(groups: dict[str, Any], message: str) -> None:
    text = refused(**groups)
    assert message in text
    assert "Traceback" not in text


@pytest.mark.parametrize(
    "groups",
    [
        {"train": {"tokens_per_step": 4096}},
        {"train": {"warmup_steps": 8, "max_steps": 8}},
        {
            "train": {"early_stopping_patience": 2},
            "data": {"train": [SOURCE], "eval": [SOURCE]},
            "eval": {"every_steps": 5},
        },
        {"adapter": {"type": "qlora"}, "cluster": {"gpus_per_worker": 1}},
        {"adapter": {"type": "none", "lora_r": 8}},
        {"adapter": {}},
        {"zero": {"offload_optimizer": True}},
        {"model": {"path": "m", "attention": "sdpa"}},
        {"data": {"train": [{"path": "a", "weight": 3}, {"path": "b", "replay": True, "weight": 1}]}},
    ],
)
def test_their_neighbours_are_fine(groups: dict[str, Any]) -> None:
    assert job(**groups)


def test_the_batch_has_one_unit() -> None:
    assert job().train.global_batch_size == 16
    assert job(train={"tokens_per_step": 4096}).train.global_batch_size is None
