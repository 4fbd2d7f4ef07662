"""A model's own dropout is off wherever two passes over the same answer must agree."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rayft.model.files import job_files
from rayft.spec import parse_job
from rayft.train.setup import build_module
from tests.tiny import save_tiny

#: Family -> where its models drop: in a function that they call, or in modules.
DROPPING = {
    "llama": {"attention_dropout": 0.5},
    "gpt_neox": {"attention_dropout": 0.5, "hidden_dropout": 0.5},
}
REWARDS = {"rewards": [{"name": "r", "type": "function", "path": "r.py:f"}], "rollout": {"max_new_tokens": 8}}


@pytest.mark.parametrize("family", DROPPING)
@pytest.mark.parametrize("method", ["sft", "dpo", "grpo", "ppo"])
def test_two_passes_agree(method: str, family: str, tmp_path: Path) -> None:
    """But under sft, which wants it."""
    folder = save_tiny(tmp_path / "model", family, **DROPPING[family])
    job = parse_job(
        {
            "name": "run",
            "method": method,
            "model": {"path": str(folder), "attention": "eager"},
            "data": {"train": [{"path": "a.jsonl"}], "max_length": 64},
            "train": {"global_batch_size": 2, "max_steps": 1, "precision": "fp32"},
            **(REWARDS if method in ("grpo", "ppo") else {}),
        }
    )
    module = build_module(job, job_files(job, tmp_path / "cache"), 0, "cpu").train()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        one, other = (module.base_model(ids).last_hidden_state for _ in range(2))
    assert torch.equal(one, other) is (method != "sft")
