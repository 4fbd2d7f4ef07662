"""What is wrong with which node, by what the nodes told. Pure: no Ray, no network."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Limits:
    """What a node must have. max_skew_s: that clocks may surely differ by. slow_share: of the others' network speed."""

    min_disk_gb: float = 10.0
    min_shm_gb: float = 1.0
    max_skew_s: float = 2.0
    slow_share: float = 0.5
    timeout_s: float = 60.0


@dataclass
class Node:
    """One node and what it told.

    silent: why it told nothing, if so. facts: of `probe`. skew: seconds its clock is ahead of the one that asks, and by how much
    that may be off. works: it has CPUs or GPUs for Ray. links: bytes per second to other nodes, by name.
    """

    name: str
    works: bool = True
    silent: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    skew: tuple[float, float] | None = None
    links: dict[str, float] = field(default_factory=dict)
    network_error: str = ""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with one node."""

    node: str
    check: str
    text: str


def judge(nodes: Sequence[Node], limits: Limits) -> list[Finding]:
    """Everything that is wrong, node by node."""
    found = [Finding(node.name, "answer", node.silent) for node in nodes if node.silent]
    told = [node for node in nodes if not node.silent]
    found += _versions(told) + _gpus(told)
    for node in told:
        found += _room(node, limits) + _storage(node) + _clock(node, limits)
        found += [
            Finding(node.name, part, f"could not be looked at: {facts['error']}")
            for part, facts in node.facts.items()
            if part != "storage" and "error" in facts
        ]
    found += _network(told, limits)
    order = {node.name: number for number, node in enumerate(nodes)}
    return sorted(found, key=lambda finding: order[finding.node])


def storage_is_down(nodes: Sequence[Node]) -> bool:
    """Whether no node that answered can use the storage: then it is not the nodes."""
    tried = [node.facts["storage"] for node in nodes if "storage" in node.facts]
    return bool(tried) and all("error" in facts for facts in tried)


def _versions(nodes: Sequence[Node]) -> list[Finding]:
    told = {node.name: node.facts.get("versions", {}) for node in nodes}
    told = {name: facts for name, facts in told.items() if "error" not in facts}
    packages = sorted({package for facts in told.values() for package in facts} - {"took_s"})
    found = []
    for package in packages:
        values = {name: facts.get(package) for name, facts in told.items()}
        # NCCL comes with torch for GPUs, which nodes without any need not have.
        if package.startswith("nvidia-nccl"):
            values = {name: value for name, value in values.items() if value is not None}
        found += _odd_ones(values, "versions", package, missing="is not installed")
    return found


def _odd_ones(values: dict[str, Any], check: str, what: str, *, missing: str) -> list[Finding]:
    """Findings for those whose value is not the most frequent one; among equally frequent ones the first counts as right."""
    if len(set(values.values())) < 2:
        return []
    usual, count = Counter(values.values()).most_common(1)[0]
    rest = f"{count} other node{'s' if count > 1 else ''}"
    found = []
    for name, value in values.items():
        if value == usual:
            continue
        if value is None:
            text = f"{what} {missing}; {rest} {'have' if count > 1 else 'has'} {usual}"
        elif usual is None:
            text = f"{what} is {value}; {rest} {'have' if count > 1 else 'has'} none"
        else:
            text = f"{what} is {value}; on {rest} it is {usual}"
        found.append(Finding(name, check, text))
    return found


def _gpus(nodes: Sequence[Node]) -> list[Finding]:
    found = []
    told = {node.name: node.facts.get("gpus", {}) for node in nodes}
    for name, facts in told.items():
        found += [Finding(name, "gpus", text) for text in facts.get("errors", [])]
        counted, count, torch = facts.get("counted") or 0, facts.get("count"), facts.get("torch") or {}
        if count is not None and count < counted:
            found.append(Finding(name, "gpus", f"the driver sees {count} GPUs and Ray counts {counted:g}"))
        if count is None and counted:  # Ray was told of GPUs, or found device files
            seen = f"torch sees {torch['count']}" if "count" in torch else "nothing here can look at them"
            if torch.get("count", 0) < counted:
                text = f"Ray counts {counted:g} GPUs; there is no nvidia-smi, and {seen}"
                found.append(Finding(name, "gpus", text))
        if "error" in torch:
            found.append(Finding(name, "gpus", torch["error"]))
        elif torch and count and torch["count"] < count:
            found.append(Finding(name, "gpus", f"torch sees {torch['count']} of {count} GPUs"))
        for index, state in enumerate(torch.get("devices", [])):
            if state != "ok":
                found.append(Finding(name, "gpus", f"GPU {index} is not healthy: {state}"))
    having = {name: facts for name, facts in told.items() if facts.get("count")}
    found += _odd_ones(
        {name: facts.get("driver") for name, facts in having.items()},
        "gpus",
        "the driver",
        missing="is unknown",
    )
    nccl = {name: (facts.get("torch") or {}).get("nccl") for name, facts in having.items()}
    found += _odd_ones(nccl, "gpus", "NCCL", missing="is unknown")
    for kind in sorted({facts["names"][0] for facts in having.values() if facts.get("names")}):
        alike = {name: facts["count"] for name, facts in having.items() if facts["names"][:1] == [kind]}
        found += _odd_ones(alike, "gpus", f"the number of GPUs ({kind})", missing="is unknown")
    return found


def _room(node: Node, limits: Limits) -> list[Finding]:
    facts = node.facts.get("room", {})
    found = []
    for path, free in sorted(facts.get("disk", {}).items()):
        if free < limits.min_disk_gb * 1e9:
            text = f"{free / 1e9:.1f} GB of disk free at {path}, less than {limits.min_disk_gb:g}"
            found.append(Finding(node.name, "disk", text))
    shm = facts.get("shm")
    if node.works and shm is not None and shm < limits.min_shm_gb * 1e9:
        text = f"{shm / 1e9:.2f} GB of shared memory free (/dev/shm), less than {limits.min_shm_gb:g}"
        found.append(Finding(node.name, "shm", text))
    return found


def _storage(node: Node) -> list[Finding]:
    error = node.facts.get("storage", {}).get("error")
    return [Finding(node.name, "storage", f"storage: {error.rstrip('.')}")] if error else []


def _clock(node: Node, limits: Limits) -> list[Finding]:
    if node.skew is None:
        return []
    skew, bound = node.skew
    if abs(skew) - bound <= limits.max_skew_s:
        return []
    way = "ahead" if skew > 0 else "behind"
    return [Finding(node.name, "clock", f"its clock is {abs(skew):.1f} s {way} (± {bound:.3f})")]


def _network(nodes: Sequence[Node], limits: Limits) -> list[Finding]:
    """A node is slow when even its best link is far below the best links of the others; a slow neighbour leaves a good one."""
    found = [Finding(node.name, "network", node.network_error) for node in nodes if node.network_error]
    best = {node.name: max(node.links.values()) for node in nodes if node.links}
    if len(best) < 3:  # between two nodes nobody can tell whose fault it is
        return found
    for name, speed in best.items():
        others = statistics.median(value for other, value in best.items() if other != name)
        if speed < limits.slow_share * others:
            text = f"its network is slow: {speed / 1e9:.2f} GB/s at best, others have {others / 1e9:.2f}"
            found.append(Finding(name, "network", text))
    return found
