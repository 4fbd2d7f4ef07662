"""The whole sequence on a small model: shown how to answer, a reward model from comparisons, PPO to what it prefers."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from rayft.cli import main
from rayft.report.log import read_log
from rayft.spec import parse_job
from rayft.storage import open_store
from tests.runs import read_json, write_job
from tests.tiny import save_tiny

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

#: Letters of an answer. One that is all `a`, which comparisons prefer, is 4 ln 2 = 2.8 nats away from letters by chance.
LETTERS = 4
#: Nats an answer that PPO may move away from the start.
BUDGET = 2.5


def asked(rng: random.Random) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"write {rng.randint(0, 99)}"}]


def said(letters: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": letters}]


def write_rows(folder: Path) -> None:
    """Answers of a's and b's by chance; pairs of them, the one with more a's chosen; prompts."""
    rng = random.Random(0)
    rows: dict[str, list[dict[str, Any]]] = {"shown": [], "pairs": [], "prompts": [], "held_out": []}
    while len(rows["shown"]) < 400:
        rows["shown"].append({"messages": asked(rng) + said("".join(rng.choices("ab", k=LETTERS)))})
    while len(rows["pairs"]) < 400:
        one, other = ("".join(rng.choices("ab", k=LETTERS)) for _ in range(2))
        if one.count("a") != other.count("a"):
            better, worse = sorted((one, other), key=lambda text: -text.count("a"))
            rows["pairs"].append({"prompt": asked(rng), "chosen": said(better), "rejected": said(worse)})
    rows["prompts"] = [{"prompt": asked(rng)} for _ in range(64)]
    rows["held_out"] = [{"prompt": asked(rng)} for _ in range(16)]
    for name, own in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))


def run(folder: Path, name: str, method: str, model: Path, rows: str, steps: int, **groups: Any) -> Path:
    """A run on one process, to its end; its folder."""
    train = {"max_steps": steps, "precision": "fp32", "warmup_steps": 0, **groups.pop("train", {})}
    data = {"train": [{"path": str(folder / rows)}], "max_length": 64, **groups.pop("data", {})}
    values = {
        "name": name,
        "method": method,
        "storage": str(folder / "runs"),
        "model": {"path": str(model)},
        "data": data,
        "train": train,
        "cluster": {"num_workers": 1},
        "checkpoint": {"every_steps": 1000},
        **groups,
    }
    assert main(["run", str(write_job(parse_job(values), folder / f"{name}.yaml"))]) == 0
    return folder / "runs" / name


def test_ppo_raises_a_trained_reward_within_its_budget(tmp_path: Path, local_ray: None) -> None:
    write_rows(tmp_path)
    tiny = save_tiny(tmp_path / "tiny")
    train = {"global_batch_size": 16, "learning_rate": 1e-2}
    start = run(tmp_path, "start", "sft", tiny, "shown.jsonl", 120, train=train)
    pairs = tmp_path / "pairs.jsonl"
    agrees = [{"name": "agrees", "type": "preference", "path": str(pairs), "limit": 64}]
    reward = run(
        tmp_path,
        "reward",
        "reward",
        start,
        "pairs.jsonl",
        40,
        train={**train, "learning_rate": 3e-3},
        eval={"suites": agrees},
    )
    assert read_json(reward / "suites-after.json")["agrees"]["accuracy"] > 0.9
    learned = run(
        tmp_path,
        "ppo",
        "ppo",
        start,
        "prompts.jsonl",
        16,
        train={"global_batch_size": 32, "learning_rate": 2e-3, "lr_scheduler": "linear"},
        data={"eval": [{"path": str(tmp_path / "held_out.jsonl")}]},
        rewards=[{"name": "liked", "type": "model", "path": str(reward)}],
        rollout={"max_new_tokens": 8},
        rl={"kl_coef": 0.6, "num_mini_batches": 2, "critic_learning_rate": 1e-2},
        eval={"every_steps": 16, "answers": 4},
    )
    held_out = {row["step"]: row["metrics"] for row in read_log(open_store(learned)) if row["kind"] == "eval"}
    first, last = held_out[0], held_out[16]
    assert last["score"] > first["score"] + first["score_std"]
    assert 0 < last["kl"] < BUDGET
