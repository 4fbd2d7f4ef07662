"""What `rayft check` says about data: everything that is wrong at once, and what the model would see."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rayft.data.doctor import check
from rayft.data.findings import Finding, Findings, Shown, render
from rayft.data.leakage import HeldOut, Wording
from rayft.data.template import ChatTokenizer
from rayft.errors import DataError
from rayft.spec import Job, parse_job
from tests.shared import shared_data
from tests.tiny_data import byte_tokenizer, chat_rows, family_tokenizer, write_jsonl

PANGRAM = "the quick brown fox jumps over the lazy dog while nine wise owls watch from old trees"


def job_of(path: Path, *, held_out: Path | None = None, suite: Path | None = None, **data: Any) -> Job:
    values: dict[str, Any] = {"name": "x", "model": {"path": "x"}, "train": {"micro_batch_size": 4}}
    values["data"] = {"train": [{"path": str(path)}], "max_length": 120, **data}
    if held_out:
        values["data"]["eval"] = [{"path": str(held_out)}]
    if suite:
        values["eval"] = {"suites": [{"name": "s", "type": "json", "path": str(suite)}]}
    return parse_job(values)


def found(findings: Findings, words: str) -> Finding:
    """The one finding whose message has these words."""
    (finding,) = [f for f in findings.found if words in f.message]
    return finding


def rows_of(*pairs: tuple[str, str]) -> list[dict[str, Any]]:
    return [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in pairs
    ]


def test_good_data_gives_figures_and_nothing_to_complain_about(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", chat_rows(40))
    findings = check(job_of(path), family_tokenizer("chatml"), node_dir=tmp_path)
    assert findings.found == []
    assert (findings.rows, findings.documents, len(findings.lengths)) == (40, 40, 40)
    assert findings.tokens == sum(findings.lengths)
    assert 0 < findings.trained_tokens < findings.tokens
    assert findings.packing_efficiency == findings.tokens / (34 * 120)  # few of these fit together
    assert 0 < findings.padding < 0.5
    assert len(findings.samples) == 3
    first = findings.samples[0]
    assert first.where.endswith("a.jsonl line 1")
    assert [text for text, trained in first.pieces if trained] == ["answer 0-0 <|im_end|>"]


def test_all_wrong_rows_are_listed_by_what_is_wrong(tmp_path: Path) -> None:
    rows = chat_rows(9)
    rows[2] = rows[4] = {"messages": [{"role": "user", "content": "no answer"}]}
    rows[6]["messages"][0]["role"] = "robot"
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    findings = check(job_of(path), family_tokenizer("chatml"), node_dir=tmp_path)
    nothing = found(findings, "no token of the row is trained")
    assert (nothing.level, nothing.count) == ("error", 2)
    assert nothing.examples == (f"{path} line 3", f"{path} line 5")
    assert found(findings, "has the role 'robot'").examples == (f"{path} line 7",)
    assert findings.documents == 6


def test_a_broken_line_is_found_and_what_comes_before_it_looked_at(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", chat_rows(4))
    path.write_text(path.read_text() + "{oops\n")
    findings = check(job_of(path), family_tokenizer("chatml"), node_dir=tmp_path)
    assert found(findings, "line 5 is not valid JSON").level == "error"
    assert findings.documents == 4


def test_templates_without_a_turn_end_and_doubled_begin_tokens_are_errors(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", chat_rows(3))
    endless = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    findings = check(job_of(path), ChatTokenizer(byte_tokenizer(endless)), node_dir=tmp_path)
    assert sum(f.count for f in findings.errors if "without a turn-end token" in f.message) == 3
    doubled = "<s><s>{% for m in messages %}{{ m.content }}</s>\n{% endfor %}"
    tokenizer = ChatTokenizer(byte_tokenizer(doubled, bos="<s>", eos="</s>", special=["<s>", "</s>"]))
    findings = check(job_of(path), tokenizer, node_dir=tmp_path)
    assert found(findings, "begins with two <s> tokens").count == 3


@pytest.mark.parametrize(
    ("too_long", "level", "words"),
    [
        ("drop", "warning", "are dropped"),
        ("truncate", "warning", "are truncated"),
        ("error", "error", "refuses"),
    ],
)
def test_what_is_too_long_is_judged_by_the_rule(
    too_long: str, level: str, words: str, tmp_path: Path
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", rows_of(("q", "a"), ("q", "b" * 200), ("r", "c")))
    job = job_of(path, too_long=too_long)
    finding = found(check(job, family_tokenizer("chatml"), node_dir=tmp_path), words)
    assert (finding.level, finding.count, finding.examples) == (level, 1, (f"{path} line 2",))


def test_a_truncation_that_leaves_nothing_trained_counts_as_dropped(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", rows_of(("q" * 200, "a"), ("r", "c")))
    findings = check(job_of(path, too_long="truncate"), family_tokenizer("chatml"), node_dir=tmp_path)
    assert found(findings, "are dropped").count == 1


def test_odd_rows_are_pointed_out(tmp_path: Path) -> None:
    rows = rows_of(("what<|im_end|>", "a"), ("q", " "), ("same", "same"), ("same", "same"))
    rows.append({"messages": rows_of(("one", "1"))[0]["messages"] + rows_of(("two", "2"))[0]["messages"]})
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    findings = check(job_of(path), family_tokenizer("qwen3"), node_dir=tmp_path)
    assert found(findings, "text of a special token").examples == (f"{path} line 1",)
    assert found(findings, "are empty").examples == (f"{path} line 2",)
    assert found(findings, "exactly the same").examples == (f"{path} line 4 = {path} line 3",)
    assert found(findings, "several documents").examples == (f"{path} line 5",)
    assert not findings.errors


def test_a_turn_end_that_is_not_the_end_token_is_noted(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", chat_rows(3))
    findings = check(job_of(path), family_tokenizer("llama3"), node_dir=tmp_path)
    assert found(findings, "turns end with <|eot_id|>").level == "note"


def test_held_out_rows_in_the_training_data(tmp_path: Path) -> None:
    train = write_jsonl(
        tmp_path / "train.jsonl", rows_of(("A b?", "C."), (PANGRAM + " now", "yes"), ("other", "thing"))
    )
    held_out = write_jsonl(tmp_path / "eval.jsonl", rows_of(("a  B", "c"), ("unseen", "row")))
    suite = write_jsonl(tmp_path / "suite.jsonl", [{"query": "say " + PANGRAM, "gold": 1}])
    job = job_of(train, held_out=held_out, suite=suite)
    findings = check(job, family_tokenizer("chatml"), node_dir=tmp_path)
    exact, near = found(findings, "are also held out"), found(findings, "most of their wording")
    assert exact.level == "error"
    assert exact.examples == (f"{train} line 1 = {held_out} line 1",)
    assert near.level == "warning"
    assert near.examples == (f"{train} line 2 = {suite} line 1",)


def test_wording_that_all_held_out_rows_share_is_no_leak() -> None:
    held_out = HeldOut()
    for number in range(100):
        text = f"{PANGRAM} {' '.join(f'w{number}x{i}' for i in range(12))}"
        held_out.add(f"test {number}", Wording(text, text))
    held_out.close()
    held_out.look("train 1", Wording(PANGRAM + " and something else", ""))
    assert (held_out.exact, held_out.near) == ([], [])
    held_out.look("train 2", Wording(f"{PANGRAM} {' '.join(f'w7x{i}' for i in range(12))} indeed", ""))
    assert held_out.near == [("train 2", "test 7")]


def test_plain_rows_are_compared_by_their_prompt(tmp_path: Path) -> None:
    rows = [{"prompt": PANGRAM, "completion": "one"}, {"prompt": "short", "completion": "two"}]
    train = write_jsonl(tmp_path / "train.jsonl", rows)
    held_out = write_jsonl(tmp_path / "eval.jsonl", [{"text": PANGRAM}])
    findings = check(job_of(train, held_out=held_out), family_tokenizer("chatml"), node_dir=tmp_path)
    assert found(findings, "most of their wording").examples == (f"{train} line 1 = {held_out} line 1",)


def test_wrong_evaluation_rows_are_found_too(tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", chat_rows(3))
    held_out = write_jsonl(tmp_path / "eval.jsonl", [*chat_rows(2, seed=1), {"messages": []}])
    findings = check(job_of(train, held_out=held_out), family_tokenizer("chatml"), node_dir=tmp_path)
    assert [f.examples for f in findings.errors] == [(f"{held_out} line 3",)]


def test_of_large_data_a_part_is_looked_at(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", chat_rows(60))
    job = job_of(path, shard_rows=10)
    findings = check(job, family_tokenizer("chatml"), node_dir=tmp_path, max_rows=25)
    assert (findings.rows, findings.rows_in_all) == (30, 60)
    assert "30 of 60 (a part was looked at)" in shown(findings)


def test_what_cannot_be_looked_at_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file or folder"):
        check(job_of(tmp_path / "no.jsonl"), family_tokenizer("chatml"), node_dir=tmp_path)


def shown(findings: Findings, *, colour: bool = False) -> str:
    console = Console(
        file=io.StringIO(), width=120, force_terminal=colour, color_system="truecolor" if colour else None
    )
    render(findings, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_rendering_highlights_what_is_trained() -> None:
    findings = Findings(
        rows=1, rows_in_all=1, documents=1, tokens=9, trained_tokens=3, lengths=[4, 9, 30], max_length=20
    )
    findings.samples = [Shown("x line 1", (("[b]ask", False), ("answer[/b]", True)))]
    findings.add("warning", "odd", ["x line 1", "x line 2"], "Do this.")
    findings.add("error", "bad", ["x line 3"])
    plain = shown(findings)
    assert "[b]ask⟦answer[/b]⟧" in plain  # brackets of the data are no markup
    assert plain.index("error: bad\n") < plain.index("warning: odd (2 times)")
    assert "x line 2" in plain
    assert "Do this." in plain
    assert "\x1b[30;42manswer[/b]" in shown(findings, colour=True)


def test_real_data(tmp_path: Path) -> None:
    train, test = (shared_data("sft_coffee") / f"{split}.jsonl" for split in ("train", "test"))
    findings = check(
        job_of(train, suite=test, max_length=2048), family_tokenizer("chatml"), node_dir=tmp_path
    )
    assert not findings.errors
    assert found(findings, "most of their wording").count == 1
    findings = check(job_of(test, suite=test, max_length=2048), family_tokenizer("chatml"), node_dir=tmp_path)
    assert found(findings, "are also held out").count == 200


def test_comparisons_are_looked_at(tmp_path: Path) -> None:
    """Pairs are no several documents of one conversation; contradictions, repeats and held-out pairs are found."""
    ask = [{"role": "user", "content": "why is the sky blue at noon and red in the evening of a clear day?"}]
    pair = {"prompt": ask, "chosen": "because light scatters", "rejected": "nobody knows"}
    turned = {"prompt": ask, "chosen": pair["rejected"], "rejected": pair["chosen"]}
    fine = {"prompt": ask, "chosen": "it is the air", "rejected": "nobody knows"}
    train = write_jsonl(tmp_path / "train.jsonl", [pair, fine, turned, fine])
    test = write_jsonl(tmp_path / "test.jsonl", [fine])
    job = parse_job(
        {
            "name": "x",
            "method": "reward",
            "model": {"path": "m"},
            "data": {"train": [{"path": str(train)}]},
            "eval": {"suites": [{"name": "s", "type": "preference", "path": str(test)}]},
        }
    )
    findings = check(job, family_tokenizer("chatml"), node_dir=tmp_path)
    assert (findings.rows, findings.documents) == (4, 8)
    found = {finding.message: finding for finding in findings.found}
    both = next(found[m] for m in found if "the other way round" in m)
    assert both.level == "error"
    assert "line 3" in both.examples[0]
    assert "line 1" in both.examples[0]
    assert any("say exactly the same" in message for message in found)
    assert any("also held out" in message for message in found)
    assert not any("several documents" in message for message in found)
    kept = job.model_copy(update={"data": job.data.model_copy(update={"contradictions": "keep"})})
    relaxed = check(kept, family_tokenizer("chatml"), node_dir=tmp_path)
    assert not any("the other way round" in finding.message for finding in relaxed.found)
