"""Numbers as people read them; the progress lines, the tables and the page write them alike."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """`42s`, `3m 05s`, `2h 04m`, `3d 4h`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d {whole % 86400 // 3600}h"


def count(number: float) -> str:
    """`812`, `4,512`, `61.4k`, `1.35M`, `8.03B`."""
    if abs(number) < 10_000:
        return f"{number:,.0f}"
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= limit:
            return f"{number / limit:.3g}{unit}"
    raise AssertionError(number)


def value(number: float | None, digits: int = 4) -> str:
    """A loss or a metric; a value the log could not hold (NaN, infinity) reads `nan`."""
    return "nan" if number is None else f"{number:.{digits}f}"


def gib(number: float) -> str:
    """Bytes as GiB, or as MiB where that reads better."""
    return f"{number / 2**30:.2f} GiB" if number >= 2**30 else f"{number / 2**20:.0f} MiB"
