"""Checkpoints that belong to no world size, and the lease that keeps a run to one writer.

Each rank hands a `CheckpointWriter` the fragments it owns; rank 0 commits them with a manifest, written last.
A `CheckpointReader` gives any range of any tensor to any number of ranks. `Lease` decides who may write and
which commits count; `latest` finds what to resume from; `retain` deletes what is old. No torch here: tensors
are 1-D numpy arrays, bfloat16 as uint16 with the dtype's name beside it.
"""

from rayft.checkpoint.copy import copy_checkpoint
from rayft.checkpoint.fragments import Fragment, storage_dtype
from rayft.checkpoint.lease import Lease
from rayft.checkpoint.manifest import CorruptCheckpoint, Manifest
from rayft.checkpoint.reader import CheckpointReader, Range
from rayft.checkpoint.records import Lineage, lineage
from rayft.checkpoint.retention import retain
from rayft.checkpoint.survey import committed_steps, latest
from rayft.checkpoint.writer import CheckpointWriter

__all__ = [
    "CheckpointReader",
    "CheckpointWriter",
    "CorruptCheckpoint",
    "Fragment",
    "Lease",
    "Lineage",
    "Manifest",
    "Range",
    "committed_steps",
    "copy_checkpoint",
    "latest",
    "lineage",
    "retain",
    "storage_dtype",
]
