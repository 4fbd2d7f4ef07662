"""Room that a trial's dead process left reserved.

Ray gives a placement group back when both the actor that made it and that actor's job are gone (creator_actor_dead and
creator_job_dead in gcs.proto). The job of a trial is the search's, which goes on, so the desk gives it back.
"""

from __future__ import annotations

import ray
from ray.util.placement_group import PlacementGroup, remove_placement_group


def give_back_leftovers() -> int:
    """Remove the placement groups of this job whose makers, actors of it, are dead; how many there were."""
    from ray._private.state import state
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData

    job = bytes.fromhex(ray.get_runtime_context().get_job_id())
    found = 0
    for packed in state._connect_and_get_accessor().get_placement_group_table():
        group = PlacementGroupTableData.FromString(packed)
        of_an_actor = not ray.ActorID(group.creator_actor_id).is_nil()
        if group.creator_job_id != job or not of_an_actor or not group.creator_actor_dead:
            continue
        if group.is_detached or group.state == PlacementGroupTableData.REMOVED:
            continue
        remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))
        found += 1
    return found
