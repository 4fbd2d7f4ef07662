"""The prompts of a run: rows with a `prompt`, or with `messages`, and other columns that reward functions may want to see."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayft.data.comparisons import listed
from rayft.data.formats import conversation, json_value, rename
from rayft.data.messages import check_messages
from rayft.data.order import Order
from rayft.data.read import open_tables, read_row
from rayft.data.template import ChatTokenizer
from rayft.errors import DataError
from rayft.generate.prompts import chat_prompt, text_prompt
from rayft.spec import Data, Source

#: Rows between two places from which a text file can be read.
EVERY = 64


@dataclass(frozen=True)
class Prompt:
    """One prompt of a step. position: in the order of the run, unique in it; row: of the data."""

    position: int
    row: int
    ids: tuple[int, ...]
    content: Any
    columns: dict[str, Any]


@dataclass(frozen=True)
class Taken:
    """Prompts of a step, the position after the last that was looked at, and rows left out for their length."""

    prompts: list[Prompt]
    next_position: int
    too_long: list[int]


class PromptSet:
    """All rows of a job's sources, read when they are needed; what comes when follows from the position alone."""

    def __init__(
        self,
        data: Data,
        chat: ChatTokenizer,
        *,
        seed: int | None,
        longest: int,
        node_dir: Path,
        key: str = "data.train",
    ) -> None:
        """seed: of the order; None: as they come. longest: tokens a prompt may have. key: what messages call the sources. Raises
        DataError for sources without rows."""
        self.data, self.chat, self.longest, self._node_dir, self._key = data, chat, longest, node_dir, key
        tables = [
            [(source, table) for table in open_tables(source, every=EVERY, node_dir=node_dir)]
            for source in data.train
        ]
        self._tables = [entry for own in tables for entry in own]
        sizes = [
            _limited(source, [table.rows for _, table in own])
            for own, source in zip(tables, data.train, strict=True)
        ]
        self._firsts = [0]
        for rows in (rows for own in sizes for rows in own):
            self._firsts.append(self._firsts[-1] + rows)
        self.order = Order(
            seed,
            sizes,
            weights=[source.weight for source in data.train],
            replay=[source.replay for source in data.train],
        )
        meaning = [[t.digest, *t.reading, sorted(s.columns.items()), s.system] for s, t in self._tables]
        whole = repr([meaning, sizes, chat.identity, longest, data.too_long])
        self.identity = hashlib.blake2b(whole.encode(), digest_size=16).hexdigest()

    @property
    def rows(self) -> int:
        """Rows of all sources."""
        return self._firsts[-1]

    def take(self, position: int, count: int, end: int | None = None) -> Taken:
        """The next `count` prompts from `position`, or those before `end`.

        Raises DataError for a row without a prompt, and if none of an epoch fits.
        """
        prompts: list[Prompt] = []
        too_long: list[int] = []
        while len(prompts) < count and (end is None or position < end):
            prompt = self.at(position)
            if prompt is None:
                too_long.append(self._row(position))
            else:
                prompts.append(prompt)
            position += 1
            if not prompts and len(too_long) >= self.order.epoch_rows():
                raise DataError(
                    f"No prompt of {self._key} has at most {self.longest} tokens (data.max_length less rollout.max_new_tokens).",
                    "Raise data.max_length, or lower rollout.max_new_tokens.",
                )
        return Taken(prompts, position, too_long)

    def at(self, position: int) -> Prompt | None:
        """The prompt at a position; None if it is too long. Raises DataError for a row without a prompt."""
        row = self._row(position)
        number = bisect_right(self._firsts, row) - 1
        source, table = self._tables[number]
        where, values = read_row(table, row - self._firsts[number], self._node_dir)
        row_values = asked(rename(values, source, where), where)
        content, ids = self._encode(row_values, source, where)
        if len(ids) > self.longest:
            if self.data.too_long != "drop":
                raise DataError(
                    f"{where}: the prompt has {len(ids)} tokens; data.max_length less rollout.max_new_tokens leaves {self.longest}.",
                    "Shorten it, raise data.max_length, or set data.too_long to drop.",
                )
            return None
        columns = {name: value for name, value in row_values.items() if name != "prompt"}
        return Prompt(position, row, tuple(ids), content, columns)

    def _row(self, position: int) -> int:
        return int(self.order.ids(position, 1)[0])

    def _encode(self, row: dict[str, Any], source: Source, where: str) -> tuple[Any, Sequence[int]]:
        if clash := {"prompts", "completions"} & row.keys():
            raise DataError(
                f"{where}: there is a column {min(clash)!r}, under which reward functions get something else.",
                "Rename it.",
            )
        messages = listed("prompt", row.get("prompt"))
        if isinstance(messages, str) and messages.strip():
            return messages, text_prompt(self.chat.tokenizer, messages)
        if not messages:
            raise DataError(
                f"{where}: the column 'prompt' is missing or empty.",
                "It is text or a list of messages; rename another with `columns` of the source. `messages` do too.",
            )
        made = conversation(messages, row, source, where)
        if made.messages[-1]["role"] == "assistant":
            raise DataError(
                f"{where}: the prompt ends with a turn of the assistant.",
                "Leave that turn out: the model writes it.",
            )
        return made.messages, chat_prompt(self.chat, made.messages, made.tools, where)


def asked(row: dict[str, Any], where: str) -> dict[str, Any]:
    """A row of `messages`, as for `method: sft`, with a `prompt` instead: what comes before the assistant's last turn.

    What that turn says becomes the column `reference`, for reward functions to compare with. Other rows stay as they are.
    Raises DataError for messages that are none.
    """
    if row.get("prompt") is not None or row.get("messages") is None:
        return row
    messages, _ = check_messages(json_value(row["messages"], "'messages'", where), where)
    rest = {name: value for name, value in row.items() if name not in ("prompt", "messages")}
    if messages[-1]["role"] != "assistant":
        return {**rest, "prompt": messages}
    if "reference" in rest:
        raise DataError(
            f"{where}: there is a column 'reference', under which reward functions get the last turn of `messages`.",
            "Rename it.",
        )
    if len(messages) == 1:
        raise DataError(f"{where}: nothing is asked before the answer.", "Put a user message first.")
    return {**rest, "prompt": messages[:-1], "reference": messages[-1]["content"]}


def _limited(source: Source, rows: list[int]) -> list[int]:
    """Rows of each table that `limit` leaves."""
    left, kept = source.limit, []
    for own in rows:
        kept.append(own if left is None else min(own, left))
        left = None if left is None else left - kept[-1]
    return kept
