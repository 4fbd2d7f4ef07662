"""Preflight: each thing that can be wrong with one node is told, with its name, and nothing else."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest

from rayft.errors import JobError, ResourceError, StorageError
from rayft.fleet.connect import refuse_unreachable
from rayft.fleet.preflight import Seen, refuse_bad
from rayft.fleet.preflight_table import nodes_table
from rayft.fleet.probe import parse_smi, probe
from rayft.fleet.scout import pairings
from rayft.fleet.verdict import Limits, Node, judge, storage_is_down

#: As eight H100s answer.
SMI = "\n".join(["NVIDIA H100 80GB HBM3, 570.86.15, 81559, 3, 0"] * 8)
LIMITS = Limits()


def healthy(name: str) -> Node:
    facts: dict[str, Any] = {
        "versions": {
            "python": "3.11.7",
            "ray": "2.60.0",
            "torch": "2.13.0",
            "nvidia-nccl-cu12": "2.28.3",
            "took_s": 0.1,
        },
        "gpus": {
            **parse_smi(SMI),
            "counted": 8.0,
            "torch": {"count": 8, "nccl": "2.28.3", "devices": ["ok"] * 8},
        },
        "room": {"disk": {"/tmp": 500e9, "/cache": 300e9}, "shm": 64e9},
        "storage": {"write": 120e6, "read": 400e6},
    }
    return Node(name, facts=facts, skew=(0.01, 0.002))


def cluster(count: int = 4) -> list[Node]:
    nodes = [healthy(f"10.0.0.{number}") for number in range(1, count + 1)]
    for one, other in itertools.permutations(nodes, 2):
        one.links[other.name] = 2.5e9
    return nodes


def told(nodes: list[Node]) -> list[tuple[str, str, str]]:
    return [(finding.node, finding.check, finding.text) for finding in judge(nodes, LIMITS)]


def test_nothing_is_wrong_with_nodes_that_are_alike() -> None:
    assert told(cluster()) == []
    assert told(cluster(1)) == []
    refuse_bad(Seen(cluster(), [], []))


def set_at(node: Node, path: str, value: Any) -> None:
    *folders, last = path.split("/")
    place = node.facts
    for folder in folders:
        place = place[folder]
    place[last] = value


@pytest.mark.parametrize(
    ("path", "value", "check", "text"),
    [
        ("versions/torch", "2.12.0", "versions", "torch is 2.12.0; on 3 other nodes it is 2.13.0"),
        ("versions/ray", None, "versions", "ray is not installed; 3 other nodes have 2.60.0"),
        ("versions/trl", "1.16.0", "versions", "trl is 1.16.0; 3 other nodes have none"),
        ("versions/python", "3.11.6", "versions", "python is 3.11.6; on 3 other nodes it is 3.11.7"),
        ("versions/nvidia-nccl-cu12", "2.27.5", "versions", "nvidia-nccl-cu12 is 2.27.5; on 3 other"),
        ("gpus/driver", "550.90.07", "gpus", "the driver is 550.90.07; on 3 other nodes it is 570.86.15"),
        ("gpus/torch/nccl", "2.27.5", "gpus", "NCCL is 2.27.5; on 3 other nodes"),
        ("gpus/torch/devices", ["ok"] * 7 + ["CUDA error: uncorrectable"], "gpus", "GPU 7 is not healthy: CUDA"),
        ("gpus/torch", {"error": "torch got no answer"}, "gpus", "torch got no answer"),
        ("gpus/errors", ["GPU 3 has 2 uncorrected memory errors"], "gpus", "GPU 3 has 2 uncorrected"),
        ("room/disk", {"/tmp": 500e9, "/cache": 1.25e9}, "disk", "1.2 GB of disk free at /cache, less than 10"),
        ("room/shm", 67e6, "shm", "0.07 GB of shared memory free (/dev/shm), less than 1"),
        ("storage", {"error": "Access Denied."}, "storage", "storage: Access Denied"),
        ("room", {"error": "OSError: gone"}, "room", "could not be looked at: OSError: gone"),
    ],
)  # fmt: skip
def test_the_one_bad_node_is_named(path: str, value: Any, check: str, text: str) -> None:
    nodes = cluster()
    set_at(nodes[2], path, value)
    found = told(nodes)
    assert [(node, what) for node, what, _ in found if text in _][0:1] == [("10.0.0.3", check)]
    assert {node for node, _, _ in found} == {"10.0.0.3"}


def test_a_gpu_that_fell_off_the_bus() -> None:
    """Ray counted what was left, too, so only the other nodes tell."""
    nodes = cluster()
    nodes[0].facts["gpus"] = copy.deepcopy(nodes[0].facts["gpus"]) | {"count": 7, "counted": 7.0}
    assert told(nodes) == [
        ("10.0.0.1", "gpus", "the number of GPUs (NVIDIA H100 80GB HBM3) is 7; on 3 other nodes it is 8")
    ]
    nodes[0].facts["gpus"]["counted"] = 8.0
    assert ("10.0.0.1", "gpus", "the driver sees 7 GPUs and Ray counts 8") in told(nodes)


@pytest.mark.parametrize(
    ("torch", "text"),
    [
        ({"count": 0, "devices": []}, "torch sees 0"),
        ({"count": 2, "devices": ["ok"] * 2}, "torch sees 2"),
        (None, "nothing here can look at them"),
        ({"count": 8, "devices": ["ok"] * 8}, ""),  # a maker's whose tool has another name
    ],
)
def test_a_node_whose_driver_tool_is_missing(torch: dict[str, Any] | None, text: str) -> None:
    nodes = cluster()
    nodes[1].facts["gpus"] = {"counted": 8.0, "count": None, "errors": []} | (
        {"torch": torch} if torch else {}
    )
    said = f"Ray counts 8 GPUs; there is no nvidia-smi, and {text}"
    assert told(nodes) == ([("10.0.0.2", "gpus", said)] if text else [])


def test_torch_is_asked_for_gpus_that_ray_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also where there is no driver tool."""
    monkeypatch.setenv("PATH", str(tmp_path))
    facts = probe(None, "", 2.0)
    assert facts["gpus"]["count"] is None
    assert facts["gpus"]["torch"]["count"] == 0
    [finding] = judge([Node("a", facts=facts)], Limits(min_disk_gb=0, min_shm_gb=0))
    assert finding.text == "Ray counts 2 GPUs; there is no nvidia-smi, and torch sees 0"


def test_nodes_without_gpus_among_others_are_no_fault() -> None:
    nodes = cluster()
    nodes[0].facts["gpus"] = {"counted": 0.0, "count": None, "errors": []}
    del nodes[0].facts["versions"]["nvidia-nccl-cu12"]
    assert told(nodes) == []


@pytest.mark.parametrize(("skew", "bad"), [((42.0, 0.01), True), ((-42.0, 0.01), True), ((3.0, 1.5), False)])
def test_a_clock_is_wrong_only_where_it_surely_is(skew: tuple[float, float], bad: bool) -> None:
    nodes = cluster()
    nodes[1].skew = skew
    found = told(nodes)
    assert bool(found) == bad
    if bad:
        way = "ahead" if skew[0] > 0 else "behind"
        assert found == [("10.0.0.2", "clock", f"its clock is 42.0 s {way} (± 0.010)")]


def test_the_slow_node_and_not_its_neighbours() -> None:
    nodes = cluster(5)
    for node in nodes:
        if node.name != "10.0.0.4":
            node.links["10.0.0.4"] = nodes[3].links[node.name] = 0.3e9
    assert told(nodes) == [
        ("10.0.0.4", "network", "its network is slow: 0.30 GB/s at best, others have 2.50")
    ]
    pair = cluster(2)
    pair[0].links["10.0.0.2"] = pair[1].links["10.0.0.1"] = 1e3
    assert told(pair) == []  # between two nobody can tell whose fault it is


def test_a_node_that_says_nothing() -> None:
    nodes = cluster()
    nodes[3].facts, nodes[3].silent = {}, "it gave no answer within 36 s"
    assert told(nodes) == [("10.0.0.4", "answer", "it gave no answer within 36 s")]
    nodes_table(nodes, judge(nodes, LIMITS))


def test_exit_codes() -> None:
    """4 for bad nodes, 5 where the storage fails everywhere."""
    nodes = cluster()
    nodes[0].facts["storage"] = {"error": "Access Denied."}
    nodes[1].skew = (60.0, 0.0)
    assert not storage_is_down(nodes)
    with pytest.raises(
        ResourceError,
        match=r"2 of 4 nodes are bad: 10\.0\.0\.1: storage: Access Denied; 10\.0\.0\.2: its clock",
    ):
        refuse_bad(Seen(nodes, judge(nodes, LIMITS), []))
    for node in nodes:
        node.facts["storage"] = {"error": "Access Denied."}
    with pytest.raises(StorageError, match="No node can use the storage"):
        refuse_bad(Seen(nodes, judge(nodes, LIMITS), []))


@pytest.mark.parametrize("size", range(2, 14))
def test_pairings(size: int) -> None:
    """Nobody meets two at once or the same one twice, and everybody meets at least as many as tell a slow node."""
    rounds = pairings(size)
    met: dict[int, list[int]] = {rank: [] for rank in range(size)}
    for pairs in rounds:
        ranks = [rank for pair in pairs for rank in pair]
        assert len(ranks) == len(set(ranks))
        for one, other in pairs:
            met[one].append(other)
            met[other].append(one)
    for rank, others in met.items():
        assert len(set(others)) == len(others) >= min(2, size - 1)
        assert rank not in others


def test_this_machine() -> None:
    facts = probe(None, "", 0.0)
    assert facts["versions"]["ray"]
    assert all(free > 0 for free in facts["room"]["disk"].values())
    assert "error" not in facts["gpus"]
    assert "storage" not in facts


@pytest.mark.parametrize(
    ("address", "error"),
    [
        ("http://head:8265", JobError),
        ("local", JobError),
        ("head", JobError),
        ("ftp://head:1", JobError),
        ("127.0.0.1:9", ResourceError),
        ("ray://127.0.0.1:9", ResourceError),
    ],
)
def test_addresses_that_cannot_work_are_refused_at_once(address: str, error: type[Exception]) -> None:
    with pytest.raises(error, match="ray job submit"):
        refuse_unreachable(address)
