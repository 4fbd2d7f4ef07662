"""How many trials a cluster holds: against brute force, and never more than there is or than the share grants."""

from __future__ import annotations

import copy
import math
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayft.spec import Job
from rayft.tune.capacity import Resources, Size, _lay, size_of, sizes_of, total_of, trials_that_fit
from rayft.tune.share import Fleet
from tests.search_jobs import RL, search

#: Amounts in eighths, which binary fractions hold exactly.
amounts = st.integers(0, 64).map(lambda eighths: eighths / 8)
some = st.integers(1, 32).map(lambda eighths: eighths / 8)
shares = st.sampled_from([0.125, 0.25, 0.5, 0.75, 1.0])


@st.composite
def bundle(draw: st.DrawFn) -> Resources:
    need = {"CPU": draw(some)}
    return need | ({"GPU": draw(st.sampled_from([0.25, 0.5, 1.0, 2.0]))} if draw(st.booleans()) else {})


@st.composite
def node(draw: st.DrawFn) -> Resources:
    """As Ray tells it: without what it has not, and with what is no trial's."""
    have: Resources = {"CPU": draw(amounts), "GPU": float(draw(st.integers(0, 4)))}
    have = {name: amount for name, amount in have.items() if amount}
    return have | {"memory": 1e9, "node:10.0.0.1": 1.0}


def most(bundles: list[Resources], nodes: list[Resources]) -> int:
    """By brute force: the most trials that any way of laying their bundles has room for."""

    def amounts_of(one: Resources) -> tuple[float, float]:
        return one.get("CPU", 0.0), one.get("GPU", 0.0)

    @cache
    def can(left: tuple[tuple[float, float], ...], free: tuple[tuple[float, float], ...]) -> bool:
        if not left:
            return True
        (cpus, gpus), rest = left[0], left[1:]
        return any(
            can(rest, tuple(sorted([*free[:at], (free[at][0] - cpus, free[at][1] - gpus), *free[at + 1 :]])))
            for at in range(len(free))
            if free[at][0] >= cpus and free[at][1] >= gpus
        )

    free = tuple(sorted(map(amounts_of, nodes)))
    one = tuple(sorted(map(amounts_of, bundles), reverse=True))
    count = 0
    while count < 8 and can(one * (count + 1), free):
        count += 1
    return count


def fit(bundles: list[Resources], nodes: list[Resources], share: float) -> int:
    """How many trials that are not elastic the share of these nodes holds."""
    return Fleet(nodes).room(Size(bundles, total_of(bundles)), share)


def granted(nodes: list[Resources], share: float) -> Resources:
    return {name: share * sum(one.get(name, 0.0) for one in nodes) for name in ("CPU", "GPU")}


@settings(max_examples=150, deadline=None)
@given(st.lists(bundle(), min_size=1, max_size=3), st.lists(node(), max_size=3))
def test_never_more_trials_than_any_layout_has_room_for(
    bundles: list[Resources], nodes: list[Resources]
) -> None:
    assert min(trials_that_fit(bundles, nodes), 8) <= most(bundles, nodes)


@settings(max_examples=150, deadline=None)
@given(bundle(), st.integers(1, 3), st.lists(node(), max_size=3))
def test_processes_that_are_alike_are_laid_as_well_as_can_be(
    need: Resources, count: int, nodes: list[Resources]
) -> None:
    """What every trial is whose processes are the ranks of one training."""
    assert min(trials_that_fit([need] * count, nodes), 8) == most([need] * count, nodes)


@settings(max_examples=300, deadline=None)
@given(st.lists(bundle(), min_size=1, max_size=4), st.lists(node(), max_size=4), shares)
def test_the_share_is_kept_and_nothing_else_held_back(
    bundles: list[Resources], nodes: list[Resources], share: float
) -> None:
    before = copy.deepcopy((bundles, nodes))
    count = fit(bundles, nodes, share)
    assert (bundles, nodes) == before, "the caller's nodes are as they were"
    need, most_of_it = total_of(bundles), granted(nodes, share)
    assert all(count * need.get(name, 0.0) <= most_of_it[name] + 1e-6 for name in most_of_it)
    by_share = min(int(most_of_it[name] / need[name] + 1e-9) for name in need)
    assert count == min(trials_that_fit(bundles, nodes), by_share)


@settings(max_examples=300, deadline=None)
@given(st.lists(bundle(), min_size=1, max_size=4), st.lists(node(), max_size=4))
def test_a_layout_takes_exactly_what_it_lays_or_nothing(
    bundles: list[Resources], nodes: list[Resources]
) -> None:
    free = copy.deepcopy(nodes)
    for _ in range(3):
        before = copy.deepcopy(free)
        laid = _lay(bundles, free)
        assert all(amount >= 0 for one in free for amount in one.values()), "more was taken than there is"
        if not laid:
            assert free == before
            continue
        taken = {name: total_of(before).get(name, 0.0) - total_of(free)[name] for name in total_of(free)}
        assert {name: amount for name, amount in taken.items() if amount} == total_of(bundles)


@pytest.mark.parametrize(
    ("bundles", "nodes", "share", "count"),
    [
        ([{"CPU": 1.0}] * 4, [{"CPU": 3.0}, {"CPU": 5.0}], 1.0, 2),
        ([{"CPU": 4.0}], [{"CPU": 3.0}, {"CPU": 3.0}], 1.0, 0),  # a process lies on one node
        ([{"CPU": 2.0}], [{"CPU": 3.0}, {"CPU": 3.0}], 1.0, 2),
        ([{"CPU": 1.0, "GPU": 1.0}], [{"CPU": 8.0}, {"CPU": 1.0, "GPU": 4.0}], 1.0, 1),
        ([{"CPU": 1.0, "GPU": 0.5}], [{"CPU": 8.0, "GPU": 2.0}], 1.0, 4),
        ([{"CPU": 1.0, "GPU": 1.0}], [{"CPU": 16.0, "GPU": 4.0}], 0.5, 2),
        ([{"CPU": 4.0, "GPU": 1.0}], [{"CPU": 8.0, "GPU": 8.0}], 0.5, 1),  # the share is of each resource
        ([{"CPU": 1.0}], [{"CPU": 2.0}], 0.25, 0),
        ([{"CPU": 1.0}], [], 1.0, 0),
        ([{"CPU": 1.0}, {"CPU": 3.0}], [{"CPU": 3.0}, {"CPU": 1.0}], 1.0, 1),  # the largest first
    ],
)
def test_trials_by_hand(bundles: list[Resources], nodes: list[Resources], share: float, count: int) -> None:
    assert fit(bundles, nodes, share) == count


@pytest.mark.parametrize("parts", [3, 7, 10, 100])
def test_decimal_fractions_of_a_node_fill_it(parts: int) -> None:
    """Ten tenths are one, though not in binary fractions; and an eleventh is too many."""
    for nodes in (1, 3):
        assert (
            trials_that_fit([{"CPU": round(1 / parts, 6)}], [{"CPU": round(1 / parts, 6) * parts}] * nodes)
            == parts * nodes
        )
    assert fit([{"CPU": 0.1}], [{"CPU": 1.0}], 0.3) == 3


def test_trials_that_ask_for_nothing_come_to_an_end() -> None:
    assert trials_that_fit([], [{"CPU": 1.0}]) == 10_000


# -- what a trial asks for -------------------------------------------------------------------------------------------


def training(**cluster: Any) -> Job:
    return search(groups={"cluster": cluster, "train": {"max_steps": 100, "global_batch_size": 12}})


def test_a_trial_asks_for_its_ranks() -> None:
    assert size_of(training(num_workers=3, cpus_per_worker=2)) == Size([{"CPU": 2.0}] * 3, {"CPU": 6.0})
    assert size_of(training(gpus_per_worker=0.5)).bundles == [{"CPU": 1.0, "GPU": 0.5}]


def test_an_elastic_trial_asks_for_its_least_and_is_counted_by_its_most() -> None:
    assert size_of(training(num_workers=[2, 4])) == Size([{"CPU": 1.0}] * 2, {"CPU": 4.0})


def test_trials_ask_for_what_their_values_say() -> None:
    """The job's own numbers are no trial's where the space has others; values that go with nothing are no trial's either."""
    groups = {"cluster": {"num_workers": 8}, "train": {"max_steps": 100, "global_batch_size": 16}}
    space = {"cluster.num_workers": {"choice": [4, 1]}, "cluster.cpus_per_worker": {"quniform": [1, 3, 1]}}
    found = sizes_of(search(space, groups))
    assert [total_of(size.bundles)["CPU"] for size in found] == [1, 2, 3, 4, 8, 12]
    assert sizes_of(search(groups=groups)) == [size_of(search(groups=groups))]


def test_a_trial_that_learns_from_rewards_asks_for_every_process_apart() -> None:
    groups = {**copy.deepcopy(RL), "cluster": {"num_workers": 2, "gpus_per_worker": 1}}
    assert size_of(search(groups=groups, metric="eval.score")).bundles == [{"CPU": 1.0, "GPU": 1.0}] * 2
    apart = {"rewards": {"apart": True, "cpus": 2}, "rollout": {"apart": True, "gpus": 1, "cpus": 1}}
    job = search(groups={**groups, "placement": apart, "rollout": {"engines": 1}}, metric="eval.score")
    bundles = size_of(job).bundles
    # two ranks, an engine, and two rewards that are functions, which take no GPU
    assert sorted((need["CPU"], need.get("GPU", 0.0)) for need in bundles) == [
        (1, 1),
        (1, 1),
        (1, 1),
        (2, 0),
        (2, 0),
    ]
    assert total_of(bundles) == {"CPU": 7.0, "GPU": 3.0}
    # three GPUs hold it only where there are CPUs for the rewards too
    assert trials_that_fit(bundles, [{"CPU": 6.0, "GPU": 3.0}]) == 0
    assert trials_that_fit(bundles, [{"CPU": 3.0, "GPU": 3.0}, {"CPU": 4.0}]) == 1
    assert math.isclose(total_of(bundles)["CPU"], 7)
