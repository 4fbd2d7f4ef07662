"""Names of what a run's checkpoints consist of.

    checkpoints/step-40/0000007-rank-00000-of-00002.bin    the data of one rank: its fragments, one after the other
    checkpoints/step-40/0000007-rank-00000-of-00002.json   that rank's index, published after its data
    checkpoints/step-40/manifest-0000007.json              the commit
    lease/0000007.json                                     a record of the lease
    lease/heartbeat.json                                   a counter that moves while the holder lives

0000007 is the epoch: every name carries it, so that a stale writer can never overwrite what a later one wrote.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

CHECKPOINTS = "checkpoints"
LEASE = "lease"
HEARTBEAT = f"{LEASE}/heartbeat.json"

_RANK_FILE = r"(?P<epoch>\d{7,})-rank-\d{5,}-of-\d{5,}\.(?:bin|json)"
_MANIFEST = r"manifest-(?P<committed>\d{7,})\.json"
_OBJECT = re.compile(rf"{CHECKPOINTS}/step-(?P<step>\d+)/(?:{_RANK_FILE}|{_MANIFEST})")
_RECORD = re.compile(rf"{LEASE}/(\d{{7,}})\.json")


@dataclass(frozen=True)
class CheckpointObject:
    """What a key in the checkpoints folder says about itself."""

    step: int
    epoch: int
    is_manifest: bool


def folder(step: int) -> str:
    """Folder of one step's checkpoint."""
    return f"{CHECKPOINTS}/step-{step}"


def data_name(epoch: int, rank: int, world_size: int) -> str:
    """Name, in the step's folder, of one rank's data."""
    return f"{epoch:07d}-rank-{rank:05d}-of-{world_size:05d}.bin"


def index_name(epoch: int, rank: int, world_size: int) -> str:
    """Name, in the step's folder, of one rank's index."""
    return f"{epoch:07d}-rank-{rank:05d}-of-{world_size:05d}.json"


def renamed(name: str, epoch: int) -> str:
    """Name of a rank's data or index as of another epoch."""
    return f"{epoch:07d}-{name.partition('-')[2]}"


def manifest_key(step: int, epoch: int) -> str:
    """Key of the manifest that commits `step`."""
    return f"{folder(step)}/manifest-{epoch:07d}.json"


def record_key(epoch: int) -> str:
    """Key of the lease record that opened `epoch`."""
    return f"{LEASE}/{epoch:07d}.json"


def parse_object(key: str) -> CheckpointObject | None:
    """What `key` is, or None if it belongs to no checkpoint."""
    match = _OBJECT.fullmatch(key)
    if match is None:
        return None
    committed = match["committed"]
    return CheckpointObject(int(match["step"]), int(committed or match["epoch"]), committed is not None)


def parse_record(key: str) -> int | None:
    """The epoch of a lease record, or None if `key` is none."""
    match = _RECORD.fullmatch(key)
    return int(match[1]) if match else None
