"""Ratings as rows to train on: pairs, and ranked lists."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rayft.rate.items import Item
from rayft.rate.ledger import Event

PREFERENCES, RANKED = "preferences.jsonl", "ranked.jsonl"


def preference_rows(items: Sequence[Item], events: Iterable[Event]) -> Iterator[dict[str, Any]]:
    """A `prompt`, `chosen`, `rejected` row for every two answers of which one was found better, with rater and time.

    Ties and skips give none. Where raters disagree about two answers each of their rows is there (see
    `agreed_rows`).
    """
    by_id = {item.id: item for item in items}
    for event in events:
        if event.kind != "rating" or event.item not in by_id:
            continue
        item = by_id[event.item]
        for place, group in enumerate(event.ranking):
            for better in group:
                for worse in (n for later in event.ranking[place + 1 :] for n in later):
                    yield {
                        "prompt": item.prompt,
                        "chosen": _answer(item, better),
                        "rejected": _answer(item, worse),
                        "chosen_source": item.answers[better].source,
                        "rejected_source": item.answers[worse].source,
                        "item": item.id,
                        **_rated(event),
                    }


def agreed_rows(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of rows about the same two answers, one that says what most raters said, with all their names; none where as many
    said one thing as the other."""
    votes: dict[tuple[str, frozenset[str]], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        votes[row["item"], frozenset((_key(row["chosen"]), _key(row["rejected"])))].append(row)
    agreed = []
    for own in votes.values():
        first = [row for row in own if row["chosen"] == own[0]["chosen"]]
        other = [row for row in own if row["chosen"] != own[0]["chosen"]]
        won = max(first, other, key=len)
        if len(first) != len(other):
            votes_for = {"for": len(won), "against": len(own) - len(won)}
            agreed.append({**won[0], "rater": [row["rater"] for row in won], "votes": votes_for})
    return agreed


def ranked_rows(items: Sequence[Item], events: Iterable[Event]) -> list[dict[str, Any]]:
    """A `prompt`, `completions` row, best first, of every item with more than two answers that was rated: by the mean of
    the raters' places, and none where two answers come out equal."""
    by_id = {item.id: item for item in items if len(item.answers) > 2}
    rated: dict[str, list[Event]] = defaultdict(list)
    for event in events:
        if event.kind == "rating" and event.item in by_id:
            rated[event.item].append(event)
    rows = []
    for name, own in rated.items():
        item = by_id[name]
        places = [_mean_places(event, len(item.answers)) for event in own]
        means = [sum(column) / len(own) for column in zip(*places, strict=True)]
        if len(set(means)) == len(means):
            order = sorted(range(len(means)), key=means.__getitem__)
            raters = [event.rater for event in own]
            answers = [_answer(item, number) for number in order]
            rows.append(
                {
                    "prompt": item.prompt,
                    "completions": answers,
                    "item": name,
                    "rater": raters,
                    "time": own[-1].time,
                }
            )
    return rows


def _mean_places(event: Event, answers: int) -> list[float]:
    """The place of each answer in one ranking, from 0; equally good ones share the mean of theirs."""
    places, before = [0.0] * answers, 0
    for group in event.ranking:
        for number in group:
            places[number] = before + (len(group) - 1) / 2
        before += len(group)
    return places


def write_rows(folder: Path, items: Sequence[Item], events: Sequence[Event]) -> dict[str, int]:
    """Write `preferences.jsonl` (one row for each two answers, by majority) and, if any, `ranked.jsonl`; rows by file."""
    written = {PREFERENCES: agreed_rows(preference_rows(items, events)), RANKED: ranked_rows(items, events)}
    (folder / RANKED).unlink(missing_ok=True)  # of ratings that were taken back since
    for name, rows in written.items():
        if rows or name == PREFERENCES:
            temporary = folder / f"{name}.part"
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            temporary.write_text(text, encoding="utf-8", errors="replace")
            temporary.replace(folder / name)
    return {name: len(rows) for name, rows in written.items() if rows or name == PREFERENCES}


def _rated(event: Event) -> dict[str, Any]:
    return {
        "rater": event.rater,
        "time": event.time,
        "seconds": event.seconds,
        **({"comment": event.comment} if event.comment else {}),
    }


def _answer(item: Item, number: int) -> Any:
    """The answer in the shape of its prompt: text to text, a message to messages."""
    text = item.answers[number].text
    return text if isinstance(item.prompt, str) else [{"role": "assistant", "content": text}]


def _key(answer: Any) -> str:
    return json.dumps(answer, sort_keys=True)
