"""What a search learns of the cluster that it runs on, from a real Ray."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
from ray.core.generated import autoscaler_pb2
from ray.experimental import internal_kv

from rayft.tune.share import fleet_now

AUTOSCALER = b"__autoscaler"


@pytest.fixture
def _autoscaler(local_ray: None) -> Iterator[None]:
    """The cluster says that it has one, as one does."""
    internal_kv._internal_kv_put(b"__autoscaler_v2_enabled", b"1", namespace=AUTOSCALER)
    yield
    for key in (b"__autoscaler_v2_enabled", b"__autoscaler_cluster_config"):
        internal_kv._internal_kv_del(key, namespace=AUTOSCALER)


def test_a_cluster_of_its_own_does_not_grow(local_ray: None) -> None:
    fleet = fleet_now()
    assert (fleet.grows, fleet.limits) == (False, None)
    assert fleet.whole["CPU"] == fleet.nodes[0]["CPU"]


@pytest.mark.usefixtures("_autoscaler")
def test_an_autoscaler_that_does_not_say_what_it_may_add() -> None:
    fleet = fleet_now()
    assert (fleet.grows, fleet.limits, fleet.types) == (True, None, ())


@pytest.mark.usefixtures("_autoscaler")
def test_an_autoscaler_that_says_what_it_may_add() -> None:
    config = autoscaler_pb2.ClusterConfig()
    for resources, count in (({"CPU": 16, "GPU": 8}, 4), ({"CPU": 32}, -1)):
        group = config.node_group_configs.add(max_count=count)
        group.resources.update(resources)
    internal_kv._internal_kv_put(
        b"__autoscaler_cluster_config", config.SerializeToString(), namespace=AUTOSCALER
    )
    fleet = fleet_now()
    assert fleet.grows
    assert fleet.whole["GPU"] == 32
    assert fleet.types == [({"CPU": 16.0, "GPU": 8.0}, 4), ({"CPU": 32.0}, sys.maxsize)]
