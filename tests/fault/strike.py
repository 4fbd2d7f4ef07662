"""`rayft run JOB` that loses a process at given moments: `python -m tests.fault.strike JOB STRIKES LOG`.

STRIKES is a JSON file, a list of [whom, when], which gets shorter with every strike: whom is a role, `node` (one that a rank of the
policy is on) or `driver`, when is one of the phases below. The first comes before there is a checkpoint, unless its phase is the
writing of one; between two strikes a step is taken and a checkpoint is committed, so that each goes back to another one.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from rayft.checkpoint import latest
from rayft.cli import main
from rayft.rlhf import group, loop
from tests.processes import below

#: Phase -> the method whose call is a sign of it.
PHASES = {
    "generation": "generate",
    "update": "update",
    "sync": "ship",
    "checkpoint": "save",
    "scoring": "logprobs",
}
ACTORS = {
    "policy": "ray::PolicyActor",
    "critic": "ray::CriticActor",
    "reference": "ray::ReferenceActor",
    "reward": "ray::RewardActor",
    "rollout": "ray::EngineActor",
}


def processes(sign: str) -> list[psutil.Process]:
    """Live processes with a sign in their command line, below the one that started this: its cluster's, not another test's."""
    found = []
    for process in psutil.Process(os.getppid()).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if sign in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def kill_node_of(process: psutil.Process) -> None:
    """SIGKILL a process's raylet and everything below it."""
    raylet, there = next(
        (raylet, there) for raylet in processes("raylet/raylet") if process in (there := below(raylet))
    )
    for one in [raylet, *there]:
        with contextlib.suppress(psutil.Error):
            one.kill()


class Striker:
    """Strikes at the first call of the phase that is up, once a step has been taken and a checkpoint been committed since the last
    strike, and what it took is there again."""

    def __init__(self, file: Path, log: Path) -> None:
        self._file, self._log = file, log
        self._left: list[list[str]] = json.loads(file.read_text())
        self._struck = bool(log.read_text())
        self._steps = 0
        self._saved: int | None = None
        self._gone_back_to: int | None = None
        self._unknown = self._struck

    def step(self, saved: int | None) -> None:
        """A step is done; saved: that of the newest checkpoint."""
        self._steps += 1
        self._saved = saved
        if self._unknown:  # a driver that was started again: nothing is committed in its first step
            self._gone_back_to, self._unknown = saved, False

    def called(self, method: str) -> None:
        """A method was called somewhere."""
        if not self._left or self._steps == 0 or PHASES[self._left[0][1]] != method:
            return
        if self._struck and self._saved == self._gone_back_to:
            return
        whom, when = self._left[0]
        if whom in ACTORS and not processes(ACTORS[whom]):
            return  # the one before has taken it, and nobody has needed it since
        self._left.pop(0)
        self._steps, self._struck, self._gone_back_to = 0, True, self._saved
        self._file.write_text(json.dumps(self._left))
        with self._log.open("a") as file:
            file.write(f"{whom} {when}\n")
        time.sleep(0.02)
        if whom == "driver":
            os.kill(os.getpid(), signal.SIGKILL)
        if whom == "node":
            kill_node_of(processes(ACTORS["policy"])[-1])
        else:
            processes(ACTORS[whom])[-1].kill()


def install(striker: Striker) -> None:
    """Have the striker see every call and every step."""
    ask, record = group.Task.ask, loop.Loop._record

    def asking(self: group.Task) -> None:
        ask(self)
        striker.called(self.method)

    def recording(self: loop.Loop, *arguments: Any) -> None:
        record(self, *arguments)
        striker.step(latest(self.store))

    group.Task.ask = asking  # type: ignore[method-assign]
    loop.Loop._record = recording  # type: ignore[method-assign]


if __name__ == "__main__":
    job, strikes, log = sys.argv[1:]
    install(Striker(Path(strikes), Path(log)))
    sys.exit(main(["run", job]))
