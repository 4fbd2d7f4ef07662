"""Run a function on several gloo ranks, each a fresh process, and collect what each returns.

The processes are real ranks of a torch process group; they are killed when the time-out passes.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import shutil
import socket
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


def free_port() -> int:
    """A TCP port on loopback that was free a moment ago."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 240) -> list[Any]:
    """Call `function(*args)` on every rank of a new gloo group; results in rank order. Fails with a rank's traceback."""
    context = multiprocessing.get_context("spawn")
    results: Any = context.Queue()
    # They meet in a file: a port that was free a moment ago may be another test's by now.
    meeting = Path(tempfile.mkdtemp(prefix="rayft-ranks-")) / "store"
    ranks = [
        context.Process(target=_rank, args=(function, rank, world_size, meeting, args, results), daemon=True)
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    try:
        collected: dict[int, Any] = {}
        while len(collected) < world_size:
            try:
                rank, value, error = results.get(timeout=timeout_s)
            except queue.Empty:
                raise AssertionError(
                    f"ranks {set(range(world_size)) - set(collected)} gave nothing in {timeout_s} s"
                ) from None
            if error:
                raise AssertionError(f"rank {rank} failed:\n{error}")
            collected[rank] = value
        return [collected[rank] for rank in range(world_size)]
    finally:
        for process in ranks:
            process.join(timeout=5)
            process.kill()
        shutil.rmtree(meeting.parent, ignore_errors=True)


def _rank(
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    meeting: Path,
    args: tuple[Any, ...],
    results: Any,
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    try:
        import torch

        torch.set_num_threads(1)
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{meeting}", rank=rank, world_size=world_size
        )
        results.put((rank, function(*args), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
