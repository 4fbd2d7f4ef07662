"""Stands where Ray would start Python for a worker: has the zygote fork one, and stays until it ends. Imports as little as it can."""

import json
import os
import socket
import sys


def main() -> None:
    arguments, folder = sys.argv[1:], os.environ.get("RAYFT_TEST_ZYGOTE", "")
    server = socket.socket(socket.AF_UNIX)
    try:
        server.connect(os.path.join(folder, "socket"))
    except OSError:  # it is gone, with the tests that started it
        os.execv(sys.executable, [sys.executable, *arguments])
    wanted = {"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd()}
    payload = json.dumps(wanted).encode()
    socket.send_fds(server, [len(payload).to_bytes(8, "big")], [0, 1, 2])
    server.sendall(payload)
    child = int.from_bytes(server.recv(8), "big")
    # So that whoever looks for what is below this process finds it.
    with open(os.path.join(folder, str(os.getpid())), "w") as file:
        file.write(str(child))
    server.recv(1)  # nothing ever comes; it ends with the worker


main()
