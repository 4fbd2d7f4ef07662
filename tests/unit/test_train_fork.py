"""What a run may begin from: the checkpoint must be there, and mean the same to the new job."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rayft.checkpoint import Lease
from rayft.errors import JobError, StorageError
from rayft.spec import Job, changed_keys, dump_job, parse_job
from rayft.storage import LocalStore, Store
from rayft.train.fork import differences, find_fork, forked_state, refuse_lost_beginning
from tests import checkpoints

ORIGIN: dict[str, Any] = {
    "model": {"source": "m", "identity": "model-1"},
    "data": {"identity": "rows-1", "rows": 9, "sources": ["r"]},
    "tokenizer_and_template": "t",
}


def job(name: str = "mine", **groups: Any) -> Job:
    values: dict[str, Any] = {
        "name": name,
        "model": {"path": "m"},
        "adapter": {"type": "lora", "lora_r": 8},
        "data": {"train": [{"path": "r"}]},
    }
    return parse_job({**values, **groups})


@pytest.fixture
def source(tmp_path: Path) -> Store:
    """The folder of a run with checkpoints of steps 4 and 8."""
    store = LocalStore(tmp_path / "runs" / "source")
    lease = Lease.acquire(store, {})
    store.put("job.yaml", dump_job(job("source")).encode())
    store.put("lineage.json", json.dumps(ORIGIN).encode())
    epoch = lease.begin_attempt(None)
    for step in (4, 8):
        checkpoints.save(store, step, epoch=epoch)
    lease.release()
    return store


@pytest.fixture
def own(tmp_path: Path) -> Store:
    return LocalStore(tmp_path / "runs" / "mine")


@pytest.mark.parametrize(
    "value", ["runs/a", "runs/a@", "@4", "runs/a@x", "runs/a@0", "runs/a@-4", "runs/a@²"]
)
def test_the_key_names_a_run_and_a_step(value: str) -> None:
    with pytest.raises(JobError, match="RUN_FOLDER@STEP"):
        job(checkpoint={"fork_from": value})


def test_the_last_at_sign_counts() -> None:
    assert job(checkpoint={"fork_from": "s3://b/a@home/run@12"}).checkpoint.fork == ("s3://b/a@home/run", 12)
    assert job().checkpoint.fork is None


def test_another_beginning_is_another_run() -> None:
    forked = job(checkpoint={"fork_from": "runs/a@4", "keep": 3})
    assert changed_keys(job(), forked) == ["checkpoint.fork_from: None -> 'runs/a@4'"]


def test_a_checkpoint_of_the_same_model_and_rows_is_found(source: Store, own: Store) -> None:
    changed = job(train={"learning_rate": 0.5, "weight_decay": 0.1, "global_batch_size": 32, "max_steps": 50})
    fork = find_fork(changed, own, source, 4, ORIGIN)
    assert fork.manifest.step == 4
    lease = Lease.acquire(own, {})
    fork.take(changed, own, lease.epoch)
    checkpoints.check(own, 4)


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ({"adapter": {"type": "lora", "lora_r": 16}}, "adapter.lora_r: 8 -> 16"),
        ({"adapter": {"type": "none"}}, "adapter.type: 'lora' -> 'none'"),
        ({"adapter": {"type": "lora", "lora_r": 8, "target_modules": ["q_proj"]}}, "adapter.target_modules"),
        ({"seed": 1}, "seed: 0 -> 1"),
        ({"method": "reward"}, "method: 'sft' -> 'reward'"),
        ({"data": {"train": [{"path": "r", "weight": 1.0}]}}, "the weights of data.train"),
    ],
)
def test_a_checkpoint_that_means_something_else_is_refused(
    groups: dict[str, Any], words: str, source: Store, own: Store
) -> None:
    with pytest.raises(JobError) as caught:
        find_fork(job(**groups), own, source, 4, ORIGIN)
    assert words in caught.value.message
    assert own.list() == []


@pytest.mark.parametrize(("key", "words"), [("model", "the base model"), ("data", "the rows of data.train")])
def test_another_model_and_other_rows_are_refused(key: str, words: str, source: Store, own: Store) -> None:
    origin = {**ORIGIN, key: {**ORIGIN[key], "identity": "other"}}
    with pytest.raises(JobError, match=words):
        find_fork(job(), own, source, 4, origin)


def test_what_is_not_there_is_refused_with_what_there_is(source: Store, own: Store, tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"no committed checkpoint of step 5 \(there are: 4, 8\)"):
        find_fork(job(), own, source, 5, ORIGIN)
    with pytest.raises(JobError, match="is no run folder"):
        find_fork(job(), own, LocalStore(tmp_path / "nowhere"), 4, ORIGIN)
    source.delete_prefix("checkpoints")
    with pytest.raises(JobError, match="there are: none"):
        find_fork(job(), own, source, 4, ORIGIN)


def test_a_torn_checkpoint_is_an_error_of_the_storage(source: Store, own: Store) -> None:
    data = next(e.key for e in source.list("checkpoints/step-8") if e.key.endswith(".bin"))
    source.put(data, source.get(data)[:-1])
    with pytest.raises(StorageError, match="step-8 is corrupt"):
        find_fork(job(), own, source, 8, ORIGIN)


def test_a_run_is_no_fork_of_itself(source: Store, tmp_path: Path) -> None:
    (tmp_path / "other").symlink_to(tmp_path / "runs")
    with pytest.raises(JobError, match="fork of itself"):
        find_fork(job("source"), source, LocalStore(tmp_path / "other" / "source"), 4, ORIGIN)


def test_a_controller_keeps_its_state_unless_the_job_says_otherwise() -> None:
    def ppo(**rl: Any) -> Job:
        return job(method="ppo", rl=rl, rewards=[{"name": "a", "type": "function", "path": "r.py:f"}])

    adaptive = ppo(kl_coef=0.1, kl_target=1.0)
    state = {"position": 4, "kl_coef": 0.3}
    assert forked_state(state, adaptive, adaptive) == state
    assert forked_state(state, adaptive, ppo(kl_coef=0.1, kl_target=2.0)) == state
    assert forked_state(state, adaptive, ppo(kl_coef=0.2, kl_target=1.0))["kl_coef"] == 0.2
    assert forked_state(state, adaptive, ppo(kl_coef=0.1))["kl_coef"] == 0.1
    assert forked_state({"position": 4}, job(), job()) == {"position": 4}


def test_a_fork_does_not_begin_again_from_the_base_model() -> None:
    refuse_lost_beginning(job(), None)
    refuse_lost_beginning(job(checkpoint={"fork_from": "runs/a@4"}), 4)
    with pytest.raises(StorageError, match="began as a fork"):
        refuse_lost_beginning(job(checkpoint={"fork_from": "runs/a@4"}), None)


def test_answers_drawn_ahead_must_have_been_drawn_and_scored_alike() -> None:
    def ahead(lag: int, weight: float = 1.0, **rollout: Any) -> Job:
        judge = {"name": "judge", "type": "http", "path": "http://127.0.0.1:1", "weight": weight}
        groups = {"rewards": [judge], "rollout": {"engines": 1, "lag": lag, **rollout}}
        return job(method="grpo", adapter={"type": "none"}, **groups)

    assert differences(ahead(1), ahead(1)) == []
    assert differences(ahead(1), ahead(1, weight=0.5)) == ["rewards, by which answers drawn ahead are scored"]
    assert differences(ahead(1), ahead(1, top_k=5)) == ["rollout.top_k: None -> 5"]
    assert differences(ahead(0), ahead(0, weight=0.5, top_k=5)) == []
