"""Runs that begin from another run's checkpoint, against that run resumed by hand under the same settings."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayft.checkpoint import CheckpointReader, committed_steps
from rayft.cli import main
from rayft.errors import PreemptedError
from rayft.report.log import read_log
from rayft.spec import Job, dump_job
from rayft.storage import open_store
from tests.cluster.rewards import function, rl_job
from tests.cluster.rewards import prepare_folder as prepare_prompts
from tests.cluster.steps import prepare_folder, small_job
from tests.fault.test_rlhf_kill import facts
from tests.linked import Linked
from tests.runs import assert_same_state, events, final_state, losses, write_job

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

#: What the forks change, all of it settings of the optimizer.
CHANGED = {
    "learning_rate": 4e-3,
    "weight_decay": 0.2,
    "adam_beta1": 0.8,
    "adam_beta2": 0.95,
    "max_grad_norm": 0.3,
}


def job(folder: Path, name: str, train: dict[str, Any] | None = None, **groups: Any) -> Job:
    values: dict[str, Any] = {
        "train": {"max_steps": 6, **(train or {})},
        "checkpoint": {"every_steps": 1, "keep": 9, **groups.pop("checkpoint", {})},
        "zero": {"stage": 2},
    }
    return small_job(folder, name=name, **{**values, **groups})


def run(job: Job, folder: Path) -> int:
    return main(["run", str(write_job(job, folder / f"{job.name}.yaml"))])


def by_hand(source: Path, target: Path, step: int, job: Job) -> None:
    """The run folder as it was at a step, under another name and another job: what a person would make who knows the format."""
    shutil.copytree(source, target)
    for later in (target / "checkpoints").iterdir():
        if int(later.name.partition("-")[2]) > step:
            shutil.rmtree(later)
    for name in ("log.jsonl", "report.html"):
        (target / name).unlink()
    (target / "job.yaml").write_text(dump_job(job))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> Path:
    """With a run `source` of six steps, all of them kept."""
    folder = prepare_folder(tmp_path_factory.mktemp("fork"))
    assert run(job(folder, "source"), folder) == 0
    return folder


@pytest.mark.full
def test_an_unchanged_fork_goes_on_like_its_source(folder: Path) -> None:
    source, own = folder / "runs" / "source", folder / "runs" / "same"
    assert run(job(folder, "same", checkpoint={"fork_from": f"{source}@3"}), folder) == 0
    assert_same_state(own, source)
    before, after = losses(open_store(source)), losses(open_store(own))
    assert after == {step: before[step] for step in (4, 5, 6)}
    [event] = events(open_store(own), "fork")
    assert (event["source"], event["step"]) == (str(source), 3)
    lineage = json.loads((own / "lineage.json").read_text())
    assert lineage["forked_from"] == {"run": str(source), "step": 3}


def test_a_changed_fork_equals_its_source_resumed_by_hand(folder: Path) -> None:
    """Stopped after a step and started again when the source is gone: a fork is forked once."""
    runs = folder / "runs"
    by_hand(runs / "source", runs / "hand", 3, job(folder, "hand", CHANGED))
    assert run(job(folder, "hand", CHANGED), folder) == 0
    shutil.copytree(runs / "source", runs / "donor")
    measured = {
        "data": {"eval": [{"path": str(folder / "rows.jsonl"), "limit": 8}]},
        "eval": {"every_steps": 4},
    }
    changed = job(
        folder,
        "changed",
        CHANGED,
        checkpoint={"fork_from": f"{runs / 'donor'}@3", "every_steps": 4},
        **measured,
    )
    first = Linked(changed)
    first.gate(4)
    first.link.stop("a look")
    assert isinstance(first.end(), PreemptedError)
    assert committed_steps(open_store(runs / "changed")) == [3, 4]
    shutil.rmtree(runs / "donor")
    assert run(changed, folder) == 0
    assert len(events(open_store(runs / "changed"), "fork")) == 1
    assert json.loads((runs / "changed" / "lineage.json").read_text())["forked_from"]["step"] == 3
    assert losses(open_store(runs / "changed")) == losses(open_store(runs / "hand"))
    _, tensors, state = final_state(runs / "changed")
    _, expected, expected_state = final_state(runs / "hand")
    assert {**state, "stopping": None} == {**expected_state, "stopping": None}
    assert all(np.array_equal(tensors[key], expected[key]) for key in expected | tensors)
    _, other, _ = final_state(runs / "source")
    assert not all(np.array_equal(other[key], expected[key]) for key in expected)
    refuse_old_settings(runs / "changed", step=4)


def refuse_old_settings(uri: Path, step: int) -> None:
    """That the step to this checkpoint was AdamW's with the changed settings (arXiv:1711.05101, algorithm 2).

    The gradient follows from the first moments; the second moments and the weights must follow from it.
    """
    store = open_store(uri)
    was, now = CheckpointReader(store, step - 1), CheckpointReader(store, step)
    beta1, beta2 = CHANGED["adam_beta1"], CHANGED["adam_beta2"]
    rate = next(
        row["learning_rate"] for row in read_log(store) if row["kind"] == "step" and row["step"] == step
    )
    assert rate > 1e-3  # the source's is lower throughout
    squares = 0.0
    for name in now.names("param"):
        p, m, v = (was.read(name, kind).astype(np.float64) for kind in ("param", "exp_avg", "exp_avg_sq"))
        p_next, m_next, v_next = (
            now.read(name, kind).astype(np.float64) for kind in ("param", "exp_avg", "exp_avg_sq")
        )
        gradient = (m_next - beta1 * m) / (1 - beta1)
        squares += float((gradient**2).sum())
        np.testing.assert_allclose(v_next, beta2 * v + (1 - beta2) * gradient**2, rtol=1e-3, atol=1e-12)
        decay = CHANGED["weight_decay"] if len(now.shape(name)) > 1 else 0.0
        update = (m_next / (1 - beta1**step)) / (np.sqrt(v_next / (1 - beta2**step)) + 1e-8)
        np.testing.assert_allclose(p_next, p * (1 - rate * decay) - rate * update, rtol=0, atol=1e-6)
    assert np.sqrt(squares) < 1.001 * CHANGED["max_grad_norm"]


@pytest.mark.full
def test_a_fork_with_other_batches_reads_what_is_left(folder: Path) -> None:
    """An epoch of 48 rows, 24 of them read in steps of 8: the rest in steps of 16, and of 4."""
    epoch = {"max_steps": None, "num_train_epochs": 1}
    source = folder / "runs" / "source"
    for rows, last in ((16, 5), (4, 9)):
        train = {**epoch, "global_batch_size": rows}
        forked = job(folder, f"by-{rows}", train, checkpoint={"fork_from": f"{source}@3", "every_steps": 50})
        assert run(forked, folder) == 0
        store = open_store(folder / "runs" / f"by-{rows}")
        positions = {row["step"]: row["position"] for row in read_log(store) if row["kind"] == "step"}
        assert (max(positions), positions[max(positions)]) == (last, 48)
        assert committed_steps(store)[-1] == last


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ({"checkpoint": {"fork_from": "SOURCE@7"}}, "no committed checkpoint of step 7"),
        pytest.param(
            {"checkpoint": {"fork_from": "SOURCE-not@3"}}, "is no run folder", marks=pytest.mark.full
        ),
        pytest.param(
            {"checkpoint": {"fork_from": "SOURCE@3"}, "data": {"max_length": 128}},
            "the rows of data.train",
            marks=pytest.mark.full,
        ),
        pytest.param(
            {"checkpoint": {"fork_from": "SOURCE@3"}, "train": {"max_steps": 3}},
            "would be over where it begins",
            marks=pytest.mark.full,
        ),
        pytest.param(
            {"checkpoint": {"fork_from": "SOURCE@3"}, "adapter": {"type": "lora"}},
            "adapter.type",
            marks=pytest.mark.full,
        ),
    ],
)
def test_what_cannot_be_forked_ends_with_2(
    groups: dict[str, Any], words: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(folder / "runs" / "source")
    groups = {
        **groups,
        "checkpoint": {"fork_from": groups["checkpoint"]["fork_from"].replace("SOURCE", source)},
    }
    refused = job(folder, "refused", **groups)
    assert run(refused, folder) == 2
    assert words in " ".join(capsys.readouterr().err.split())
    store = open_store(folder / "runs" / "refused")
    assert committed_steps(store) == []
    assert events(store, "start") == []
    assert run(job(folder, "refused", checkpoint={"fork_from": f"{source}@5"}), folder) == 0
    shutil.rmtree(folder / "runs" / "refused")


@pytest.mark.full
@pytest.mark.parametrize("lag", [0, 1])
def test_a_fork_that_learns_from_rewards(lag: int, tmp_path: Path, local_ray: None) -> None:
    """Policy, critic, controller and answers drawn ahead; with other rates and coefficients as resumed by hand."""
    folder = prepare_prompts(tmp_path)
    rollout = {"max_new_tokens": 12, "unit_prompts": 2} | ({"engines": 1, "lag": 1} if lag else {})

    def made(name: str, rate: float, kl_target: float, **checkpoint: Any) -> Job:
        return rl_job(
            folder,
            "ppo",
            name=name,
            rewards=[function(folder)],
            rollout=rollout,
            rl={"kl_coef": 0.05, "kl_target": kl_target, "kl_horizon": 100},
            train={"max_steps": 4, "global_batch_size": 6, "learning_rate": rate, "weight_decay": 10 * rate},
            cluster={"num_workers": 1, "cpus_per_worker": 0.5},
            checkpoint={"every_steps": 1, "keep": 9, **checkpoint},
        )

    runs = folder / "runs"
    assert run(made("source", 1e-3, 1.0), folder) == 0
    assert run(made("same", 1e-3, 1.0, fork_from=f"{runs / 'source'}@2"), folder) == 0
    assert_same_state(runs / "same", runs / "source")
    after = [row for row in facts(runs / "source") if row["step"] > 2]
    assert facts(runs / "same") == after
    hand = made("hand", 3e-3, 0.1)
    by_hand(runs / "source", runs / "hand", 2, hand)
    assert run(hand, folder) == 0
    assert run(made("changed", 3e-3, 0.1, fork_from=f"{runs / 'source'}@2"), folder) == 0
    assert_same_state(runs / "changed", runs / "hand")
    assert facts(runs / "changed") == facts(runs / "hand")
    assert facts(runs / "changed") != after
