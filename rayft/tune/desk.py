"""The desk: one Ray actor beside the search's driver that says which trial may hold workers, and who does what all share.

Trials ask, and ask again until they hear yes; nobody blocks it. It ends with the driver, and nothing of it needs to be kept: what
must outlive it stands in the ledger.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import ray

from rayft.report.log import Row
from rayft.train.cluster import amounts
from rayft.tune.capacity import Resources, Size, free_now, trials_that_fit
from rayft.tune.leftover import give_back_leftovers
from rayft.tune.share import Fleet, fleet_now

ASK_TIMEOUT_S = 600.0  # a flush to S3 is tried again for minutes
#: A trial that has not asked for so long wants no slot any more.
ASKING_S = 20.0
#: The nodes there are need not be counted at every question.
COUNT_EVERY_S = 2.0
#: How the reason begins where the cluster is too small for a trial: nodes were lost, or its values ask for too much.
MORE_NODES = "more nodes"


@dataclass
class Slot:
    """A trial that may hold workers. placed: whether its run has begun, so that the cluster's books show them; hoping: whether it
    waits for nodes."""

    size: Size
    placed: bool = False
    hoping: bool = False


@dataclass
class Waiter:
    """A trial that wants a slot. seen: when it last asked."""

    size: Size
    seen: float


class Desk:
    """Slots in order of asking; a trial that has not asked for a while is out of the queue.

    share: of the cluster's resources for all trials together. max_concurrent: trials at once, or None. yielding: whether a trial
    gives way at its next report when others wait (schedulers that compare a population need all of it to move on).
    """

    def __init__(self, recorder: Any, share: float, max_concurrent: int | None, *, yielding: bool) -> None:
        self.recorder, self.share, self.max_concurrent = recorder, share, max_concurrent
        self.yielding = yielding
        self.stopping = ""
        self._tokens: dict[str, str] = {}
        self._slots: dict[str, Slot] = {}
        self._waiters: dict[str, Waiter] = {}
        self._reasons: dict[str, str] = {}
        self._shared: dict[str, tuple[str, float]] = {}
        self._done: set[str] = set()
        self._room: tuple[float, int] = (0.0, 0)

    # -- slots -------------------------------------------------------------------------------------------------

    def arrive(self, trial: str, token: str) -> None:
        """A process begins to drive the trial. What an earlier one held is free, and its late words are not heard."""
        if self._tokens.get(trial) != token:
            self._free(trial)
            self._tokens[trial] = token
            give_back_leftovers()

    def ask_slot(self, trial: str, size: Size) -> str:
        """ "" where the trial may start its workers now; else what it waits for."""
        if self.stopping:
            return self.stopping
        if trial in self._slots:
            return ""
        now = time.monotonic()
        waiter = self._waiters.setdefault(trial, Waiter(size, now))
        waiter.size, waiter.seen = size, now
        self._waiters = {name: one for name, one in self._waiters.items() if now - one.seen < ASKING_S}
        fleet = fleet_now()
        reason = self._missing(trial, size, fleet)
        if reason:
            if self._reasons.get(trial) != reason:
                self._reasons[trial] = reason
                self._tell({"event": "waiting", "trial": trial, "reason": reason})
            return reason
        del self._waiters[trial]
        need = self._without_room(size.bundles) if fleet.grows else ""
        self._slots[trial] = Slot(size, hoping=bool(need))
        self._reasons.pop(trial, None)
        if need:
            # The autoscaler adds nodes only for what is asked of Ray, so the trial asks, and is shown as waiting.
            self._tell(
                {"event": "waiting", "trial": trial, "reason": f"nodes that the autoscaler may add: {need}"}
            )
        else:
            self._tell({"event": "running", "trial": trial})
        return ""

    def placed(self, trial: str) -> None:
        """The trial's workers have their room."""
        if slot := self._slots.get(trial):
            if slot.hoping:
                self._tell({"event": "running", "trial": trial})
            slot.placed, slot.hoping = True, False

    def release(self, trial: str, token: str = "") -> None:
        """The trial's workers are gone, or it wants none any more. token: of the process that says so; "" where there is none."""
        if not token or self._tokens.get(trial) == token:
            self._free(trial)

    def _free(self, trial: str) -> None:
        """What the trial had not finished for all, somebody else does."""
        self._slots.pop(trial, None)
        self._waiters.pop(trial, None)
        self._reasons.pop(trial, None)
        self._shared = {key: held for key, held in self._shared.items() if held[0] != trial}

    def should_yield(self, trial: str) -> bool:
        """Whether the trial should give its slot to one that waits longer."""
        return self.yielding and trial in self._slots and bool(self._waiters)

    def room(self, size: Size) -> int:
        """How many trials of such a size may be under way."""
        counted, room = self._room
        if time.monotonic() - counted > COUNT_EVERY_S:
            room = fleet_now().room(size, self.share)
            self._room = (time.monotonic(), room)
        return min(room, self.max_concurrent or room)

    def _missing(self, trial: str, size: Size, fleet: Fleet) -> str:
        asked = f"{len(size.bundles)} x {amounts(size.bundles[0])}"
        if not fleet.ever_holds(size, self.share):
            there = amounts({name: fleet.whole.get(name, 0.0) for name in size.bundles[0]})
            of_it = f", of which tune.share grants {self.share:g}" if self.share < 1 else ""
            return f"{MORE_NODES}: {asked}, and all there {'may be' if fleet.grows else 'are'} have {there}{of_it}"
        unfit = {name for name, reason in self._reasons.items() if reason.startswith(MORE_NODES)} - {trial}
        first = next(name for name in self._waiters if name not in unfit)
        if first != trial:
            return f"its turn, after {first}"
        if self.max_concurrent and len(self._slots) >= self.max_concurrent:
            return f"a slot: tune.max_concurrent is {self.max_concurrent}"
        if of_all := fleet.beyond(size, [slot.size for slot in self._slots.values()], self.share):
            return f"{asked}: {len(self._slots)} trials hold their part of {of_all}"
        need = self._without_room(size.bundles)
        coming = next((name for name, slot in self._slots.items() if slot.hoping), "")
        if fleet.grows:  # one at a time, so that no more wait for nodes than may come
            return f"its turn: nodes for {coming} come first" if need and coming else ""
        return need

    def _without_room(self, bundles: list[Resources]) -> str:
        """What is asked for and what is free, where the nodes there are have no room for it now; else ""."""
        give_back_leftovers()
        free = free_now()
        for slot in self._slots.values():
            if not slot.placed:
                # Preparing may take long. What the books show already is taken twice until its run has begun.
                _take(slot.size.bundles, free)
        if not trials_that_fit(bundles, free):
            there = amounts(
                {name: round(sum(node.get(name, 0.0) for node in free), 3) for name in bundles[0]}
            )
            return f"{len(bundles)} x {amounts(bundles[0])}, and {there} free"
        return ""

    # -- what all share ----------------------------------------------------------------------------------------

    def share_of(self, key: str, trial: str) -> str:
        """Who makes what `key` names: "yours", "done", or the trial that is at it."""
        if key in self._done:
            return "done"
        holder, _ = self._shared.setdefault(key, (trial, time.monotonic()))
        return "yours" if holder == trial else holder

    def made(self, key: str) -> None:
        """What `key` names is there for all."""
        self._done.add(key)
        self._shared.pop(key, None)

    # -- the search --------------------------------------------------------------------------------------------

    def stop(self, reason: str) -> None:
        """Every trial is to save and leave."""
        self.stopping = self.stopping or reason

    def look(self, trial: str) -> tuple[str, bool]:
        """For a trial at work: why to leave ("" if it need not), and whether it should give way."""
        return self.stopping, self.should_yield(trial)

    def tell(self, row: Row) -> None:
        """A row of the ledger, durable when this returns."""
        ray.get(self.recorder.row.remote({"kind": "trial", **row}), timeout=ASK_TIMEOUT_S)
        ray.get(self.recorder.flush.remote(), timeout=ASK_TIMEOUT_S)

    def _tell(self, row: Row) -> None:
        self.recorder.row.remote({"kind": "trial", **row})


def _take(bundles: list[Resources], free: list[dict[str, float]]) -> None:
    """Books the room of bundles that are being placed, where it is."""
    for bundle in bundles:
        for node in free:
            if all(node.get(name, 0.0) + 1e-9 >= amount for name, amount in bundle.items()):
                for name, amount in bundle.items():
                    node[name] -= amount
                break


def start_desk(recorder: Any, share: float, max_concurrent: int | None, *, yielding: bool) -> Any:
    """Start the desk on the driver's node; it ends with the driver."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(Desk).options(num_cpus=0, scheduling_strategy=here)
    return actor.remote(recorder, share, max_concurrent, yielding=yielding)
