"""Pictures of a search as inline SVG: learning curves, parallel coordinates, who forked whom; without any library."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from html import escape

from rayft.report.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Axes, Point, grid, short, thin
from rayft.report.trials import TrialState
from rayft.spec.tune import Objective
from rayft.tune.choose import value_of
from rayft.tune.importance import ranks
from rayft.tune.scale import Scale, label

#: Colours from the best trial to the worst, in between mixed; no colour blindness takes blue for orange.
SCALE = ((37, 99, 235), (161, 161, 170), (234, 88, 12))
NO_VALUE = "var(--rule)"
#: Parallel coordinates: width of the picture, height of the axes, and of the line under them for keys not sampled.
WIDE, TALL, UNDER = 1060, 260, 34
MARGIN, HEAD = 80, 40
#: Letters of an option that fit beside its axis.
LETTERS = 16


def colours(trials: Mapping[str, TrialState], aim: Objective) -> dict[str, str]:
    """A colour for each trial by the rank of its metric: ranks, so that one that diverged does not leave the rest alike."""
    found = {name: at for name, trial in trials.items() if (at := value_of(trial, aim.metric)) is not None}
    by_rank = dict.fromkeys(trials, NO_VALUE)
    for name, rank in zip(found, ranks(list(found.values())) if found else (), strict=True):
        share = (float(rank) - 1) / (len(found) - 1) if len(found) > 1 else 0.0
        by_rank[name] = _mixed(1 - share if aim.mode == "max" else share)
    return by_rank


def curves(trials: Mapping[str, TrialState], metric: str, colour: Mapping[str, str], best: str | None) -> str:
    """A metric over the step, a line for each trial, the best one drawn last and thick; forks are hollow dots."""
    lines = {name: trial.points(metric) for name, trial in trials.items()}
    lines = {name: points for name, points in lines.items() if points}
    if not lines:
        return '<p class="none">nothing reported</p>'
    low, high = _seen([at for points in lines.values() for _, at in points])
    clipped = sum(not low <= at <= high for points in lines.values() for _, at in points)
    kept = {
        name: [(float(step), min(high, max(low, at))) for step, at in points]
        for name, points in lines.items()
    }
    axes = Axes.around([point for points in kept.values() for point in points])
    drawn = [
        _curve(axes, trials[name], kept[name], colour[name], name == best)
        for name in sorted(kept, key=lambda name: name == best)
    ]
    note = f'<p class="none">values beyond the picture, drawn at its edge: {clipped}</p>' if clipped else ""
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{grid(axes)}{"".join(drawn)}</svg>{note}'


def parallel(
    trials: Mapping[str, TrialState],
    scales: Sequence[Scale],
    aims: Sequence[Objective],
    colour: Mapping[str, str],
    best: str | None,
) -> str:
    """Parallel coordinates: an axis for each hyper-parameter and objective, a line through its values for each trial.

    Where a key was not sampled in a trial (a condition), its line goes through the mark under the axis. Trials without a value
    of the first objective are drawn pale, to the axes of their values only.
    """
    axes = [*scales, *(_objective_scale(trials, aim.metric) for aim in aims)]
    missing = any(
        scale.place(trial.values.get(scale.key)) is None for scale in scales for trial in trials.values()
    )
    height = HEAD + TALL + (UNDER if missing else 12)
    apart = (WIDE - 2 * MARGIN) / max(1, len(axes) - 1)
    xs = [MARGIN + number * apart for number in range(len(axes))]
    heads = "".join(
        _axis(scale, x, missing=missing and i < len(scales))
        for i, (scale, x) in enumerate(zip(axes, xs, strict=True))
    )
    lines = []
    for name in sorted(trials, key=lambda name: (name == best, colour[name] != NO_VALUE)):
        trial = trials[name]
        given = [trial.values.get(scale.key) for scale in scales] + [
            value_of(trial, aim.metric) for aim in aims
        ]
        points = []
        for number, (scale, x, value) in enumerate(zip(axes, xs, given, strict=True)):
            place = scale.place(value)
            if place is not None:
                points.append(f"{x:.1f},{_height(place):.1f}")
            elif number < len(scales):
                points.append(f"{x:.1f},{HEAD + TALL + 22:.1f}")
        told = [
            f"{scale.key} {label(value)}"
            for scale, value in zip(axes, given, strict=True)
            if value is not None
        ]
        lines.append(
            f'<polyline class="way{" best" if name == best else ""}" style="stroke:{colour[name]}" points="{" ".join(points)}">'
            f"<title>{escape(name)} ({trial.status})\n{escape(chr(10).join(told))}</title></polyline>"
        )
    return f'<svg class="wide" viewBox="0 0 {WIDE} {height}" role="img">{"".join(lines)}{heads}</svg>'


def forks(trials: Mapping[str, TrialState], colour: Mapping[str, str]) -> str:
    """Who forked whom at which step: a line for each trial over the step, an arrow from the donor's line for each fork."""
    names = list(trials)
    last = max((trial.step for trial in trials.values()), default=0)
    height = TOP + 22 * len(names) + BOTTOM
    rows = {name: TOP + 22 * number + 11 for number, name in enumerate(names)}

    def x(step: float) -> float:
        return LEFT + step / max(1, last) * (WIDTH - LEFT - RIGHT)

    parts = []
    for name, trial in trials.items():
        y = rows[name]
        parts.append(
            f'<text class="tick" x="{LEFT - 8}" y="{y + 3.5}" text-anchor="end">{escape(name)}</text>'
            f'<line class="way" style="stroke:{colour[name]}" x1="{x(0):.1f}" x2="{x(trial.step):.1f}" y1="{y}" y2="{y}"/>'
        )
    for name, trial in trials.items():
        for segment in trial.forks:
            fork = segment.forked_from
            if fork is None or fork.trial not in rows:
                continue
            at, from_, to = x(fork.step), rows[fork.trial], rows[name]
            tip = to + (5 if from_ > to else -5)
            parts.append(
                f'<g><line class="fork" x1="{at:.1f}" x2="{at:.1f}" y1="{from_}" y2="{tip}" marker-end="url(#arrow)"/>'
                f'<circle cx="{at:.1f}" cy="{from_}" r="3" style="fill:{colour[fork.trial]}"/>'
                f"<title>{escape(name)} went on from {escape(fork.trial)} at step {fork.step}</title></g>"
            )
    steps = sorted(
        {s.forked_from.step for t in trials.values() for s in t.forks if s.forked_from} | {0, last}
    )
    gap = (WIDTH - LEFT - RIGHT) / 14
    shown: list[int] = []
    for step in steps:
        if not shown or x(step) - x(shown[-1]) >= gap:
            shown.append(step)
    parts += [
        f'<text class="tick" x="{x(step):.1f}" y="{height - 8}" text-anchor="middle">{short(step)}</text>'
        for step in shown
    ]
    arrow = (
        '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path class="head" d="M0,0 L8,4 L0,8 z"/></marker></defs>'
    )
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img">{arrow}{"".join(parts)}</svg>'


def bars(shares: Mapping[str, float]) -> str:
    """Named values from 0 to 1 as horizontal bars."""
    lines = (
        f'<div><span>{escape(name)}</span><b><i style="width:{100 * min(1.0, share):.1f}%"></i></b><span>{share:.2f}</span></div>'
        for name, share in shares.items()
    )
    return f'<div class="shares">{"".join(lines)}</div>'


def spectrum(aim: Objective) -> str:
    """What the colours mean."""
    ends = ", ".join(_mixed(part / 4) for part in range(5))
    return (
        f'<p class="spectrum">best {escape(aim.metric)} <i style="background:linear-gradient(90deg, {ends})"></i> worst, by rank; '
        "the best trial is thick</p>"
    )


def _curve(axes: Axes, trial: TrialState, points: Sequence[Point], colour: str, best: bool) -> str:
    path = " ".join(f"{axes.x(x):.1f},{axes.y(y):.1f}" for x, y in thin(points))
    forked = {segment.start for segment in trial.forks}
    dots = "".join(
        f'<circle class="joint" style="stroke:{colour}" cx="{axes.x(x):.1f}" cy="{axes.y(y):.1f}" r="3"/>'
        for x, y in points
        if x in forked
    )
    x, y = points[-1]
    end = f'<circle cx="{axes.x(x):.1f}" cy="{axes.y(y):.1f}" r="{3 if best else 2}" style="fill:{colour}"/>'
    told = f"{trial.trial} ({trial.status}), step {trial.step}: {trial_value(y)}"
    line = f'<polyline class="way{" best" if best else ""}" style="stroke:{colour}" points="{path}"/>'
    return f"<g>{line}{dots}{end}<title>{escape(told)}</title></g>"


def trial_value(number: float) -> str:
    """A value as a tip shows it."""
    return f"{number:.5g}"


def _seen(values: Sequence[float], parts: int = 10) -> tuple[float, float]:
    """The range a picture shows: all of it, unless a few values lie far off the others (a run that diverged).

    Far is twice the distance between the outer quantiles, by tenths (`parts`) or by quarters where values are few.
    """
    low, high = min(values), max(values)
    if len(values) < 8:
        return low, high
    cuts = statistics.quantiles(values, n=parts, method="inclusive")
    spread = cuts[-1] - cuts[0]
    return (max(low, cuts[0] - 2 * spread), min(high, cuts[-1] + 2 * spread)) if spread > 0 else (low, high)


def _objective_scale(trials: Mapping[str, TrialState], metric: str) -> Scale:
    values = [at for trial in trials.values() if (at := value_of(trial, metric)) is not None]
    return Scale(metric, *_seen(values, 4)) if values else Scale(metric)


def _axis(scale: Scale, x: float, *, missing: bool) -> str:
    parts = [
        f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{HEAD}" y2="{HEAD + TALL}"/>',
        f'<text class="key" x="{x:.1f}" y="14" text-anchor="middle">{escape(_clipped(scale.key.rpartition(".")[2]))}'
        f"<title>{escape(scale.key)}</title></text>",
        f'<text class="tick" x="{x:.1f}" y="28" text-anchor="middle">{escape(_clipped(scale.key.rpartition(".")[0], 22))}</text>',
    ]
    for text, place in _ticks(scale):
        parts.append(
            f'<text class="tick halo" x="{x + 6:.1f}" y="{_height(place) + 3.5:.1f}">{escape(_clipped(text))}<title>{escape(text)}</title></text>'
        )
    if missing:
        parts.append(f'<text class="tick halo" x="{x + 6:.1f}" y="{HEAD + TALL + 26}">not set</text>')
    return "".join(parts)


def _ticks(scale: Scale) -> list[tuple[str, float]]:
    if scale.options:
        return [
            (text, (i / (len(scale.options) - 1)) if len(scale.options) > 1 else 0.5)
            for i, text in enumerate(scale.options)
        ]
    if scale.high <= scale.low:
        return [(label(scale.low), 0.5)]
    if scale.log:
        marks = [scale.low * (scale.high / scale.low) ** (part / 4) for part in range(5)]
    else:
        marks = [scale.low + (scale.high - scale.low) * part / 4 for part in range(5)]
    return [(f"{mark:.3g}", part / 4) for part, mark in enumerate(marks)]


def _height(place: float) -> float:
    return HEAD + (1 - place) * TALL


def _clipped(text: str, letters: int = LETTERS) -> str:
    return text if len(text) <= letters else text[: letters - 1] + "…"


def _mixed(share: float) -> str:
    """The colour at a share of the way from best to worst."""
    at = max(0.0, min(1.0, share)) * (len(SCALE) - 1)
    left = min(int(at), len(SCALE) - 2)
    mixed = (round(a + (b - a) * (at - left)) for a, b in zip(SCALE[left], SCALE[left + 1], strict=True))
    return f"rgb({', '.join(map(str, mixed))})"
