"""Whose a submission is: what `rayft usage` groups by, told where the run cannot look."""

from __future__ import annotations

import getpass
import os


def submitter() -> dict[str, str]:
    """`user` and `team` for a submission's metadata: RAYFT_USER, else the login name; RAYFT_TEAM, left out where there is none."""
    found = {"user": os.environ.get("RAYFT_USER") or login_name(), "team": os.environ.get("RAYFT_TEAM", "")}
    return {name: text for name, text in found.items() if text}


def login_name() -> str:
    """Of who runs this process; nothing for a container's number without a name."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return ""
