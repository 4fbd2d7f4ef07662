"""Every answer of a step as Parquet: what was asked and said, how it was scored, what was learned from it."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rayft.rlhf.experience import Columns
from rayft.rlhf.step import Scored
from rayft.storage import Store

#: Answers that a step was trained on; those it was not trained on, since their group had no spread; those to held-out prompts
#: after so many steps.
Kind = Literal["step", "dropped", "held-out"]


def keep_rollouts(store: Store, kind: Kind, step: int, scored: Scored, columns: Columns) -> None:
    """Write a Parquet file with a row for each answer; columns: what its tokens were trained with."""
    rollouts = scored.rollouts
    rows: dict[str, Any] = {
        "row": [r.prompt.row for r in rollouts],
        "position": [r.prompt.position for r in rollouts],
        "sample": [r.sample for r in rollouts],
        "prompt": [json.dumps(r.prompt.content, ensure_ascii=False) for r in rollouts],
        "text": [r.text for r in rollouts],
        "prompt_ids": _lists([np.array(r.prompt.ids, np.int64) for r in rollouts]),
        "ids": _lists([np.array(r.ids, np.int64) for r in rollouts]),
        "ended": [r.ended for r in rollouts],
        "version": [r.version for r in rollouts],
        "engine_logprobs": _lists([np.array(r.logprobs, np.float64) for r in rollouts]),
        "score": scored.scores_S.tolist(),
    }
    rows |= {f"score/{name}": scores.tolist() for name, scores in scored.by_source.items()}
    rows |= {name: _lists([np.asarray(a, np.float64) for a in arrays]) for name, arrays in columns.items()}
    sink = io.BytesIO()
    pq.write_table(pa.table(rows), sink, compression="zstd")
    store.put(key_of(kind, step), sink.getvalue())


def _lists(arrays: Sequence[np.ndarray]) -> pa.ListArray:
    """A list column without a Python object for each number, which for long answers would take a minute a step."""
    offsets = np.cumsum([0, *map(len, arrays)], dtype=np.int32)
    return pa.ListArray.from_arrays(offsets, np.concatenate(arrays) if arrays else np.empty(0))


def key_of(kind: Kind, step: int) -> str:
    """Where answers lie."""
    return f"rollouts/{kind}-{step:06d}.parquet"
