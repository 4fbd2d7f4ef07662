"""A Ray cluster of several nodes on this machine: real nodes, each with its own processes and address."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

#: So that a node's death is noticed within seconds; Ray's own values take half a minute.
HEALTH_CHECK = {
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 5000,
    "health_check_failure_threshold": 5,
}
OBJECT_STORE = {"object_store_memory": 100 << 20}


def drain(address: str, node_id: str, seconds: float) -> None:
    """Announce to the cluster of that address that a node is taken away in so many seconds, as Ray does on a spot notice."""
    from ray._raylet import GcsClient
    from ray.core.generated import autoscaler_pb2

    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    deadline_ms = int((time.time() + seconds) * 1000)
    accepted, why = GcsClient(address=address).drain_node(node_id, reason, "spot notice", deadline_ms)
    assert accepted, why


class Nodes:
    """A head that takes no work, and nodes with one CPU each, on addresses of their own."""

    def __init__(self, cluster: Any, count: int) -> None:
        self._cluster = cluster
        #: Where a driver finds the cluster.
        self.address: str = cluster.address
        self._number = 1
        self._nodes = [self.add() for _ in range(count)]

    def add(self, **options: Any) -> Any:
        """One more; options are those of Ray's `add_node`."""
        self._number += 1
        address = f"127.0.0.{self._number}"
        given = {"num_cpus": 1, **OBJECT_STORE, **options}
        return self._cluster.add_node(node_ip_address=address, **given)

    def drain(self, node_id: str, seconds: float) -> None:
        """`drain` of a node of this cluster."""
        drain(self.address, node_id, seconds)

    @property
    def head(self) -> str:
        """Id of the head."""
        return str(self._cluster.head_node.node_id)

    @property
    def ids(self) -> list[str]:
        """Ids of the nodes for work that were there from the beginning."""
        return [str(node.node_id) for node in self._nodes]

    def holding(self, actor: str) -> list[str]:
        """Ids of the nodes, but the head, on which live actors of a class run."""
        return sorted(set(self._places(actor)) - {self.head})

    def alive(self, actor: str) -> int:
        """How many live actors of a class there are, as Ray counts: a process that is on its way out is none."""
        return len(self._places(actor))

    def _places(self, actor: str) -> list[str]:
        from ray._private.state import GlobalState
        from ray._raylet import GcsClientOptions

        state = GlobalState()
        state._initialize_global_state(
            GcsClientOptions.create(
                self.address, None, allow_cluster_id_nil=True, fetch_cluster_id_if_nil=False
            )
        )
        try:
            table = state.actor_table(None, None, "ALIVE").values()
            return [row["Address"]["NodeID"] for row in table if row["ActorClassName"] == actor]
        finally:
            state.disconnect()

    def take(self, node_id: str) -> None:
        """One of the first nodes dies, without a word."""
        node = next(node for node in self._nodes if node.node_id == node_id)
        self._nodes.remove(node)
        self._cluster.remove_node(node, allow_graceful=False)

    def take_last(self) -> None:
        """The last of the first nodes dies, without a word."""
        self._cluster.remove_node(self._nodes.pop(), allow_graceful=False)

    def add_again(self) -> None:
        """Another one in the place of one that died."""
        self._nodes.append(self.add())


@contextmanager
def ray_nodes(count: int) -> Iterator[Nodes]:
    """`count` nodes for work, for drivers in other processes."""
    os.environ["RAY_AUTH_MODE"] = "disabled"
    from ray.cluster_utils import Cluster
    from ray.experimental import internal_kv

    # Cluster takes the place of the Ray that this process may be connected to in Ray's internal store, and empties
    # that place when it ends.
    connected = internal_kv.internal_kv_get_gcs_client()
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "_system_config": HEALTH_CHECK, **OBJECT_STORE}
    )
    try:
        yield Nodes(cluster, count)
    finally:
        cluster.shutdown()
        if connected is not None:
            internal_kv._initialize_internal_kv(connected)
