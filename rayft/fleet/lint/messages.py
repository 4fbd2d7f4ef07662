"""What a schema says is wrong, in words that never repeat a value: it might be a secret."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

_NAMES = {
    "object": "a mapping",
    "array": "a list",
    "string": "a text",
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "null": "nothing",
}
_KINDS = [
    (bool, "boolean"),
    (dict, "object"),
    (list, "array"),
    (str, "string"),
    (int, "integer"),
    (float, "number"),
]


def message(error: Any) -> str:
    """An error of jsonschema in a few words, with names of fields and without their values."""
    wanted = error.validator_value
    match error.validator:
        case "required" | "additionalProperties":
            return str(error.message)  # names of fields alone
        case "type":
            kinds = [wanted] if isinstance(wanted, str) else [kind for kind in wanted if kind != "null"]
            return f"must be {' or '.join(_NAMES.get(kind, kind) for kind in kinds)}, is {_named(error.instance)}"
        case "anyOf" | "oneOf":
            return (
                "is neither a number nor a text"
                if not isinstance(error.instance, int | str)
                else "fits no choice"
            )
        case "enum":
            return f"is not one of {', '.join(map(str, wanted))}"
        case "pattern":
            return f"does not match {wanted}"
        case "format":
            return f"is no {wanted}"
    return f"does not fit {error.validator}: {str(wanted)[:100]}"


def _named(value: object) -> str:
    return next((_NAMES[name] for kind, name in _KINDS if isinstance(value, kind)), "nothing")


def dotted(parts: Iterable[str | int]) -> str:
    """A path such as `spec.levels[0].nodeLabel`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).removeprefix(".")
