"""The version that submitted a run against the version that runs it: a job file means what the submitter's rayft says it means."""

from __future__ import annotations

from collections.abc import Mapping

from rayft import __version__
from rayft.errors import JobError

#: Set in the environment of a submitted run; `rayft run` looks at it first.
SUBMITTER_VERSION = "RAYFT_SUBMITTER_VERSION"


def refuse_other_version(environment: Mapping[str, str]) -> None:
    """Raise JobError where the run was submitted by another version of rayft than this one."""
    submitter = environment.get(SUBMITTER_VERSION)
    if submitter and submitter != __version__:
        raise JobError(
            f"The run was submitted by rayft {submitter}, and here is rayft {__version__}.",
            f"Submit it with rayft {__version__}, or have the cluster (the profile's image) run {submitter}.",
        )
