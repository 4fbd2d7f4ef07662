"""`report.html`: one self-contained page about a run, made from its folder alone; it needs no network and no server."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources
from typing import Any

from rayft.errors import EXIT_CODES
from rayft.report.charts import Series, line_chart, stacked_bar
from rayft.report.lineage import read_lineage
from rayft.report.log import Row, read_log
from rayft.report.tables import Results, deltas, summary
from rayft.spec import Job, parse_job
from rayft.storage import ObjectNotFound, Store

PAGE = "report.html"
COLOURS = ("#2563eb", "#ea580c", "#16a34a", "#9333ea", "#ca8a04", "#64748b", "#db2777")


def write_page(store: Store) -> None:
    """Write `report.html` into the run folder `store`. Raises StorageError where it has no job.yaml."""
    import yaml

    text = store.get("job.yaml").decode()
    page = render_page(
        parse_job(yaml.safe_load(text)), text, read_log(store), read_lineage(store), _details(store)
    )
    store.put(PAGE, page.encode())


def render_page(
    job: Job,
    job_text: str,
    rows: Sequence[Row],
    lineage: dict[str, Any] | None,
    details: dict[str, Any] | None = None,
) -> str:
    """The page as HTML. job_text: the resolved job as written; rows: of the run log; lineage: of lineage.json; details:
    of details-after.json, what suites give to be drawn."""
    steps = [row for row in rows if row["kind"] == "step"]
    events = [row for row in rows if row["kind"] == "event"]
    sections = [
        _header(job, rows, events),
        _section("Training", _curves(rows, steps, events)),
        _section("Before and after", _suites(job, rows)),
        _section("Agreement with people", _agreement(details or {})),
        _section("Where the time went", _time_split(steps)),
        _section("Memory", _memory(job, steps, events)),
        _section("Checkpoints", _checkpoints(events)),
        _section("Events", _events(events)),
        _section("Lineage", _lineage(lineage)),
        _section(
            "Job", f"<details><summary>the resolved job file</summary><pre>{escape(job_text)}</pre></details>"
        ),
    ]
    body = "\n".join(section for section in sections if section)
    here = resources.files("rayft.report")
    style, script = (here.joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(job.name)}</title><style>{style}</style></head>\n"
        f"<body>{body}<script>{script}</script></body></html>\n"
    )


def _header(job: Job, rows: Sequence[Row], events: Sequence[Row]) -> str:
    ends = [row for row in events if row["event"] == "end"]
    if ends:
        code = ends[-1].get("code", 0)
        state = (
            f'<span class="{"ok" if code == 0 else "bad"}">{escape(EXIT_CODES.get(code, str(code)))}</span>'
        )
    else:
        state = '<span class="open">not ended</span>'
    written = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(rows[-1]["time"])) if rows else ""
    kind = "full fine-tuning" if job.adapter.type == "none" else job.adapter.type
    cards = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in summary(rows).items()
    )
    return (
        f"<header><h1>{escape(job.name)} {state}</h1><p>{escape(job.model.path)} · {job.method}, {kind} · {written}</p>"
        f'<dl class="cards">{cards}</dl></header>'
    )


def _curves(rows: Sequence[Row], steps: Sequence[Row], events: Sequence[Row]) -> str:
    if not steps:
        return ""
    resumed = [row["resumed_step"] for row in events if row.get("resumed_step")]
    evals = _points([row for row in rows if row["kind"] == "eval"], "loss")
    charts = [
        ("loss", [Series("training", _points(steps, "loss")), Series("evaluation", evals, True, COLOURS[1])]),
        ("learning rate", [Series("learning rate", _points(steps, "learning_rate"))]),
        ("gradient norm", [Series("gradient norm", _points(steps, "grad_norm"))]),
        (
            "tokens per second",
            [
                Series("all", _points(steps, "tokens_per_s")),
                Series("trained", _points(steps, "trained_tokens_per_s"), colour=COLOURS[2]),
            ],
        ),
    ]
    for name in (steps[-1].get("metrics") or {}) if steps else ():
        measured = [Series("training", _metric(steps, name))]
        held_out = _metric([row for row in rows if row["kind"] == "eval"], name)
        charts.append((name.replace("_", " "), [*measured, Series("evaluation", held_out, True, COLOURS[1])]))
    figures = (
        f"<figure><figcaption>{title}</figcaption>{line_chart(series, resumed)}</figure>"
        for title, series in charts
    )
    return f'<div class="charts">{"".join(figures)}</div>'


def _suites(job: Job, rows: Sequence[Row]) -> str:
    results: dict[str, Results] = {row["when"]: row["results"] for row in rows if row["kind"] == "suites"}
    found = deltas(results.get("before"), results.get("after"), job.eval.suites)
    lines = []
    for delta in found:
        mark = "forgot" if delta.forgot else "kept" if delta.forgetting and delta.change is not None else ""
        cells = (
            delta.suite,
            delta.metric,
            delta.text(delta.before),
            delta.text(delta.after),
            delta.change_text,
            mark,
        )
        lines.append((delta.verdict + (" forgot" if delta.forgot else ""), cells))
    return _table(("suite", "metric", "before", "after", "change", ""), lines)


def _agreement(details: dict[str, Any]) -> str:
    """Of each suite of a reward model: how often it is right by how sure it is, and scores against length."""
    figures = []
    for suite, found in details.items():
        bins = [(100 * sure, 100 * right) for sure, right, _ in found["calibration"]]
        ideal = Series("as sure as right", [(50, 50), (100, 100)], colour=COLOURS[5])
        figures.append((f"{suite}: share right by confidence, %", [Series("model", bins, True), ideal]))
        answers = [(length, score) for length, score in found["length_and_score"]]
        figures.append(
            (f"{suite}: score by length in tokens", [Series("answers", answers, True, line=False)])
        )
    return "".join(
        f"<figure><figcaption>{escape(title)}</figcaption>{line_chart(series)}</figure>"
        for title, series in figures
    )


def _details(store: Store) -> dict[str, Any]:
    try:
        return json.loads(store.get("details-after.json"))
    except ObjectNotFound:
        return {}


def _time_split(steps: Sequence[Row]) -> str:
    names = dict.fromkeys(name for row in steps for name in row["seconds"])
    totals = {name: sum(row["seconds"].get(name, 0.0) for row in steps) for name in names}
    if not totals:
        return ""
    return stacked_bar(
        [(name, s, COLOURS[i % len(COLOURS)]) for i, (name, s) in enumerate(totals.items())], "s"
    )


def _memory(job: Job, steps: Sequence[Row], events: Sequence[Row]) -> str:
    """Predicted terms as a bar, and predicted against measured for each rank.

    What is measured on a GPU is its allocator's peak, so the overhead is left out of the prediction there.
    """
    plans = [row for row in events if row.get("memory_terms_gb")]
    measured = [row["peak_memory_gb"] for row in steps if row.get("peak_memory_gb")]
    parts, predicted = [], 0.0
    if plans:
        terms = plans[-1]["memory_terms_gb"]
        predicted = sum(
            s for name, s in terms.items() if name != "overhead" or not job.cluster.gpus_per_worker
        )
        bar = stacked_bar(
            [(name, s, COLOURS[i % len(COLOURS)]) for i, (name, s) in enumerate(terms.items())], "GB"
        )
        parts.append(f"<p>predicted for a rank at ZeRO stage {plans[-1]['stage']}</p>{bar}")
    if measured:
        ranks = max(len(peaks) for peaks in measured)
        lines = []
        for rank in range(ranks):
            peak = max(peaks[rank] for peaks in measured if rank < len(peaks))
            difference = f"{peak / predicted - 1:+.0%}" if predicted else ""
            lines.append(
                ("", (str(rank), f"{predicted:.2f}" if predicted else "", f"{peak:.2f}", difference))
            )
        parts.append(_table(("rank", "predicted, GB", "measured peak, GB", "difference"), lines))
    return "".join(parts)


def _checkpoints(events: Sequence[Row]) -> str:
    saved = [str(row["step"]) for row in events if row["event"] == "checkpoint"]
    return f"<p>committed at steps {', '.join(saved)}</p>" if saved else ""


def _events(events: Sequence[Row]) -> str:
    lines = []
    for row in events:
        if row["event"] == "checkpoint":
            continue  # they have a list of their own
        when = time.strftime("%m-%d %H:%M:%S", time.gmtime(row["time"]))
        cells = (when, str(row["attempt"]), row["event"], row.get("message", ""))
        lines.append(("failed" if row["event"] in ("failure", "hang") else "", cells))
    return _table(("time (UTC)", "attempt", "event", ""), lines)


def _lineage(lineage: dict[str, Any] | None) -> str:
    """Origin, and the circumstances of the last start."""
    if not lineage:
        return ""
    starts = lineage["starts"]
    facts = _flat({**{k: v for k, v in lineage.items() if k != "starts"}, **starts[-1]})
    if len(starts) > 1:
        facts["starts"] = f"{len(starts)} under different circumstances; this is the last"
    return _table(("", ""), [("", (name, text)) for name, text in facts.items()])


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>" if content else ""


def _table(headings: Sequence[str], lines: Iterable[tuple[str, Sequence[str]]]) -> str:
    """Lines are (class, cells)."""
    body = "".join(
        f'<tr class="{name}">{"".join(f"<td>{escape(cell)}</td>" for cell in cells)}</tr>'
        for name, cells in lines
    )
    if not body:
        return ""
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _points(rows: Sequence[Row], key: str) -> list[tuple[float, float]]:
    return [(row["step"], row[key]) for row in rows if row.get(key) is not None]


def _metric(rows: Sequence[Row], name: str) -> list[tuple[float, float]]:
    return [(row["step"], row["metrics"][name]) for row in rows if name in (row.get("metrics") or {})]


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return flat
