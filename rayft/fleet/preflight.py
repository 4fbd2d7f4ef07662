"""`rayft preflight`: look at every node of a Ray cluster at once, and name the bad ones before a run finds out.

It runs where a driver may run: on a node of the cluster (`--address auto` or HEAD:6379), through Ray's client
(`ray://HEAD:10001`), or as a submitted job (`ray job submit --address http://HEAD:8265 -- rayft preflight`).
"""

from __future__ import annotations

import dataclasses
import json
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from rayft.errors import RayftError, ResourceError, StorageError
from rayft.fleet.connect import connected
from rayft.fleet.preflight_table import nodes_table
from rayft.fleet.probe import QUICK
from rayft.fleet.scout import Scout
from rayft.fleet.verdict import Finding, Limits, Node, judge, storage_is_down
from rayft.spec import Job
from rayft.storage import Store, open_store

CLOCK_ROUND_TRIPS = 7
#: Of the time there is, what the network may take; the rest is for looking at the nodes before it.
NETWORK_SHARE = 0.4


@dataclasses.dataclass
class Seen:
    """What a preflight came to. bandwidth: of all nodes' all-reduce, bytes per second, if it was measured."""

    nodes: list[Node]
    findings: list[Finding]
    notes: list[str]
    bandwidth: float | None = None


def preflight_cluster(address: str, storage: str | None, limits: Limits, *, as_json: bool = False) -> int:
    """Look at the cluster at `address`, show what was seen, and raise as `refuse_bad` does."""
    with connected(address):
        seen = look_at_nodes(storage, limits)
    console = Console()
    if as_json:
        print(json.dumps(dataclasses.asdict(seen)))
    else:
        show(seen, console)
    refuse_bad(seen)
    if not as_json:
        console.print(f"All {len(seen.nodes)} nodes are fit.")
    return 0


def preflight_job(job: Job, run_uri: str, recorder: Any, console: Console) -> None:
    """The same for a run that has joined its cluster, told to its log as well. Raises as `refuse_bad` does."""
    import ray

    seen = look_at_nodes(run_uri.rpartition("/")[0], Limits())
    show(seen, console)
    bad = sorted({finding.node for finding in seen.findings})
    message = f"{len(seen.nodes)} nodes, {len(bad)} bad{': ' + ', '.join(bad) if bad else ''}"
    findings = [dataclasses.asdict(finding) for finding in seen.findings]
    ray.get(recorder.event.remote("preflight", message, findings=findings), timeout=60)
    refuse_bad(seen)


def show(seen: Seen, console: Console) -> None:
    """A row for each node, and a line for each thing that is wrong."""
    if not console.is_terminal:
        console.width = max(console.width, 160)
    console.print(nodes_table(seen.nodes, seen.findings))
    if seen.bandwidth is not None:
        console.print(
            f"all-reduce over all nodes, one GPU or CPU process of each: {seen.bandwidth / 1e9:.2f} GB/s (bus bandwidth)",
            soft_wrap=True,
        )
    for finding in seen.findings:
        line = f"{finding.node}: {finding.text}"
        console.print(line, style="red", soft_wrap=True, highlight=False, markup=False)
    for note in seen.notes:
        console.print(note, soft_wrap=True, highlight=False, markup=False)


def refuse_bad(seen: Seen) -> None:
    """Raise StorageError where no node can use the storage, ResourceError for bad nodes."""
    if storage_is_down(seen.nodes):
        text = next(finding.text for finding in seen.findings if finding.check == "storage")
        raise StorageError(
            f"No node can use the storage; {text}.",
            "Check its address, the credentials on the nodes, and that it can be reached from there.",
        )
    if seen.findings:
        bad = {finding.node: finding.text for finding in reversed(seen.findings)}
        said = "; ".join(f"{node}: {text}" for node, text in reversed(bad.items()))
        raise ResourceError(
            f"{len(bad)} of {len(seen.nodes)} nodes {'is' if len(bad) == 1 else 'are'} bad: {said}.",
            "Mend them, or take them out of the cluster (`ray drain-node`, `kubectl cordon`).",
        )


def look_at_nodes(storage: str | None, limits: Limits) -> Seen:
    """Look at every live node of the cluster this process is connected to, within `limits.timeout_s`."""
    import ray

    began = time.monotonic()
    until_told = began + (1 - NETWORK_SHARE) * limits.timeout_s
    there = ray.nodes()
    here = ray.get_runtime_context().get_node_id()
    # This node first: where half of the nodes differ from the others, it counts as right.
    alive = sorted(
        (node for node in there if node["Alive"]),
        key=lambda node: (node["NodeID"] != here, node["NodeManagerAddress"]),
    )
    notes = []
    if gone := len(there) - len(alive):
        notes.append(f"{gone} node{'s' if gone > 1 else ''} that Ray knows to be dead left out")
    names = _names(alive)
    nodes = {
        node["NodeID"]: Node(
            names[node["NodeID"]], works=any(node["Resources"].get(name, 0) for name in ("CPU", "GPU"))
        )
        for node in alive
    }
    uri, marker, store = _marked(storage, nodes, notes)
    scouts = {node["NodeID"]: _scout(node["NodeID"]) for node in alive}
    try:
        asked = {
            node["NodeID"]: scouts[node["NodeID"]].look.remote(uri, marker, node["Resources"].get("GPU", 0.0))
            for node in alive
        }
        for node_id, (facts, error) in _answers(asked, until_told).items():
            nodes[node_id].facts, nodes[node_id].silent = facts or {}, error
        told = [node_id for node_id, node in nodes.items() if not node.silent]
        for node_id in told:
            nodes[node_id].skew = _skew(scouts[node_id], until_told)
        bandwidth = _network(nodes, scouts, told, began + limits.timeout_s, notes)
    finally:
        for scout in scouts.values():
            ray.kill(scout)
        if store is not None:
            _clean(store)
    if uri is None:
        notes.append("storage was not tried: give --storage")
    found = list(nodes.values())
    return Seen(found, judge(found, limits), notes, bandwidth)


def _scout(node_id: str) -> Any:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(node_id, soft=False)
    options = {"num_cpus": 0, "scheduling_strategy": there, "max_restarts": 0, "max_concurrency": 4}
    return ray.remote(Scout).options(**options).remote()


def _names(alive: Sequence[dict[str, Any]]) -> dict[str, str]:
    """What people call a node: its address, with the beginning of its id where several share one."""
    addresses = [node["NodeManagerAddress"] for node in alive]
    return {
        node["NodeID"]: address if addresses.count(address) == 1 else f"{address}/{node['NodeID'][:6]}"
        for node, address in zip(alive, addresses, strict=True)
    }


def _marked(
    storage: str | None, nodes: dict[str, Node], notes: list[str]
) -> tuple[str | None, str, Store | None]:
    """The storage as nodes get it, the key of an object that was just written there, and the folder to clean up."""
    if storage is None:
        return None, "", None
    uri = storage if "://" in storage else str(Path(storage).expanduser().absolute())
    folder = f".preflight/{uuid.uuid4().hex}"
    store = open_store(uri, retry=QUICK)
    try:
        store.put(f"{folder}/marker", b"rayft preflight")
    except StorageError as error:
        notes.append(f"this process cannot write to the storage: {error.message}")
    return uri, f"{folder}/marker", store.child(*folder.split("/"))


def _clean(store: Store) -> None:
    try:
        store.delete_prefix("")
    except Exception:
        return  # that storage fails has been said


def _answers(asked: dict[str, Any], deadline: float) -> dict[str, tuple[Any, str]]:
    """By key: what came until the deadline and no error, or nothing and why."""
    import ray

    began = time.monotonic()
    pending = {ref: key for key, ref in asked.items()}
    found: dict[str, tuple[Any, str]] = {}
    while pending and (left := deadline - time.monotonic()) > 0:
        ready, _ = ray.wait(list(pending), timeout=left)
        for ref in ready:
            key = pending.pop(ref)
            try:
                found[key] = (ray.get(ref, timeout=5), "")
            except Exception as error:
                found[key] = (None, f"it failed: {reason(error)}")
    waited = time.monotonic() - began
    for key in pending.values():
        found[key] = (None, f"it gave no answer within {waited:.0f} s")
    return found


def reason(error: BaseException) -> str:
    """One line of what Ray raised."""
    cause = getattr(error, "cause", None) or error
    if isinstance(cause, RayftError):
        return cause.message
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    told = [line for line in lines if "Error" in line] or lines
    return (told[-1] if told else type(cause).__name__)[:300]


def _skew(scout: Any, deadline: float) -> tuple[float, float] | None:
    """Seconds by which the node's clock is ahead, and how far off that may be: half of the fastest round trip."""
    import ray

    best: tuple[float, float] | None = None
    for _ in range(CLOCK_ROUND_TRIPS):
        left = deadline - time.monotonic()
        if left <= 0:
            break
        sent, started = time.time(), time.perf_counter()
        try:
            there = ray.get(scout.clock.remote(), timeout=min(5.0, left))
        except Exception:
            break
        trip = time.perf_counter() - started
        if best is None or trip / 2 < best[1]:
            best = (there - (sent + trip / 2), trip / 2)
    return best


def _network(
    nodes: dict[str, Node], scouts: dict[str, Any], told: Sequence[str], deadline: float, notes: list[str]
) -> float | None:
    """Measure between the nodes that take work; fills in their links, returns the bandwidth of them all together."""
    import ray

    taking = [key for key in told if nodes[key].works and "torch" in nodes[key].facts.get("versions", {})]
    if len(taking) < 2:
        notes.append("the network was not measured: fewer than two nodes that take work and have torch")
        return None
    if len(taking) == 2:
        notes.append(
            "the network between two nodes is measured and not judged: nobody can tell whose fault a slow one is"
        )
    with_gpus = all((nodes[key].facts.get("gpus", {}).get("torch") or {}).get("count") for key in taking)
    backend = "nccl" if with_gpus else "gloo"
    try:
        address = ray.get(scouts[taking[0]].address.remote(), timeout=10)
    except Exception as error:
        nodes[taking[0]].network_error = f"it failed before the network was measured: {reason(error)}"
        return None
    asked = {
        key: scouts[key].network.remote(rank, address, len(taking), backend)
        for rank, key in enumerate(taking)
    }
    answers = _answers(asked, deadline)
    for key, (found, why) in answers.items():
        if why:
            nodes[key].network_error = f"all-reduce with the other nodes ({backend}): {why}"
        else:
            nodes[key].links = {nodes[taking[rank]].name: speed for rank, speed in found["links"].items()}
    speeds = [found["all_reduce"] for found, why in answers.values() if not why]
    return min(speeds) if len(speeds) == len(taking) else None
