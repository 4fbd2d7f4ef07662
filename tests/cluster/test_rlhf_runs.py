"""Short runs that learn from rewards, from the job file to the exported model."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

from rayft.checkpoint import committed_steps
from rayft.cli import main
from rayft.learner.schedule import learning_rate
from rayft.report.log import read_log
from rayft.report.usage_table import collect
from rayft.rlhf.browse import read_rows
from rayft.rlhf.kept import key_of
from rayft.rlhf.plan import RlPlan
from rayft.rlhf.rewards import ModelScorer
from rayft.storage import open_store
from tests.cluster.rewards import REWARDS, function, prepare_folder, rl_job
from tests.fault.test_rlhf_kill import facts
from tests.runs import assert_same_state, events, read_json, write_job

pytestmark = pytest.mark.slow

LORA = {"type": "lora", "lora_r": 4, "target_modules": "all-linear"}

#: Method -> its groups. Between them: both kinds of reference and none, a critic, both kinds of reward, ZeRO 0 to 2.
CELLS: dict[str, dict[str, Any]] = {
    "grpo": {"adapter": LORA, "zero": {"stage": 2}},
    "ppo": {
        "rl": {"kl_target": 1.0, "num_mini_batches": 2},
        "zero": {"stage": 1},
        "eval": {"every_steps": 2, "answers": 3},
    },
    "rloo": {"zero": {"stage": 0}, "rollout": {"max_new_tokens": 12, "temperature": 0.7, "top_p": 0.9}},
    "reinforce++": {"adapter": LORA, "cluster": {"num_workers": 1}},
    "dapo": {"rl": {"num_generations": 4, "overlong_buffer": 4}, "data": {"packing": False}},
    "dr_grpo": {"rl": {"num_generations": 4, "truncated": "penalty"}},
    "gspo": {"rl": {"num_generations": 4, "num_mini_batches": 2}},
}
SHORT = ("grpo", "ppo")
#: Where the reward function `raises` does it.
RAISED = REWARDS.splitlines().index('    raise KeyError("no such thing")') + 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_folder(tmp_path_factory.mktemp("rlhf"))


def run(job: Any, folder: Path) -> int:
    return main(["run", str(write_job(job, folder / f"{job.name}.yaml"))])


@pytest.mark.parametrize(
    "method", [*SHORT, *(pytest.param(m, marks=pytest.mark.full) for m in CELLS if m not in SHORT)]
)
def test_a_run_asks_learns_and_exports(method: str, folder: Path, local_ray: None) -> None:
    name = method.replace("_", "-").replace("+", "p")
    groups = {key: dict(group) for key, group in CELLS[method].items()}
    if method == "ppo":
        groups["data"] = {"eval": [{"path": str(folder / "prompts.jsonl"), "limit": 5}]}
    if "data" in groups:
        groups["data"] = {**rl_job(folder, method).data.model_dump(exclude_unset=True), **groups["data"]}
    model = {"name": "model", "type": "model", "path": str(folder / "scorer"), "weight": 0.5, "workers": 2}
    rewards = [function(folder), model] if method == "ppo" else [function(folder)]
    job = rl_job(folder, method, name=name, rewards=rewards, **groups)
    assert run(job, folder) == 0
    uri = folder / "runs" / name
    log = read_log(open_store(uri))
    steps = [row for row in log if row["kind"] == "step"]
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    rates = [learning_rate(job.train, step, 4) for step in range(4)]
    assert [row["learning_rate"] for row in steps] == pytest.approx(rates)
    assert len(set(rates)) == 4
    [used] = collect([str(uri)])
    begun = next(row for row in log if row.get("event") == "start")
    assert sum(used.parts.values()) == 10_000 * used.wall_ms * begun["devices"]["CPU"]
    assert used.parts["useful"] > 0 < used.parts["load"]
    assert (used.parts["evaluation"] > 0) == (method == "ppo")
    first = steps[0]["metrics"]
    assert first["engine_gap"] < 1e-5
    if job.rl.kl_coef:
        assert first["kl"] == 0.0, "the reference is not what the policy starts as"
        assert steps[-1]["metrics"]["kl"] != 0  # an estimate, which may be negative
    if job.rl.num_mini_batches == job.rl.num_epochs == 1:
        assert first["moved"] == 0.0
        assert first["ratio"] == pytest.approx(1.0, abs=1e-7)
        assert first["clip_fraction"] == 0.0
    if method == "ppo":
        assert {"value_loss", "score/small", "score/model"} <= first.keys()
        held_out = {row["step"]: row["metrics"] for row in log if row["kind"] == "eval"}
        assert list(held_out) == [0, 2, 4]
        assert held_out[0]["kl"] == 0.0
        assert held_out[0]["score"] == pytest.approx(
            held_out[0]["score/small"] + 0.5 * held_out[0]["score/model"]
        )
        assert {"win_rate/small", "win_rate/model", "score_stderr"} <= held_out[4].keys()
        before, after = (
            pq.read_table(
                io.BytesIO(open_store(uri).get(f"rollouts/held-out-00000{step}.parquet"))
            ).to_pylist()
            for step in (0, 4)
        )
        assert [row["sample"] for row in before] == 5 * [0, 1, 2]
        assert len({tuple(row["ids"]) for row in before}) > 5
        of_prompts = np.array([row["score/small"] for row in before]).reshape(5, 3).mean(axis=1)
        assert held_out[0]["score/small_stderr"] == pytest.approx(of_prompts.std(ddof=1) / 5**0.5)
        wins = [
            (a["score/small"] > b["score/small"]) + (a["score/small"] == b["score/small"]) / 2
            for a, b in zip(after, before, strict=True)
        ]
        assert held_out[4]["win_rate/small"] == pytest.approx(sum(wins) / 15)
        source = next(source for source in job.rewards if source.name == "model")
        alone = ModelScorer(source, dtype=torch.float32)
        asked, answers = [json.loads(row["prompt"]) for row in before], [row["text"] for row in before]
        wanted = alone(asked, answers, {})
        assert [row["score/model"] for row in before] == pytest.approx(wanted, abs=1e-4), (
            "shared by two workers"
        )
        assert steps[-1]["metrics"]["kl_coef"] != first["kl_coef"]
    ledger = [row for row in log if row["kind"] == "ledger"]
    seen = [row for entry in ledger for what in ("trained", "uniform") for row in entry[what]]
    if method != "dapo":  # which asks for others in the place of some, into the next epoch
        assert sorted(seen) == list(range(24)), "an epoch does not ask every prompt once"
    table = pq.read_table(io.BytesIO(open_store(uri).get("rollouts/step-000002.parquet")))
    answers = 6 * (job.rl.num_generations or 1)
    assert table.num_rows == answers == steps[1]["answers"]
    rows = table.to_pylist()
    assert {row["version"] for row in rows} == {1}
    assert all(len(row["ids"]) == len(row["old_logprobs"]) == len(row["advantages"]) for row in rows)
    if job.adapter.type == "none":
        model = AutoModelForCausalLM.from_pretrained(uri / "model", dtype=torch.float32)
        before = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
        assert not torch.equal(model.lm_head.weight, before.lm_head.weight)
    else:
        assert (uri / "model" / "adapter_model.safetensors").exists()
    assert (uri / "report.html").stat().st_size > 10_000


@pytest.mark.full
def test_an_epoch_ends_with_its_last_prompt(folder: Path, local_ray: None) -> None:
    """24 prompts in steps of 16: the second has 8."""
    train = {"max_steps": None, "num_train_epochs": 1, "global_batch_size": 16, "learning_rate": 1e-3}
    job = rl_job(folder, "dr_grpo", name="epoch", train=train)
    assert run(job, folder) == 0
    ledger = [row for row in read_log(open_store(folder / "runs" / "epoch")) if row["kind"] == "ledger"]
    assert [len(row["trained"]) for row in ledger] == [16, 8]
    assert sorted(row for entry in ledger for row in entry["trained"]) == list(range(24))


@pytest.mark.full
def test_a_reward_whose_process_always_dies(
    folder: Path, capfd: pytest.CaptureFixture[str], local_ray: None
) -> None:
    """Once more within the step, and then, with the role's budget used up, once from the beginning."""
    rewards, deaths = [function(folder, "dies")], folder / "deaths"
    cluster = {"num_workers": 1, "max_failures": 1}
    assert run(rl_job(folder, "grpo", name="dying", rewards=rewards, cluster=cluster), folder) == 9
    assert "The roles failed more than 1 times" in capfd.readouterr().err
    assert len(deaths.read_text()) == 3
    store = open_store(folder / "runs" / "dying")
    assert len(events(store, "recovery")) == len(events(store, "failure")) == 1


@pytest.mark.full
def test_one_pass_is_enough(folder: Path, local_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking up the old probabilities before the update that sees them anyway changes nothing, to the last bit."""
    rl = {"num_generations": 4, "kl_target": 1.0}
    once = rl_job(folder, "grpo", name="once", rl=rl, zero={"stage": 2}, adapter=LORA)
    assert run(once, folder) == 0
    monkeypatch.setattr(RlPlan, "one_pass", False)
    twice = rl_job(folder, "grpo", name="twice", rl=rl, zero={"stage": 2}, adapter=LORA)
    assert run(twice, folder) == 0
    assert_same_state(folder / "runs" / "once", folder / "runs" / "twice")
    assert facts(folder / "runs" / "once") == facts(folder / "runs" / "twice")
    tables = [
        pq.read_table(io.BytesIO(open_store(folder / "runs" / name).get("rollouts/step-000003.parquet")))
        for name in ("once", "twice")
    ]
    assert tables[0].select(tables[1].column_names).equals(tables[1])


def test_an_epoch_that_ends_early_is_saved(folder: Path, local_ray: None) -> None:
    """Prompts that are too long make the epoch shorter than was planned; its last step has fewer answers than mini-batches."""
    rows = [{"prompt": "a" * (3 if number < 6 else 300), "id": number} for number in range(10)]
    (folder / "uneven.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = rl_job(
        folder,
        "reinforce++",
        name="early",
        data={"train": [{"path": str(folder / "uneven.jsonl")}], "max_length": 96},
        rl={"num_mini_batches": 3},
        train={"max_steps": None, "num_train_epochs": 1, "global_batch_size": 4, "learning_rate": 1e-3},
        checkpoint={"every_steps": 100},
        cluster={"num_workers": 1},
    )
    assert run(job, folder) == 0
    store = open_store(folder / "runs" / "early")
    ledger = [row for row in read_log(store) if row["kind"] == "ledger"]
    assert [len(row["trained"]) for row in ledger if row["trained"]] == [4, 2]
    assert sorted(row for entry in ledger for what in ("trained", "too_long") for row in entry[what]) == list(
        range(10)
    )
    assert committed_steps(store) == [2]
    assert store.exists("model/config.json")


@pytest.mark.full
def test_it_learns_what_is_rewarded(folder: Path, local_ray: None) -> None:
    """Small letters, a tenth of what a random model writes: by a standard deviation of the first answers' scores at least."""
    train = {"max_steps": 25, "learning_rate": 1e-2, "lr_scheduler": "constant", "global_batch_size": 8}
    job = rl_job(folder, "dr_grpo", name="learns", train=train, checkpoint={"every_steps": 25})
    assert run(job, folder) == 0
    metrics = [
        row["metrics"] for row in read_log(open_store(folder / "runs" / "learns")) if row["kind"] == "step"
    ]
    last = sum(row["score"] for row in metrics[-3:]) / 3
    assert last > metrics[0]["score"] + metrics[0]["score_std"]


@pytest.mark.full
def test_suites_are_measured_before_and_after(folder: Path, local_ray: None) -> None:
    text = folder / "text.jsonl"
    text.write_text('{"text": "some words of general text"}\n')
    suites = [{"name": "general", "type": "bits_per_byte", "path": str(text), "forgetting": True}]
    job = rl_job(
        folder,
        "grpo",
        name="suites",
        eval={"suites": suites},
        train={"max_steps": 2, "global_batch_size": 2, "learning_rate": 1e-2, "precision": "fp32"},
    )
    assert run(job, folder) == 0
    before, after = (
        read_json(folder / "runs" / "suites" / f"suites-{when}.json")["general"]
        for when in ("before", "after")
    )
    assert before != after


@pytest.mark.parametrize(
    ("name", "words", "groups"),
    [
        pytest.param(
            "raises", ["rewards.py:raises raised KeyError", f"(line {RAISED})"], {}, marks=pytest.mark.full
        ),
        ("never", ["gave no scores for 24 answers within 3 s"], {"timeout_s": 3}),
        *(
            pytest.param(name, words, {}, marks=pytest.mark.full)
            for name, words in (
                ("nan", ["gave nan for answer 1"]),
                ("short", ["gave 1 scores for 24 answers"]),
                ("missing", ["has no function 'missing'"]),
            )
        ),
        pytest.param(
            "down",
            ["http://127.0.0.1:9/score failed", "refused", "2 tries"],
            {"type": "http", "path": "http://127.0.0.1:9/score", "retries": 1},
            marks=pytest.mark.full,
        ),
    ],
)
def test_a_reward_that_misbehaves_ends_the_run_with_2(
    name: str,
    words: list[str],
    groups: dict[str, Any],
    folder: Path,
    capfd: pytest.CaptureFixture[str],
    local_ray: None,
) -> None:
    job = rl_job(folder, "grpo", name=name, rewards=[{**function(folder, name), **groups}])
    capfd.readouterr()
    assert run(job, folder) == 2
    err = capfd.readouterr().err
    assert "Traceback" not in err
    sentences = [line for line in err.splitlines() if line.startswith("rayft run:")]
    assert len(sentences) == 1, err
    for word in words:
        assert word in sentences[0]
    if name == "raises":  # the function is mended, and the very same job trains
        file = folder / "rewards.py"
        file.write_text(
            file.read_text().replace('raise KeyError("no such thing")', "return small([], completions)")
        )
        assert run(job, folder) == 0, capfd.readouterr().err


def test_a_reward_that_fails_late_loses_no_step(
    folder: Path, capfd: pytest.CaptureFixture[str], local_ray: None
) -> None:
    """Two steps are whole and no checkpoint is due: they are saved, and the answers of the third."""
    groups: dict[str, Any] = {"checkpoint": {"every_steps": 1000}, "cluster": {"num_workers": 1}}
    job = rl_job(folder, "grpo", name="late", rewards=[function(folder, "late")], **groups)
    store = open_store(folder / "runs" / "late")
    assert run(job, folder) == 2
    assert "the third step has no scores" in capfd.readouterr().err
    assert committed_steps(store) == [2]
    assert store.stat("rollouts/finished-000002.json.gz") is not None
    assert run(job, folder) == 0, "its process counts anew, so that two steps are left to it"
    assert events(store, "resume")[-1]["repeated"] == 0
    whole = rl_job(folder, "grpo", name="never-late", **groups)
    assert run(whole, folder) == 0
    assert_same_state(folder / "runs" / "late", folder / "runs" / "never-late")


@pytest.mark.parametrize("lag", [0, pytest.param(1, marks=pytest.mark.full)])
def test_a_judge_that_fails_late_loses_no_step(
    lag: int, folder: Path, capfd: pytest.CaptureFixture[str], local_ray: None
) -> None:
    """One that is measured and not learned from, at held-out prompts: the steps before are saved."""
    (folder / "judged").unlink(missing_ok=True)
    prompts = {"path": str(folder / "prompts.jsonl")}
    groups: dict[str, Any] = {
        "checkpoint": {"every_steps": 1000},
        "cluster": {"num_workers": 1},
        "zero": {"stage": 0},
        "rollout": {"max_new_tokens": 12, "unit_prompts": 2, "engines": 1, "lag": lag},
        "data": {"train": [prompts], "eval": [{**prompts, "limit": 3}], "max_length": 96},
        "eval": {"every_steps": 2},
    }
    learned = function(folder, "small")
    judge = {**function(folder, "late_judge"), "name": "judge", "weight": 0}
    name = f"judged-{lag}"
    job = rl_job(folder, "grpo", name=name, rewards=[learned, judge], **groups)
    store = open_store(folder / "runs" / name)
    assert run(job, folder) == 2
    assert "the judge has gone home" in capfd.readouterr().err
    assert committed_steps(store) == [2]
    assert run(job, folder) == 0
    assert events(store, "resume")[-1]["repeated"] == 0
    log = read_log(store)
    for what in ("issued", "generated"):
        told = [row["prompts"] for row in log if row["kind"] == what]
        assert told == [row["trained"] for row in log if row["kind"] == "ledger"], what
    whole = rl_job(folder, "grpo", name=f"never-{name}", rewards=[learned], **groups)
    assert run(whole, folder) == 0
    assert_same_state(folder / "runs" / name, folder / "runs" / f"never-{name}")


@pytest.mark.full
def test_a_run_that_drew_ahead_is_prolonged(folder: Path, local_ray: None) -> None:
    """By a fork of its last checkpoint, which has no answers for the step after it."""
    groups: dict[str, Any] = {
        "rollout": {"max_new_tokens": 12, "unit_prompts": 2, "engines": 1, "lag": 1},
        "cluster": {"num_workers": 1},
        "zero": {"stage": 0},
    }
    assert run(rl_job(folder, "grpo", name="ahead", **groups), folder) == 0
    fork = {"every_steps": 2, "fork_from": f"{folder / 'runs' / 'ahead'}@4"}
    longer = rl_job(folder, "grpo", name="longer", train={"max_steps": 6}, checkpoint=fork, **groups)
    assert run(longer, folder) == 0
    store = open_store(folder / "runs" / "longer")
    assert [row["step"] for row in read_log(store) if row["kind"] == "step"] == [5, 6]


@pytest.mark.full
def test_groups_without_spread_change_nothing(
    folder: Path, capfd: pytest.CaptureFixture[str], local_ray: None
) -> None:
    """Every answer scored the same: no advantage, and a step whose gradient is 0, which is said; DAPO draws others until it may no
    more, and those it leaves out are kept too."""
    train = {"max_steps": 1, "global_batch_size": 4, "learning_rate": 1e-2, "precision": "fp32"}
    rl = {"num_generations": 2, "max_refills": 2}
    job = rl_job(folder, "dapo", name="same", rewards=[function(folder, "same")], train=train, rl=rl)
    assert run(job, folder) == 0
    assert "step 1: the answers to each prompt all have the same reward" in capfd.readouterr().out
    store = open_store(folder / "runs" / "same")
    log = read_log(store)
    [step] = [row for row in log if row["kind"] == "step"]
    [ledger] = [row for row in log if row["kind"] == "ledger"]
    assert step["metrics"]["uniform_groups"] == 1.0
    assert step["grad_norm"] == 0.0
    assert len(ledger["trained"]) == 4
    assert len(ledger["uniform"]) == 8
    [issued] = [row["prompts"] for row in log if row["kind"] == "issued"]
    assert issued == ledger["uniform"] + ledger["trained"]
    dropped = read_rows(store, key_of("dropped", 1))
    assert [row["row"] for row in dropped[::2]] == ledger["uniform"]
    assert {row["score"] for row in dropped} == {1.0}
    assert main(["rollouts", str(folder / "runs" / "same"), "--dropped", "--step", "1"]) == 0
    assert "5 of 16 answers of step 1" in capfd.readouterr().out


def test_a_critic_that_begins_as_the_policy_says_nothing_at_first(folder: Path, local_ray: None) -> None:
    """Its head is zeros, so that the first advantages are the returns and no noise; then it learns what they are."""
    model = {"name": "model", "type": "model", "path": str(folder / "scorer")}
    rl = {"critic_init": "policy", "num_epochs": 1, "critic_learning_rate": 1e-2}
    job = rl_job(folder, "ppo", name="zero", rewards=[function(folder), model], rl=rl)
    assert run(job, folder) == 0
    steps = [
        row["metrics"] for row in read_log(open_store(folder / "runs" / "zero")) if row["kind"] == "step"
    ]
    assert steps[0]["value"] == 0.0
    assert steps[0]["return"] != 0.0
    assert steps[-1]["value"] != 0.0
