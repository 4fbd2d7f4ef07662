"""Rows that occur twice: inside the training data, and in training data and held-out data alike.

Held-out rows are found in training rows three ways: the same text; the same words (case, punctuation and spacing
aside); and most of the question's sequences of eight words (as n-gram overlap is used to find benchmark
contamination, e.g. arXiv:2005.14165, appendix C).
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

from rayft.data.comparisons import Comparison
from rayft.data.formats import Conversation, PromptCompletion, Row, Text

#: Words in a sequence, and the share of a held-out question's sequences that makes it a near match.
SEQUENCE = 8
NEAR = 0.8

#: Sequences in more of the held-out rows than this are wording of the task, not of a row.
COMMON = 0.05

_WORDS = re.compile(r"\w+")


@dataclass(frozen=True)
class Wording:
    """What a row says: everything, and what is asked (all of it where nothing is asked)."""

    text: str
    question: str

    @property
    def words(self) -> tuple[str, ...]:
        return tuple(_WORDS.findall(self.text.casefold()))


def wording(row: Row | Comparison) -> Wording:
    """The words of a row, system messages aside: they are the same in many rows. Of a comparison, those of all answers."""
    if isinstance(row, Comparison):
        answers = [wording(answer) for answer in row.answers]
        return Wording("\n\n".join(answer.text for answer in answers), answers[0].question)
    if isinstance(row, Text):
        return Wording(row.text, row.text)
    if isinstance(row, PromptCompletion):
        return Wording(f"{row.prompt}\n{row.completion}", row.prompt)
    assert isinstance(row, Conversation)
    spoken = [m for m in row.messages if m["role"] not in ("system", "developer")]
    asked = [m["content"] for m in spoken if m["role"] == "user"]
    return Wording("\n".join(f"{m['role']}: {m['content']}" for m in spoken), "\n".join(asked))


def wording_of_columns(columns: dict[str, Any]) -> Wording:
    """The words of a row of unknown layout: all its strings but its id."""
    text = "\n".join(v for k, v in columns.items() if isinstance(v, str) and k != "id")
    return Wording(text, text)


class Duplicates:
    """Rows of the training data that say the same as an earlier one."""

    def __init__(self) -> None:
        self._seen: dict[int, str] = {}
        self.pairs: list[tuple[str, str]] = []

    def add(self, where: str, row: Wording) -> None:
        """Compare a row with all before it; `pairs` collects (row, earlier row)."""
        first = self._seen.setdefault(hash(row.text), where)
        if first != where:
            self.pairs.append((where, first))


class Contradictions:
    """Rows that rate the same answers to the same prompt the other way round than an earlier one."""

    def __init__(self) -> None:
        self._seen: dict[tuple[int, int], str] = {}
        self.pairs: list[tuple[str, str]] = []

    def add(self, where: str, row: Row | Comparison) -> None:
        """Compare a row with all before it; `pairs` collects (row, earlier row). A label is a win over nothing, or a loss."""
        if not isinstance(row, Comparison):
            return
        said = [hash(repr(answer)) for answer in row.answers]
        if len(said) == 1:
            said = [said[0], 0] if row.value else [0, said[0]]
        for i, better in enumerate(said):
            for worse in said[i + 1 :]:
                if (worse, better) in self._seen:
                    self.pairs.append((where, self._seen[worse, better]))
                self._seen.setdefault((better, worse), where)


@dataclass
class HeldOut:
    """Held-out rows, indexed. `exact` and `near` collect (training row, held-out row)."""

    exact: list[tuple[str, str]] = field(default_factory=list)
    near: list[tuple[str, str]] = field(default_factory=list)
    _names: list[str] = field(default_factory=list)
    _texts: dict[int, int] = field(default_factory=dict)
    _sequences: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    _sizes: Counter[int] = field(default_factory=Counter)

    def add(self, where: str, row: Wording) -> None:
        """Index a held-out row."""
        number = len(self._names)
        self._names.append(where)
        self._texts.setdefault(hash(row.words), number)
        for sequence in _sequences(row.question):
            self._sequences[sequence].append(number)

    def close(self) -> None:
        """All held-out rows are there: forget the wording that they share."""
        limit = max(3.0, COMMON * len(self._names))
        self._sequences = {s: rows for s, rows in self._sequences.items() if len(rows) <= limit}
        self._sizes = Counter(number for rows in self._sequences.values() for number in rows)

    def look(self, where: str, row: Wording) -> None:
        """Compare a training row with all held-out rows."""
        found = self._texts.get(hash(row.words)) if row.words else None
        if found is not None:
            self.exact.append((where, self._names[found]))
            return
        shared = Counter(n for s in _sequences(row.text) for n in self._sequences.get(s, ()))
        matches = [number for number, count in shared.items() if count >= NEAR * self._sizes[number]]
        if matches:
            self.near.append((where, self._names[min(matches)]))


def _sequences(text: str) -> set[int]:
    words = _WORDS.findall(text.casefold())
    return {hash(tuple(words[i : i + SEQUENCE])) for i in range(len(words) - SEQUENCE + 1)}
