"""Rows that compare answers: what they mean, what is refused, what a too long prompt becomes, contradictions."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from rayft.data.cache import plan_cache
from rayft.data.comparisons import Comparison, read_row
from rayft.data.contradictions import refuse_contradictions
from rayft.data.corpus import Corpus
from rayft.data.formats import (
    COMPARISONS,
    EXAMPLES,
    Conversation,
    Format,
    PromptCompletion,
    detect_format,
    layouts_of,
)
from rayft.errors import DataError
from rayft.spec import Data, Source, parse_job
from tests.tiny_data import corpus_of, family_tokenizer, write_jsonl

ASK = [{"role": "user", "content": "why?"}]
GOOD = [{"role": "assistant", "content": "because"}]
BAD = [{"role": "assistant", "content": "no idea"}]
SYSTEM = {"role": "system", "content": "be kind"}


def read(row: dict[str, Any], layout: Format = "preference") -> Comparison:
    made = read_row(row, layout, Source(path="x"), "x.jsonl line 3")
    assert isinstance(made, Comparison)
    return made


def texts(made: Comparison) -> list[list[str]]:
    return [
        [answer.prompt, answer.completion]
        if isinstance(answer, PromptCompletion)
        else [message["content"] for message in answer.messages]
        for answer in made.answers
    ]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": ASK, "chosen": GOOD, "rejected": BAD},
        {"prompt": "why?", "chosen": GOOD, "rejected": BAD},
        {"prompt": ASK, "chosen": "because", "rejected": "no idea"},
        {"prompt": "why?", "chosen": "because", "rejected": "no idea"},
        {"chosen": ASK + GOOD, "rejected": ASK + BAD},
        {"prompt": "why?", "chosen": ASK + GOOD, "rejected": ASK + BAD},
        {"prompt": ASK, "chosen": ASK + GOOD, "rejected": ASK + BAD},
        {"prompt": json.dumps(ASK), "chosen": json.dumps(GOOD), "rejected": "no idea", "margin": ""},
        {"prompt": None, "chosen": ASK + GOOD, "rejected": ASK + BAD},
    ],
)
def test_pairs(row: dict[str, Any]) -> None:
    made = read(row)
    assert texts(made) == [["why?", "because"], ["why?", "no idea"]]
    assert math.isnan(made.value)
    plain = (row.get("prompt"), row["chosen"]) == ("why?", "because")
    assert isinstance(made.answers[0], PromptCompletion) == plain
    if isinstance(made.answers[0], Conversation):
        assert made.answers[0].completion_from == 1


def test_margin_ranks_and_labels() -> None:
    assert read({"prompt": ASK, "chosen": GOOD, "rejected": BAD, "margin": 2}).value == 2.0
    ranked = read({"prompt": ASK, "completions": [GOOD, "perhaps", BAD]}, "ranked")
    assert texts(ranked) == [["why?", "because"], ["why?", "perhaps"], ["why?", "no idea"]]
    texts_of_lists = {"prompt": "why?", "completions": '["because", "no idea"]'}
    assert texts(read(texts_of_lists, "ranked")) == [["why?", "because"], ["why?", "no idea"]]
    assert read({"prompt": ASK, "chosen": GOOD, "rejected": BAD, "margin": "0.5"}).value == 0.5
    for label, value in ((True, 1.0), (0, 0.0), (1.0, 1.0), ("True", 1.0), ("0", 0.0)):
        labelled = read({"prompt": ASK, "completion": GOOD, "label": label}, "labelled")
        assert (texts(labelled), labelled.value) == ([["why?", "because"]], value)


BROKEN = [
    ({"prompt": ASK, "chosen": GOOD, "rejected": GOOD}, "preference", "'chosen' and 'rejected' say the same"),
    ({"prompt": ASK, "chosen": "because ", "rejected": GOOD}, "preference", "say the same"),
    ({"prompt": ASK, "chosen": GOOD, "rejected": " "}, "preference", "'rejected' is empty"),
    ({"prompt": ASK, "chosen": [{"role": "assistant", "content": ""}], "rejected": BAD}, "preference", "'chosen' is empty"),
    ({"prompt": ASK, "chosen": [], "rejected": BAD}, "preference", "'chosen' is empty"),
    ({"prompt": ASK, "chosen": GOOD}, "preference", "the column 'rejected' is missing"),
    ({"chosen": "a", "rejected": "b"}, "preference", "there is no 'prompt'"),
    ({"prompt": "", "chosen": "a", "rejected": "b"}, "preference", "the prompt is empty"),
    ({"chosen": ASK + GOOD, "rejected": [{"role": "user", "content": "who?"}, *BAD]}, "preference", "share no prompt"),
    (
        {"chosen": [SYSTEM, *ASK, *GOOD], "rejected": [SYSTEM, {"role": "user", "content": "who?"}, *GOOD]},
        "preference",
        "share no prompt",
    ),
    ({"prompt": ASK, "chosen": [*GOOD, *ASK, {"role": "assistant", "content": ""}], "rejected": BAD}, "preference", "'chosen' is empty"),
    ({"prompt": ASK, "chosen": GOOD, "rejected": BAD, "margin": -1}, "preference", "the margin is -1"),
    ({"prompt": ASK, "chosen": GOOD, "rejected": BAD, "margin": "big"}, "preference", "the margin is 'big'"),
    ({"prompt": ASK, "chosen": ASK, "rejected": BAD}, "preference", "'chosen' begins with a message from 'user'"),
    ({"prompt": ASK, "chosen": 3, "rejected": BAD}, "preference", "'chosen' is a number"),
    ({"prompt": ASK, "completions": [GOOD]}, "ranked", "'completions' is a list"),
    ({"prompt": ASK, "completions": [GOOD, BAD, "because"]}, "ranked", r"'completions\[0\]' and 'completions\[2\]' say"),
    ({"prompt": ASK, "completion": GOOD, "label": 2}, "labelled", "the label is 2"),
    ({"prompt": ASK, "completion": GOOD, "label": "good"}, "labelled", "the label is 'good'"),
    ({"prompt": ASK, "completion": "", "label": True}, "labelled", "'completion' is empty"),
    ({"completion": GOOD, "label": True}, "labelled", "the column 'prompt' is missing"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "layout", "says"), BROKEN)
def test_what_cannot_be_learned_from_is_refused(row: dict[str, Any], layout: Format, says: str) -> None:
    with pytest.raises(DataError, match=says) as caught:
        read(row, layout)
    assert caught.value.message.startswith("x.jsonl line 3")
    assert caught.value.code == 3
    assert caught.value.remedy


def test_layouts_go_by_method() -> None:
    pair, label = ["prompt", "chosen", "rejected"], ["prompt", "completion", "label"]
    assert detect_format(pair, "x", COMPARISONS) == "preference"
    assert detect_format(label, "x", COMPARISONS) == "labelled"
    assert detect_format(label, "x", EXAMPLES) == "prompt_completion"
    with pytest.raises(DataError, match=r"those of preference rows, which this method cannot"):
        detect_format(pair, "x", EXAMPLES)
    with pytest.raises(DataError, match=r"those of preference rows, which this method cannot"):
        detect_format(pair, "x", ("labelled",))
    values: dict[str, Any] = {"name": "x", "model": {"path": "m"}, "data": {"train": [{"path": "a"}]}}
    assert layouts_of(parse_job(values)) == EXAMPLES
    assert layouts_of(parse_job({**values, "method": "reward"})) == COMPARISONS
    assert layouts_of(parse_job({**values, "method": "dpo"})) == ("preference",)
    assert layouts_of(parse_job({**values, "method": "dpo", "dpo": {"loss": "kto"}})) == ("labelled",)


def corpus(folder: Path, rows: list[dict[str, Any]], **data: Any) -> Corpus:
    path = write_jsonl(folder / "a.jsonl", rows)
    made = Data(train=[Source(path=str(path))], **data)
    return corpus_of(made, family_tokenizer("chatml"), folder, COMPARISONS)[1]


def pairs(count: int, prompt: str = "why?") -> list[dict[str, Any]]:
    return [
        {"prompt": f"{prompt} {i}", "chosen": [{"role": "assistant", "content": "b" * (i + 1)}], "rejected": BAD, "margin": i}
        for i in range(count)
    ]  # fmt: skip


def test_answers_are_documents_that_end_with_their_last_token(tmp_path: Path) -> None:
    made = corpus(tmp_path, pairs(3), shard_rows=2)
    tokenizer = family_tokenizer("chatml").tokenizer
    for row in range(3):
        documents = made.documents(row)
        assert len(documents) == 2
        for document in documents:
            assert made.answers(document) == (documents, float(row))
            sample = made.sample(document)
            assert tokenizer.decode(sample.ids).endswith("<|im_end|>")
            assert sample.trained[-1]
            start = made.prompt_length(document)
            assert tokenizer.decode(sample.ids[:start]).endswith("<|im_start|>assistant\n")
            assert sample.trained[start:].all()


def test_a_long_prompt_loses_its_beginning_and_the_answers_stay(tmp_path: Path) -> None:
    rows = [*pairs(1, "p" * 60), {"prompt": "x", "chosen": "c" * 200, "rejected": "d"}]
    tokenizer = family_tokenizer("chatml").tokenizer
    whole = corpus(tmp_path / "whole", rows) if (tmp_path / "whole").mkdir() is None else None
    assert whole is not None
    limit = 50
    (tmp_path / "cut").mkdir()
    cut = corpus(tmp_path / "cut", rows, max_length=limit, too_long="truncate")
    assert len(cut.documents(1)) == 0  # its answer alone is too long
    assert max(cut.length(d) for d in cut.documents(0)) == limit
    for before, after in zip(whole.documents(0), cut.documents(0), strict=True):
        ids, kept = whole.sample(before).ids, cut.sample(after).ids
        assert kept[0] == ids[0]
        assert kept[1:].tolist() == ids[-len(kept) + 1 :].tolist()
        assert whole.trained_count(before) == cut.trained_count(after)
    removed = {
        whole.length(b) - cut.length(a) for b, a in zip(whole.documents(0), cut.documents(0), strict=True)
    }
    assert len(removed) == 1
    (tmp_path / "drop").mkdir()
    assert len(corpus(tmp_path / "drop", rows, max_length=limit).documents(0)) == 0
    (tmp_path / "error").mkdir()
    with pytest.raises(DataError, match="has an answer that makes"):
        corpus(tmp_path / "error", rows, max_length=limit, too_long="error")
    assert tokenizer is not None


def contradicted(folder: Path, rows: list[dict[str, Any]]) -> None:
    path = write_jsonl(folder / "a.jsonl", rows)
    data = Data(train=[Source(path=str(path))], shard_rows=2)
    spec, made = corpus_of(data, family_tokenizer("chatml"), folder, COMPARISONS)
    refuse_contradictions(spec, made, node_dir=folder / "node")


def test_contradictions_name_both_rows(tmp_path: Path) -> None:
    fine = pairs(3)
    turned = {"prompt": "why? 1", "chosen": fine[1]["rejected"], "rejected": fine[1]["chosen"]}
    with pytest.raises(DataError, match=r"line 4 contradicts .*line 2") as caught:
        contradicted(tmp_path, [*fine, turned])
    assert caught.value.code == 3
    assert "data.contradictions" in caught.value.remedy
    contradicted(tmp_path, [*fine, fine[1]])  # said twice is no contradiction


def test_contradicting_labels_and_ranks(tmp_path: Path) -> None:
    said = {"prompt": ASK, "completion": GOOD}
    with pytest.raises(DataError, match=r"line 3 contradicts .*line 1"):
        contradicted(
            tmp_path, [{**said, "label": 1}, {"prompt": ASK, "completion": BAD, "label": 0}, {**said, "label": False}]
        )  # fmt: skip
    rows = [{"prompt": ASK, "completions": ["a", "b", "c"]}, {"prompt": ASK, "completions": ["c", "a"]}]
    with pytest.raises(DataError, match="line 2 contradicts"):
        contradicted(tmp_path, rows)


def test_a_template_that_changes_history_refuses_answers_of_several_turns(tmp_path: Path) -> None:
    turns = [*GOOD, {"role": "user", "content": "and?"}, *BAD]
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": ASK, "chosen": turns, "rejected": BAD}])
    data = Data(train=[Source(path=str(path))])
    with pytest.raises(DataError, match="no single text shows the whole answer"):
        corpus_of(data, family_tokenizer("qwen3"), tmp_path, COMPARISONS)
    plan_cache(data.train, data, family_tokenizer("qwen3"), node_dir=tmp_path, allowed=COMPARISONS)
