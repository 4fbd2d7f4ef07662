"""Line charts and stacked bars as inline SVG, without any library, so that the page needs nothing but itself."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from html import escape

WIDTH, HEIGHT = 520, 220
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 12, 26
#: Points per line beyond which only the extremes of each stretch are drawn.
MAX_POINTS = 600

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """A named line; `dots` marks its points, for lines with few of them; without `line` there are only dots."""

    name: str
    points: Sequence[Point]
    dots: bool = False
    colour: str = "var(--line)"
    line: bool = True


@dataclass
class Axes:
    """Scales of one chart from the data's ranges."""

    x0: float
    x1: float
    y0: float
    y1: float
    y_ticks: list[float] = field(default_factory=list)

    @classmethod
    def around(cls, points: Sequence[Point]) -> Axes:
        xs, ys = [x for x, _ in points], [y for _, y in points]
        low, high = min(ys), max(ys)
        if low == high:
            margin = abs(low) / 2 or 1.0
            low, high = low - margin, high + margin
        elif 0 <= low < 0.4 * high:
            low = 0.0
        ticks = nice_ticks(low, high)
        return cls(min(xs), max(xs), min(low, ticks[0]), max(high, ticks[-1]), ticks)

    def x(self, value: float) -> float:
        share = (value - self.x0) / (self.x1 - self.x0) if self.x1 > self.x0 else 0.5
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.y0) / (self.y1 - self.y0) * (HEIGHT - TOP - BOTTOM)


def line_chart(series: Sequence[Series], marks: Sequence[float] = ()) -> str:
    """One chart of several lines over the optimizer step; `marks` are steps with a dashed line (restarts)."""
    drawn = [replace(series_, points=thin(series_.points)) for series_ in series if series_.points]
    if not drawn:
        return '<p class="none">nothing logged</p>'
    axes = Axes.around([point for s in drawn for point in s.points])
    parts = [grid(axes), *(_mark(axes, x) for x in marks if axes.x0 <= x <= axes.x1)]
    parts += [_line(axes, s) for s in drawn]
    data = [
        {"name": s.name, "points": [(x, y, round(axes.x(x), 1), round(axes.y(y), 1)) for x, y in s.points]}
        for s in drawn
    ]
    legend = _legend([(s.name, s.colour) for s in drawn]) if len(drawn) > 1 else ""
    return (
        f'{legend}<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" data-lines="{escape(json.dumps(data))}">'
        f"{''.join(parts)}</svg>"
    )


def stacked_bar(parts: Sequence[tuple[str, float, str]], unit: str) -> str:
    """One horizontal bar of named parts with their shares; parts are (name, value, colour)."""
    total = sum(value for _, value, _ in parts)
    if total <= 0:
        return '<p class="none">nothing logged</p>'
    spans, labels = [], []
    for name, value, colour in parts:
        share = value / total
        tip = f"{name}: {value:,.1f} {unit}, {share:.1%}"
        spans.append(
            f'<span style="width:{100 * share:.3f}%;background:{colour}" title="{escape(tip)}"></span>'
        )
        labels.append((f"{name} {value:,.1f} {unit} ({share:.1%})", colour))
    return f'<div class="bar">{"".join(spans)}</div>{_legend(labels)}'


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten) that lie between `low` and `high`."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    first = math.ceil(low / step - 1e-9)
    return [round(step * n, 12) for n in range(first, math.floor(high / step + 1e-9) + 1)]


def thin(points: Sequence[Point]) -> Sequence[Point]:
    """At most MAX_POINTS points in which the lowest and the highest of every stretch survive, so that spikes show."""
    if len(points) <= MAX_POINTS:
        return points
    size = math.ceil(len(points) / (MAX_POINTS // 2))
    kept: list[Point] = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        extremes = {min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])}
        kept += sorted(extremes)
    return kept


def grid(axes: Axes) -> str:
    """Lines and labels of both axes."""
    lines = [
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{axes.y(tick):.1f}" y2="{axes.y(tick):.1f}"/>'
        f'<text class="tick" x="{LEFT - 6}" y="{axes.y(tick) + 3.5:.1f}" text-anchor="end">{short(tick)}</text>'
        for tick in axes.y_ticks
    ]
    ticks = nice_ticks(axes.x0, axes.x1, 6) if axes.x1 > axes.x0 else [axes.x0]
    lines += [
        f'<text class="tick" x="{axes.x(tick):.1f}" y="{HEIGHT - 8}" text-anchor="middle">{short(tick)}</text>'
        for tick in ticks
        if tick == int(tick)
    ]
    return "".join(lines)


def _line(axes: Axes, series: Series) -> str:
    places = [(axes.x(x), axes.y(y)) for x, y in series.points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    dots = ""
    if series.dots or len(places) == 1:
        dots = "".join(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" style="fill:{series.colour}"/>' for x, y in places
        )
    line = f'<polyline class="line" style="stroke:{series.colour}" points="{path}"/>' if series.line else ""
    return line + dots


def _mark(axes: Axes, step: float) -> str:
    x = axes.x(step)
    return (
        f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}">'
        f"<title>resumed from step {step:.0f}</title></line>"
    )


def _legend(entries: Sequence[tuple[str, str]]) -> str:
    items = (f'<span><i style="background:{colour}"></i>{escape(name)}</span>' for name, colour in entries)
    return f'<div class="legend">{"".join(items)}</div>'


def short(number: float) -> str:
    """A tick label: `1,200`, `0.05`, `2e-05`, `12k`."""
    if number and abs(number) < 1e-3:
        return f"{number:.1e}".replace(".0e", "e")
    if abs(number) >= 10_000:
        return f"{number / 1000:g}k"
    return f"{number:,.10g}"
