"""Scores of answers: functions that misbehave end in a sentence, a reward model scores as `rayft score` does."""

from __future__ import annotations

import datetime
import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from rayft.errors import JobError
from rayft.rlhf.placement import Spot
from rayft.rlhf.rewards import FunctionScorer, HttpScorer, ModelScorer, RewardActor, checked, longest_wait
from rayft.spec import RewardSource
from tests.tiny import save_tiny
from tests.unit.test_model_score import checkpoint_of, job_of

PROMPTS = [[{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}]]
FILE = """
def length(prompts, completions, wanted, **columns):
    assert prompts[0][0]["role"] == "user"
    return [len(text) if want else 0 for text, want in zip(completions, wanted)]

def raises(prompts, completions, **_):
    return [1 / 0]

def nan(completions, **_):
    return [0.5, float("nan")]

def short(completions, **_):
    return [1.0]

def words(completions, **_):
    return ["good", "bad"]

def nothing(completions, **_):
    pass

def generator(completions, **_):
    yield from [2.0, 1 / 0]

def leaves(completions, **_):
    raise SystemExit(3)

number = 3
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "my_rewards.py"
    path.write_text(FILE)
    return path


def source(path: str, kind: str = "function") -> RewardSource:
    return RewardSource(name="mine", type=kind, path=path)  # type: ignore[arg-type,call-arg]


def score(file: Path, name: str) -> list[float]:
    actor = RewardActor(Spot(0, 0.0, 1), source(f"{file}:{name}"))
    actor.load()
    return actor.score(PROMPTS, ["xx", "yyy"], {"wanted": [True, False]})


def test_a_function_gets_columns_and_gives_numbers(file: Path) -> None:
    assert score(file, "length") == [2.0, 0.0]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("raises", ["my_rewards.py:raises raised ZeroDivisionError", "line 7"]),
        ("leaves", ["my_rewards.py:leaves raised SystemExit: 3"]),
        ("generator", ["my_rewards.py:generator raised ZeroDivisionError"]),
        ("nothing", ["The reward mine gave NoneType, not numbers"]),
        ("nan", ["gave nan for answer 2 of 2"]),
        ("short", ["gave 1 scores for 2 answers"]),
        ("words", ["gave list, not numbers"]),
        ("missing", ["has no function 'missing'"]),
        ("number", ["has no function 'number'"]),
    ],
)
def test_what_is_wrong_with_a_function_is_one_sentence(file: Path, name: str, words: list[str]) -> None:
    with pytest.raises(JobError) as caught:
        score(file, name)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("path", ["nowhere.py:f", "no.such.module:f"])
def test_a_function_that_is_not_there(path: str) -> None:
    with pytest.raises(JobError, match="cannot be loaded"):
        FunctionScorer(source(path))


@pytest.mark.parametrize("scores", [None, 3, [None], ["x"]])
def test_anything_but_numbers_is_refused(scores: Any) -> None:
    with pytest.raises(JobError, match="not numbers"):
        checked(scores, 1, source("a.py:f"))


def test_a_reward_model_scores_as_the_verb_does(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from rayft.evals.score import score_rows
    from rayft.generate.scores import ScoreEngine, load_score_model
    from rayft.model.export import export_model
    from rayft.model.files import job_files

    job = job_of(save_tiny(tmp_path / "model"))
    reader, _ = checkpoint_of(job, tmp_path)
    export_model(reader, job_files(job, tmp_path / "cache"), job, tmp_path / "reward")
    shows_tools = AutoTokenizer.from_pretrained(tmp_path / "reward")
    shows_tools.chat_template = "{{ tools | tojson if tools else '' }}" + shows_tools.chat_template
    shows_tools.save_pretrained(tmp_path / "reward")
    tools = [[{"type": "function", "function": {"name": "add"}}], None]
    rows = [
        {"prompt": prompt, "completion": [{"role": "assistant", "content": answer}], "tools": own}
        for prompt, answer, own in zip(PROMPTS, ["xx", "yyy"], tools, strict=True)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model, tokenizer = load_score_model(str(tmp_path / "reward"))
    scored: Iterator[dict[str, Any]] = score_rows(
        str(tmp_path / "rows.jsonl"), [(ScoreEngine(model), tokenizer)], cache_dir=tmp_path
    )
    scorer = ModelScorer(source(str(tmp_path / "reward"), "model"))
    found = scorer(PROMPTS, ["xx", "yyy"], {"tools": tools})
    assert found == pytest.approx([row["scores"][0] for row in scored], rel=1e-6)
    assert found[0] != found[1]
    without = scorer(PROMPTS, ["xx", "yyy"], {})
    assert without[0] != pytest.approx(found[0], rel=1e-6)
    assert without[1] == pytest.approx(found[1], rel=1e-6)


def test_a_reward_model_reads_the_text_in_its_own_tokens(tmp_path: Path) -> None:
    """Its tokenizer is not the policy's: other ids for the same characters give the same scores."""
    import torch
    from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

    save_tiny(tmp_path / "plain")
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "plain", num_labels=1)
    model.save_pretrained(tmp_path / "plain")
    before = PreTrainedTokenizerFast.from_pretrained(tmp_path / "plain")
    # The 256 bytes in reverse, and the rows of the embedding with them.
    values = json.loads(before.backend_tokenizer.to_str())
    values["model"]["vocab"] = {char: 255 - i for char, i in values["model"]["vocab"].items()}
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding[:256] = embedding[:256].flip(0)
    model.save_pretrained(tmp_path / "other")
    before.save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(values))
    after = PreTrainedTokenizerFast.from_pretrained(tmp_path / "other")
    assert after("abc").input_ids == [255 - i for i in before("abc").input_ids]
    plain, other = (
        ModelScorer(source(str(tmp_path / name), "model"))(PROMPTS, ["xx", "yyy"], {})
        for name in ("plain", "other")
    )
    assert other == pytest.approx(plain, rel=1e-6)
    assert plain[0] != plain[1]


class Endpoint(BaseHTTPRequestHandler):
    """Answers with what `replies` holds, one after another: a status, and a body or what makes one from the request."""

    replies: ClassVar[list[tuple[int, Any]]] = []

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        status, body = self.replies.pop(0)
        sent = json.dumps(body(asked) if callable(body) else body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(sent)))
        self.end_headers()
        self.wfile.write(sent)

    def log_message(self, *_: Any) -> None:
        """Nothing."""


@pytest.fixture
def endpoint() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/score"
    server.shutdown()
    thread.join()
    server.server_close()


def lengths(asked: dict[str, Any]) -> dict[str, Any]:
    assert asked["prompts"][0] in PROMPTS
    return {
        "scores": [len(text) * want for text, want in zip(asked["completions"], asked["wanted"], strict=True)]
    }


def test_an_endpoint_scores_in_batches_and_is_asked_again(
    endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rayft.rlhf.rewards.time.sleep", lambda _: None)
    Endpoint.replies = [(503, {}), (200, lengths), (429, {}), (200, lengths)]
    scorer = HttpScorer(RewardSource(name="mine", type="http", path=endpoint, batch_size=1))  # type: ignore[call-arg]
    assert scorer(PROMPTS, ["xx", "yyy"], {"wanted": [1, 2]}) == [2.0, 6.0]
    assert Endpoint.replies == []


@pytest.mark.parametrize(
    ("replies", "words"),
    [
        ([(500, {})] * 2, ["it answered 500", "2 tries"]),
        ([(404, {})], ["it answered 404", "1 try"]),
        ([(200, {"score": [1, 2]})], ["answered without a list under `scores`"]),
        ([(200, [1, 2])], ["answered without a list under `scores`"]),
        ([(200, {"scores": [1]})], ["gave 1 scores for 2 answers"]),
        ([(200, {"scores": [1, None]})], ["not numbers"]),
        ([(200, {"scores": [1, float("nan")]})], ["gave nan for answer 2"]),
    ],
)
def test_an_endpoint_that_misbehaves_is_one_sentence(
    replies: list[tuple[int, Any]], words: list[str], endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rayft.rlhf.rewards.time.sleep", lambda _: None)
    Endpoint.replies = list(replies)
    scorer = HttpScorer(RewardSource(name="mine", type="http", path=endpoint, retries=1))  # type: ignore[call-arg]
    with pytest.raises(JobError) as caught:
        scorer(PROMPTS, ["xx", "yyy"], {})
    for word in words:
        assert word in str(caught.value)


def test_a_column_that_cannot_be_sent_is_named() -> None:
    scorer = HttpScorer(source("http://127.0.0.1:9/score", "http"))
    columns = {"id": [1, 2], "day": [datetime.date(2026, 1, 1)] * 2}
    with pytest.raises(JobError, match=r"The column 'day' cannot be sent to the reward mine: .*date"):
        scorer(PROMPTS, ["xx", "yyy"], columns)


def test_an_endpoint_has_its_time_out_for_every_try_of_every_request() -> None:
    values = {"name": "mine", "type": "http", "path": "http://a/b", "timeout_s": 10}
    http = RewardSource.model_validate({**values, "retries": 2, "batch_size": 8})
    assert longest_wait(http, 20) >= 3 * 3 * 10
    function = RewardSource.model_validate({**values, "type": "function", "path": "a.py:b"})
    assert longest_wait(function, 20) == 10


def test_an_endpoint_that_is_down_is_one_sentence() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        path = f"http://127.0.0.1:{closed.getsockname()[1]}/score"
    scorer = HttpScorer(RewardSource(name="mine", type="http", path=path, retries=0))  # type: ignore[call-arg]
    with pytest.raises(JobError, match=r"mine at http.*Connection refused \(1 try\)"):
        scorer(PROMPTS, ["xx", "yyy"], {})


@pytest.mark.timeout(30)
def test_an_endpoint_that_never_answers(endpoint: str) -> None:
    asked, over = threading.Event(), threading.Event()

    def silent(_: dict[str, Any]) -> dict[str, Any]:
        asked.set()
        over.wait(60)
        return {}

    Endpoint.replies = [(200, silent)]
    values = {"type": "http", "path": endpoint, "timeout_s": 0.5, "retries": 0}
    try:
        with pytest.raises(JobError, match=r"failed: .*tim.*\(1 try\)"):
            HttpScorer(RewardSource(name="mine", **values))(PROMPTS, ["xx", "yyy"], {})  # type: ignore[arg-type]
    finally:
        over.set()
    assert asked.is_set()
