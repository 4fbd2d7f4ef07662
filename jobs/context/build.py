"""Writes the rows of `jobs/sft_context.yaml` from XQuAD: `python -m jobs.context.build ../shared/data/qa_xquad`.

Source rows hold `context`, `question`, `answers` and the article's `title` (SQuAD's layout), in `train.jsonl` and
`test.jsonl`, no article in both. A third of the rows of each file gets a passage of another article of that file, one
in which the answer does not occur, and `REFUSAL` as its answer. The same input gives the same bytes.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "data"
REFUSAL = "The context does not say."
INSTRUCTION = f"Answer with words copied from the context. If it does not hold the answer, say: {REFUSAL}"
SEED = 7

Row = dict[str, Any]


def rows(source: Sequence[Row], seed: int) -> list[Row]:
    """`messages` and `answers` of every source row, in the source's order; exactly a third cannot be answered."""
    rng = random.Random(seed)
    unanswerable = set(rng.sample(range(len(source)), len(source) // 3))
    made = []
    for number, row in enumerate(source):
        texts = [answer["text"] for answer in row["answers"]]
        if number in unanswerable:
            made.append(_row(_foreign_passage(row, texts, source, rng), row["question"], REFUSAL, []))
        else:
            made.append(_row(row["context"], row["question"], texts[0], texts))
    return made


def _row(context: str, question: str, answer: str, answers: list[str]) -> Row:
    asked = f"Context: {context}\n\nQuestion: {question}"
    messages = [
        {"role": "system", "content": INSTRUCTION},
        {"role": "user", "content": asked},
        {"role": "assistant", "content": answer},
    ]
    return {"messages": messages, "answers": answers}


def _foreign_passage(row: Row, texts: Sequence[str], source: Sequence[Row], rng: random.Random) -> str:
    """A passage of another article in which none of the answers occurs."""
    passages = sorted({other["context"] for other in source if other["title"] != row["title"]})
    rng.shuffle(passages)
    for passage in passages:
        if not any(text.lower() in passage.lower() for text in texts):
            return passage
    raise ValueError(f"every passage of another article holds an answer to {row['question']!r}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the source folder and write both splits."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("source", type=Path, help="folder with train.jsonl and test.jsonl")
    parser.add_argument("--out", type=Path, default=FOLDER, help=f"folder to write to (default {FOLDER})")
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    for number, split in enumerate(("train", "test")):
        lines = (args.source / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        made = rows([json.loads(line) for line in lines], SEED + number)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made)
        (args.out / f"{split}.jsonl").write_text(text, encoding="utf-8")
        print(f"{args.out / split}.jsonl: {len(made)} rows, {len(made) // 3} without an answer")


if __name__ == "__main__":
    main()
