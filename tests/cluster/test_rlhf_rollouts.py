"""`rayft rollouts`: what a run learned from can be browsed, filtered, compared and put through the loss again."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from rayft.cli import main
from rayft.report.log import read_log
from rayft.storage import open_store
from tests.cluster.rewards import prepare_folder, rl_job
from tests.runs import write_job

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> Path:
    folder = prepare_folder(tmp_path_factory.mktemp("rollouts"), prompts=6)
    job = rl_job(
        folder,
        "ppo",
        name="run",
        rl={"num_generations": 4, "num_epochs": 2, "num_mini_batches": 2},
        data={
            "train": [{"path": str(folder / "prompts.jsonl")}],
            "eval": [{"path": str(folder / "prompts.jsonl"), "limit": 4}],
            "max_length": 96,
        },
        train={
            "max_steps": 3,
            "global_batch_size": 6,
            "learning_rate": 1e-2,
            "precision": "fp32",
            "warmup_steps": 0,
        },
    )
    assert main(["run", str(write_job(job, folder / "run.yaml"))]) == 0
    return folder / "runs" / "run"


def rollouts(capfd: pytest.CaptureFixture[str], run: Path, *arguments: str, code: int = 0) -> str:
    capfd.readouterr()
    assert main(["rollouts", str(run), *arguments]) == code
    captured = capfd.readouterr()
    return captured.err if code else captured.out


def test_it_shows_filters_and_compares(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    overview = rollouts(capfd, run)
    assert len(re.findall(r"^│ [123] +│ 24 ", overview, re.M)) == 3
    answers = rollouts(capfd, run, "--step", "2", "--sort=-score", "--limit", "3")
    assert "3 of 24 answers of step 2" in answers
    scores = [float(found) for found in re.findall(r"score ([\d.]+) \(small", answers)]
    assert scores == sorted(scores, reverse=True)
    assert "weights of version 1" in " ".join(answers.split())
    some = rollouts(capfd, run, "--step", "2", "--where", f"score>={scores[0]}", "--where", "tokens<=12")
    assert f"score {scores[0]:.4g}" in some
    short = rollouts(capfd, run, "--step", "2", "--where", "tokens<=12.5")
    assert "5 of 24 answers" in short
    ended = rollouts(capfd, run, "--step", "2", "--where", "ended=false")
    assert "of 24 answers" in ended
    none = rollouts(capfd, run, "--step", "2", "--where", "text~no such text")
    assert "0 of 0 answers" in none
    changed = rollouts(capfd, run, "--compare", "1", "3")
    assert "6 prompts are in both" in changed
    assert "score/small" in changed
    assert len(re.findall(r"^│ [03] +│ 4 ", rollouts(capfd, run, "--held-out"), re.M)) == 2
    held_out = rollouts(capfd, run, "--held-out", "--compare", "0", "3")
    assert "4 prompts are in both" in held_out
    assert "weights of version 3" in " ".join(rollouts(capfd, run, "--held-out", "--step", "3").split())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--step", "9"], "has no rollouts of step 9; it has steps 1 to 3"),
        (["--held-out", "--step", "1"], "no answers to held-out prompts at step 1; it has steps 0, 3"),
        (["--where", "score<1"], "look at the answers of one step"),
        (["--step", "1", "--where", "score"], "'score' is no condition"),
        (["--step", "1", "--where", "score<much"], "compares a number with 'much'"),
        (["--step", "1", "--where", "ended=1"], "compares yes or no with '1'"),
        (["--dropped"], "No answers were dropped"),
        (["--step", "1", "--where", "text~("], "regular expression"),
        (["--step", "1", "--sort", "nothing"], "have no column 'nothing'"),
        (["--replay", "2"], "are not kept (checkpoint 1)"),
    ],
)
def test_what_cannot_be_shown(
    arguments: list[str], words: str, run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert words in rollouts(capfd, run, *arguments, code=2)


def test_no_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert "There are no rollouts" in rollouts(capfd, tmp_path, code=2)


def test_a_step_is_replayed_to_the_last_bit(
    run: Path, capfd: pytest.CaptureFixture[str], local_ray: None
) -> None:
    """From a checkpoint, critic and all, by a process that knows the dump alone."""
    before = sorted((path, path.stat().st_mtime) for path in run.rglob("*"))
    out = rollouts(capfd, run, "--replay", "3")
    assert "largest |Δ| to those kept 0" in out
    [logged] = [row for row in read_log(open_store(run)) if row["kind"] == "step" and row["step"] == 3]
    found = re.findall(r"update \d of 4: loss (\S+), gradient norm (\S+); critic's loss (\S+),", out)
    losses, norms, critic_losses = np.array(found, np.float64).T
    assert len(losses) == 4
    assert losses.mean() == pytest.approx(logged["loss"], rel=1e-5)
    assert norms.max() == pytest.approx(logged["grad_norm"], rel=1e-3)
    assert critic_losses[0] == pytest.approx(logged["metrics"]["value_loss"], rel=1e-5)
    assert len(set(critic_losses)) == 4
    assert sorted((path, path.stat().st_mtime) for path in run.rglob("*")) == before
