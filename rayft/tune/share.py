"""What the cluster has or may grow to, and how much of it the trials of a search may hold together."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from rayft.errors import ResourceError
from rayft.spec import Job
from rayft.train.cluster import amounts, may_grow
from rayft.tune.capacity import COUNTED, MOST, Resources, Size, nodes_now, sizes_of, total_of, trials_that_fit

#: What a count or an amount without a bound is in the autoscaler's configuration.
UNBOUNDED = -1


@dataclass(frozen=True)
class Fleet:
    """The cluster as trials may use it.

    nodes: resources of those that are there. grows: whether an autoscaler may add some. limits, types: the most that it may bring
    all nodes together to, and the kinds of nodes that it knows with how many there may be; None and empty where it does not say.
    """

    nodes: list[Resources]
    grows: bool = False
    limits: Resources | None = None
    types: Sequence[tuple[Resources, int]] = ()

    @property
    def whole(self) -> Resources:
        """What all nodes have together, those that may come among them."""
        there = {name: sum(node.get(name, 0.0) for node in self.nodes) for name in COUNTED}
        return {name: max(amount, (self.limits or {}).get(name, 0.0)) for name, amount in there.items()}

    def ever_holds(self, size: Size, share: float) -> bool:
        """Whether such a trial can run alone, within the share; true where the autoscaler does not say what it may add."""
        if self.grows and self.limits is None:
            return True
        if not self.by_share(size, share):
            return False
        # No more nodes of a kind than the trial has processes are of any use to it.
        coming = [dict(node) for node, count in self.types for _ in range(min(count, len(size.bundles)))]
        return any(trials_that_fit(size.bundles, nodes) for nodes in (self.nodes, coming))

    def by_share(self, size: Size, share: float) -> int:
        """How many such trials the share grants at once, each at the most that it may come to hold."""
        if self._unknown and share == 1.0:
            return MOST
        parts = [share * self.whole[name] / size.most[name] for name in COUNTED if size.most.get(name)]
        return max(int(self._always(share)), int(min(parts, default=MOST) + 1e-9))

    def room(self, size: Size, share: float) -> int:
        """How many such trials may be under way: with an autoscaler one more than the nodes hold, since it adds some only for what
        is asked for."""
        return min(trials_that_fit(size.bundles, self.nodes) + self.grows, self.by_share(size, share))

    def beyond(self, size: Size, held: Sequence[Size], share: float) -> str:
        """What of the share is taken where one more such trial is more than it grants beside those that are there; else ""."""
        if (self._unknown and share == 1.0) or (not held and self._always(share)):
            return ""
        wanted = total_of([size.most, *(one.most for one in held)])
        for name, amount in wanted.items():
            if name in COUNTED and amount > (granted := share * self.whole[name]) + 1e-9:
                return f"{granted:g} {name}"
        return ""

    @property
    def _unknown(self) -> bool:
        return self.grows and self.limits is None

    def _always(self, share: float) -> bool:
        """Whether one trial may run whatever it may come to hold: there is nobody else to leave something to, or it must ask for
        nodes before the share is a share of anything."""
        return share == 1.0 or self._unknown


def fleet_now() -> Fleet:
    """The cluster as it is, and as the autoscaler's configuration in Ray's internal store says that it may become."""
    nodes = nodes_now()
    if not may_grow():
        return Fleet(nodes)
    from ray._private.state import state

    limits = state.get_max_resources_from_cluster_config()
    if limits is None:
        return Fleet(nodes, grows=True)
    groups = state.get_cluster_config().node_group_configs
    types = [
        (
            {name: float(_bounded(amount)) for name, amount in group.resources.items()},
            _bounded(group.max_count),
        )
        for group in groups
    ]
    return Fleet(nodes, True, {name: float(amount) for name, amount in limits.items()}, types)


def _bounded(count: int) -> int:
    return sys.maxsize if count == UNBOUNDED else count


def refuse_no_trial(search: Job, share: float) -> None:
    """Raise ResourceError, with the arithmetic, where not even the smallest trial fits the cluster, what it may grow to, or the
    share of it."""
    fleet, sizes = fleet_now(), sizes_of(search)
    if any(fleet.ever_holds(size, share) for size in sizes):
        return
    bundles, most = sizes[0].bundles, sizes[0].most
    asked = f"{len(bundles)} x {amounts(bundles[0])}"
    if len({tuple(sorted(bundle.items())) for bundle in bundles}) > 1:
        asked = f"{amounts(total_of(bundles))} in {len(bundles)} processes"
    grown = f" and may come to hold {amounts(most)}" if most != total_of(bundles) else ""
    who = "a trial" if len(sizes) == 1 else "the smallest trial"
    there = "; ".join(amounts({name: node.get(name, 0.0) for name in COUNTED}) for node in fleet.nodes)
    may = f", and the autoscaler may bring it to {amounts(fleet.whole)}" if fleet.grows else ""
    of_it = f", and tune.share grants {share:g} of it" if share < 1 else ""
    raise ResourceError(
        f"No trial fits: {who} asks for {asked}{grown}; the cluster's nodes have {there or 'nothing'}{may}{of_it}.",
        "Ask for fewer workers or less per worker (cluster, placement), raise tune.share, or add nodes.",
    )
