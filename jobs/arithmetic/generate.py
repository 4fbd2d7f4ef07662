"""Writes the arithmetic of `grpo.yaml`: `python -m jobs.arithmetic.generate` rewrites the three files beside this one, byte for byte.

Sums and differences of two numbers below 100. No pair of numbers is in more than one file: `sft.jsonl` shows the form of an
answer, `train.jsonl` has questions with their answer in a column, `test.jsonl` is never trained on.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
SEED = 4
ROWS = {"sft": 400, "train": 4000, "test": 200}

Row = dict[str, Any]


def rows() -> dict[str, list[Row]]:
    """The rows of each file."""
    rng = random.Random(SEED)
    pairs = [(a, b) for a in range(100) for b in range(100)]
    rng.shuffle(pairs)
    made: dict[str, list[Row]] = {}
    for name, count in ROWS.items():
        own, pairs = pairs[:count], pairs[count:]
        made[name] = [row(a, b, rng.random() < 0.5, answered=name == "sft") for a, b in own]
    return made


def row(a: int, b: int, adds: bool, *, answered: bool) -> Row:
    """One question, as a conversation with its answer or as a prompt with the answer in a column."""
    question = {"role": "user", "content": f"{a} {'+' if adds else '-'} {b} ="}
    answer = str(a + b if adds else a - b)
    if answered:
        return {"messages": [question, {"role": "assistant", "content": answer}]}
    return {"prompt": [question], "answer": answer}


def main(folder: Path = FOLDER) -> None:
    """Write the files into a folder."""
    for name, own in rows().items():
        lines = (json.dumps(one) + "\n" for one in own)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
