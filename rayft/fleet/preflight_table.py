"""The table of a preflight: a row for each node."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from rayft.fleet.verdict import Finding, Node


def nodes_table(nodes: Sequence[Node], findings: Sequence[Finding]) -> Table:
    """What was seen of each node; what is wrong is red."""
    table = Table(title="Preflight", box=box.SIMPLE_HEAD)
    for heading in ("node", "GPUs", "driver", "disk", "shm", "storage", "clock", "network", "versions", ""):
        table.add_column(heading, no_wrap=heading == "node", overflow="fold")
    for node in nodes:
        wrong = {finding.check for finding in findings if finding.node == node.name}
        cells = {
            "gpus": gpus_text(node.facts.get("gpus", {})),
            "driver": str(node.facts.get("gpus", {}).get("driver") or "-"),
            "disk": _disk(node.facts.get("room", {})),
            "shm": _gb(node.facts.get("room", {}).get("shm")),
            "storage": _storage(node.facts.get("storage")),
            "clock": f"{node.skew[0]:+.3f} ± {node.skew[1]:.3f} s" if node.skew else "-",
            "network": f"{max(node.links.values()) / 1e9:.2f} GB/s" if node.links else "-",
            "versions": "differ" if "versions" in wrong else "alike" if "versions" in node.facts else "-",
        }
        verdict = Text("BAD", style="bold red") if wrong else Text("ok", style="green")
        shown = [Text(text, style="red" if check in wrong else "") for check, text in cells.items()]
        table.add_row(Text(node.name, style="red" if wrong else ""), *shown, verdict)
    return table


def gpus_text(facts: dict[str, Any]) -> str:
    """Such as `8 x NVIDIA H100 80GB HBM3`."""
    names = facts.get("names") or []
    if not names:
        return f"{facts['counted']:g} for Ray" if facts.get("counted") else "-"
    return ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))


def _disk(facts: dict[str, Any]) -> str:
    free = facts.get("disk", {})
    return _gb(min(free.values())) if free else "-"


def _gb(size: float | None) -> str:
    return "-" if size is None else f"{size / 1e9:.1f} GB"


def _storage(facts: dict[str, Any] | None) -> str:
    if facts is None:
        return "-"
    if "error" in facts:
        return "fails"
    return f"w {facts['write'] / 1e6:.0f} r {facts['read'] / 1e6:.0f} MB/s"
