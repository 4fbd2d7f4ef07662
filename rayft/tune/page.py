"""`report.html` of a search: one self-contained page, made from its folder alone; it needs no network and no server."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources

import yaml

from rayft.errors import EXIT_CODES, RayftError
from rayft.report.log import Row, read_all
from rayft.report.text import count, duration, value
from rayft.report.trials import STATUSES, TrialState, lineage, trials_of
from rayft.spec import Job
from rayft.spec.search import given
from rayft.spec.tune import Bound, Tune
from rayft.storage import Store
from rayft.tune.best import best_yaml, schedule
from rayft.tune.charts import bars, colours, curves, forks, parallel, spectrum
from rayft.tune.choose import Choice, choose, value_of
from rayft.tune.cost import Cost, cost_of, hours_of
from rayft.tune.importance import importance_of
from rayft.tune.scale import label, scales_of
from rayft.tune.table import best_so_far, differing, hours_text, why_of

PAGE = "report.html"
STYLE = """
.charts figure { max-width: 44rem; }
.way { fill: none; stroke-width: 1.5; stroke-linejoin: round; opacity: .75; pointer-events: stroke; }
.way.best { stroke-width: 3.5; opacity: 1; }
.way:hover, g:hover > .way { stroke-width: 4.5; opacity: 1; stroke: var(--ink) !important; }
.joint { fill: var(--paper); stroke-width: 1.5; }
.axis { stroke: var(--ink); stroke-width: 1; }
.key { fill: var(--ink); font-size: 11.5px; font-weight: 600; }
.halo { paint-order: stroke; stroke: var(--paper); stroke-width: 3px; }
.fork { stroke: var(--ink); stroke-width: 1.2; }
.head { fill: var(--ink); }
.spectrum { font-size: .8rem; color: var(--soft); margin: .3rem 0; }
.spectrum i { display: inline-block; width: 6rem; height: .6rem; border-radius: 2px; margin: 0 .3rem; }
.shares { max-width: 40rem; }
.shares div { display: grid; grid-template-columns: 16rem 1fr 3rem; gap: .8rem; align-items: center; margin: .25rem 0; }
.shares b { height: .8rem; background: var(--rule); border-radius: 2px; }
.shares i { display: block; height: 100%; background: var(--line); border-radius: 2px; }
.scroll { overflow-x: auto; }
.scroll th, .scroll td { white-space: nowrap; overflow-wrap: normal; }
.scroll td.why { white-space: normal; min-width: 12rem; }
.winner td { font-weight: 600; }
.stopped td, .proposed td { color: var(--soft); }
.lost td:nth-child(2) { color: var(--bad); }
a { color: var(--line); }
.note { color: var(--soft); font-size: .85rem; }
"""


class Html(str):
    """Text that is already HTML."""


def write_page(store: Store, search: Job) -> None:
    """Write `report.html` into the search folder `store`. search: its job, with the group `tune`."""
    store.put(PAGE, render_page(search, read_all(store)).encode())


def render_page(search: Job, rows: Sequence[Row]) -> str:
    """The page as HTML. rows: of the ledger."""
    tune = search.tune
    assert tune is not None, "a search has a group `tune`"
    trials = trials_of(rows)
    cost = cost_of(trials, rows, search.train.max_steps)
    choice, refusal = None, ""
    try:
        choice = choose(trials, tune.aims, tune.constraints)
    except RayftError as error:
        refusal = str(error)
    best = choice.trial.trial if choice else None
    scales, colour = scales_of(tune.space, list(trials.values())), colours(trials, tune.aims[0])
    importances = [(aim, importance_of(trials, scales, aim)) for aim in tune.aims]
    sections = [
        _header(search, tune, rows, trials, choice, refusal, cost),
        _section("Best job", _best(search, choice, trials)),
        _section("Trials", _trials(tune, trials, choice, cost.unit)),
        _section("Pareto front", _front(tune, trials, choice)),
        _section(
            "Learning curves",
            "".join(spectrum(aim) for aim in tune.aims[:1]) + _curves(tune, trials, colour, best)
            if trials
            else "",
        ),
        _section(
            "Parallel coordinates",
            spectrum(tune.aims[0]) + parallel(trials, scales, tune.aims, colour, best) if scales else "",
        ),
        _section(
            "Importance",
            "".join(
                (f"<h3>{escape(aim.metric)}</h3>" if len(importances) > 1 else "")
                + (bars(found.shares) if found.shares else "")
                + f'<p class="note">{escape(found.method)}</p>'
                for aim, found in importances
            )
            if scales
            else "",
        ),
        _section("Constraints", _constraints(tune.constraints, trials)),
        _section("Lineage", _lineage(trials, colour, best)),
        _section("Cost", _cost(cost, search.train.max_steps)),
        _section("Failed trials", _failed(trials)),
        _section("Search", _folded("the job file of the search", _search_yaml(search))),
    ]
    body = "\n".join(section for section in sections if section)
    style = resources.files("rayft.report").joinpath("page.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(search.name)}</title><style>{style}{STYLE}</style></head>\n"
        f"<body>{body}</body></html>\n"
    )


def _header(
    search: Job,
    tune: Tune,
    rows: Sequence[Row],
    trials: Mapping[str, TrialState],
    choice: Choice | None,
    refusal: str,
    cost: Cost,
) -> str:
    last = next((row for row in reversed(rows) if row.get("event") in ("open", "end")), {})
    over = bool(trials) and all(trial.ended for trial in trials.values())
    if last.get("event") == "end" or over:  # the page may be written just before the end is
        code = last.get("code", 0)
        state = (
            f'<span class="{"ok" if code == 0 else "bad"}">{escape(EXIT_CODES.get(code, str(code)))}</span>'
        )
    else:
        state = '<span class="open">not ended</span>'
    written = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(rows[-1]["time"])) if rows else ""
    counts = Counter(trial.status for trial in trials.values())
    statuses = ", ".join(f"{counts[status]} {status}" for status in STATUSES if counts[status])
    cards = {"best": "none yet"}
    if choice:
        cards = {"best": choice.trial.trial}
        cards |= {metric: f"{number:.5g}" for metric, number in choice.values.items()}
    cards["trials"] = f"{len(trials)}: {statuses}" if trials else "none"
    cards["cost"] = f"{hours_text(cost.hours)} {cost.unit}-hours, {duration(cost.wall_s)}"
    if cost.stopped:
        cards["saved by stopping early"] = (
            f"{count(cost.saved_steps)} steps ({cost.saved_share:.0%}), about {hours_text(cost.saved_hours)} {cost.unit}-hours"
        )
    how = f"{choice.how}" if choice else refusal
    searched = f"{tune.searcher}, {tune.scheduler if tune.scheduler != 'none' else 'no scheduler'}"
    boxes = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in cards.items()
    )
    about = f"{search.model.path} · {search.method} · {searched} · {written}"
    note = (
        f'<p class="{"note" if choice else "bad"}">{"best: " if choice else ""}{escape(how)}</p>'
        if trials
        else ""
    )
    return f'<header><h1>{escape(search.name)} {state}</h1><p>{escape(about)}</p><dl class="cards">{boxes}</dl>{note}</header>'


def _best(search: Job, choice: Choice | None, trials: Mapping[str, TrialState]) -> str:
    if choice is None:
        return ""
    rows = [("", (key, label(given))) for key, given in choice.trial.values.items()]
    return _table(("key", "value"), rows) + _folded("best.yaml", best_yaml(search, choice, trials))


def _trials(tune: Tune, trials: Mapping[str, TrialState], choice: Choice | None, unit: str) -> str:
    keys = differing(trials)
    lines = []
    for name, trial in trials.items():
        link = escape(name)
        if trial.run:
            link = f'<a href="trials/{escape(trial.run)}/report.html">{link}</a>'
        why = why_of(trial) or (choice.out.get(name, "") if choice else "")
        values = [label(trial.values[key]) if key in trial.values else "" for key in keys]
        aims = [value(value_of(trial, aim.metric)) if trial.curve else "" for aim in tune.aims]
        cells = [Html(link), trial.status, str(trial.step) if trial.curve else "", *aims]
        cells += [
            hours_text(hours_of(trial, unit)),
            duration(trial.seconds),
            *values,
            Html(f'<td class="why">{escape(why)}</td>'),
        ]
        kind = "lost" if trial.status == "failed" else trial.status
        lines.append(("winner" if choice and name == choice.trial.trial else kind, cells))
    heads = [
        "trial",
        "status",
        "step",
        *(f"{aim.metric} ({aim.mode})" for aim in tune.aims),
        f"{unit}-hours",
        "time",
    ]
    return f'<div class="scroll">{_table([*heads, *keys, "why"], lines)}</div>' if lines else ""


def _front(tune: Tune, trials: Mapping[str, TrialState], choice: Choice | None) -> str:
    if choice is None or len(tune.aims) < 2:
        return ""
    lines = [
        (
            "winner" if name == choice.trial.trial else "",
            [name, *(value(value_of(trials[name], aim.metric)) for aim in tune.aims)],
        )
        for name in choice.front
    ]
    note = "No other trial beats one of these in one objective without losing in another. The best leads in the first."
    heads = ("trial", *(f"{aim.metric} ({aim.mode})" for aim in tune.aims))
    return _table(heads, lines) + f'<p class="note">{note}</p>'


def _curves(tune: Tune, trials: Mapping[str, TrialState], colour: Mapping[str, str], best: str | None) -> str:
    """A picture for every objective and constraint that was reported more than once, and for the losses."""
    wanted = dict.fromkeys([*(aim.metric for aim in tune.aims), *tune.constraints, "eval.loss", "train.loss"])
    drawn = [name for name in wanted if any(len(trial.points(name)) > 1 for trial in trials.values())]
    best = best or best_so_far(trials, tune.aims[0])
    figures = "".join(
        f"<figure><figcaption>{escape(name)}</figcaption>{curves(trials, name, colour, best)}</figure>"
        for name in drawn
    )
    return f'<div class="charts">{figures}</div>' if figures else '<p class="none">nothing reported twice</p>'


def _constraints(constraints: Mapping[str, Bound], trials: Mapping[str, TrialState]) -> str:
    lines = []
    for metric, bound in constraints.items():
        values = [at for trial in trials.values() if (at := value_of(trial, metric)) is not None]
        broken = sum(max(bound.violations(at)) > 0 for at in values)
        sides = [f"at least {bound.min:g}"] if bound.min is not None else []
        sides += [f"at most {bound.max:g}"] if bound.max is not None else []
        span = f"{min(values):.4g} to {max(values):.4g}" if values else "not reported"
        lines.append(("", (metric, " and ".join(sides), f"{len(values) - broken} of {len(values)}", span)))
    return _table(("metric", "must be", "trials that keep to it", "found"), lines)


def _lineage(trials: Mapping[str, TrialState], colour: Mapping[str, str], best: str | None) -> str:
    """Forks of other trials, and runs that began again with less memory."""
    lines = []
    for name, trial in trials.items():
        for before, segment in zip([None, *trial.segments], trial.segments, strict=False):
            if before is None:
                continue
            fork = segment.forked_from
            source = f"{fork.trial}, step {fork.step}" if fork else "the beginning"
            keys = dict.fromkeys([*before.values, *segment.values])
            moved = [
                f"{key} {label(before.values.get(key))} → {label(segment.values.get(key))}"
                for key in keys
                if label(before.values.get(key)) != label(segment.values.get(key))
            ]
            lines.append(("", (name, segment.run, source, segment.reason, ", ".join(moved))))
    if not lines:
        return ""
    picture = ""
    if any(trial.forks for trial in trials.values()):
        picture = f'<div class="charts"><figure><figcaption>who went on from whom, over the step</figcaption>{forks(trials, colour)}</figure></div>'
    way = lineage(trials, best) if best else []
    told = "".join(f"<li>{escape(text)}</li>" for text in schedule(way)) if len(way) > 1 else ""
    of_best = f"<p>What the model of {escape(best or '')} went through:</p><ul>{told}</ul>" if told else ""
    return picture + of_best + _table(("trial", "run", "began from", "why", "changed"), lines)


def _cost(cost: Cost, max_steps: int | None) -> str:
    facts = [
        (f"{cost.unit}-hours of all trials", f"{cost.hours:.3f}"),
        ("wall-clock", duration(cost.wall_s) + (f" in {cost.drivers} starts" if cost.drivers > 1 else "")),
        ("steps run", f"{cost.steps:,}"),
    ]
    if cost.stopped:
        whole = f"{max_steps:,} steps" if max_steps else "as many steps as the furthest"
        facts += [
            (
                "steps not run",
                f"{cost.saved_steps:,} of {cost.steps + cost.saved_steps:,} ({cost.saved_share:.0%})",
            ),
            (f"{cost.unit}-hours not spent (estimate)", f"{cost.saved_hours:.3f}"),
            (
                "against",
                f"running each of the {cost.stopped} trials that were stopped to {whole}, at its own pace",
            ),
        ]
    return _table(("", ""), [("", fact) for fact in facts])


def _failed(trials: Mapping[str, TrialState]) -> str:
    lines = [
        (
            "failed",
            (
                trial.trial,
                EXIT_CODES.get(trial.code or 1, str(trial.code)),
                trial.reason,
                str(trial.step),
                _values(trial),
            ),
        )
        for trial in trials.values()
        if trial.status == "failed"
    ]
    return _table(("trial", "what", "reason", "step", "values"), lines)


def _values(trial: TrialState) -> str:
    return ", ".join(f"{key} {label(given)}" for key, given in trial.values.items())


def _search_yaml(search: Job) -> str:
    tune = search.tune.model_dump(mode="json", exclude_defaults=True) if search.tune else {}
    return yaml.safe_dump({**given(search), "tune": tune}, sort_keys=False, allow_unicode=True)


def _folded(title: str, text: str) -> str:
    return f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>"


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>" if content else ""


def _table(headings: Sequence[str], lines: Iterable[tuple[str, Sequence[str]]]) -> str:
    """Lines are (class, cells); cells of type Html are taken as they are."""
    body = "".join(
        f'<tr class="{name}">{"".join(_cell(cell) for cell in cells)}</tr>' for name, cells in lines
    )
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>" if body else ""


def _cell(cell: str) -> str:
    if not isinstance(cell, Html):
        return f"<td>{escape(cell)}</td>"
    return str(cell) if cell.startswith("<td") else f"<td>{cell}</td>"
