"""A process that has imported what Ray's workers import, and forks them: `python -m tests.warm.zygote FOLDER`.

Most of what a test on Ray costs is processes that import torch, transformers and DeepSpeed. A fork has them at once. What runs
in it is the same program with the same arguments and variables. It ends when its standard input does.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
from typing import Any

#: Not Ray itself, which reads the variables of its process when it is imported.
MODULES = (
    "pandas",
    "pyarrow",
    "deepspeed",
    "rayft.generate.hf",
    "rayft.learner.learner",
    "rayft.learner.sharded",
    "rayft.model.export",
    "rayft.model.load",
    "rayft.objectives.policy",
    "rayft.objectives.value",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
)


def main(folder: str) -> dict[str, Any]:
    """Serve until the standard input ends; in a fork, return what is wanted of it."""
    for name in MODULES:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    assert "ray" not in sys.modules
    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, f"{len(threads)} threads are running; a fork would lose all but one"
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks
    server = socket.socket(socket.AF_UNIX)
    server.bind(os.path.join(folder, "socket"))
    server.listen(64)
    print("ready", flush=True)
    while True:
        ready, _, _ = select.select([server, 0], [], [])
        if server not in ready:
            sys.exit(0)
        connection, _ = server.accept()
        wanted = fork(connection)
        if wanted is not None:
            server.close()
            return wanted
        connection.close()


def fork(connection: socket.socket) -> dict[str, Any] | None:
    """None in the zygote. The fork keeps the connection open, so that it ends with it."""
    size, streams, _, _ = socket.recv_fds(connection, 8, 3)
    payload = b""
    while len(payload) < int.from_bytes(size, "big"):
        payload += connection.recv(1 << 20)
    child = os.fork()
    if child:
        connection.sendall(child.to_bytes(8, "big"))
        for stream in streams:
            os.close(stream)
        return None
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setpgid(0, 0)  # Ray ends a worker with its group
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    wanted: dict[str, Any] = json.loads(payload)
    wanted["connection"] = connection
    return wanted


def become(wanted: dict[str, Any]) -> None:
    """Run the program as `python ARGUMENTS` does."""
    os.chdir(wanted["folder"])
    os.environ.clear()
    os.environ.update(wanted["environment"])
    arguments = [argument for argument in wanted["arguments"] if argument not in ("-S", "-s")]
    sys.argv = arguments
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = [
        os.path.dirname(arguments[0]),
        *paths,
        *(path for path in sys.path[1:] if path not in paths),
    ]
    runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    become(main(sys.argv[1]))
