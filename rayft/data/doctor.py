"""The data doctor: looks at a job's rows as they would be trained on, without training.

It goes on where a run would stop at the first wrong row, and compares training data with everything held out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from rayft.data.cache import BATCH_ROWS, CacheSpec, ShardTask, plan_cache
from rayft.data.comparisons import Comparison, read_row
from rayft.data.findings import Findings, Level, Shown
from rayft.data.formats import (
    Conversation,
    Format,
    PromptCompletion,
    Row,
    Text,
    detect_format,
    layouts_of,
)
from rayft.data.leakage import Contradictions, Duplicates, HeldOut, Wording, wording, wording_of_columns
from rayft.data.order import Order
from rayft.data.packing import efficiency, pack
from rayft.data.read import open_tables, read_rows
from rayft.data.step import packed_layout, padded_layout, padded_size
from rayft.data.template import ChatTokenizer, Sample
from rayft.errors import DataError
from rayft.spec import Data, Job, Source

#: Rows looked at if the data has more: whole shards, in the order in which training needs them.
MAX_ROWS = 20_000

#: What can be odd about a row that can be trained on: level, message, remedy.
ODD: dict[str, tuple[Level, str, str]] = {
    "refused": (
        "error",
        "documents are longer than data.max_length, which data.too_long refuses",
        "Raise data.max_length (the lengths above show what it costs), or set data.too_long to drop or truncate.",
    ),
    "dropped": (
        "warning",
        "documents are longer than data.max_length and are dropped",
        "Raise data.max_length; the lengths above show what it costs.",
    ),
    "cut": (
        "warning",
        "documents are longer than data.max_length and are truncated: their answers end without an end token",
        "Raise data.max_length, or set data.too_long to drop.",
    ),
    "shortened": (
        "warning",
        "answers with their prompt are longer than data.max_length: the prompt loses its beginning",
        "Raise data.max_length, or set data.too_long to drop.",
    ),
    "several": (
        "warning",
        "the chat template renders earlier turns differently once later ones follow (it strips thinking, or moves the "
        "system message): such a conversation is trained as several documents, each exact, at the cost of more tokens",
        "Set model.chat_template to one that leaves history as it was, if inference uses that too.",
    ),
    "special": (
        "warning",
        "messages contain the text of a special token, which the tokenizer takes for the real one",
        "Remove it from the data: otherwise the model learns a second turn end, or a turn that nobody spoke.",
    ),
    "empty": ("warning", "assistant messages are empty", "Drop them, or set `train: false` on them."),
    "twice": ("warning", "rows say exactly the same as an earlier one", "Remove them; they weigh double."),
    "both ways": (
        "error",
        "rows rate the same answers to the same prompt the other way round than an earlier one",
        "Decide which is right and drop the other, or set data.contradictions to keep.",
    ),
    "exact": (
        "error",
        "training rows are also held out (in data.eval or a suite): what is measured on them means nothing",
        "Remove them from one side.",
    ),
    "near": (
        "warning",
        "training rows share most of their wording with a held-out row",
        "If they are the same question or passage, remove them from one side.",
    ),
}


@dataclass(frozen=True)
class _Examined:
    where: str
    row: Row | Comparison
    samples: list[Sample]


def check(
    job: Job, tokenizer: ChatTokenizer, *, node_dir: Path, samples: int = 3, max_rows: int = MAX_ROWS
) -> Findings:
    """Look at the training rows of a job and at what it holds out; `samples` documents are kept to be shown.

    Raises DataError where nothing can be looked at: no such file, no rows, columns that fit no layout.
    """
    spec = plan_cache(job.data.train, job.data, tokenizer, node_dir=node_dir, allowed=layouts_of(job))
    findings = Findings(rows_in_all=spec.rows, max_length=job.data.max_length)
    wrong = _Wrong()
    held_out = _held_out(job, tokenizer, wrong, node_dir)
    duplicates, contradictions = Duplicates(), Contradictions()
    rows = _Rows(findings, tokenizer, job.data)
    for shard in _shards(spec, job.seed, max_rows):
        findings.rows += shard.rows
        for where, row, documents in _examine(spec, shard, wrong, node_dir):
            rows.see(where, row, documents)
            duplicates.add(where, wording(row))
            contradictions.add(where, row)
            held_out.look(where, wording(row))
    wrong.report(findings)
    rows.report()
    refused = contradictions.pairs if job.data.contradictions == "error" else []
    compared = {
        "twice": duplicates.pairs,
        "both ways": refused,
        "exact": held_out.exact,
        "near": held_out.near,
    }
    for name, pairs in compared.items():
        _report(findings, name, [f"{one} = {other}" for one, other in pairs])
    _simulate_steps(findings, job)
    findings.samples = rows.shown(samples)
    return findings


class _Wrong:
    """Rows that cannot be trained on, by what is wrong with them."""

    def __init__(self) -> None:
        self._wheres: dict[tuple[str, str], list[str]] = defaultdict(list)

    def add(self, error: DataError, where: str) -> None:
        message = error.message.removeprefix(where).lstrip(":, ")
        self._wheres[message, error.remedy].append(where)

    def report(self, findings: Findings) -> None:
        for (message, remedy), wheres in self._wheres.items():
            findings.add("error", message, wheres, remedy)


class _Rows:
    """What is looked at in every row that can be trained on."""

    def __init__(self, findings: Findings, tokenizer: ChatTokenizer, data: Data) -> None:
        self._findings = findings
        self._tokenizer = tokenizer
        self._data = data
        self._special = [t.content for t in tokenizer.tokenizer.added_tokens_decoder.values() if t.special]
        self._odd: dict[str, list[str]] = defaultdict(list)
        self._ends: dict[int, list[str]] = defaultdict(list)
        self._kept: list[tuple[str, Sample]] = []

    def see(self, where: str, row: Row | Comparison, documents: list[Sample]) -> None:
        """Count a row and note what is odd about it."""
        if len(documents) > 1 and not isinstance(row, Comparison):
            self._odd["several"].append(where)
        for answer in row.answers if isinstance(row, Comparison) else (row,):
            if isinstance(answer, Conversation):
                self._see_messages(where, answer)
        if not isinstance(row, Text | PromptCompletion) and self._tokenizer.loss_on != "all":
            for token in {token for sample in documents for token in _end_tokens(sample)}:
                self._ends[token].append(where)
        for sample in documents:
            self._see_document(where, sample, compared=isinstance(row, Comparison))

    def _see_messages(self, where: str, row: Conversation) -> None:
        contents = [message["content"] for message in row.messages]
        if any(token in content for content in contents for token in self._special):
            self._odd["special"].append(where)
        answers = [m for m in row.messages if m["role"] == "assistant" and not m.get("tool_calls")]
        if not all(message["content"].strip() for message in answers):
            self._odd["empty"].append(where)

    def _see_document(self, where: str, sample: Sample, *, compared: bool) -> None:
        findings, length, limit = self._findings, len(sample.ids), self._data.max_length
        findings.documents += 1
        findings.tokens += length
        findings.trained_tokens += int(sample.trained.sum())
        findings.lengths.append(length)
        if length <= limit:
            self._kept.append((where, sample))
        elif self._data.too_long == "error":
            self._odd["refused"].append(where)
        elif compared and self._data.too_long == "truncate":
            answer = length - int(np.flatnonzero(sample.trained)[0])
            self._odd["shortened" if answer + 2 <= limit else "dropped"].append(where)
        elif self._data.too_long == "truncate" and sample.trained[:limit].any():
            self._odd["cut"].append(where)
        else:
            self._odd["dropped"].append(where)

    def report(self) -> None:
        """Turn what was noted into findings."""
        for name, wheres in self._odd.items():
            _report(self._findings, name, wheres)
        tokenizer = self._tokenizer.tokenizer
        for token, wheres in self._ends.items():
            if token != tokenizer.eos_token_id:
                name = tokenizer.convert_ids_to_tokens(token)
                self._findings.add(
                    "note",
                    f"assistant turns end with {name}, while the tokenizer's end token is {tokenizer.eos_token}",
                    wheres,
                    f"Generation must stop at {name} too: eos_token_id in generation_config.json has to list it.",
                )

    def shown(self, count: int) -> list[Shown]:
        """A few documents, evenly spread over those that are kept."""
        step = max(1, len(self._kept) // max(1, count))
        return [Shown(where, self._pieces(sample)) for where, sample in self._kept[::step][:count]]

    def _pieces(self, sample: Sample) -> tuple[tuple[str, bool], ...]:
        runs = groupby(
            zip(sample.ids.tolist(), sample.trained.tolist(), strict=True), key=lambda pair: pair[1]
        )
        return tuple(
            (self._tokenizer.tokenizer.decode([i for i, _ in run]), trained) for trained, run in runs
        )


def _shards(spec: CacheSpec, seed: int, max_rows: int) -> Iterator[ShardTask]:
    by_first = {shard.first_id: shard for shard in spec.shards}
    rows = 0
    for first in Order.of(spec, seed).first_shards():
        if rows >= max_rows:
            return
        rows += by_first[first].rows
        yield by_first[first]


def _examine(
    spec: CacheSpec, shard: ShardTask, wrong: _Wrong, node_dir: Path
) -> Iterator[tuple[str, Row | Comparison, list[Sample]]]:
    """Rows of a shard that can be trained on, with their documents; the others go to `wrong`."""
    source, layout = spec.sources[shard.source], spec.layouts[shard.source]
    table = spec.tables[shard.source][shard.table]
    wheres: list[str] = []
    rows: list[Row | Comparison] = []
    try:
        for where, columns in read_rows(table, shard.first, shard.rows, node_dir):
            try:
                rows.append(read_row(columns, layout, source, where))
                wheres.append(where)
            except DataError as error:
                wrong.add(error, where)
    except DataError as error:  # the file itself is broken from here on
        wrong.add(error, table.uri)
    for start in range(0, len(rows), BATCH_ROWS):
        own = slice(start, start + BATCH_ROWS)
        results = spec.tokenizer.encode_batch(rows[own], wheres[own])
        for where, row, result in zip(wheres[own], rows[own], results, strict=True):
            if isinstance(result, DataError):
                wrong.add(result, where)
            else:
                yield where, row, result


def _held_out(job: Job, tokenizer: ChatTokenizer, wrong: _Wrong, node_dir: Path) -> HeldOut:
    """Rows of data.eval and of the suites; evaluation rows are examined as training rows are."""
    held_out = HeldOut()
    if job.data.eval:
        spec = plan_cache(job.data.eval, job.data, tokenizer, node_dir=node_dir, allowed=layouts_of(job))
        for shard in _shards(spec, job.seed, MAX_ROWS):
            for where, row, _ in _examine(spec, shard, wrong, node_dir):
                held_out.add(where, wording(row))
    for suite in job.eval.suites:
        source = Source.model_validate({"path": suite.path, "split": "test"})
        for table in open_tables(source, every=MAX_ROWS, node_dir=node_dir):
            for where, columns in read_rows(table, 0, min(table.rows, MAX_ROWS), node_dir):
                held_out.add(where, _suite_wording(columns, source, where, layouts_of(job)))
    held_out.close()
    return held_out


def _suite_wording(columns: dict[str, Any], source: Source, where: str, layouts: Sequence[Format]) -> Wording:
    """Suites may have layouts of their own; whatever strings a row has can still be found in training data."""
    try:
        return wording(read_row(columns, detect_format(columns, where, layouts), source, where))
    except DataError:
        return wording_of_columns(columns)


def _end_tokens(sample: Sample) -> list[int]:
    """The last token of each run of trained ones."""
    ends = sample.trained & ~np.append(sample.trained[1:], False)
    return sample.ids[ends].tolist()


def _report(findings: Findings, name: str, wheres: list[str]) -> None:
    level, message, remedy = ODD[name]
    findings.add(level, message, wheres, remedy)


def _simulate_steps(findings: Findings, job: Job) -> None:
    """How full packs are, and micro-batches of the job's own steps; what padding would cost without packing."""
    data, train, world_size = job.data, job.train, job.cluster.max_workers
    lengths = [length for length in findings.lengths if length <= data.max_length]
    if not lengths:
        return
    rows = train.global_batch_size or max(1, (train.tokens_per_step or 0) * len(lengths) // sum(lengths))
    slots = computed = tokens = 0
    for start in range(0, len(lengths), rows):
        step = lengths[start : start + rows]
        tokens += sum(step)
        slots += len(packed_layout(step, data.max_length, train.micro_batch_size, world_size))
        padded = padded_layout(step, data.max_length, train.micro_batch_size, world_size)
        computed += sum(padded_size(slot, [[length] for length in step]) for slot in padded)
    packs = pack(lengths, data.max_length)
    findings.packing_efficiency = efficiency(lengths, packs, data.max_length)
    findings.micro_batch_fill = tokens / (slots * data.max_length * train.micro_batch_size)
    findings.padding = 1.0 - tokens / computed
