"""What there is to rate: prompts with the answers that people compare, kept in `items.jsonl` of the ratings folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rayft.data.read import open_tables, read_rows
from rayft.errors import DataError, JobError
from rayft.spec import Source

ITEMS = "items.jsonl"
#: Answers of one item: more than nine have no key.
MOST = 9


@dataclass(frozen=True)
class Answer:
    """One answer and where it comes from, which raters never see: a model, or a column."""

    text: str
    source: str


@dataclass(frozen=True)
class Item:
    """One prompt, a text or messages as in the data, with its answers; `id` names the content."""

    id: str
    prompt: Any
    answers: tuple[Answer, ...]

    @property
    def turns(self) -> list[dict[str, str]]:
        """The prompt as turns with `role` and `content`."""
        if isinstance(self.prompt, str):
            return [{"role": "user", "content": self.prompt}]
        return [{"role": str(m["role"]), "content": str(m.get("content") or "")} for m in self.prompt]


def item(prompt: Any, answers: Iterable[Answer]) -> Item:
    """An item with its id. Of answers that say the same the first stays."""
    by_text: dict[str, Answer] = {}
    for answer in answers:
        by_text.setdefault(answer.text.strip(), answer)
    distinct = tuple(by_text.values())
    content = json.dumps([prompt, [answer.text for answer in distinct]], sort_keys=True, ensure_ascii=False)
    return Item(hashlib.blake2b(content.encode(), digest_size=8).hexdigest(), prompt, distinct)


def read_prompts(path: str, *, cache_dir: Path, limit: int | None = None) -> list[tuple[str, Any]]:
    """The `prompt` (text or messages) of each row, or of `messages` rows all before the last answer, with its row.

    Raises DataError for rows that have none.
    """
    prompts = []
    for where, row in _rows(path, cache_dir, limit):
        prompt = row.get("prompt")
        if prompt is None and isinstance(row.get("messages"), list):
            messages = row["messages"]
            prompt = messages[:-1] if messages and messages[-1].get("role") == "assistant" else messages
        _check_prompt(prompt, where)
        prompts.append((where, prompt))
    return prompts


def read_answers(path: str, *, cache_dir: Path, limit: int | None = None) -> list[Item]:
    """Items of a file of ready answers: `prompt` with `completions` (a list), with `chosen` and `rejected`, or with
    several columns `completion_<name>`. Raises DataError naming the row; rows of fewer than two different answers are
    left out, and an error if that leaves none.
    """
    items: dict[str, Item] = {}
    for where, row in _rows(path, cache_dir, limit):
        _check_prompt(row.get("prompt"), where)
        made = item(row["prompt"], _answers(row, where))
        if len(made.answers) > MOST:
            raise DataError(
                f"{where} has {len(made.answers)} answers.", f"At most {MOST} can be ranked at once."
            )
        if len(made.answers) > 1:
            items.setdefault(made.id, made)
    if not items:
        raise DataError(f"{path} has no row with two different answers.", "There is nothing to compare.")
    return list(items.values())


def save_items(folder: Path, items: Iterable[Item]) -> None:
    """Write the items of a new ratings folder, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{ITEMS}.part"
    lines = [json.dumps(asdict(one), ensure_ascii=False) for one in items]
    temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    temporary.replace(folder / ITEMS)


def load_items(folder: Path) -> list[Item]:
    """The items of a ratings folder. Raises JobError if it is none."""
    if not (folder / ITEMS).exists():
        raise JobError(f"{folder} holds no {ITEMS}.", "Give the folder that `rayft rate` wrote to.")
    items = []
    for line in (folder / ITEMS).read_text(encoding="utf-8").rstrip("\n").split("\n"):
        values = json.loads(line)
        items.append(Item(values["id"], values["prompt"], tuple(Answer(**a) for a in values["answers"])))
    return items


def _rows(path: str, cache_dir: Path, limit: int | None) -> Iterable[tuple[str, dict[str, Any]]]:
    source = Source(path=path, split="test")  # type: ignore[call-arg]
    left = limit
    for table in open_tables(source, every=1000, node_dir=cache_dir):
        count = table.rows if left is None else min(left, table.rows)
        yield from read_rows(table, 0, count, node_dir=cache_dir)
        left = None if left is None else left - count


def _check_prompt(prompt: Any, where: str) -> None:
    messages = (
        isinstance(prompt, list) and prompt and all(isinstance(m, dict) and "role" in m for m in prompt)
    )
    if not messages and not (isinstance(prompt, str) and prompt.strip()):
        raise DataError(
            f"{where}: the prompt is missing, or neither text nor messages.", "Every row needs a 'prompt'."
        )


def _answers(row: dict[str, Any], where: str) -> list[Answer]:
    if isinstance(row.get("completions"), list):
        named = [(f"completions[{i}]", answer) for i, answer in enumerate(row["completions"])]
    elif "chosen" in row and "rejected" in row:
        named = [("chosen", row["chosen"]), ("rejected", row["rejected"])]
    else:
        named = [
            (key.removeprefix("completion_"), v) for key, v in row.items() if key.startswith("completion_")
        ]
    if len(named) < 2:
        raise DataError(
            f"{where}: there are no answers to compare (columns: {', '.join(row)}).",
            "Give `completions` (a list), `chosen` and `rejected`, or several `completion_<name>` columns.",
        )
    return [Answer(_text(answer, name, where), name) for name, answer in named]


def _text(answer: Any, name: str, where: str) -> str:
    if isinstance(answer, list) and answer and isinstance(answer[-1], dict):
        answer = answer[-1].get("content")
    if not isinstance(answer, str) or not answer.strip():
        raise DataError(f"{where}: the answer {name!r} is empty or no text.", "Correct or drop the row.")
    return answer
