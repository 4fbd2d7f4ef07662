"""A reward model on comparisons drawn from known scores: it finds the scores, and is right as often as anybody can be."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.cluster.steps import learner_of, plan_of, prepare_folder, small_job, step_plans, train_steps
from tests.ranks import run_ranks

pytestmark = pytest.mark.slow

LETTERS = "abcdefgh"
TRUE = dict(zip(LETTERS, (-1.5, -1.1, -0.6, -0.1, 0.3, 0.7, 1.0, 1.3), strict=True))
STEPS = 100


def drawn(count: int, seed: int) -> list[tuple[str, str]]:
    """(winner, loser) of comparisons of two different letters, by the Bradley-Terry model."""
    rng = random.Random(seed)
    found = []
    while len(found) < count:
        one, other = rng.sample(LETTERS, 2)
        wins = rng.random() < 1 / (1 + math.exp(TRUE[other] - TRUE[one]))
        found.append((one, other) if wins else (other, one))
    return found


def _scores(folder: Path) -> dict[str, float]:
    """Train, then score each letter."""
    job = small_job(
        folder,
        "reward",
        data={"train": [{"path": str(folder / "drawn.jsonl")}], "max_length": 64, "shard_rows": 10_000},
        reward={"center_coef": 0.0},
        train={"max_steps": STEPS, "global_batch_size": 64, "micro_batch_size": 64, "learning_rate": 2e-3},
    )
    plan = plan_of(job, folder, stage=0, packed=True)
    learner = learner_of(plan, folder)
    train_steps(learner, plan, folder, STEPS)
    scores: dict[str, float] = {}
    rows = [json.loads(line) for line in (folder / "drawn.jsonl").read_text().splitlines()]
    for corpus, step in step_plans(plan, folder, 4):
        batches = step.micro_batches[0]
        results: Any = learner.infer(
            (learner.objective.collate(corpus, batch) for batch in batches), "scores"
        )
        for batch, found in zip(batches, results, strict=True):
            documents = [document for row in batch for document in row]
            for document, score in zip(documents, found[:, 0].tolist(), strict=True):
                row = rows[corpus.answers(document)[0].start // 2]
                scores[row["chosen" if document % 2 == 0 else "rejected"]] = score
    learner.close()
    return scores


def test_scores_and_accuracy_of_the_truth(tmp_path: Path) -> None:
    folder = prepare_folder(tmp_path)
    pairs = [{"prompt": "letter?", "chosen": one, "rejected": other} for one, other in drawn(6400, 0)]
    (folder / "drawn.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    scores = run_ranks(_scores, 1, folder)[0]
    assert scores.keys() == TRUE.keys()
    learned, true = (np.array([values[letter] for letter in LETTERS]) for values in (scores, TRUE))
    differences = (learned - learned.mean()) - (true - true.mean())
    assert np.abs(differences).max() < 0.25
    unseen = drawn(20_000, 1)
    right = np.mean([scores[one] > scores[other] for one, other in unseen])
    bayes = np.mean([1 / (1 + math.exp(-abs(TRUE[one] - TRUE[other]))) for one, other in unseen])
    assert abs(right - bayes) < 1.96 * math.sqrt(bayes * (1 - bayes) / len(unseen)) + 0.005
