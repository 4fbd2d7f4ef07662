"""Each suite type against figures made by hand, over an engine whose answers are given."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from rayft.errors import DataError, JobError
from rayft.evals.bits_per_byte import windows
from rayft.evals.run import run_suites
from rayft.generate.engine import Scored
from rayft.generate.hf import TransformersEngine
from rayft.spec import Suite
from rayft.storage import open_store
from tests.shared import shared_data
from tests.tiny import tiny_model, tiny_tokenizer

torch.set_num_threads(1)

TOKENIZER = tiny_tokenizer()


class Given:
    """An engine that answers what it is told, by the text of the prompt, and scores by a function of the ids."""

    context: int | None = None

    def __init__(
        self,
        answers: dict[str, str] | None = None,
        log_probability: Callable[[str], float] = lambda text: 0.0,
    ) -> None:
        self.answers, self.log_probability = answers or {}, log_probability
        self.limits: list[int] = []

    def generate(self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, **_: Any) -> list[list[int]]:
        self.limits.append(max_new_tokens)
        texts = [TOKENIZER.decode(list(ids)) for ids in prompts]
        asked = [text.rpartition("user\n")[2].partition("<|im_end|>")[0] for text in texts]
        return [TOKENIZER(self.answers[text] + "<|im_end|>")["input_ids"] for text in asked]

    def score(self, sequences: Sequence[Scored]) -> list[tuple[float, int]]:
        counted = [[i for i, counts in zip(ids, flags, strict=True) if counts] for ids, flags in sequences]
        return [(self.log_probability(TOKENIZER.decode(ids)), len(ids)) for ids in counted]


def suite(tmp_path: Path, kind: str, rows: list[dict[str, Any]], **settings: Any) -> Suite:
    path = tmp_path / f"{kind}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Suite(name="s", type=kind, path=str(path), **settings)  # type: ignore[arg-type]


def measured(engine: Any, suite: Suite, tmp_path: Path, **settings: Any) -> dict[str, float]:
    return run_suites([suite], engine, TOKENIZER, cache_dir=tmp_path, **settings)["s"]


def chat_row(question: str, answer: str, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, **more}


# bits per byte


def test_windows_count_every_token_once_and_give_it_context() -> None:
    ids = list(range(100))
    parts = windows(ids, 16)
    counted = [i for part, flags in parts for i, counts in zip(part, flags, strict=True) if counts]
    assert counted == ids[1:]
    assert all(len(part) <= 16 for part, _ in parts)
    for part, flags in parts[1:]:
        assert flags.index(True) == 4
        assert list(part) == ids[part[0] : part[0] + len(part)]
    assert windows([1], 16) == []


def test_bits_per_byte_is_negative_log2_over_utf8_bytes(tmp_path: Path) -> None:
    rows = [{"text": "äb"}, {"text": "xyz"}]
    engine = Given(log_probability=lambda text: -0.5 * len(text.encode()))
    found = measured(engine, suite(tmp_path, "bits_per_byte", rows), tmp_path)
    assert found == {
        "bits_per_byte": pytest.approx(0.5 / math.log(2)),
        "documents": 2,
        "tokens": 6,
        "bytes": 6,
    }


def test_bits_per_byte_of_a_real_model_does_not_depend_on_the_window(
    tmp_path: Path, monkeypatch: Any
) -> None:
    text = "".join(chr(97 + i * i % 26) for i in range(40))
    model = tiny_model()
    ids = torch.tensor([[257, *TOKENIZER(text)["input_ids"]]])
    with torch.no_grad():
        log_p = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None]).sum()
    engine = TransformersEngine(model, TOKENIZER)
    whole = measured(engine, suite(tmp_path, "bits_per_byte", [{"text": text}]), tmp_path)
    assert whole["bits_per_byte"] == pytest.approx(float(-log_p) / math.log(2) / 40, rel=1e-5)
    monkeypatch.setattr("rayft.evals.bits_per_byte.WINDOW", 16)
    cut = measured(engine, suite(tmp_path, "bits_per_byte", [{"text": text}]), tmp_path)
    assert cut["tokens"] == whole["tokens"] == 40
    assert cut["bits_per_byte"] == pytest.approx(whole["bits_per_byte"], rel=0.2)
    assert cut["bits_per_byte"] != whole["bits_per_byte"]


def test_windows_fit_the_models_context(tmp_path: Path) -> None:
    engine = TransformersEngine(tiny_model(max_position_embeddings=32), TOKENIZER)
    found = measured(engine, suite(tmp_path, "bits_per_byte", [{"text": "a" * 100}]), tmp_path)
    assert found["tokens"] == 100


# multiple choice


def test_choices_by_sum_and_by_bytes(tmp_path: Path) -> None:
    # By the sum "yes" wins the first row (right) and "no" the second (wrong); by the byte "certainly" wins the second.
    rows = [
        {"query": "One? ", "choices": ["yes", "certainly not"], "gold": 0, "continuation_delimiter": "\nA: "},
        {"query": "Two?", "choices": ["no", "certainly"], "gold": 1},
    ]
    scores = {" yes": -3.0, " certainly not": -14.0, " no": -1.0, " certainly": -1.5}
    found = measured(
        Given(log_probability=scores.__getitem__), suite(tmp_path, "multiple_choice", rows), tmp_path
    )
    assert found == {
        "accuracy": 0.5,
        "accuracy_stderr": pytest.approx(math.sqrt(0.25 / 2)),
        "accuracy_norm": 1.0,
        "accuracy_norm_stderr": 0.0,
        "rows": 2,
    }


def test_tasks_are_told_apart_where_there_are_several(tmp_path: Path) -> None:
    rows = [
        {"query": "q", "choices": ["aa", "bb"], "gold": gold, "task": task}
        for gold, task in [(0, "easy"), (0, "easy"), (1, "hard")]
    ]
    engine = Given(log_probability=lambda text: -float(text == " bb"))
    found = measured(engine, suite(tmp_path, "multiple_choice", rows), tmp_path)
    assert (found["accuracy_norm/easy"], found["accuracy_norm/hard"]) == (1.0, 0.0)
    assert found["accuracy"] == pytest.approx(2 / 3)


def test_the_real_model_gets_the_questions_as_documented(tmp_path: Path) -> None:
    path = shared_data("eval_mc") / "test.jsonl"
    row = json.loads(path.open().readline())
    seen: list[str] = []
    engine = Given(log_probability=lambda text: seen.append(text) or 0.0)  # type: ignore[func-returns-value]
    run_suites(
        [Suite(name="s", type="multiple_choice", path=str(path), limit=1)],
        engine,
        TOKENIZER,
        cache_dir=tmp_path,
    )
    assert seen == [" " + choice for choice in row["choices"]]


# json

SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer"}, "ok": {"type": "boolean"}},
    "required": ["n", "ok"],
    "additionalProperties": False,
}


def test_json_answers(tmp_path: Path) -> None:
    reference = '{"n": 1, "ok": true}'
    answers = {
        "equal": '{"ok":true,\n "n":1}',
        "wrong field": '{"n":2,"ok":true}',
        "breaks schema": '{"n":"1","ok":true}',
        "true is not 1": '{"n":true,"ok":true}',
        "fenced": '```json\n{"n":1,"ok":true}\n```',
        "not a number": '{"n":NaN,"ok":true}',
        "a list": "[1, 2]",
        "cut": '{"n":1,',
    }
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(SCHEMA))
    rows = [chat_row(question, reference) for question in answers]
    kept: dict[str, list[dict[str, Any]]] = {}
    engine = Given(answers)
    found = measured(
        engine,
        suite(tmp_path, "json", rows, schema_path=str(path), max_new_tokens=17),
        tmp_path,
        keep_samples=kept.__setitem__,
        samples=2,
    )
    shares = {name: value for name, value in found.items() if not name.endswith("_stderr")}
    assert shares == {
        "valid_json": 5 / 8,
        "schema_valid": 2 / 8,
        "exact_match": 1 / 8,
        "field_accuracy": (2 + 1 + 1 + 1) / 2 / 8,
        "field/n": 1 / 8,
        "field/ok": 4 / 8,
        "rows": 8,
    }
    assert found["exact_match_stderr"] == pytest.approx(math.sqrt(1 / 8 * 7 / 8 / 8))
    assert engine.limits == [17]
    assert kept["s"] == [
        {"prompt": "equal", "answer": answers["equal"], "reference": reference},
        {"prompt": "wrong field", "answer": answers["wrong field"], "reference": reference},
    ]


def test_json_of_prompt_and_completion_rows(tmp_path: Path) -> None:
    class Echo(Given):
        def generate(self, prompts: Sequence[Sequence[int]], **_: Any) -> list[list[int]]:
            assert [TOKENIZER.decode(list(ids)) for ids in prompts] == ["say one: "]
            return [TOKENIZER('{"n": 1}')["input_ids"]]

    rows = [{"prompt": "say one: ", "completion": '{"n":1}'}]
    assert measured(Echo(), suite(tmp_path, "json", rows), tmp_path)["exact_match"] == 1.0


# qa

REFUSAL = "The context does not say."


def test_qa_scores_answers_and_refusals_apart(tmp_path: Path) -> None:
    rows = [
        chat_row("exact", "the Blue house", answers=[{"text": "the Blue house"}, {"text": "blue"}]),
        chat_row("half", "red car", answers={"text": ["red car"]}),
        chat_row("refused", "context menu"),  # shares a word with the refusal
        chat_row("none, said so", REFUSAL),
        chat_row("none, made up", REFUSAL),
    ]
    answers = {
        "exact": "Blue House.",
        "half": "a red bus",
        "refused": REFUSAL,
        "none, said so": "the context does not say",
        "none, made up": "42",
    }
    found = measured(Given(answers), suite(tmp_path, "qa", rows, refusal=REFUSAL), tmp_path)
    shares = {name: value for name, value in found.items() if not name.endswith("_stderr")}
    assert shares == {
        "f1": pytest.approx((1 + 0.5 + 0) / 3),
        "exact_match": pytest.approx(1 / 3),
        "right_refusals": 0.5,
        "answered": pytest.approx(2 / 3),
        "rows": 5,
    }


def test_qa_without_a_refusal_sentence(tmp_path: Path) -> None:
    rows = [chat_row("q", "blue", answers=["blue", "azure"])]
    found = measured(Given({"q": "Azure"}), suite(tmp_path, "qa", rows), tmp_path)
    assert found["exact_match"] == 1.0
    assert "right_refusals" not in found


# ifeval


def test_ifeval_checks_instructions(tmp_path: Path) -> None:
    pytest.importorskip("if_verifiable")
    rows = [
        {"prompt": "no comma", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
        {
            "prompt": "both",
            "instruction_id_list": ["punctuation:no_comma", "keywords:existence"],
            "kwargs": [{}, {"keywords": ["tree"]}],
        },
        {"prompt": "loose", "instruction_id_list": ["startend:quotation"], "kwargs": [{}]},
        {"prompt": "silent", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
    ]
    answers = {"no comma": "Fine words", "both": "Fine, words", "loose": 'Sure:\n"Quoted."', "silent": " "}
    found = measured(Given(answers), suite(tmp_path, "ifeval", rows), tmp_path)
    shares = {name: value for name, value in found.items() if not name.endswith("_stderr")}
    assert shares == {
        "prompt_strict": 1 / 4,
        "instruction_strict": 1 / 5,
        "prompt_loose": 2 / 4,
        "instruction_loose": 2 / 5,
        "rows": 4,
        "rows_skipped": 0,
    }


def test_all_rows_of_ifeval_can_be_checked_or_are_counted(tmp_path: Path) -> None:
    pytest.importorskip("if_verifiable")
    path = shared_data("eval_ifeval") / "test.jsonl"

    class Same(Given):
        def generate(self, prompts: Sequence[Sequence[int]], **_: Any) -> list[list[int]]:
            return [TOKENIZER("no comma here")["input_ids"] for _ in prompts]

    found = measured(Same(), Suite(name="s", type="ifeval", path=str(path)), tmp_path)
    assert found["rows"] + found["rows_skipped"] == 341
    assert found["rows"] >= 290  # the others need NLTK's sentence data
    assert 0.1 < found["instruction_strict"] < 0.5


# what all of them share


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        ("bits_per_byte", {"title": "x"}, "line 2: the column 'text' is missing"),
        ("bits_per_byte", {"text": ""}, "line 2: the text is empty"),
        ("multiple_choice", {"query": "q", "choices": ["a", "b"], "gold": 2}, "line 2: `gold` is 2"),
        ("multiple_choice", {"query": "q", "choices": ["a"], "gold": 0}, "line 2: `choices` must be"),
        ("multiple_choice", {"query": "q", "choices": ["a", "b"], "gold": "0"}, "'gold' is of type str"),
        ("json", chat_row("q", "no json"), "line 2: the reference answer is not a JSON object"),
        (
            "json",
            {"messages": [{"role": "user", "content": "q"}]},
            "line 2: a json suite needs rows that end",
        ),
        ("json", {"messages": [{"role": "assistant", "content": "{}"}]}, "line 2"),
        ("qa", chat_row("q", "a", answers=[{"texts": "a"}]), "line 2: `answers` holds no texts"),
        ("ifeval", {"prompt": "p", "instruction_id_list": ["no:such"], "kwargs": [{}]}, "line 2: not all"),
        (
            "ifeval",
            {"prompt": "p", "instruction_id_list": ["keywords:existence"], "kwargs": []},
            "line 2: 1 inst",
        ),
    ],
)
def test_bad_rows_are_named(kind: str, row: dict[str, Any], message: str, tmp_path: Path) -> None:
    if kind == "ifeval":
        pytest.importorskip("if_verifiable")
    good: dict[str, dict[str, Any]] = {
        "bits_per_byte": {"text": "t"},
        "multiple_choice": {"query": "q", "choices": ["a", "b"], "gold": 1},
        "json": chat_row("q", "{}"),
        "qa": chat_row("q", "a"),
        "ifeval": {"prompt": "p", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
    }
    with pytest.raises(DataError) as caught:
        measured(Given(), suite(tmp_path, kind, [good[kind], row]), tmp_path)
    assert message in str(caught.value)
    assert f"{kind}.jsonl" in str(caught.value)


def test_bad_schemas_are_named(tmp_path: Path, s3_bucket: str) -> None:
    rows = [chat_row("q", '{"n": 1}')]
    with pytest.raises(JobError, match=r"none\.json cannot be read"):
        measured(Given(), suite(tmp_path, "json", rows, schema_path=str(tmp_path / "none.json")), tmp_path)
    path = tmp_path / "schema.json"
    path.write_text('{"type": 3}')
    with pytest.raises(JobError, match="no valid JSON schema"):
        measured(Given(), suite(tmp_path, "json", rows, schema_path=str(path)), tmp_path)
    path.write_text(json.dumps(SCHEMA))
    with pytest.raises(DataError, match="line 1: the reference answer breaks"):
        measured(Given(), suite(tmp_path, "json", rows, schema_path=str(path)), tmp_path)
    remote = f"s3://{s3_bucket}/schemas/schema.json"
    with pytest.raises(JobError, match=r"schema\.json cannot be read: .* does not exist"):
        measured(Given(), suite(tmp_path, "json", rows, schema_path=remote), tmp_path)
    open_store(f"s3://{s3_bucket}/schemas").upload(path, "schema.json")
    with pytest.raises(DataError, match="line 1: the reference answer breaks"):
        measured(Given(), suite(tmp_path, "json", rows, schema_path=remote), tmp_path)


def test_limit_takes_rows_from_the_whole_file(tmp_path: Path) -> None:
    rows = [{"text": "x" * n} for n in range(1, 11)]
    found = measured(Given(), suite(tmp_path, "bits_per_byte", rows, limit=3), tmp_path)
    assert (found["documents"], found["bytes"]) == (3, 1 + 4 + 7)


def test_ranks_share_the_rows_and_agree(tmp_path: Path) -> None:
    rows = [{"query": "q" * n, "choices": ["aa", "bbb"], "gold": n % 2} for n in range(1, 8)]
    made = suite(tmp_path, "multiple_choice", rows)
    engine = TransformersEngine(tiny_model(), TOKENIZER)
    alone = measured(engine, made, tmp_path)
    parts: list[list[dict[str, Any]]] = []
    for rank in (0, 1, 2):
        measured(
            engine, made, tmp_path, rank=rank, world_size=3, gather=lambda mine: parts.append(mine) or [mine]
        )  # type: ignore[func-returns-value]
    assert sorted(r["row"] for part in parts for r in part) == list(range(7))
    together = measured(engine, made, tmp_path, rank=1, world_size=3, gather=lambda mine: parts)
    assert together == alone
