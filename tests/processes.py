"""Which processes are below another one, also those that a zygote forked for it (`tests.warm`)."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import psutil


def below(process: psutil.Process) -> list[psutil.Process]:
    """Everything that the process has started, and what that has started. Raises psutil.NoSuchProcess if it is gone."""
    found = process.children(recursive=True)
    folder = os.environ.get("RAYFT_TEST_ZYGOTE")
    for client in list(found) if folder else []:
        with contextlib.suppress(OSError, ValueError, psutil.NoSuchProcess):
            fork = psutil.Process(int((Path(str(folder)) / str(client.pid)).read_text()))
            found += [fork, *fork.children(recursive=True)]
    return found
