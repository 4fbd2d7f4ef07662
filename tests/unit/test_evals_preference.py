"""Agreement with people: accuracy, AUC, calibration, by groups, of reward models and of language models; `rayft score`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from rayft.cli import main
from rayft.errors import DataError, JobError
from rayft.evals.preference import Preference
from rayft.evals.run import run_suites
from rayft.evals.score import score_rows
from rayft.generate.hf import TransformersEngine
from rayft.generate.load import load_model
from rayft.generate.scores import ScoreEngine, load_score_model
from rayft.model.export import export_model
from rayft.model.files import job_files
from rayft.spec import Suite
from tests.tiny import save_tiny, tiny_model, tiny_tokenizer
from tests.tiny_data import write_jsonl
from tests.unit.test_model_score import checkpoint_of, job_of

ASK = [{"role": "user", "content": "why?"}]


def reward_model(folder: Path, heads: int = 2) -> Path:
    job = job_of(save_tiny(folder / "model"), reward={"heads": heads})
    reader, _ = checkpoint_of(job, folder)
    export_model(reader, job_files(job, folder / "cache"), job, folder / "reward", dtype=torch.float32)
    return folder / "reward"


def engine_of(folder: Path) -> tuple[ScoreEngine, Any]:
    model, tokenizer = load_score_model(str(folder), dtype=torch.float32, device="cpu")
    return ScoreEngine(model), tokenizer


def suite_of(path: Path, **values: Any) -> Suite:
    return Suite.model_validate({"name": "s", "type": "preference", "path": str(path), **values})


def records(*rows: tuple[list[float], float, str]) -> list[dict[str, Any]]:
    return [
        {
            "row": i,
            "scores": [[s] for s in scores],
            "lengths": [3] * len(scores),
            "value": value,
            "group": group,
        }
        for i, (scores, value, group) in enumerate(rows)
    ]


def summarise(found: list[dict[str, Any]], engine: Any = None) -> dict[str, float]:
    suite = Preference.__new__(Preference)
    suite.engine, suite.by, suite.too_long = engine, None, 0
    return suite.summarise(found)


SCORES = ScoreEngine.__new__(ScoreEngine)


def test_pairs_ties_and_ranked_lists() -> None:
    found = summarise(
        records(([2.0, 1.0], 0, "a"), ([1.0, 2.0], 0, "a"), ([1.0, 1.0], 0, "b"), ([3.0, 1.0, 2.0], 0, "b")),
        SCORES,
    )
    assert found["accuracy"] == pytest.approx((1 + 0 + 0.5 + 2 / 3) / 4)
    assert found["accuracy/a"] == 0.5
    assert found["accuracy/b"] == pytest.approx((0.5 + 2 / 3) / 2)
    assert found["accuracy_stderr"] > 0
    assert found["rows"] == 4


def test_labels_have_an_accuracy_and_an_auc() -> None:
    found = summarise(records(([2.0], 1, ""), ([-1.0], 1, ""), ([-2.0], 0, ""), ([1.0], 0, "")), SCORES)
    assert found["accuracy"] == 0.5
    assert found["auc"] == pytest.approx(3 / 4)
    assert 0 < found["auc_stderr"] < 0.5


def test_calibration_by_hand() -> None:
    """Two pairs whose margin says 0.9, one of them right; two that say 0.6, both right."""
    sure, unsure = math.log(9), math.log(1.5)
    found = summarise(
        records(([sure, 0], 0, ""), ([0, sure], 0, ""), ([unsure, 0], 0, ""), ([unsure, 0], 0, "")), SCORES
    )
    assert found["ece"] == pytest.approx(0.5 * 0.4 + 0.5 * 0.4)


def test_a_language_models_margin_is_of_its_log_probabilities() -> None:
    found = [
        {"row": 0, "scores": [[-4.0, -2.0], [-6.0, -1.0]], "lengths": [2, 6], "value": 0, "group": ""},
        {"row": 1, "scores": [[-9.0, -3.0], [-6.0, -6.0]], "lengths": [3, 1], "value": 0, "group": ""},
    ]
    measured = summarise(found)
    assert (measured["accuracy"], measured["accuracy_norm"], measured["margin"]) == (0.5, 0.5, -0.5)


def test_real_models_on_real_rows(tmp_path: Path) -> None:
    rows = [
        {
            "prompt": ASK,
            "chosen": f"because {i}",
            "rejected": "x" * (i + 1),
            "rater": "ann" if i % 2 else "bob",
        }
        for i in range(6)
    ]
    path = write_jsonl(tmp_path / "pairs.jsonl", rows)
    engine, tokenizer = engine_of(reward_model(tmp_path))
    found = run_suites([suite_of(path, by="rater")], engine, tokenizer)["s"]
    assert {"accuracy", "ece", "mean_score", "length_correlation", "disagreement"} <= found.keys()
    assert {"accuracy/ann", "accuracy/bob"} <= found.keys()
    scored = list(score_rows(str(path), [(engine, tokenizer)], cache_dir=tmp_path))
    right = [row["scores"][0] > row["scores"][1] for row in scored]
    assert found["accuracy"] == pytest.approx(sum(right) / 6)
    language = TransformersEngine(tiny_model(), tiny_tokenizer())
    assert {"accuracy", "accuracy_norm", "margin"} <= run_suites([suite_of(path)], language, tokenizer)[
        "s"
    ].keys()


def test_bad_rows_are_named(tmp_path: Path) -> None:
    engine, tokenizer = engine_of(reward_model(tmp_path))
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": ASK, "chosen": "a", "rejected": "a"}])
    with pytest.raises(DataError, match=r"a.jsonl line 1: 'chosen' and 'rejected' say the same"):
        run_suites([suite_of(path)], engine, tokenizer)
    path = write_jsonl(tmp_path / "b.jsonl", [{"prompt": ASK, "chosen": "a", "rejected": "b"}])
    with pytest.raises(DataError, match="no column 'rater'"):
        run_suites([suite_of(path, by="rater")], engine, tokenizer)


def test_score_writes_one_number_for_each_answer(tmp_path: Path) -> None:
    model = reward_model(tmp_path)
    rows = [{"messages": [*ASK, {"role": "assistant", "content": "because"}]}, {"messages": ASK}]
    path = write_jsonl(tmp_path / "chats.jsonl", rows[:1])
    out = tmp_path / "scores.jsonl"
    assert main(["score", str(model), str(model), "--data", str(path), "--out", str(out)]) == 0
    (scored,) = map(json.loads, out.read_text().splitlines())
    assert scored["messages"] == rows[0]["messages"]
    assert len(scored["scores"]) == len(scored["disagreement"]) == 1
    pair = write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": ASK, "chosen": "because", "rejected": "no"}])
    engine, tokenizer = engine_of(model)
    (compared,) = score_rows(str(pair), [(engine, tokenizer)], cache_dir=tmp_path)
    assert compared["scores"][0] == pytest.approx(scored["scores"][0], abs=0.05)  # bf16 on the command line
    assert main(["score", str(model), "--data", str(path), "--out", str(out)]) == 2
    lonely = write_jsonl(tmp_path / "lonely.jsonl", rows[1:])
    assert main(["score", str(model), "--data", str(lonely), "--out", str(tmp_path / "o.jsonl")]) == 3
    assert not (tmp_path / "o.jsonl").exists()


@pytest.mark.parametrize("adapter", [{}, {"type": "lora", "lora_r": 4}], ids=["full", "lora"])
def test_a_reward_model_writes_nothing(adapter: dict[str, Any], tmp_path: Path) -> None:
    job = job_of(save_tiny(tmp_path / "model"), adapter=adapter)
    reader, _ = checkpoint_of(job, tmp_path)
    export_model(reader, job_files(job, tmp_path / "cache"), job, tmp_path / "reward", merge=False)
    with pytest.raises(JobError, match="is a reward model"):
        load_model(str(tmp_path / "reward"), cache_dir=tmp_path / "cache")
