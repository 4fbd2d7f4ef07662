"""The watch over the ranks: notices one that stands still, dumps every rank's stack, and has the group restarted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rayft.storage import Store

#: Loading a model or generating for an evaluation may be silent for longer than a training step.
SLOW_PHASE_S = 1800.0
ASK_TIMEOUT_S = 30.0
DUMP_TIMEOUT_S = 30


class Watch:
    """What the driver does while the workers train: show what the recorder has, and look at its heartbeats.

    A rank that is silent for `hang_timeout_s` in a training step (or half an hour in a slow phase) is a hang: stacks
    of all ranks go to `stacks/` in the run folder, then the silent ranks are killed, which Ray Train answers by
    restarting the group within its budget. `on_rows` gets new rows of the run log for display.
    """

    def __init__(
        self, recorder: Any, store: Store, hang_timeout_s: float, on_rows: Callable[[list[Any]], None]
    ) -> None:
        self.recorder, self.store = recorder, store
        self.hang_timeout_s = hang_timeout_s
        self.on_rows = on_rows
        self.interval_s = max(0.2, min(2.0, hang_timeout_s / 10))
        #: Ids of the nodes that ranks were on at the last look.
        self.nodes: set[str] = set()
        self._shown = 0

    def look(self) -> None:
        """Show new rows and act on ranks that stand still. Call it every `interval_s` seconds."""
        self.show_rows()
        self._look_at_ranks()

    def show_rows(self) -> None:
        """Hand rows that are new since the last look to `on_rows`."""
        try:
            rows = ray.get(self.recorder.since.remote(self._shown), timeout=ASK_TIMEOUT_S)
        except ray.exceptions.GetTimeoutError:
            return  # it waits for a storage that is slow; the next look shows them
        self._shown += len(rows)
        self.on_rows(rows)

    def _look_at_ranks(self) -> None:
        try:
            ranks = ray.get(self.recorder.silent.remote(), timeout=ASK_TIMEOUT_S)
        except ray.exceptions.GetTimeoutError:
            return
        self.nodes = {state["node"] for state in ranks.values()}
        hung = [
            rank
            for rank, state in ranks.items()
            if state["silent_s"]
            > (self.hang_timeout_s if state["phase"] == "train" else max(SLOW_PHASE_S, self.hang_timeout_s))
        ]
        if not hung:
            return
        longest = max(hung, key=lambda rank: ranks[rank]["silent_s"])
        step = ranks[longest].get("step")
        where = self._dump_stacks(ranks, step)
        message = (
            f"rank {longest} made no progress for {ranks[longest]['silent_s']:.0f} s at step {step}; "
            f"stacks of all ranks are in {where}; restarting the group "
            "(if it was only slow, raise cluster.hang_timeout_s)"
        )
        ray.get(self.recorder.event.remote("hang", message, step=step, ranks=hung), timeout=ASK_TIMEOUT_S)
        ray.get(self.recorder.forget_ranks.remote(), timeout=ASK_TIMEOUT_S)
        self._on_nodes({rank: ranks[rank] for rank in hung}, _kill)

    def _dump_stacks(self, ranks: dict[int, Any], step: Any) -> str:
        folder = f"stacks/step-{step}"
        for rank, text in self._on_nodes(ranks, _stack).items():
            self.store.put(f"{folder}/rank-{rank}.txt", text.encode())
        return self.store.where(folder)

    def _on_nodes(self, ranks: dict[int, Any], function: Callable[[int], str]) -> dict[int, str]:
        task = ray.remote(function)
        pending = {}
        for rank, state in ranks.items():
            there = NodeAffinitySchedulingStrategy(state["node"], soft=False)
            pending[rank] = task.options(num_cpus=0, scheduling_strategy=there, max_retries=0).remote(
                state["pid"]
            )
        results = {}
        for rank, ref in pending.items():
            try:
                results[rank] = ray.get(ref, timeout=2 * DUMP_TIMEOUT_S)
            except ray.exceptions.RayError as error:
                results[rank] = f"nothing could be done on its node: {type(error).__name__}: {error}"
        return results


def _stack(pid: int) -> str:
    """Stack of all threads of a process, also of one that is stopped; needs the right to trace it."""
    import shutil
    import subprocess
    import sys

    tool = shutil.which("py-spy", path=str(Path(sys.executable).parent)) or shutil.which("py-spy")
    if tool is None:
        return "py-spy is not installed on this node"
    try:
        # --nonblocking: pausing a process that is stopped already would wait for ever.
        done = subprocess.run(
            [tool, "dump", "--nonblocking", "--pid", str(pid)],
            capture_output=True,
            text=True,
            timeout=DUMP_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"py-spy gave no answer within {DUMP_TIMEOUT_S} s"
    return done.stdout or done.stderr


def _kill(pid: int) -> str:
    """End a process that answers to nothing else."""
    import os
    import signal

    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return "gone already"
    return "killed"
