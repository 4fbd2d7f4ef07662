"""What the data doctor found, and how it is shown."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

Level = Literal["error", "warning", "note"]

_STYLES: dict[Level, str] = {"error": "bold red", "warning": "bold yellow", "note": "bold cyan"}
_BAR = 40


@dataclass(frozen=True)
class Finding:
    """One thing found: how bad it is, what, how often, where for example, and what to do about it."""

    level: Level
    message: str
    count: int = 1
    examples: tuple[str, ...] = ()
    remedy: str = ""


@dataclass(frozen=True)
class Shown:
    """A document as the model sees it, in pieces (text, trained)."""

    where: str
    pieces: tuple[tuple[str, bool], ...]


@dataclass
class Findings:
    """Everything the doctor says about a job's data.

    `lengths` has an entry per document in tokens. `packing_efficiency` is the share of best-fit packs that holds tokens;
    over the job's own steps and ranks, `micro_batch_fill` is how full packed micro-batches are, and `padding` the share
    of padding without packing.
    """

    rows: int = 0
    rows_in_all: int = 0
    documents: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    lengths: list[int] = field(default_factory=list)
    max_length: int = 0
    packing_efficiency: float = 0.0
    micro_batch_fill: float = 0.0
    padding: float = 0.0
    samples: list[Shown] = field(default_factory=list)
    found: list[Finding] = field(default_factory=list)

    @property
    def errors(self) -> list[Finding]:
        """Findings that would end a run, or make its result worthless."""
        return [finding for finding in self.found if finding.level == "error"]

    def add(self, level: Level, message: str, wheres: list[str], remedy: str = "") -> None:
        """A finding with its count and a few examples; nothing if it was found nowhere."""
        if wheres:
            self.found.append(Finding(level, message, len(wheres), tuple(wheres[:3]), remedy))


def render(findings: Findings, console: Console) -> None:
    """Print samples with their trained tokens highlighted, lengths, figures and findings (worst first)."""
    for sample in findings.samples:
        console.print(Panel(_text(sample, console), title=Text(sample.where), title_align="left"))
    if findings.lengths:
        console.print(_histogram(findings.lengths, findings.max_length))
    console.print(_figures(findings))
    for level in ("error", "warning", "note"):
        for finding in findings.found:
            if finding.level == level:
                console.print(_line(finding))
    if not findings.found:
        console.print("[bold green]nothing to complain about[/]")


def _text(sample: Shown, console: Console) -> Text:
    """Trained pieces in green where there is colour, else between brackets that no data uses."""
    text = Text()
    for piece, trained in sample.pieces:
        if console.color_system:
            text.append(piece, style="black on green" if trained else "dim")
        else:
            text.append(f"⟦{piece}⟧" if trained else piece)
    return text


def _histogram(lengths: list[int], max_length: int) -> Table:
    """Documents by length in up to eight bins of equal width; what is over max_length stands out."""
    table = Table("tokens", "documents", "", title="lengths", box=None, title_justify="left")
    shortest = min(lengths)
    width = (max(lengths) - shortest) // 8 + 1
    counts = Counter((length - shortest) // width for length in lengths)
    for number in range(max(counts) + 1):
        low = shortest + number * width
        bar = "█" * round(_BAR * counts[number] / max(counts.values()))
        style = "red" if low > max_length else "green"
        table.add_row(f"{low:,}–{low + width - 1:,}", f"{counts[number]:,}", Text(bar, style=style))
    return table


def _figures(findings: Findings) -> Table:
    table = Table.grid(padding=(0, 2))
    of = (
        ""
        if findings.rows == findings.rows_in_all
        else f" of {findings.rows_in_all:,} (a part was looked at)"
    )
    trained = findings.trained_tokens / findings.tokens if findings.tokens else 0.0
    ordered = sorted(findings.lengths) or [0]
    quantiles = [ordered[int(q * (len(ordered) - 1))] for q in (0.5, 0.9, 1.0)]
    table.add_row("rows", f"{findings.rows:,}{of}")
    table.add_row("documents", f"{findings.documents:,}")
    table.add_row("tokens", f"{findings.tokens:,}, of which {trained:.1%} trained")
    table.add_row("length", "median {:,}, 90 % below {:,}, longest {:,}".format(*quantiles))
    table.add_row(
        "packed",
        f"packs of {findings.max_length:,} tokens are {findings.packing_efficiency:.1%} full, this job's micro-batches "
        f"{findings.micro_batch_fill:.0%}; no padding",
    )
    table.add_row("not packed", f"{findings.padding:.0%} of the computed tokens would be padding")
    return table


def _line(finding: Finding) -> Group:
    head = Text.assemble(
        (finding.level, _STYLES[finding.level]),
        f": {finding.message}",
        f" ({finding.count:,} times)" * (finding.count > 1),
    )
    more = [Text(f"    {example}", style="dim") for example in finding.examples]
    return Group(head, *more, *([Text(f"    {finding.remedy}")] if finding.remedy else []))
