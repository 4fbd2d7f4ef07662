"""Room that a dead process of a search left reserved is given back, on a real Ray."""

from __future__ import annotations

import os
import signal
import uuid

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from rayft.tune.desk import Desk
from rayft.tune.leftover import give_back_leftovers
from tests.runs import wait_until


class Trial:
    """Reserves room, as the process of a trial does."""

    def reserve(self) -> PlacementGroup:
        group = placement_group([{"CPU": 0.25}])
        assert group.wait(30)
        return group

    def pid(self) -> int:
        return os.getpid()


def state_of(group: PlacementGroup) -> str:
    return str(ray.util.placement_group_table(group)["state"])


def test_only_the_room_of_a_dead_process_is_given_back(local_ray: None) -> None:
    trial = ray.remote(Trial).options(num_cpus=0)
    dead, alive = trial.remote(), trial.remote()
    left, held, own = (
        *ray.get([dead.reserve.remote(), alive.reserve.remote()]),
        placement_group([{"CPU": 0.25}]),
    )
    assert own.wait(30)
    assert give_back_leftovers() == 0
    os.kill(ray.get(dead.pid.remote()), signal.SIGKILL)
    # Ray itself keeps it, and that is why this is there.
    wait_until("the dead process's room to be found", lambda: give_back_leftovers() == 1, timeout_s=30)
    wait_until("the room to be given back", lambda: state_of(left) == "REMOVED", timeout_s=30)
    assert (state_of(held), state_of(own)) == ("CREATED", "CREATED")
    assert give_back_leftovers() == 0
    ray.kill(alive)
    desk = Desk(None, 1.0, None, yielding=False)

    def after_an_arrival() -> bool:
        desk.arrive("t0000", uuid.uuid4().hex)
        return state_of(held) == "REMOVED"

    wait_until("the desk to give back what the trial's last process held", after_an_arrival, timeout_s=30)
    remove_placement_group(own)
