"""Runs the suites of a job over an engine: rows dealt over the ranks, metrics equal on all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from rayft.evals.bits_per_byte import BitsPerByte
from rayft.evals.ifeval import IfEval
from rayft.evals.json_answers import JsonAnswers
from rayft.evals.multiple_choice import MultipleChoice
from rayft.evals.preference import Preference
from rayft.evals.qa import QuestionAnswering
from rayft.evals.suite import Record, SuiteType
from rayft.spec import Suite
from rayft.storage import node_cache_dir

TYPES: dict[str, type[SuiteType]] = {
    "bits_per_byte": BitsPerByte,
    "multiple_choice": MultipleChoice,
    "json": JsonAnswers,
    "qa": QuestionAnswering,
    "ifeval": IfEval,
    "preference": Preference,
}

#: Every rank's argument, in rank order, on every rank.
Gather = Callable[[list[Record]], list[list[Record]]]

#: Called with a suite's name and the first records that hold generated text: `prompt`, `answer`, `reference`.
KeepSamples = Callable[[str, list[dict[str, Any]]], None]

#: Called with a suite's name and what the report draws of it.
KeepDetails = Callable[[str, dict[str, Any]], None]


def run_suites(
    suites: Sequence[Suite],
    engine: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    rank: int = 0,
    world_size: int = 1,
    gather: Gather | None = None,
    keep_samples: KeepSamples | None = None,
    keep_details: KeepDetails | None = None,
    samples: int = 10,
    cache_dir: Path | None = None,
) -> dict[str, dict[str, float]]:
    """Metrics of each suite by its name: shares from 0 to 1, a standard error as `<metric>_stderr`, `rows` or the like.

    On several ranks all must call it with the same suites; rank r measures rows r, r + world_size, …, and `gather`
    brings the records together. engine: an `Engine`, or a `ScoreEngine` for suites of the type `preference`. cache_dir: where S3 files are kept on this node. Raises DataError for bad rows before anything is measured.
    """
    cache_dir = cache_dir or node_cache_dir()
    measured = {suite.name: TYPES[suite.type](suite, engine, tokenizer, cache_dir) for suite in suites}
    results: dict[str, dict[str, float]] = {}
    for name, suite in measured.items():
        mine = suite.measure(range(rank, len(suite), world_size))
        parts = gather(mine) if gather else [mine]
        records = sorted(chain.from_iterable(parts), key=lambda record: record["row"])
        results[name] = suite.summarise(records)
        if keep_details and isinstance(suite, Preference) and (details := suite.details(records)):
            keep_details(name, details)
        if keep_samples:
            shown = [
                {key: r[key] for key in ("prompt", "answer", "reference")} for r in records if "answer" in r
            ]
            keep_samples(name, shown[:samples])
    return results
