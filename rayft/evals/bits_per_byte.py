"""Bits per byte of held-out documents: how well the model predicts plain text, whatever its tokenizer.

bits per byte = -sum of log2 p(token | tokens before it) / UTF-8 bytes of the text. Long documents are read in windows
that overlap, so that every token but the first ones has context before it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from rayft.errors import DataError
from rayft.evals.rows import column, suite_rows
from rayft.evals.suite import Record
from rayft.generate.engine import Engine, Scored
from rayft.spec import Suite

#: Tokens of a window (fewer where the model's context is shorter). A quarter of them is context only.
WINDOW = 1024


class BitsPerByte:
    """Rows are windows; a document's bytes are counted with its first one."""

    def __init__(
        self, suite: Suite, engine: Engine, tokenizer: PreTrainedTokenizerBase, cache_dir: Path
    ) -> None:
        self.engine = engine
        self.windows: list[Scored] = []
        self.bytes: list[int] = []
        first = next((i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None), None)
        if first is None:
            raise DataError(
                "The tokenizer has neither a BOS nor an EOS token, so a text's first token has no probability.",
                "Set model.tokenizer to one that has.",
            )
        for row in suite_rows(suite, cache_dir):
            text = column(row, "text", str)
            if not text:
                raise DataError(f"{row.where}: the text is empty.", "Drop the row.")
            ids = [first, *tokenizer(text, add_special_tokens=False)["input_ids"]]
            parts = windows(ids, min(WINDOW, engine.context or WINDOW))
            self.windows += parts
            self.bytes += [len(text.encode()), *[0] * (len(parts) - 1)]

    def __len__(self) -> int:
        return len(self.windows)

    def measure(self, rows: Sequence[int]) -> list[Record]:
        scores = self.engine.score([self.windows[row] for row in rows])
        return [
            {"row": row, "log_probability": total, "tokens": tokens, "bytes": self.bytes[row]}
            for row, (total, tokens) in zip(rows, scores, strict=True)
        ]

    def summarise(self, records: Sequence[Record]) -> dict[str, float]:
        nats = -sum(record["log_probability"] for record in records)
        size = sum(record["bytes"] for record in records)
        return {
            "bits_per_byte": nats / math.log(2) / size,
            "documents": sum(1 for record in records if record["bytes"]),
            "tokens": sum(record["tokens"] for record in records),
            "bytes": size,
        }


def windows(ids: Sequence[int], window: int) -> list[Scored]:
    """Windows in which every token but the first of `ids` counts exactly once, after at least window // 4 others
    where there are as many before it."""
    parts: list[Scored] = []
    done = 1
    while done < len(ids):
        start = max(done - window // 4, 0) if parts else 0
        end = min(start + window, len(ids))
        parts.append((ids[start:end], [start + at >= done for at in range(end - start)]))
        done = end
    return parts
