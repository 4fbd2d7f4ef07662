"""The demo's data set: reproducible, unseen test split, records that follow the house rules and the schema."""

from __future__ import annotations

import json
import random
import re
from itertools import product as cartesian
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from jobs.triage import generate
from jobs.triage.bank import Bank
from jobs.triage.rules import IMPACTS, PLANS, Facts, record
from jobs.triage.wording_test import TEST
from jobs.triage.wording_train import TRAIN

FOLDER = Path(generate.__file__).parent
FACTS = Facts("K-4821", "Kestrel router", "network", "defect", "standard", "some", None, security=False)


@pytest.fixture(scope="module")
def files() -> dict[str, str]:
    return generate.build()


def rows(files: dict[str, str], split: str) -> list[tuple[str, dict[str, Any]]]:
    """(ticket, record) of each row, after checking the row's form."""
    out = []
    for line in files[f"{split}.jsonl"].splitlines():
        messages = json.loads(line)["messages"]
        assert [m["role"] for m in messages] == ["system", "user", "assistant"]
        out.append((messages[1]["content"], json.loads(messages[2]["content"])))
    return out


def test_the_committed_files_are_what_the_generator_writes(files: dict[str, str]) -> None:
    for name, content in files.items():
        assert (FOLDER / name).read_bytes() == content.encode(), (
            f"{name}: run `python -m jobs.triage.generate`"
        )


def test_sizes(files: dict[str, str]) -> None:
    assert len(rows(files, "train")) == generate.TRAIN_ROWS >= 1000
    assert len(rows(files, "test")) == generate.TEST_ROWS == 200


@pytest.mark.parametrize("split", ["train", "test"])
def test_records_fit_the_schema_and_copy_from_the_ticket(files: dict[str, str], split: str) -> None:
    validator = jsonschema.Draft202012Validator(json.loads(files["schema.json"]))
    for ticket, answer in rows(files, split):
        validator.validate(answer)
        assert answer["order"] in ticket
        assert answer["product"] in ticket
        assert not re.search(r"[\[\]{}|]", ticket), f"unresolved pattern in {ticket!r}"


def test_schema_refuses_what_is_not_a_record(files: dict[str, str]) -> None:
    validator = jsonschema.Draft202012Validator(json.loads(files["schema.json"]))
    good = record(FACTS)
    assert validator.is_valid(good)
    for change in ({"team": "sales"}, {"note": "x"}, {"order": "4821"}, {"priority": "P1"}):
        assert not validator.is_valid(good | change), change
    assert not validator.is_valid({k: v for k, v in good.items() if k != "plan"})


def test_no_product_combination_or_wording_is_in_both_splits(files: dict[str, str]) -> None:
    """From the written rows alone, without the generator's own check."""
    train, test = rows(files, "train"), rows(files, "test")
    assert not {r["product"] for _, r in train} & {r["product"] for _, r in test}
    keys = ("plan", "impact", "category", "team")
    plain = [
        {tuple(r[k] for k in keys) for _, r in split if r["team"] != "security"} for split in (train, test)
    ]
    by_line = [{c for c in combos if c[3] in ("network", "print", "video")} for combos in plain]
    assert by_line[0]
    assert by_line[1]
    assert not by_line[0] & by_line[1]
    assert not {run for t, r in train for run in _runs(t, r)} & {run for t, r in test for run in _runs(t, r)}


def _runs(ticket: str, answer: dict[str, str]) -> set[str]:
    words = re.findall(r"[a-z]+", ticket.replace(answer["product"], "").lower())
    return {" ".join(words[i : i + 6]) for i in range(len(words) - 5)}


@pytest.mark.parametrize("what", ["product", "combination", "wording"])
def test_the_generators_check_finds_leaks(what: str) -> None:
    for_train, for_test = generate.combinations()
    train = generate.make_split(TRAIN, for_train, 100, random.Random(1))
    bank = {
        "product": _with(TEST, brands=TRAIN.brands),
        "combination": TEST,
        "wording": _with(TEST, impacts=TRAIN.impacts),
    }[what]
    test = generate.make_split(bank, for_train if what == "combination" else for_test, 50, random.Random(2))
    with pytest.raises(AssertionError, match=what):
        generate.check(train, test)


def _with(bank: Bank, **changes: Any) -> Bank:
    return Bank(**(vars(bank) | changes))


def test_every_pair_of_values_stays_in_train() -> None:
    for_train, for_test = generate.combinations()
    assert not set(for_train) & set(for_test)
    assert len(for_train) + len(for_test) == 3 * 5 * 3 * 3
    for i, j in cartesian(range(4), repeat=2):
        assert {(c[i], c[j]) for c in for_test} <= {(c[i], c[j]) for c in for_train}


def test_banks_share_no_phrase() -> None:
    for name, train_values in vars(TRAIN).items():
        if name == "devices":  # half of the kinds of device are meant to be known, the rest is new
            continue
        test_values = vars(TEST)[name]
        if isinstance(train_values, dict):
            assert not {p for ps in train_values.values() for p in ps} & {
                p for ps in test_values.values() for p in ps
            }
        else:
            assert not set(train_values) & set(test_values), name


def test_priority_by_impact_and_plan() -> None:
    table = {(p, i): record(_facts(plan=p, impact=i))["priority"] for p, i in cartesian(PLANS, IMPACTS)}
    assert [table["premium", i] for i in IMPACTS] == ["urgent", "high", "high"]
    assert [table["standard", i] for i in IMPACTS] == ["urgent", "normal", "low"]
    assert [table["basic", i] for i in IMPACTS] == ["urgent", "normal", "low"]


def test_no_plan_named_means_basic() -> None:
    assert record(_facts(plan=None))["plan"] == "basic"


@pytest.mark.parametrize(("amount", "refund"), [(None, 0), (99, 99), (744, 744)])
def test_refund_is_the_amount(amount: int | None, refund: int) -> None:
    assert record(_facts(refund=amount))["refund"] == refund


@pytest.mark.parametrize(
    ("category", "security", "team"),
    [("billing", True, "security"), ("setup", True, "security"), ("billing", False, "finance"), ("delivery", False, "logistics"),
     ("defect", False, "network"), ("access", False, "network"), ("setup", False, "network")],
)  # fmt: skip
def test_team(category: str, security: bool, team: str) -> None:
    assert record(_facts(category=category, security=security))["team"] == team


def _facts(**changes: Any) -> Facts:
    return Facts(**(vars(FACTS) | changes))


def test_expand_resolves_nested_and_empty_choices() -> None:
    seen = {generate.expand("a [b|c [d|]] e", random.Random(i)) for i in range(50)}
    assert seen == {"a b e", "a c d e", "a c e"}
