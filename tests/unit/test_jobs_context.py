"""The rows of `jobs/sft_context.yaml`: a third without an answer, honest passages, the same bytes every time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobs.context.build import INSTRUCTION, REFUSAL, main, rows
from rayft.spec import load_job
from tests.shared import ROOT, shared_data


def source(articles: int = 4, each: int = 6) -> list[dict[str, object]]:
    return [
        {
            "title": f"article {a}",
            "context": f"Passage {a} says word{a}x{n // 2}.",
            "question": f"question {a} {n}",
            "answers": [{"text": f"word{a}x{n // 2}", "answer_start": 0}],
        }
        for a in range(articles)
        for n in range(each)
    ]


def context_of(row: dict[str, list[dict[str, str]]]) -> str:
    return row["messages"][1]["content"].removeprefix("Context: ").partition("\n\nQuestion: ")[0]


def test_a_third_gets_a_passage_of_another_article_and_the_refusal() -> None:
    given = source()
    made = rows(given, 0)
    assert [row["messages"][1]["content"].partition("Question: ")[2] for row in made] == [
        row["question"] for row in given
    ]
    refused = [n for n, row in enumerate(made) if row["messages"][-1]["content"] == REFUSAL]
    assert len(refused) == len(given) // 3
    by_context = {row["context"]: row["title"] for row in given}
    for n, (row, old) in enumerate(zip(made, given, strict=True)):
        if n in refused:
            assert by_context[context_of(row)] != old["title"]
            assert row["answers"] == []
        else:
            assert context_of(row) == old["context"]
            assert row["messages"][-1]["content"] == row["answers"][0] == old["answers"][0]["text"]


def test_a_passage_that_holds_the_answer_is_never_taken_for_one_without() -> None:
    given = source(articles=3, each=1)
    given[1]["context"] = given[2]["context"] = "It says WORD0X0 and word1x0 and word2x0."
    with pytest.raises(ValueError, match="holds an answer to 'question 0 0'"):
        [rows(given[:1] * 3 + given[1:], seed) for seed in range(20)]


def test_the_real_rows_are_built_the_same_every_time(tmp_path: Path) -> None:
    folder = shared_data("qa_xquad")
    main([str(folder), "--out", str(tmp_path / "a")])
    main([str(folder), "--out", str(tmp_path / "b")])
    for split, expected in (("train", 780), ("test", 206)):
        text = (tmp_path / "a" / f"{split}.jsonl").read_text(encoding="utf-8")
        assert text == (tmp_path / "b" / f"{split}.jsonl").read_text(encoding="utf-8")
        made = [json.loads(line) for line in text.splitlines()]
        assert len(made) == expected
        for row in made:
            answered = row["messages"][-1]["content"] != REFUSAL
            assert answered == any(a in context_of(row) for a in row["answers"])


def test_the_job_asks_for_what_the_rows_say() -> None:
    job = load_job(str(ROOT / "jobs" / "sft_context.yaml"), [])
    assert job.eval.suites[0].refusal == REFUSAL
    assert REFUSAL in INSTRUCTION
