"""`rayft doctor`: a line for each equality, and a failing one where the user's own part breaks it."""

from __future__ import annotations

from pathlib import Path

import pytest

from rayft.cli import main
from tests.cluster.rewards import function, prepare_folder, rl_job
from tests.runs import write_job

pytestmark = pytest.mark.slow

LORA = {"type": "lora", "lora_r": 4, "target_modules": "all-linear"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = prepare_folder(tmp_path_factory.mktemp("doctor"))
    with (folder / "rewards.py").open("a") as file:
        file.write("\ndef by_batch(completions, **_):\n    return [len(completions)] * len(completions)\n")
    return folder


def doctor(
    folder: Path, capfd: pytest.CaptureFixture[str], name: str, *values: str, **groups: object
) -> tuple[int, list[str]]:
    """Exit code and the lines that say ok or FAIL."""
    job = rl_job(folder, "grpo", name=name, **groups)
    capfd.readouterr()
    code = main(["doctor", str(write_job(job, folder / f"{name}.yaml")), *values])
    out = capfd.readouterr().out
    return code, [line for line in out.splitlines() if line.startswith(("ok", "FAIL"))]


def test_a_sound_job(folder: Path, capfd: pytest.CaptureFixture[str], local_ray: None) -> None:
    model = {"name": "model", "type": "model", "path": str(folder / "scorer"), "weight": 0.5}
    code, lines = doctor(
        folder,
        capfd,
        "sound",
        adapter=LORA,
        rollout={"engines": 1},
        rewards=[function(folder), model],
        zero={"stage": 2},
    )
    assert code == 0, lines
    assert all(line.startswith("ok") for line in lines)
    for words in (
        "answers can end: by '<|im_end|>'; in training they end with '<|im_end|>'",
        "weights of the engines: 0.0 MB in 1 buckets, every checksum as sent",
        "answers drawn again: 24 of 24 are the same",
        "engine against trainer: mean |Δp|",
        "log-probabilities: micro-batches of one row",
        "log-probabilities: each answer with its prompt",
        "log-probabilities: padding instead of packing",
        "log-probabilities: one rank instead of all",
        "reference at the start: largest |Δ| to the policy 0",
        "reward small",
        "reward model",
        "first update: ratio 1.0000000",
    ):
        assert any(words in line for line in lines), (words, lines)
    assert not (folder / "runs" / "sound").exists(), "it leaves something behind"


@pytest.mark.full
def test_a_reward_that_depends_on_the_batch(
    folder: Path, capfd: pytest.CaptureFixture[str], local_ray: None
) -> None:
    code, lines = doctor(folder, capfd, "batch", rewards=[function(folder, "by_batch")])
    assert code == 2
    [failed] = [line for line in lines if line.startswith("FAIL")]
    assert "reward by_batch" in failed
    assert "2.3e+01" in failed
