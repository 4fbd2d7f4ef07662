"""Quantities of Kubernetes: `500m`, `16Gi`, `1e3`."""

from __future__ import annotations

import re
from decimal import Decimal

_PATTERN = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+))(?:([KMGTPE]i|[numkMGTPE])|[eE]([+-]?\d{1,3}))?")
_BINARY = {unit: Decimal(1024) ** power for power, unit in enumerate(["Ki", "Mi", "Gi", "Ti", "Pi", "Ei"], 1)}
_DECIMAL = {unit: Decimal(1000) ** power for power, unit in enumerate(["k", "M", "G", "T", "P", "E"], 1)}
_SMALL = {"m": Decimal("1e-3"), "u": Decimal("1e-6"), "n": Decimal("1e-9")}
_UNITS = {**_BINARY, **_DECIMAL, **_SMALL}


def quantity(value: object) -> Decimal | None:
    """The number, in whole units (cores, bytes, devices); None for what is no quantity."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    match = _PATTERN.fullmatch(str(value).strip())
    if not match:
        return None
    number, unit, exponent = match.groups()
    return Decimal(number) * (_UNITS[unit] if unit else Decimal(10) ** int(exponent or 0))
