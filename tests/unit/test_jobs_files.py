"""Every job file in `jobs/` is valid, and names data that is there or says where it comes from."""

from __future__ import annotations

from pathlib import Path

import pytest

from rayft.spec import load_job
from tests.shared import ROOT

FILES = sorted((ROOT / "jobs").glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_job_file_is_valid(path: Path) -> None:
    job = load_job(path)
    local = [
        source.path for source in [*job.data.train, *job.data.eval] if source.path.startswith("jobs/triage")
    ]
    assert all((ROOT / name).exists() for name in local)


def test_run_names_differ() -> None:
    names = [load_job(path).name for path in FILES]
    assert len(set(names)) == len(names)


def test_the_gpu_job_plans_within_its_gpus() -> None:
    """The multi-node job's memory plan fits the GPU it names, from a config alone."""
    from rayft.plan.architecture import read_architecture
    from rayft.plan.choose import choose, memory_limit

    job = load_job(ROOT / "jobs" / "sft_hub_gpu.yaml")
    config = {
        "model_type": "qwen3",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "tie_word_embeddings": False,
    }
    choice = choose(job, read_architecture(config), memory_limit(job))
    assert choice.stage == 3
    assert choice.fits
