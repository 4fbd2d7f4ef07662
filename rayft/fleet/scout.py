"""The Ray actor of a preflight: one on every node looks at its node, and together they measure the network between them."""

from __future__ import annotations

import os
import socket
import statistics
import time
from typing import Any

from rayft.fleet.probe import probe

#: Payload of a measurement between two nodes or all of them.
NETWORK_BYTES = 16 << 20
REPEATS = 3
#: Rounds in which every node meets another one; more would tell no more about a node.
ROUNDS = 4
#: After this long a node that does not take part is given up.
JOIN_TIMEOUT_S = 20.0


class Scout:
    """One node's part of a preflight. Answers from several threads, so that a part that hangs stops no other."""

    def clock(self) -> float:
        """Seconds since 1970 here."""
        return time.time()

    def look(self, storage: str | None, marker: str, gpus: float) -> dict[str, Any]:
        """See `probe`."""
        return probe(storage, marker, gpus)

    def address(self) -> tuple[str, int]:
        """Where the others may find this node."""
        import ray

        with socket.socket() as listening:
            listening.bind(("", 0))
            return ray.util.get_node_ip_address(), listening.getsockname()[1]

    def network(self, rank: int, address: tuple[str, int], size: int, backend: str) -> dict[str, Any]:
        """All-reduce over all nodes, then exchanges with single ones, as `pairings` says.

        Returns `all_reduce`, bus bandwidth in bytes per second as nccl-tests count it (2 (n-1)/n x bytes / time), and `links`,
        bytes per second to each node met.
        """
        if backend == "nccl":
            os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        from datetime import timedelta

        import torch
        import torch.distributed as dist

        device = "cuda:0" if backend == "nccl" else "cpu"
        patience = timedelta(seconds=JOIN_TIMEOUT_S)
        store = dist.TCPStore(address[0], address[1], size, rank == 0, timeout=patience)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=patience)
        try:
            sent = torch.ones(NETWORK_BYTES // 4, device=device)
            received = torch.empty_like(sent)

            def together() -> None:
                dist.all_reduce(sent)
                sent.fill_(1.0)

            seconds = self._timed(together, device)
            bandwidth, links = 2 * (size - 1) / size * NETWORK_BYTES / seconds, {}
            for pairs in pairings(size):
                dist.barrier()
                other = next((b if a == rank else a for a, b in pairs if rank in (a, b)), None)
                if other is None:
                    continue

                def exchange(other: int = other) -> None:
                    for work in dist.batch_isend_irecv(
                        [dist.P2POp(dist.isend, sent, other), dist.P2POp(dist.irecv, received, other)]
                    ):
                        work.wait()

                links[other] = NETWORK_BYTES / self._timed(exchange, device)
            dist.barrier()
            return {"all_reduce": bandwidth, "links": links}
        finally:
            dist.destroy_process_group()

    def _timed(self, work: Any, device: str) -> float:
        """Median seconds of one call, after one that does not count."""
        import torch

        seconds = []
        for _ in range(1 + REPEATS):
            began = time.perf_counter()
            work()
            if device != "cpu":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
        return statistics.median(seconds[1:])


def pairings(size: int, rounds: int = ROUNDS) -> list[list[tuple[int, int]]]:
    """Who meets whom, round by round: in every round each node meets at most one other, and nobody the same one twice.

    The circle method of tournaments. With an odd number one node rests in every round, so there is a round more.
    """
    players: list[int | None] = list(range(size)) + ([None] if size % 2 else [])
    found = []
    for _ in range(min(len(players) - 1, rounds + size % 2)):
        half = len(players) // 2
        pairs = zip(players[:half], reversed(players[half:]), strict=True)
        found.append([(min(a, b), max(a, b)) for a, b in pairs if a is not None and b is not None])
        players = [players[0], players[-1], *players[1:-1]]
    return found
