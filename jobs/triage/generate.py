"""Writes the demo's data set: `python -m jobs.triage.generate` rewrites the three files beside this one, byte for byte.

A ticket is composed from clauses (problem, impact, order, and often plan, refund, security, distractor, greeting,
closing) drawn from a bank that belongs to its split, in changing order and punctuation, with typing errors. The test
split shares no product, no combination (`rules.Facts.combination`) and no run of five words with train; `check` proves it.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterable, Sequence
from itertools import product as cartesian
from pathlib import Path

from jobs.triage.bank import Bank
from jobs.triage.rules import CATEGORIES, IMPACTS, LINES, PLANS, Facts, record, schema
from jobs.triage.wording_test import TEST
from jobs.triage.wording_train import TRAIN

FOLDER = Path(__file__).parent
SYSTEM = "Triage the ticket as JSON."
SEED = 20
TRAIN_ROWS = 1600
TEST_ROWS = 200
MONEY = ["${}", "{} dollars", "{} EUR", "{} euros"]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday"]
SHARED_WORDS = 5  # a run of this many words never occurs in both splits

_CHOICE = re.compile(r"\[([^\[\]]*)\]")
_QUESTION = re.compile(r"(how|can|could|where|which|what|why|when|does|is (the|there))\b")
_JOINTS, _JOINT_WEIGHTS = [". ", ", ", " - ", "; ", " and ", ".\n"], [60, 15, 6, 6, 6, 7]
_SLOT = re.compile(r"\{(\w)\}")

Row = dict[str, list[dict[str, str]]]
Pairs = Sequence[tuple[Facts, Row]]
Combination = tuple[str, str, str, str]


def combinations() -> tuple[list[Combination], list[Combination]]:
    """All (line, category, plan, impact) for train and for test: a quarter is held out, every pair of values stays in train."""
    train: list[Combination] = []
    test: list[Combination] = []
    for values in cartesian(LINES, CATEGORIES, PLANS, IMPACTS):
        line, category, plan, impact = values
        rank = LINES.index(line) + 2 * CATEGORIES.index(category) + PLANS.index(plan) + IMPACTS.index(impact)
        (test if rank % 4 == 0 else train).append(values)
    return train, test


def expand(pattern: str, rng: random.Random) -> str:
    """Resolves every `[a|b]`, innermost first; several spaces become one."""
    while _CHOICE.search(pattern):
        pattern = _CHOICE.sub(lambda m: rng.choice(m[1].split("|")), pattern)
    return " ".join(pattern.split())


def draw_facts(bank: Bank, combination: Combination, rng: random.Random) -> Facts:
    """A random ticket's facts for a given combination."""
    line, category, plan, impact = combination
    name = [rng.choice(bank.brands), rng.choice(bank.devices[line])]
    if rng.random() < 0.25:
        name.insert(1, rng.choice(bank.models))
    refund = None
    if rng.random() < (0.6 if category in ("billing", "delivery", "defect") else 0.3):
        refund = rng.randint(*rng.choice([(12, 99), (100, 1999)]))
    return Facts(
        order=_id(rng),
        product=" ".join(name),
        line=line,
        category=category,
        plan=None if plan == "basic" and rng.random() < 0.4 else plan,
        impact=impact,
        refund=refund,
        security=rng.random() < 0.25,
    )


def write_ticket(facts: Facts, bank: Bank, rng: random.Random) -> str:
    """The customer's text for these facts, from the split's wording."""
    problem = expand(rng.choice(bank.problems[facts.category]), rng)
    others = [rng.choice(bank.impacts[facts.impact]), rng.choice(bank.orders)]
    if facts.plan is not None:
        others.append(rng.choice(bank.plans))
    if facts.refund is not None:
        others.append(rng.choice(bank.refunds))
    if facts.security:
        others.append(rng.choice(bank.security))
    if rng.random() < 0.25:
        others.append(rng.choice(bank.distractors))
    clauses = [expand(clause, rng) for clause in others]
    rng.shuffle(clauses)
    clauses.insert(0 if rng.random() < 0.6 else rng.randrange(len(clauses) + 1), problem)
    text = _join(clauses, rng)
    if rng.random() < 0.25:
        text = expand(rng.choice(bank.greetings), rng) + rng.choice([", ", "! ", ",\n"]) + text
    if rng.random() < 0.2:
        text += rng.choice([" ", "\n"]) + expand(rng.choice(bank.closings), rng)
    text = _typing(text, rng)
    return _fill(text, facts, rng)


def _join(clauses: list[str], rng: random.Random) -> str:
    """Clauses to sentences: each ends with a stop, or runs on into the next with a comma, dash or conjunction."""
    text, ends = "", True
    for clause in clauses[:-1]:
        joint = "? " if _QUESTION.match(clause) else rng.choices(_JOINTS, _JOINT_WEIGHTS)[0]
        text += (_capital(clause) if ends else clause) + joint
        ends = joint[0] in ".?"
    last = clauses[-1]
    stop = "?" if _QUESTION.match(last) else rng.choice([".", ".", ".", "", "!"])
    return text + (_capital(last) if ends else last) + stop


def _capital(clause: str) -> str:
    return clause[:1].upper() + clause[1:]


def _typing(text: str, rng: random.Random) -> str:
    """Typing habits: sometimes all in lower case, now and then two letters swapped or one lost; placeholders stay."""
    if rng.random() < 0.15:
        text = text.lower()
    return re.sub(r"[A-Za-z{}]{5,}", lambda m: _misspell(m[0], rng), text)


def _misspell(word: str, rng: random.Random) -> str:
    if "{" in word or rng.random() > 0.03:
        return word
    i = rng.randrange(1, len(word) - 2)
    return word[:i] + (word[i + 1] + word[i] if rng.random() < 0.5 else word[i]) + word[i + 2 :]


def _fill(text: str, facts: Facts, rng: random.Random) -> str:
    """Puts the facts, and random values for what does not count, into the placeholders."""
    values: dict[str, Callable[[], str]] = {
        "p": lambda: facts.product,
        "o": lambda: facts.order,
        "t": lambda: facts.plan or "",
        "m": lambda: rng.choice(MONEY).format(facts.refund),
        "x": lambda: _id(rng),
        "n": lambda: str(rng.randint(2, 9)),
        "d": lambda: rng.choice(DAYS),
    }
    return _SLOT.sub(lambda m: values[m[1]](), text)


def _id(rng: random.Random) -> str:
    return f"{rng.choice('ABCDEFGHKLMNPRSTVWXZ')}-{rng.randint(1000, 9999)}"


def make_split(
    bank: Bank, allowed: list[Combination], count: int, rng: random.Random, unlike: Pairs = ()
) -> list[tuple[Facts, Row]]:
    """`count` rows with their facts; every allowed combination occurs equally often.

    A ticket is drawn again if it has a brand of a row in `unlike`, or a run of words (clauses can meet by accident).
    """
    brands = {facts.brand for facts, _ in unlike}
    runs = {run for pair in unlike for run in word_runs(*pair)}
    rows: list[tuple[Facts, Row]] = []
    while len(rows) < count:
        facts = draw_facts(bank, allowed[len(rows) % len(allowed)], rng)
        row = make_row(facts, write_ticket(facts, bank, rng))
        if facts.brand not in brands and runs.isdisjoint(word_runs(facts, row)):
            rows.append((facts, row))
    rng.shuffle(rows)
    return rows


def make_row(facts: Facts, ticket: str) -> Row:
    """One chat: the system prompt, the ticket, and the record in compact JSON as the answer."""
    answer = json.dumps(record(facts), separators=(",", ":"))
    turns = [("system", SYSTEM), ("user", ticket), ("assistant", answer)]
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def word_runs(facts: Facts, row: Row) -> set[tuple[str, ...]]:
    """All runs of `SHARED_WORDS` words of a ticket, products, ids and amounts masked so that wording alone counts."""
    text = row["messages"][1]["content"].replace(facts.product, "PRODUCT")
    text = re.sub(r"\b[A-Z]-\d{4}\b|\d[\d.]*", "ID", text)
    words = re.findall(r"[a-z']+", text.lower())
    return {tuple(words[i : i + SHARED_WORDS]) for i in range(len(words) - SHARED_WORDS + 1)}


def check(train: Pairs, test: Pairs) -> None:
    """Asserts what makes the test split unseen: products, combinations and wording that never occur in train."""
    for what, of in (("product", lambda f: f.brand), ("combination", lambda f: f.combination)):
        common = {of(f) for f, _ in train} & {of(f) for f, _ in test}
        assert not common, f"{what} in both splits: {sorted(common)[:5]}"
    seen = set().union(*(word_runs(*pair) for pair in train))
    common_runs = sorted({run for pair in test for run in word_runs(*pair)} & seen)
    assert not common_runs, f"wording in both splits: {common_runs}"
    texts = [row["messages"][1]["content"] for _, row in [*train, *test]]
    assert len(set(texts)) == len(texts), "a ticket occurs twice"


def build() -> dict[str, str]:
    """File name -> content of the three files."""
    rng = random.Random(SEED)
    for_train, for_test = combinations()
    train = make_split(TRAIN, for_train, TRAIN_ROWS, rng)
    test = make_split(TEST, for_test, TEST_ROWS, rng, unlike=train)
    check(train, test)
    return {
        "train.jsonl": _lines(row for _, row in train),
        "test.jsonl": _lines(row for _, row in test),
        "schema.json": json.dumps(schema(), indent=2) + "\n",
    }


def _lines(rows: Iterable[Row]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def main() -> None:
    for name, content in build().items():
        (FOLDER / name).write_text(content, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
