"""Generated JSON against the reference: valid, valid by a schema, equal, and equal field by field.

An answer is JSON when the whole of it is; words or a code fence around it make it invalid. Equality is of values: key
order and white space do not count, types do.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator, SchemaError
from jsonschema.validators import validator_for
from transformers import PreTrainedTokenizerBase

from rayft.errors import DataError, JobError
from rayft.evals.rows import answers, questions, suite_rows
from rayft.evals.suite import Record, fraction, mean
from rayft.generate.engine import Engine
from rayft.spec import Suite
from rayft.storage import ObjectNotFound, hold_file


class JsonAnswers:
    """Rows are `messages` or `prompt`/`completion`, their reference answers JSON objects."""

    def __init__(
        self, suite: Suite, engine: Engine, tokenizer: PreTrainedTokenizerBase, cache_dir: Path
    ) -> None:
        self.suite, self.engine, self.tokenizer = suite, engine, tokenizer
        self.schema = _schema(suite.schema_path, cache_dir) if suite.schema_path else None
        rows = suite_rows(suite, cache_dir)
        self.questions = questions(rows, suite, tokenizer)
        self.references = []
        for row, question in zip(rows, self.questions, strict=True):
            reference = parse(question.reference)
            if not isinstance(reference, dict):
                raise DataError(
                    f"{row.where}: the reference answer is not a JSON object.", "Correct the row."
                )
            if self.schema and (reason := _violation(self.schema, reference)):
                raise DataError(
                    f"{row.where}: the reference answer breaks {suite.schema_path}: {reason}.",
                    "Correct row or schema.",
                )
            self.references.append(reference)

    def __len__(self) -> int:
        return len(self.questions)

    def measure(self, rows: Sequence[int]) -> list[Record]:
        asked = [self.questions[row] for row in rows]
        texts = answers(asked, self.suite, self.engine, self.tokenizer)
        return [self._record(row, text) for row, text in zip(rows, texts, strict=True)]

    def summarise(self, records: Sequence[Record]) -> dict[str, float]:
        metrics = fraction("valid_json", [r["valid"] for r in records])
        if self.schema:
            metrics |= fraction("schema_valid", [r["schema_valid"] for r in records])
        metrics |= fraction("exact_match", [r["exact"] for r in records])
        metrics |= mean(
            "field_accuracy", [sum(r["fields"].values()) / max(len(r["fields"]), 1) for r in records]
        )
        for name in dict.fromkeys(name for r in records for name in r["fields"]):
            metrics |= fraction(f"field/{name}", [r["fields"][name] for r in records if name in r["fields"]])
        return {**metrics, "rows": len(records)}

    def _record(self, row: int, text: str) -> Record:
        value, reference = parse(text), self.references[row]
        found = value if isinstance(value, dict) else {}
        return {
            "row": row,
            "valid": value is not INVALID,
            "schema_valid": value is not INVALID
            and self.schema is not None
            and not _violation(self.schema, value),
            "exact": same(value, reference),
            "fields": {name: name in found and same(found[name], right) for name, right in reference.items()},
            "prompt": self.questions[row].shown,
            "answer": text,
            "reference": self.questions[row].reference,
        }


INVALID = object()


def parse(text: str) -> Any:
    """The JSON value that the whole text is, or `INVALID`. NaN and Infinity are no JSON."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return INVALID


def same(one: Any, other: Any) -> bool:
    """Equal as JSON values: unlike in Python, true is not 1."""
    if one is INVALID or other is INVALID:
        return False
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _schema(path: str, cache_dir: Path) -> Any:
    try:
        with hold_file(path, cache_dir) as file:
            schema = json.loads(file.read_text(encoding="utf-8"))
        kind = validator_for(schema, default=Draft202012Validator)
        kind.check_schema(schema)
    except (OSError, ObjectNotFound) as error:
        reason = error.strerror if isinstance(error, OSError) else error.message.rstrip(".")
        raise JobError(f"The JSON schema {path} cannot be read: {reason}.", "Correct schema_path.") from None
    except (ValueError, SchemaError) as error:
        reason = error.message if isinstance(error, SchemaError) else str(error)
        raise JobError(f"{path} is no valid JSON schema: {reason}.", "Correct the file.") from None
    return kind(schema)


def _violation(schema: Any, value: Any) -> str:
    """What of the schema is broken first; empty if nothing is."""
    error = next(iter(schema.iter_errors(value)), None)
    return str(error.message) if error else ""
