"""A Ray cluster of several nodes on this machine: `python -m cluster.local --nodes 2`.

Every node is a real `ray start --block` with processes, ports and an address (127.0.0.x) of its own, as on a fleet; SIGTERM
to one drains it. The head takes no work. Token authentication is on: whoever wants in needs the file that is named.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import requests

#: Marks every process of a cluster, the workers' and drivers' included, wherever in the tree they end up.
MARK = "RAYFT_LOCAL_CLUSTER"
START_S = 180.0
#: What Ray says where a node did not register within its 30 s, as on a machine that is busy: it is started again.
TOO_SLOW = "timed out during startup"
ASK_S = 10.0


class ClusterFailed(RuntimeError):
    """The cluster did not start; the message says what it waited for, and what the nodes last said."""


@dataclass
class Node:
    """One `ray start --block`. arguments: what is its own on that command line."""

    ip: str
    process: subprocess.Popen[bytes]
    log: Path
    arguments: tuple[str, ...]


class LocalCluster:
    """Head and `nodes` nodes with `cpus` CPUs each. Use it as a context, or call `start` and `stop`.

    drain_s: how long a node that gets SIGTERM drains before it ends (Ray's own default is 30). environment: more
    variables for all nodes, such as PYTHONPATH.
    """

    def __init__(
        self,
        nodes: int = 2,
        cpus: int = 1,
        *,
        drain_s: float = 30.0,
        object_store_mb: int = 100,
        environment: dict[str, str] | None = None,
    ) -> None:
        self._count, self._cpus, self._store = nodes, cpus, object_store_mb << 20
        self._mark = uuid.uuid4().hex
        # Short: the paths of Ray's sockets below it must stay under 107 characters.
        self.folder = Path(tempfile.mkdtemp(prefix="rayft-", dir="/tmp"))
        self.token_path = self.folder / "token"
        self.token_path.touch(mode=0o600)
        self.token_path.write_text(secrets.token_urlsafe(32))
        self.head: Node | None = None
        self.nodes: list[Node] = []
        self._gcs_port, self._dashboard_port = free_port("127.0.0.2"), free_port("127.0.0.2")
        self._environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token_path),
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(drain_s),
            "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
            "RAY_agent_register_timeout_ms": "120000",
            MARK: self._mark,
            **(environment or {}),
        }

    @property
    def address(self) -> str:
        """Where jobs are submitted."""
        return f"http://127.0.0.2:{self._dashboard_port}"

    @property
    def gcs_address(self) -> str:
        """What RAY_ADDRESS is for a driver on this machine."""
        return f"127.0.0.2:{self._gcs_port}"

    @property
    def client_environment(self) -> dict[str, str]:
        """Variables for whoever submits jobs here."""
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.token_path)}

    def __enter__(self) -> LocalCluster:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()

    def start(self, timeout_s: float = START_S) -> None:
        """Start all nodes and wait until they take jobs. Raises ClusterFailed after `timeout_s`."""
        self.head = self._ray_start(
            "127.0.0.2",
            "--head",
            f"--port={self._gcs_port}",
            "--dashboard-host=127.0.0.2",
            f"--dashboard-port={self._dashboard_port}",
            f"--ray-client-server-port={free_port('127.0.0.2')}",
            "--num-cpus=0",
        )
        deadline = time.monotonic() + timeout_s
        self._wait("the job server of the head node", self._answers, deadline)
        for number in range(1, self._count + 1):  # one after another: each is busy on all cores for a while
            self.add_node()
            self._wait(f"node {number} of {self._count} to join", lambda: self._alive() > number, deadline)  # noqa: B023

    def add_node(self) -> Node:
        """Start one more node, without waiting for it."""
        ip = f"127.0.0.{3 + len(self.nodes)}"
        self.nodes.append(self._ray_start(ip, f"--address={self.gcs_address}", f"--num-cpus={self._cpus}"))
        return self.nodes[-1]

    def stop(self, patience_s: float = 60.0) -> None:
        """End every process of the cluster, by its id: all nodes at once with SIGTERM, so that they drain; then what is left."""
        started = self._started()
        for node in started:
            if node.process.poll() is None:
                node.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + patience_s
        for node in started:
            with contextlib.suppress(subprocess.TimeoutExpired):
                node.process.wait(timeout=max(0.1, deadline - time.monotonic()))
        for _ in range(10):  # what is killed may have started others meanwhile
            left = list(self.processes())
            if not left:
                break
            for process in left:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            psutil.wait_procs(left, timeout=5)
        for node in started:
            node.process.wait(timeout=10)
        shutil.rmtree(self.folder, ignore_errors=True)

    def processes(self) -> Iterator[psutil.Process]:
        """Live processes of the cluster, those that outlived their parents included."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == self._mark:
                    yield process

    def _ray_start(self, ip: str, *arguments: str) -> Node:
        log = self.folder / f"{ip}.log"
        # Each node its own, or one would unpack a job's files over those that another's processes stand in. Outside of
        # /tmp/ray, so that no other cluster's address file is overwritten.
        home = self.folder / ip.rpartition(".")[2]
        ports = {
            name: free_port(ip) for name in ("dashboard-agent-listen", "metrics-export", "runtime-env-agent")
        }
        command = [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"),
            *(f"--node-ip-address={ip}", f"--temp-dir={home}", f"--object-store-memory={self._store}"),
            *("--min-worker-port=0", "--max-worker-port=0", "--log-color=false"),
            *(f"--{name}-port={port}" for name, port in ports.items()),
            *arguments,
        ]
        with log.open("wb") as file:
            process = subprocess.Popen(
                command,
                env={**self._environment, "RAY_TMPDIR": str(home)},
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for this process, which then ends the nodes in order
            )
        return Node(ip, process, log, arguments)

    def _wait(self, what: str, ready: Callable[[], bool], deadline: float) -> None:
        began = time.monotonic()
        while not ready():
            for node in self._started():
                if node.process.poll() is None:
                    continue
                if TOO_SLOW not in node.log.read_text(errors="replace") or time.monotonic() > deadline:
                    raise ClusterFailed(
                        f"The node {node.ip} ended while waiting for {what}: {_tail(node.log)}"
                    )
                node.process = self._ray_start(node.ip, *node.arguments).process
            if time.monotonic() > deadline:
                last = self._started()[-1]
                raise ClusterFailed(
                    f"Waited {time.monotonic() - began:.0f} s for {what}. The node {last.ip} says: {_tail(last.log)}"
                )
            time.sleep(0.2)

    def _started(self) -> list[Node]:
        return [*([self.head] if self.head else []), *self.nodes]

    def _get(self, path: str) -> Any:
        headers = {"Authorization": f"Bearer {self.token_path.read_text()}"}
        try:
            answer = requests.get(self.address + path, headers=headers, timeout=ASK_S)
            return answer.json() if answer.status_code == 200 else None
        except (requests.RequestException, ValueError):
            return None

    def _answers(self) -> bool:
        return self._get("/api/jobs/") is not None

    def _alive(self) -> int:
        """Nodes that live, the head included."""
        found = self._get("/nodes?view=summary")
        summary = found["data"]["summary"] if found else []
        return sum(node["raylet"].get("state") == "ALIVE" for node in summary)


def free_port(ip: str) -> int:
    """A port of `ip` that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((ip, 0))
        return int(probe.getsockname()[1])


def _tail(log: Path, lines: int = 15) -> str:
    return "\n" + "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def main(argv: list[str] | None = None) -> int:
    """Start a cluster, say how to use it, and end it on SIGTERM or Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="python -m cluster.local", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--nodes", type=int, default=2, help="nodes beside the head (default 2)")
    parser.add_argument("--cpus", type=int, default=1, help="CPUs of each (default 1)")
    parser.add_argument(
        "--drain-s", type=float, default=30.0, help="seconds that a node drains at SIGTERM (default 30)"
    )
    parser.add_argument("--start-timeout-s", type=float, default=START_S)
    args = parser.parse_args(argv)
    if args.nodes < 1 or args.cpus < 1:
        parser.error("--nodes and --cpus must be 1 or more")

    def stop(number: int, _: FrameType | None) -> None:
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    # What is imported here is imported there.
    here = os.pathsep.join(filter(None, [str(Path.cwd()), os.environ.get("PYTHONPATH", "")]))
    cluster = LocalCluster(args.nodes, args.cpus, drain_s=args.drain_s, environment={"PYTHONPATH": here})
    try:
        print(f"Starting a head and {args.nodes} nodes ...", flush=True)
        cluster.start(args.start_timeout_s)
        print(
            f"Ready: a head without work and {args.nodes} nodes with {args.cpus} CPU each. In another shell:\n"
            f"  export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={cluster.token_path}\n"
            f"  rayft submit jobs/demo.yaml --address {cluster.address} storage=$PWD/runs\n"
            f"Dashboard: {cluster.address}; `rayft run` joins with RAY_ADDRESS={cluster.gcs_address}.\n"
            "Ctrl-C ends the cluster.",
            flush=True,
        )
        while cluster.head and cluster.head.process.poll() is None:
            time.sleep(0.5)
        print("The head has ended; ending the nodes.", flush=True)
        return 1
    except KeyboardInterrupt:
        return 0
    except ClusterFailed as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        # A second Ctrl-C must not leave nodes behind.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        print("Ending the cluster ...", flush=True)
        cluster.stop()


if __name__ == "__main__":
    sys.exit(main())
