"""Where tests find the shared real data; they skip, saying why, where it is absent."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def shared_root() -> Path:
    """Folder of the shared data: `RAYFT_SHARED`, else `../shared` beside the repository."""
    return Path(os.environ.get("RAYFT_SHARED", ROOT.parent / "shared"))


def shared_data(name: str) -> Path:
    """Folder of one shared data set; skips the test where it is absent."""
    path = shared_root() / "data" / name
    if not path.is_dir():
        pytest.skip(f"shared data set {name!r} is not at {path} (set RAYFT_SHARED)")
    return path
