"""Small jobs that learn from rewards: prompts, a reward function, a reward model."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification

from rayft.spec import Job, parse_job
from tests.cluster.methods import WORDS
from tests.tiny import save_tiny, tiny_tokenizer

REWARDS = '''
import time
from pathlib import Path

HERE = Path(__file__).parent

def small(prompts, completions, **_):
    """Share of small letters among as many characters as an answer can have."""
    return [sum(c.islower() and c.isascii() for c in text) / 12 for text in completions]

def slow(prompts, completions, **_):
    """The same, so slowly that a step can be hit."""
    time.sleep(0.5)
    return small(prompts, completions)

def held(prompts, completions, **_):
    """The same, once there is a file `go` beside this one; a file `asked` says that it was called."""
    (HERE / "asked").touch()
    deadline = time.monotonic() + 280
    while not (HERE / "go").exists():
        assert time.monotonic() < deadline, f"nobody made {HERE / 'go'}"
        time.sleep(0.05)
    return small(prompts, completions)

def raises(completions, **_):
    raise KeyError("no such thing")

def nan(completions, **_):
    return [float("nan")] * len(completions)

def short(completions, **_):
    return [1.0]

def never(completions, **_):
    time.sleep(600)

def same(completions, **_):
    return [1.0] * len(completions)

def dies(completions, **_):
    import os

    with (HERE / "deaths").open("a") as file:
        file.write("x")
    os._exit(1)

CALLS = []

def late(prompts, completions, **_):
    """Scores of two steps, then none."""
    CALLS.append(len(completions))
    assert len(CALLS) < 3, "the third step has no scores"
    return small(prompts, completions)

def late_judge(prompts, completions, **_):
    """Scores of all answers but those to three held-out prompts when they are asked for the second time."""
    if len(completions) == 3:
        with (HERE / "judged").open("a") as file:
            file.write("x")
        assert (HERE / "judged").read_text() != "xx", "the judge has gone home"
    return small(prompts, completions)
'''


def prepare_folder(folder: Path, prompts: int = 24) -> Path:
    """A tiny model, a tiny reward model, prompts with a column, and reward functions."""
    save_tiny(folder / "model")
    torch.manual_seed(1)
    scorer = AutoModelForSequenceClassification.from_pretrained(folder / "model", num_labels=1)
    scorer.save_pretrained(folder / "scorer")
    tiny_tokenizer().save_pretrained(folder / "scorer")
    rng = random.Random(0)
    with (folder / "prompts.jsonl").open("w") as file:
        for i in range(prompts):
            content = " ".join(rng.choices(WORDS, k=rng.randint(1, 6)))
            file.write(json.dumps({"prompt": [{"role": "user", "content": content}], "id": i}) + "\n")
    (folder / "rewards.py").write_text(REWARDS)
    return folder


def function(folder: Path, name: str = "small", **values: Any) -> dict[str, Any]:
    """A reward of a function of the folder."""
    return {"name": name, "type": "function", "path": f"{folder / 'rewards.py'}:{name}", **values}


def rl_job(folder: Path, method: str, **groups: Any) -> Job:
    """A job over the folder; groups are merged over the defaults."""
    values: dict[str, Any] = {
        "name": "small",
        "method": method,
        "storage": str(folder / "runs"),
        "model": {"path": str(folder / "model")},
        "data": {"train": [{"path": str(folder / "prompts.jsonl")}], "max_length": 96},
        "rollout": {"max_new_tokens": 12, "unit_prompts": 2},
        "rewards": [function(folder)],
        "train": {
            "global_batch_size": 6,
            "max_steps": 4,
            "learning_rate": 1e-3,
            "precision": "fp32",
            "warmup_steps": 0,
        },
        "cluster": {"num_workers": 2},
        "checkpoint": {"every_steps": 2},
    }
    if method not in ("ppo", "reinforce++"):
        values["rl"] = {"num_generations": 4}
    for key, group in groups.items():
        both = isinstance(values.get(key), dict) and isinstance(group, dict)
        values[key] = {**values[key], **group} if both else group
    return parse_job(values)
