"""Agreement with people about answers: of a reward model by its scores, of a language model by its log-probabilities.

Rows are `preference`, `ranked` or `labelled` (`rayft.data.comparisons`). For pairs and ranked lists `accuracy` is the
share of pairs of answers in the right order, ties counting half; for labels the share of scores on the label's side.
`auc` is the chance that a good answer scores above a bad one. A language model's `margin` is the difference of the
summed log-probabilities of chosen and rejected, and `accuracy_norm` goes by log-probability per token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from rayft.data.comparisons import Comparison, read_row
from rayft.data.formats import COMPARISONS, detect_format
from rayft.data.template import ChatTokenizer, Sample
from rayft.errors import DataError
from rayft.evals.rows import suite_rows
from rayft.evals.suite import Record, mean
from rayft.spec import Source, Suite

#: Bins of the calibration error, equal in width.
BINS = 10


class Preference:
    """Rows are comparisons; all answers of a row are looked at together."""

    def __init__(
        self, suite: Suite, engine: Any, tokenizer: PreTrainedTokenizerBase, cache_dir: Path
    ) -> None:
        self.engine, self.by = engine, suite.by
        rows = suite_rows(suite, cache_dir)
        chat, source = ChatTokenizer(tokenizer), Source(path=suite.path)  # type: ignore[call-arg]
        layout = detect_format(rows[0].columns, rows[0].where, COMPARISONS)
        compared = [read_row(row.columns, layout, source, row.where) for row in rows]
        self.rows: list[tuple[list[Sample], float, str]] = []
        self.too_long = 0
        encoded = chat.encode_batch(compared, [row.where for row in rows])
        for row, comparison, samples in zip(rows, compared, encoded, strict=True):
            if isinstance(samples, DataError):
                raise samples
            assert isinstance(comparison, Comparison)
            if self.by and self.by not in row.columns:
                raise DataError(
                    f"{row.where}: there is no column {self.by!r}, which `by` of the suite {suite.name!r} names.",
                    f"Columns are: {', '.join(row.columns)}.",
                )
            if max(len(sample.ids) for sample in samples) > (engine.context or math.inf):
                self.too_long += 1
                continue
            self.rows.append((samples, comparison.value, str(row.columns[self.by]) if self.by else ""))
        if not self.rows:
            raise DataError(f"No row of {suite.path} fits into the model's context.", "Give shorter rows.")

    def __len__(self) -> int:
        return len(self.rows)

    def measure(self, rows: Sequence[int]) -> list[Record]:
        chosen = [self.rows[row] for row in rows]
        samples = [sample for own, _, _ in chosen for sample in own]
        if hasattr(self.engine, "rate"):
            results = iter(self.engine.rate([sample.ids.tolist() for sample in samples]))
        else:
            counted = [(sample.ids.tolist(), sample.trained.tolist()) for sample in samples]
            results = iter([[total, total / count] for total, count in self.engine.score(counted)])
        return [
            {
                "row": row,
                "scores": [next(results) for _ in own],
                "lengths": [int(sample.trained.sum()) for sample in own],
                "value": value,
                "group": group,
            }
            for row, (own, value, group) in zip(rows, chosen, strict=True)
        ]

    def summarise(self, records: Sequence[Record]) -> dict[str, float]:
        scores = hasattr(self.engine, "rate")
        metrics = _agreement(records, scores)
        if scores:
            metrics |= _calibration(records) | _spread(records)
        for group in sorted({record["group"] for record in records} - {""}):
            own = _agreement([record for record in records if record["group"] == group], scores)
            for name in ("accuracy", "auc"):
                for suffix in ("", "_stderr"):
                    if name + suffix in own:
                        metrics[f"{name}/{group}{suffix}"] = own[name + suffix]
        return {**metrics, "rows": len(records), "rows_skipped": self.too_long}

    def details(self, records: Sequence[Record]) -> dict[str, Any]:
        """What charts are drawn of: bins of (mean confidence, share right, rows), and (tokens, score) of answers."""
        if not hasattr(self.engine, "rate"):
            return {}
        answers = [
            pair for record in records for pair in zip(record["lengths"], _heads_mean(record), strict=True)
        ]
        return {"calibration": _bins(records), "length_and_score": answers[:2000]}


def _agreement(records: Sequence[Record], scores: bool) -> dict[str, float]:
    """How often the model is right; of labels, a language model's log-probabilities only have an order."""
    labels = len(records[0]["scores"]) == 1
    metrics = {} if labels and not scores else mean("accuracy", [_right(r, scores) for r in records])
    if labels:
        return metrics | _auc(records, scores)
    if not scores:
        metrics |= mean("accuracy_norm", [_right(record, scores, column=1) for record in records])
        metrics |= mean("margin", [_margin(record) for record in records])
    return metrics


def _heads_mean(record: Record) -> list[float]:
    """The score of each answer, the mean of the heads."""
    return [sum(heads) / len(heads) for heads in record["scores"]]


def _values(record: Record, scores: bool, column: int = 0) -> list[float]:
    return _heads_mean(record) if scores else [answer[column] for answer in record["scores"]]


def _right(record: Record, scores: bool, column: int = 0) -> float:
    values = _values(record, scores, column)
    if len(values) == 1:
        return _won(values[0] if record["value"] else -values[0])
    pairs = [_won(better - worse) for i, better in enumerate(values) for worse in values[i + 1 :]]
    return sum(pairs) / len(pairs)


def _won(margin: float) -> float:
    return 0.5 if margin == 0 else float(margin > 0)


def _margin(record: Record) -> float:
    return record["scores"][0][0] - record["scores"][-1][0]


def _confidences(records: Sequence[Record]) -> list[tuple[float, float]]:
    """(confidence from 0.5 to 1 that the model has in its own judgement, whether that is right) of each pair or label."""
    found = []
    for record in records:
        values = _heads_mean(record)
        margins = [a - b for i, a in enumerate(values) for b in values[i + 1 :]]
        if len(values) == 1:
            margins = [values[0] if record["value"] else -values[0]]
        found += [(1 / (1 + math.exp(-min(abs(margin), 700.0))), _won(margin)) for margin in margins]
    return found


def _bins(records: Sequence[Record]) -> list[tuple[float, float, int]]:
    bins: list[list[tuple[float, float]]] = [[] for _ in range(BINS)]
    for confidence, right in _confidences(records):
        bins[min(int((confidence - 0.5) * 2 * BINS), BINS - 1)].append((confidence, right))
    return [
        (sum(c for c, _ in own) / len(own), sum(r for _, r in own) / len(own), len(own))
        for own in bins
        if own
    ]


def _calibration(records: Sequence[Record]) -> dict[str, float]:
    """Expected calibration error (arXiv:1706.04599): the mean distance of confidence and share right, by bins."""
    bins = _bins(records)
    total = sum(count for _, _, count in bins)
    return {"ece": sum(count * abs(confidence - right) for confidence, right, count in bins) / total}


def _spread(records: Sequence[Record]) -> dict[str, float]:
    """Mean of all scores, how they go with length (Pearson), and the heads' disagreement (standard deviation)."""
    scores = [score for record in records for score in _heads_mean(record)]
    lengths = [length for record in records for length in record["lengths"]]
    heads = [answer for record in records for answer in record["scores"]]
    metrics = mean("mean_score", scores) | {"length_correlation": _correlation(lengths, scores)}
    if len(heads[0]) > 1:
        deviations = [math.sqrt(sum((s - sum(own) / len(own)) ** 2 for s in own) / len(own)) for own in heads]
        metrics |= mean("disagreement", deviations)
    return metrics


def _correlation(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Pearson's; 0 where one of them does not vary."""
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    covariance = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True))
    spread = math.sqrt(sum((x - mean_x) ** 2 for x in xs) * sum((y - mean_y) ** 2 for y in ys))
    return covariance / spread if spread else 0.0


def _auc(records: Sequence[Record], scores: bool) -> dict[str, float]:
    """Of labelled rows: the chance that a good answer is rated above a bad one, by ranks, and Hanley and McNeil's error."""
    labelled = [
        (_values(r, scores, 1 if not scores else 0)[0], r["value"]) for r in records if len(r["scores"]) == 1
    ]
    good = [score for score, label in labelled if label]
    bad = [score for score, label in labelled if not label]
    if not good or not bad:
        return {}
    area = sum(_won(g - b) for g in good for b in bad) / (len(good) * len(bad))
    q1, q2 = area / (2 - area), 2 * area**2 / (1 + area)
    variance = area * (1 - area) + (len(good) - 1) * (q1 - area**2) + (len(bad) - 1) * (q2 - area**2)
    return {"auc": area, "auc_stderr": math.sqrt(variance / (len(good) * len(bad)))}
