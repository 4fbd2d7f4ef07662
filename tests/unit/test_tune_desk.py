"""Who may hold workers, and for what the others wait: on clusters as their books would show them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from rayft.errors import ResourceError
from rayft.tune import desk, share
from rayft.tune.capacity import Resources, Size, total_of
from rayft.tune.share import Fleet, refuse_no_trial
from tests.search_jobs import search

CPU, GPU = {"CPU": 1.0}, {"CPU": 1.0, "GPU": 1.0}


def size(count: int, most: int = 0, each: Resources = CPU) -> Size:
    """Of a trial of so many workers, or of an elastic one."""
    return Size([dict(each)] * count, total_of([dict(each)] * (most or count)))


class Cluster:
    """A desk on a cluster. free: what its nodes have left by the cluster's books."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, fleet: Fleet, granted: float = 1.0, **more: Any
    ) -> None:
        self.fleet, self.free = fleet, copy.deepcopy(fleet.nodes)
        self.rows: list[tuple[str, str]] = []
        self.clock = 100.0
        monkeypatch.setattr(desk, "fleet_now", lambda: self.fleet)
        monkeypatch.setattr(desk, "free_now", lambda: copy.deepcopy(self.free))
        monkeypatch.setattr(desk, "give_back_leftovers", lambda: 0)
        monkeypatch.setattr(desk, "time", SimpleNamespace(monotonic=lambda: self.clock))
        recorder = SimpleNamespace(row=SimpleNamespace(remote=self._take))
        self.desk = desk.Desk(recorder, granted, more.pop("max_concurrent", None), yielding=False)

    def _take(self, row: dict[str, Any]) -> None:
        self.rows.append((row["event"], row["trial"]))

    def ask(self, *trials: str, size: Size) -> list[str]:
        """What each of the trials hears."""
        return [self.desk.ask_slot(trial, size) for trial in trials]


def nodes(*cpus: float, gpus: float = 0.0) -> list[Resources]:
    return [{"CPU": count} | ({"GPU": gpus} if gpus else {}) for count in cpus]


def grown(there: Sequence[float], cpus: float, most: int) -> Fleet:
    """A cluster that may come to have so many nodes of so many CPUs."""
    return Fleet(nodes(*there), True, {"CPU": cpus * most}, [({"CPU": cpus}, most)])


# -- without an autoscaler -------------------------------------------------------------------------------------------


def test_trials_hold_no_more_than_the_share(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Cluster(monkeypatch, Fleet(nodes(4, 4)), 0.5)
    found = one.ask("t0000", "t0001", "t0002", size=size(2))
    assert found == ["", "", "2 x 1 CPU: 2 trials hold their part of 4 CPU"]
    one.desk.release("t0000")
    assert one.ask("t0002", size=size(2)) == [""]
    assert one.desk.room(size(2)) == 2


def test_what_others_hold_is_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Cluster(monkeypatch, Fleet(nodes(2, 2)))
    one.free = [{"CPU": 1.0}, {"CPU": 0.0}]
    assert one.ask("t0000", size=size(2)) == ["2 x 1 CPU, and 1 CPU free"]
    one.free[1]["CPU"] = 1.0
    assert one.ask("t0000", size=size(2)) == [""]
    assert one.rows == [("waiting", "t0000"), ("running", "t0000")]


def test_a_slot_is_taken_until_the_run_begins_however_long_it_prepares(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The cluster's books show nothing of it yet."""
    one = Cluster(monkeypatch, Fleet(nodes(3, 3)))
    one.free = nodes(3, 0)
    assert one.ask("t0000", "t0001", size=size(2)) == ["", "2 x 1 CPU, and 1 CPU free"]
    one.clock = 3600.0
    assert one.ask("t0001", size=size(2)) == ["2 x 1 CPU, and 1 CPU free"]
    one.desk.placed("t0000")  # from here on the books say what it holds
    one.free = nodes(3)
    assert one.ask("t0001", size=size(2)) == [""]


def test_each_trial_is_granted_by_its_own_size(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Cluster(monkeypatch, Fleet(nodes(4)), 0.75)
    assert one.ask("t0000", size=size(1)) == [""]
    assert one.ask("t0001", size=size(2)) == [""]
    assert one.ask("t0002", size=size(1)) == ["1 x 1 CPU: 2 trials hold their part of 3 CPU"]


def test_a_trial_that_is_too_large_does_not_keep_others_from_their_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = Cluster(monkeypatch, Fleet(nodes(4)), 0.5)
    [reason] = one.ask("t0000", size=size(3))
    assert reason == "more nodes: 3 x 1 CPU, and all there are have 4 CPU, of which tune.share grants 0.5"
    assert one.ask("t0001", size=size(2)) == [""]


def test_elastic_trials_are_counted_by_what_they_may_take(monkeypatch: pytest.MonkeyPatch) -> None:
    elastic = size(1, most=4)
    one = Cluster(monkeypatch, Fleet(nodes(4, 4)), 0.5)
    assert one.ask("t0000", "t0001", size=elastic) == ["", "1 x 1 CPU: 1 trials hold their part of 4 CPU"]
    assert one.desk.room(elastic) == 1
    assert Cluster(monkeypatch, Fleet(nodes(4)), 0.5).ask("t0000", size=elastic)[0].startswith("more nodes")
    # alone, and with nobody to leave something to, it takes what there is
    assert Cluster(monkeypatch, Fleet(nodes(2))).ask("t0000", size=elastic) == [""]


# -- with an autoscaler ----------------------------------------------------------------------------------------------


def test_the_share_is_of_what_the_cluster_may_grow_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of ten nodes of 4 CPUs half: five trials; each waits for its nodes alone."""
    one = Cluster(monkeypatch, grown([4], 4, 10), 0.5, max_concurrent=8)
    for number in range(5):
        assert one.ask(f"t{number:04d}", size=size(4)) == [""]
        one.desk.placed(f"t{number:04d}")
        one.free = nodes(0)
    assert one.ask("t0005", size=size(4)) == ["4 x 1 CPU: 5 trials hold their part of 20 CPU"]


def test_nodes_are_asked_for_by_one_trial_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Cluster(monkeypatch, grown([], 4, 10))
    assert one.ask("t0000", "t0001", size=size(4)) == ["", "its turn: nodes for t0000 come first"]
    assert one.rows == [("waiting", "t0000"), ("waiting", "t0001")]
    one.desk.placed("t0000")
    assert one.ask("t0001", size=size(4)) == [""]


def test_a_trial_that_no_kind_of_node_can_hold_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Cluster(monkeypatch, grown([1], 4, 10))
    [reason] = one.ask("t0000", size=size(1, each={"CPU": 8.0}))
    assert reason == "more nodes: 1 x 8 CPU, and all there may be have 40 CPU"
    [reason] = one.ask("t0000", size=size(11, each={"CPU": 4.0}))
    assert reason == "more nodes: 11 x 4 CPU, and all there may be have 40 CPU"
    assert one.ask("t0001", size=size(10, each={"CPU": 4.0})) == [""]


def test_of_an_autoscaler_that_says_nothing_the_share_is_of_what_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One trial may always ask, since there may be no nodes before."""
    unknown = Fleet([], grows=True)
    one = Cluster(monkeypatch, unknown, 0.5)
    assert one.ask("t0000", "t0001", size=size(4)) == ["", "4 x 1 CPU: 1 trials hold their part of 0 CPU"]
    one.fleet = Fleet(nodes(8, 8), grows=True)
    assert one.ask("t0001", size=size(4)) != [""]  # t0000's nodes come first
    one.desk.placed("t0000")
    one.free = nodes(4, 8)
    assert one.ask("t0001", "t0002", size=size(4)) == ["", "4 x 1 CPU: 2 trials hold their part of 8 CPU"]
    everything = Cluster(monkeypatch, unknown)
    assert everything.ask("t0000", size=size(4)) == [""]
    everything.desk.placed("t0000")
    assert everything.ask("t0001", size=size(4)) == [""]


@pytest.mark.parametrize(
    ("fleet", "granted", "room"),
    [
        (Fleet(nodes(4, 4)), 1.0, 4),
        (Fleet(nodes(4, 4)), 0.5, 2),
        (grown([4, 4], 4, 10), 1.0, 5),  # one that asks for nodes
        (grown([4, 4], 4, 10), 0.15, 3),
        (grown([], 4, 10), 1.0, 1),
        (Fleet([], grows=True), 0.5, 1),
        (Fleet(nodes(4, 4), grows=True), 1.0, 5),
        (Fleet(nodes(4, 4), grows=True), 0.5, 2),
    ],
)
def test_trials_that_may_be_under_way(fleet: Fleet, granted: float, room: int) -> None:
    assert fleet.room(size(2), granted) == room


# -- refused before anything starts ----------------------------------------------------------------------------------


def refusal(
    monkeypatch: pytest.MonkeyPatch, fleet: Fleet, granted: float, workers: Any, space: Any = None
) -> str:
    monkeypatch.setattr(share, "fleet_now", lambda: fleet)
    groups = {"cluster": {"num_workers": workers}, "train": {"max_steps": 100, "global_batch_size": 24}}
    try:
        refuse_no_trial(search(space, groups), granted)
    except ResourceError as error:
        return error.message
    return ""


def test_a_search_is_refused_by_the_smallest_trial_of_its_space(monkeypatch: pytest.MonkeyPatch) -> None:
    space = {"cluster.num_workers": {"choice": [6, 2]}}
    assert refusal(monkeypatch, Fleet(nodes(4)), 1.0, 8, space) == ""
    message = refusal(monkeypatch, Fleet(nodes(4)), 0.25, 8, space)
    assert message == (
        "No trial fits: the smallest trial asks for 2 x 1 CPU; the cluster's nodes have 4 CPU, 0 GPU, and tune.share grants "
        "0.25 of it."
    )
    assert "a trial asks for 8 x 1 CPU" in refusal(monkeypatch, Fleet(nodes(4)), 1.0, 8)
    assert "asks for 2 x 1 CPU and may come to hold 4 CPU" in refusal(
        monkeypatch, Fleet(nodes(4)), 0.5, [2, 4]
    )


def test_a_search_is_refused_by_what_the_autoscaler_may_add(monkeypatch: pytest.MonkeyPatch) -> None:
    assert refusal(monkeypatch, grown([], 4, 2), 1.0, 8) == ""
    assert refusal(monkeypatch, grown([], 4, 2), 1.0, 12) == (
        "No trial fits: a trial asks for 12 x 1 CPU; the cluster's nodes have nothing, and the autoscaler may bring it to 8 CPU, "
        "0 GPU."
    )
    assert refusal(monkeypatch, Fleet([], grows=True), 0.5, 12) == ""
