"""Rating without a browser: items, the ledger, the share-out, agreement, and the rows that come out."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rayft.data.comparisons import read_row
from rayft.errors import DataError, JobError, StorageError
from rayft.rate.agreement import measure, summary
from rayft.rate.generate import generate_items
from rayft.rate.items import Answer, Item, item, load_items, read_answers, read_prompts, save_items
from rayft.rate.ledger import CUT, RATINGS, Event, Ledger, read_events, standing
from rayft.rate.rows import agreed_rows, preference_rows, ranked_rows, write_rows
from rayft.rate.serve import report
from rayft.rate.share import order_of_answers, share_out
from rayft.spec import Source
from tests.tiny import save_tiny
from tests.tiny_data import write_jsonl


def items(count: int, answers: int = 2) -> list[Item]:
    return [
        item(f"question {i}", [Answer(f"answer {i}-{n}", f"m{n}") for n in range(answers)])
        for i in range(count)
    ]


def event(one: Item, rater: str, ranking: Any, number: int = 0, shown: Any = (0, 1), **more: Any) -> Event:
    return Event("rating", one.id, rater, f"request-{rater}-{one.id}-{number}", shown, ranking, **more)


A_WINS, B_WINS, TIE = ((0,), (1,)), ((1,), (0,)), ((0, 1),)


def test_items_of_every_layout(tmp_path: Path) -> None:
    ask = [{"role": "user", "content": "why?"}]
    rows = [
        {"prompt": "why?", "completions": ["a", "b", "c", "a "]},
        {"prompt": ask, "chosen": [{"role": "assistant", "content": "x"}], "rejected": "y"},
        {"prompt": "how?", "completion_small": "s", "completion_large": "l"},
        {"prompt": "same?", "chosen": "z", "rejected": "z"},
    ]
    found = read_answers(str(write_jsonl(tmp_path / "a.jsonl", rows)), cache_dir=tmp_path)
    assert [[answer.text for answer in one.answers] for one in found] == [
        ["a", "b", "c"],
        ["x", "y"],
        ["s", "l"],
    ]
    assert [answer.source for answer in found[2].answers] == ["small", "large"]
    assert found[1].turns == [{"role": "user", "content": "why?"}]
    save_items(tmp_path / "r", found)
    assert load_items(tmp_path / "r") == found


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "", "completions": ["a", "b"]}, "prompt is missing"),
        ({"prompt": "why?", "answer": "a"}, "no answers to compare"),
        ({"prompt": "why?", "completions": ["a", ""]}, "is empty"),
        ({"prompt": "why?", "completions": list("abcdefghij")}, "At most 9"),
        ({"prompt": "why?", "chosen": "a", "rejected": "a"}, "no row with two different answers"),
    ],
)
def test_answers_that_cannot_be_rated(row: dict[str, Any], says: str, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [row])
    with pytest.raises(DataError) as caught:
        read_answers(str(path), cache_dir=tmp_path)
    assert says in str(caught.value)


def test_prompts_of_messages_end_before_the_last_answer(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = write_jsonl(tmp_path / "p.jsonl", [{"messages": chat}, {"prompt": "c"}])
    assert [prompt for _, prompt in read_prompts(str(path), cache_dir=tmp_path)] == [chat[:1], "c"]
    with pytest.raises(JobError, match="holds no items"):
        load_items(tmp_path)


def test_the_ledger_has_one_writer_and_takes_a_request_once(tmp_path: Path) -> None:
    (one,) = items(1)
    ledger = Ledger(tmp_path)
    with pytest.raises(StorageError, match="open in another"):
        Ledger(tmp_path)
    assert ledger.append(event(one, "ann", A_WINS))
    assert not ledger.append(event(one, "ann", A_WINS))
    ledger.close()
    again = Ledger(tmp_path)
    assert not again.append(event(one, "ann", A_WINS))
    again.close()
    (kept,) = read_events(tmp_path / RATINGS)
    assert (kept.ranking, kept.shown) == (A_WINS, (0, 1))
    assert kept.time > 1.7e9


def test_a_cut_line_is_set_aside_and_nothing_else_is_lost(tmp_path: Path) -> None:
    """At every byte: what was whole stays, what was cut is kept apart, and the next line begins on its own."""
    one, two, three = items(3)
    ledger = Ledger(tmp_path)
    ledger.append(event(one, "ann", A_WINS))
    ledger.append(event(two, "ann", B_WINS))
    ledger.close()
    whole = (tmp_path / RATINGS).read_bytes()
    first = whole.index(b"\n") + 1
    for end in (first + 1, first + 20, len(whole) - 1):
        folder = tmp_path / str(end)
        folder.mkdir()
        (folder / RATINGS).write_bytes(whole[:end])
        assert [e.item for e in read_events(folder / RATINGS)] == [one.id]
        opened = Ledger(folder)
        assert opened.cut
        opened.append(event(three, "ann", TIE))
        opened.close()
        assert [e.item for e in read_events(folder / RATINGS)] == [one.id, three.id]
        assert (folder / CUT).read_bytes() == whole[first:end] + b"\n"


def test_line_separators_in_texts_are_no_lines(tmp_path: Path) -> None:
    (one,) = [item("first\u2028second\x85third", [Answer("a\u2029", "m"), Answer("b", "n")])]
    save_items(tmp_path, [one])
    assert load_items(tmp_path) == [one]
    ledger = Ledger(tmp_path)
    ledger.append(event(one, "[/]", A_WINS, comment="x\u2028\ud800"))
    ledger.close()
    assert report(tmp_path, Console(file=io.StringIO())) == 0
    (row,) = map(
        json.loads, (tmp_path / "preferences.jsonl").read_text(encoding="utf-8").rstrip("\n").split("\n")
    )
    assert row["prompt"] == one.prompt


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    (tmp_path / RATINGS).write_text('{"kind": "rating"\n')
    with pytest.raises(DataError, match=r"ratings.jsonl line 1 is damaged") as caught:
        list(read_events(tmp_path / RATINGS))
    assert caught.value.code == 3


WRITER = """
import sys
from pathlib import Path
from rayft.rate.ledger import Event, Ledger
ledger = Ledger(Path(sys.argv[1]))
for number in range(100_000):
    ledger.append(Event("rating", f"item-{number}", "ann", f"request-{number}", (0, 1), ((0,), (1,))))
    print(number, flush=True)
"""


def test_a_killed_writer_loses_and_doubles_nothing(tmp_path: Path) -> None:
    """What it said to have written is there after SIGKILL, in order and once."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) >= 30:
            break
    process.send_signal(signal.SIGKILL)
    told = [int(line), *map(int, process.stdout.read().split())]
    process.wait(timeout=10)
    ledger = Ledger(tmp_path)
    found = [e.item for e in ledger.events]
    assert found == [f"item-{n}" for n in range(len(found))]
    assert len(found) >= told[-1] + 1
    ledger.close()


def test_undo_takes_back_and_a_new_rating_stands() -> None:
    (one,) = items(1)
    events = [event(one, "ann", A_WINS), Event("undo", one.id, "ann", "request-undo"), event(one, "bob", TIE)]
    assert list(standing(events)) == [("bob", one.id)]
    assert standing([*events, event(one, "ann", B_WINS, 1)])["ann", one.id].ranking == B_WINS


def test_everybody_gets_the_overlap_and_the_rest_is_dealt() -> None:
    all_items, raters = items(50), ["ann", "bob", "eve"]
    shares = {rater: share_out(all_items, raters, rater, 0.2, seed=1) for rater in raters}
    counts = Counter(one.id for own in shares.values() for one in own)
    assert Counter(counts.values()) == {3: 10, 1: 40}
    assert sorted(len(own) for own in shares.values()) == [23, 23, 24]
    assert shares["ann"] == share_out(all_items, raters[::-1], "ann", 0.2, seed=1)
    assert len(share_out(all_items, [], "anybody", 0.2, seed=1)) == 50


def test_answers_are_shown_in_random_order() -> None:
    orders = Counter(order_of_answers(0, one, "ann") for one in items(400))
    assert set(orders) == {(0, 1), (1, 0)}
    assert abs(orders[0, 1] - 200) < 60
    one = items(1)[0]
    assert order_of_answers(0, one, "ann") == order_of_answers(0, one, "ann")


def test_agreement_and_habits() -> None:
    """Ann and Bob agree on three of four; Bob always takes the left one."""
    four = items(4)
    ann = [A_WINS, B_WINS, A_WINS, TIE]
    bob = [A_WINS, B_WINS, B_WINS, TIE]
    shown = [(0, 1), (1, 0), (1, 0), (0, 1)]
    events = [event(one, "ann", said, seconds=2.0) for one, said in zip(four, ann, strict=True)]
    events += [event(o, "bob", said, shown=s) for o, said, s in zip(four, bob, shown, strict=True)]
    found = measure(four, events)
    assert (found.shared, found.same) == (4, 0.75)
    assert found.alpha == pytest.approx(
        1 - (2 / 8) / (1 - (9 / 56 + 9 / 56 + 2 / 56 - 3 / 56 - 3 / 56) - 0), abs=1
    )
    assert "75% the same" in summary(found)
    ann_found, bob_found = found.raters
    assert (bob_found.name, bob_found.first, bob_found.ties) == ("bob", 1.0, 1)
    assert ann_found.first == pytest.approx(2 / 3)
    assert ann_found.seconds == 2.0
    alone = measure(four, events[:4])
    assert alone.same is None
    assert "no two raters" in summary(alone)


def test_alpha_by_hand() -> None:
    """Two raters, two values, four units: alpha = 1 - (n - 1) * disagreements / (products of the counts)."""
    four = items(4)
    one, other = [A_WINS, A_WINS, B_WINS, B_WINS], [A_WINS, A_WINS, B_WINS, A_WINS]
    events = [event(i, "ann", s) for i, s in zip(four, one, strict=True)]
    events += [event(i, "bob", s) for i, s in zip(four, other, strict=True)]
    # counts: A 5, B 3 of n = 8; off-diagonal coincidences o_AB = 1; alpha = 1 - (n - 1) o_AB / (n_A n_B)
    assert measure(four, events).alpha == pytest.approx(1 - 7 * 1 / 15)


def test_a_position_bias_is_said_only_when_it_is_one() -> None:
    many = items(100)
    left = [event(one, "lazy", A_WINS) for one in many]
    fair = [event(one, "fair", A_WINS if i % 2 else B_WINS) for i, one in enumerate(many)]
    fair_found, lazy_found = measure(many, left + fair).raters
    assert lazy_found.biased
    assert not fair_found.biased


def test_rows_to_train_on() -> None:
    pair = item([{"role": "user", "content": "why?"}], [Answer("a", "m1"), Answer("b", "m2")])
    three = item("rank", [Answer(x, x) for x in "abc"])
    events = [
        event(pair, "ann", A_WINS, comment="clear"),
        event(pair, "bob", B_WINS),
        event(pair, "eve", A_WINS),
        event(three, "ann", ((2,), (0,), (1,)), shown=(0, 1, 2)),
        event(three, "bob", ((2,), (0, 1)), shown=(0, 1, 2)),
    ]
    rows = list(preference_rows([pair, three], events))
    assert len(rows) == 3 + 3 + 2
    assert rows[0]["chosen"] == [{"role": "assistant", "content": "a"}]
    assert (rows[0]["rater"], rows[0]["comment"], rows[0]["chosen_source"]) == ("ann", "clear", "m1")
    for row in rows:
        read_row(row, "preference", Source(path="x"), "x")
    agreed = agreed_rows(rows)
    by_answers = {(json.dumps(r["chosen"]), json.dumps(r["rejected"])): r["votes"] for r in agreed}
    assert len(agreed) == 4
    assert {"for": 2, "against": 1} in by_answers.values()
    (ranked,) = ranked_rows([pair, three], events)
    assert ranked["completions"] == ["c", "a", "b"]
    assert ranked["rater"] == ["ann", "bob"]
    undecided = [*events, event(three, "eve", ((2,), (1,), (0,)), shown=(0, 1, 2))]
    assert ranked_rows([pair, three], undecided) == []
    read_row(ranked, "ranked", Source(path="x"), "x")


def test_as_many_votes_for_as_against_give_no_row(tmp_path: Path) -> None:
    (one,) = items(1)
    events = [event(one, "ann", A_WINS), event(one, "bob", B_WINS), event(one, "eve", TIE)]
    assert write_rows(tmp_path, [one], events) == {"preferences.jsonl": 0}
    assert os.listdir(tmp_path) == ["preferences.jsonl"]


def test_models_answer_the_prompts(tmp_path: Path) -> None:
    """Two real models and several samples: distinct answers with their sources, the same ones again for the same seed."""
    for seed in (0, 1):
        save_tiny(tmp_path / f"model-{seed}", seed=seed)
    prompts = [("line 1", [{"role": "user", "content": "why?"}]), ("line 2", "Once upon")]
    models = [str(tmp_path / "model-0"), str(tmp_path / "model-1")]
    said: list[str] = []

    def made() -> list[Item]:
        return generate_items(
            prompts,
            models,
            samples=2,
            max_new_tokens=8,
            temperature=1.0,
            seed=0,
            cache_dir=tmp_path / "cache",
            say=said.append,
        )

    first = made()
    assert [one.prompt for one in first] == [prompt for _, prompt in prompts]
    for one in first:
        assert 2 <= len(one.answers) <= 4
        assert {answer.source for answer in one.answers} <= set(models)
        assert len({answer.text for answer in one.answers}) == len(one.answers)
    assert {answer.source for one in first for answer in one.answers} == set(models)
    assert said[0] == f"{models[0]}: 4 answers"
    assert made() == first
