"""From people's clicks to a model that agrees with them: a scripted rater in a real browser, the file, the reward model."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from rayft.cli import main
from rayft.report.log import read_log
from rayft.spec import parse_job
from rayft.storage import open_store
from tests.rating import Page, enter
from tests.tiny import save_tiny
from tests.tiny_data import write_jsonl

pytest_plugins = ["tests.browser"]
pytestmark = pytest.mark.slow

COUNT, UNSEEN = 40, 100
WORDS = [
    "open",
    "close",
    "lid",
    "tap",
    "water",
    "steam",
    "button",
    "wheel",
    "lamp",
    "door",
    "handle",
    "paper",
    "cup",
]


def answer(rng: random.Random, polite: bool) -> str:
    words = rng.choices(WORDS, k=rng.randint(3, 8))
    words.insert(rng.randrange(len(words)), "please" if polite else "now")
    return " ".join(words)


def pairs(count: int, seed: int) -> list[dict[str, Any]]:
    """Two answers each, one of them polite, in random order."""
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        answers = [answer(rng, polite) for polite in rng.sample([True, False], 2)]
        rows.append({"prompt": [{"role": "user", "content": f"help {number}"}], "completions": answers})
    return rows


def rate(browser: Any, folder: Path) -> None:
    """Forty pairs by one rule: the polite answer is better. The rater reads what the page shows, no more."""
    page = Page(folder, "--answers", str(write_jsonl(folder.parent / "answers.jsonl", pairs(COUNT, 0))))
    try:
        tab = enter(browser, page, "rule")
        for done in range(COUNT):
            tab.wait_for_selector(f"#count:text-is('{done} of {COUNT}')")
            left = tab.text_content(".answer[data-at='0'] .text")
            tab.keyboard.press("1" if "please" in left else "2")
        tab.wait_for_selector("#finished")
    finally:
        said = page.stop()
    assert f"{COUNT} rows are in" in said


def test_the_reward_model_agrees_with_the_rater(browser: Any, tmp_path: Path, local_ray: None) -> None:
    """90 % or more on pairs of answers that it has not seen, of 40 ratings."""
    rate(browser, tmp_path / "ratings")
    save_tiny(tmp_path / "model")
    unseen = [
        {"prompt": row["prompt"], "completions": sorted(row["completions"], key=lambda a: "please" not in a)}
        for row in pairs(UNSEEN, 1)
    ]
    write_jsonl(tmp_path / "unseen.jsonl", unseen)
    job = parse_job(
        {
            "name": "polite",
            "method": "reward",
            "storage": str(tmp_path / "runs"),
            "model": {"path": str(tmp_path / "model")},
            "data": {"train": [{"path": str(tmp_path / "ratings" / "preferences.jsonl")}], "max_length": 256},
            "train": {
                "global_batch_size": 8,
                "num_train_epochs": 24,
                "learning_rate": 3e-3,
                "precision": "fp32",
            },
            "cluster": {"num_workers": 2},
            "eval": {
                "suites": [{"name": "unseen", "type": "preference", "path": str(tmp_path / "unseen.jsonl")}]
            },
        }
    )
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job.model_dump(mode="json")))
    assert main(["run", str(tmp_path / "job.yaml")]) == 0
    rows = read_log(open_store(tmp_path / "runs" / "polite"))
    after = next(r["results"]["unseen"] for r in rows if r["kind"] == "suites" and r["when"] == "after")
    assert after["rows"] == UNSEEN
    assert after["accuracy"] >= 0.9
    out = tmp_path / "scores.jsonl"
    data = str(tmp_path / "unseen.jsonl")
    assert main(["score", str(tmp_path / "runs" / "polite"), "--data", data, "--out", str(out)]) == 0
    scored = [json.loads(line)["scores"] for line in out.read_text().splitlines()]
    assert sum(better > worse for better, worse in scored) >= 0.9 * UNSEEN
    ratings = (tmp_path / "ratings" / "preferences.jsonl").read_text().splitlines()
    assert all(json.loads(line)["rater"] == ["rule"] for line in ratings)
