"""Which bundles a run needs, what can never fit, in which order ranks are numbered."""

from __future__ import annotations

from typing import Any

import pytest

from rayft.errors import ResourceError
from rayft.rlhf.placement import in_physical_order, refuse_beyond, table_of
from rayft.rlhf.roles import parts_of
from tests.unit.test_rlhf_parts import job_of


def table(critic: bool = True, reference: bool = True, **groups: Any) -> Any:
    return table_of(job_of("ppo" if critic else "grpo", **groups), critic=critic, reference=reference)


def test_by_default_everything_shares_the_ranks() -> None:
    made = table(
        cluster={"num_workers": 2, "gpus_per_worker": 1}, rollout={"engines": 2, "max_new_tokens": 8}
    )
    assert made.bundles == [("policy", {"CPU": 1, "GPU": 1})] * 2
    assert {role: len(spots) for role, spots in made.spots.items()} == {
        "policy": 2,
        "critic": 2,
        "reference": 2,
        "rollout": 2,
        "reward r": 1,
    }
    for role, spots in made.spots.items():
        assert [spot.bundle for spot in spots] == list(range(len(spots)))
        # A reward that is no model takes no part of a GPU.
        assert all(spot.gpus == (0.0 if role == "reward r" else 0.25) for spot in spots), role


def test_roles_apart_and_fractions() -> None:
    made = table(
        cluster={"num_workers": 2, "gpus_per_worker": 1, "cpus_per_worker": 4},
        rollout={"engines": 3, "max_new_tokens": 8},
        placement={
            "critic": {"apart": True},
            "reference": {"gpus": 0.25},
            "rollout": {"apart": True, "gpus": 0.5, "cpus": 3},
            "rewards": {"apart": True},
        },
    )
    assert made.bundles == [
        *[("policy", {"CPU": 4, "GPU": 1})] * 2,
        *[("critic", {"CPU": 4, "GPU": 1})] * 2,
        *[("rollout", {"CPU": 3, "GPU": 0.5})] * 3,
        ("reward r", {"CPU": 1}),
    ]
    assert [spot.gpus for spot in made.spots["policy"]] == [0.75] * 2
    assert [spot.gpus for spot in made.spots["reference"]] == [0.25] * 2
    assert [(spot.bundle, spot.gpus, spot.threads) for spot in made.spots["rollout"]] == [
        (4, 0.5, 3),
        (5, 0.5, 3),
        (6, 0.5, 3),
    ]
    assert made.spots["reward r"][0].device == "cpu"
    assert made.devices == {"CPU": 4 * 4 + 3 * 3 + 1, "GPU": 2 + 2 + 3 * 0.5}


def test_what_can_never_fit_is_refused_with_the_arithmetic() -> None:
    made = table(
        cluster={"num_workers": 2, "cpus_per_worker": 2},
        rollout={"engines": 2, "max_new_tokens": 8},
        placement={"rollout": {"apart": True, "cpus": 3}},
    )
    refuse_beyond(made, [("a", {"CPU": 7}), ("b", {"CPU": 3})])
    with pytest.raises(
        ResourceError, match=r"needs 10 CPU \(2 x 2 CPU for policy, 2 x 3 CPU for rollout\).* has 9 \(a: 6"
    ):
        refuse_beyond(made, [("a", {"CPU": 6}), ("b", {"CPU": 3})])
    with pytest.raises(ResourceError, match="No node has 3 CPU, which a process of rollout needs"):
        refuse_beyond(made, [("a", {"CPU": 2})] * 9)
    refuse_beyond(made, [("a", {"CPU": 4}), ("b", {"CPU": 4}), ("c", {"CPU": 4})])
    with pytest.raises(
        ResourceError,
        match=r"2 x 2 CPU for policy, 2 x 3 CPU for rollout, which cannot be spread over the nodes \(a: 4 CPU; b: 4 CPU; c: 2 CPU\)",
    ):
        refuse_beyond(made, [("a", {"CPU": 4}), ("b", {"CPU": 4}), ("c", {"CPU": 2})])


def test_looking_for_a_way_to_spread_many_processes_ends() -> None:
    """Here there is none, and too many ways to find that out: it is left to the cluster."""
    made = table(
        cluster={"num_workers": 30, "cpus_per_worker": 3},
        rollout={"engines": 30, "max_new_tokens": 8},
        placement={"rollout": {"apart": True, "cpus": 5}},
    )
    refuse_beyond(made, [(str(number), {"CPU": 7 + number % 3}) for number in range(30)])


def test_ranks_are_numbered_by_node_and_gpu() -> None:
    where = [("10.0.0.10", ["11"]), ("10.0.0.2", ["3"]), ("10.0.0.10", ["9"]), ("10.0.0.2", ["0"])]
    assert in_physical_order(where) == [3, 1, 2, 0]
    assert in_physical_order([("10.0.0.1", ["GPU-b"]), ("10.0.0.1", ["GPU-a"])]) == [1, 0]


def loads(made: Any) -> list[float]:
    """GPUs that processes take of each bundle."""
    taken = [0.0] * len(made.bundles)
    for spots in made.spots.values():
        for spot in spots:
            taken[spot.bundle] += spot.gpus
    return taken


def test_workers_of_rewards_are_spread_over_the_ranks() -> None:
    models = [
        {"name": name, "type": "model", "path": "m", "workers": workers}
        for name, workers in (("a", 1), ("b", 3), ("c", 2))
    ]
    made = table(critic=False, reference=False, cluster={"num_workers": 3}, rewards=models)
    where = [[spot.bundle for spot in made.spots[f"reward {name}"]] for name in "abc"]
    assert where == [[0], [0, 1, 2], [1, 2]]
    apart = table(critic=False, reference=False, rewards=models, placement={"rewards": {"apart": True}})
    assert [role for role, _ in apart.bundles[-6:]] == ["reward a", *["reward b"] * 3, *["reward c"] * 2]


@pytest.mark.parametrize(("count", "workers", "sizes"), [(7, 3, [2, 2, 3]), (2, 3, [1, 1]), (4, 1, [4])])
def test_answers_are_parted_among_workers(count: int, workers: int, sizes: list[int]) -> None:
    parts = parts_of(count, workers)
    assert [len(range(count)[own]) for own in parts] == sizes
    assert [i for own in parts for i in range(count)[own]] == list(range(count))


@pytest.mark.parametrize("engines", [1, 2, 3, 4])
@pytest.mark.parametrize("models", [0, 1, 3])
def test_no_bundle_is_asked_for_more_than_it_has(engines: int, models: int) -> None:
    made = table(
        cluster={"num_workers": 2, "gpus_per_worker": 1},
        rollout={"engines": engines, "max_new_tokens": 8},
        rewards=[{"name": f"m{number}", "type": "model", "path": "m"} for number in range(models)]
        or [{"name": "r", "type": "function", "path": "r.py:f"}],
    )
    taken = loads(made)
    assert max(taken) == pytest.approx(1.0)
    assert len({spot.gpus for spot in made.spots["policy"]}) == 1
    assert made.spots["policy"][0].gpus > 0
    assert len(made.spots["rollout"]) == engines


def test_models_go_around_the_ranks_whatever_stands_between_them() -> None:
    """What the job counts on when it says that something of each GPU is left to the policy."""
    models = [{"name": f"m{number}", "type": "model", "path": "m"} for number in range(2)]
    function = {"name": "f", "type": "function", "path": "r.py:f"}
    made = table(
        critic=False,
        reference=False,
        cluster={"num_workers": 2, "gpus_per_worker": 1},
        rewards=[models[0], function, models[1]],
        placement={"rewards": {"gpus": 0.5}},
    )
    assert [made.spots[f"reward m{number}"][0].bundle for number in range(2)] == [0, 1]
    assert loads(made) == pytest.approx([1.0, 1.0])


def test_roles_that_compute_have_a_gpu_of_their_own_apart() -> None:
    apart = {"apart": True}
    made = table(
        cluster={"num_workers": 1, "gpus_per_worker": 1},
        rollout={"engines": 1, "max_new_tokens": 8},
        placement={"reference": apart, "rollout": apart, "rewards": apart},
    )
    assert [(role, need.get("GPU", 0)) for role, need in made.bundles] == [
        ("policy", 1),
        ("reference", 1),
        ("rollout", 1),
        ("reward r", 0),
    ]
    assert in_physical_order([("10.0.0.1", []), ("10.0.0.1", [])]) == [0, 1]
