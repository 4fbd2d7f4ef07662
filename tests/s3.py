"""S3 for tests: a moto server over HTTP in a process of its own, and a proxy that makes it misbehave.

Fixtures: `s3_bucket` is the name of a fresh bucket, with the AWS variables of this process (and of what it
starts) pointing at the server; with `s3_proxy` they point at the proxy in front of it.
"""

from __future__ import annotations

import http.client
import logging
import os
import socket
import struct
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import unquote, urlsplit

import pytest

from tests.shared import ROOT

Kind = Literal[
    "slow_down",  # 503 SlowDown, nothing forwarded
    "slow",  # forwarded after `seconds`
    "throttled",  # forwarded; the answer takes `seconds` more for every MB of it
    "reset",  # the connection is reset before anything is forwarded
    "lost_response",  # forwarded and done, then the connection is reset
    "flipped_response",  # one bit of the body is another, and nothing else tells
    "truncated_response",  # half of the promised body, then the connection ends
    "truncated_request",  # half of the request's body is read, then the connection is reset
    "torn_write",  # half of the request's body is stored, and confirmed
    "full",  # 507 XMinioStorageFull
    "denied",  # 403 AccessDenied
    "no_such_upload",  # 404 NoSuchUpload: some services answer so to the second completion of an upload
    "unconditional",  # forwarded without its If-None-Match: a service that ignores it
]
_ERRORS = {
    "slow_down": (503, "SlowDown", "Please reduce your request rate."),
    "full": (507, "XMinioStorageFull", "Storage backend has reached its minimum free drive threshold."),
    "denied": (403, "AccessDenied", "Access Denied."),
    "no_such_upload": (404, "NoSuchUpload", "The specified multipart upload does not exist."),
}
_TIMEOUT_S = 60


@dataclass
class Fault:
    """What happens to the next `times` requests (None: all) of this method whose path and query contain `part`."""

    kind: Kind
    method: str = ""
    part: str = ""
    times: int | None = None
    seconds: float = 0.0


@dataclass
class FaultyProxy:
    """An HTTP proxy before the S3 server at `target` that lets faults happen. `hits` counts them by kind."""

    target: str
    faults: list[Fault] = field(default_factory=list)
    hits: dict[str, int] = field(default_factory=dict)
    endpoint: str = ""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(
        self, kind: Kind, method: str = "", part: str = "", times: int | None = None, seconds: float = 0.0
    ) -> None:
        """Let a fault happen from now on."""
        with self._lock:
            self.faults.append(Fault(kind, method, part, times, seconds))

    def clear(self) -> None:
        """No more faults."""
        with self._lock:
            self.faults.clear()

    def take(self, method: str, path: str) -> Fault | None:
        """The fault for this request, counted, or None."""
        with self._lock:
            for fault in self.faults:
                if fault.method in ("", method) and fault.part in unquote(path) and fault.times != 0:
                    fault.times = None if fault.times is None else fault.times - 1
                    self.hits[fault.kind] = self.hits.get(fault.kind, 0) + 1
                    return fault
        return None


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64
    proxy: FaultyProxy


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except ConnectionError:  # the client gave up, or a fault closed the connection
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self) -> None:
        fault = self.server.proxy.take(self.command, self.path)
        kind = fault.kind if fault else None
        length = int(self.headers.get("Content-Length") or 0)
        if kind == "truncated_request":
            self.rfile.read(length // 2)
        if kind in ("reset", "truncated_request"):
            self._reset()
            return
        body = self.rfile.read(length)
        if kind in _ERRORS:
            self._error(*_ERRORS[kind])
            return
        if kind == "torn_write":
            body = body[: len(body) // 2]
        if kind == "slow" and fault:
            time.sleep(fault.seconds)
        status, headers, content = self._forward(body, conditional=kind != "unconditional")
        if kind == "flipped_response":
            content = bytes([content[0] ^ 1]) + content[1:]
        if kind == "throttled" and fault:
            time.sleep(fault.seconds * len(content) / 1e6)
        if kind == "lost_response":
            self._reset()
            return
        self.send_response(status)
        for name, value in headers:
            if name.lower() not in ("transfer-encoding", "connection", "content-length", "server", "date"):
                self.send_header(name, value)
        promised = next(
            (value for name, value in headers if name.lower() == "content-length"), str(len(content))
        )
        self.send_header("Content-Length", promised if self.command == "HEAD" else str(len(content)))
        self.end_headers()
        if kind == "truncated_response":
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
        else:
            self.wfile.write(content)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _answer

    def _forward(self, body: bytes, *, conditional: bool) -> tuple[int, list[tuple[str, str]], bytes]:
        target = urlsplit(self.server.proxy.target)
        skipped = {"expect", "connection", "content-length"} | (set() if conditional else {"if-none-match"})
        headers = {name: value for name, value in self.headers.items() if name.lower() not in skipped}
        connection = http.client.HTTPConnection(target.hostname or "", target.port, timeout=_TIMEOUT_S)
        try:
            connection.request(self.command, self.path, body or None, headers)
            response = connection.getresponse()
            return response.status, response.getheaders(), response.read()
        finally:
            connection.close()

    def _error(self, status: int, code: str, message: str) -> None:
        content = (
            f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
        )
        self.send_response(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _reset(self) -> None:
        """Close with a TCP reset instead of a clean end."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        socket.close(
            self.connection.detach()
        )  # a plain close waits for the handler's file objects and ends cleanly
        self.close_connection = True


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """Endpoint URL of a moto server, in a process that ends with its standard input: also when pytest is killed."""
    pytest.importorskip("moto.server")
    command = [sys.executable, "-m", "tests.s3"]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin
        assert process.stdout
        endpoint = process.stdout.readline().strip()
        assert endpoint.startswith("http"), "the moto server did not start"
        yield endpoint
        process.stdin.close()
        process.wait(_TIMEOUT_S)


def aws_variables(endpoint: str) -> dict[str, str]:
    """What whoever asks the server has in its environment."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


@pytest.fixture
def s3_bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of a fresh bucket; the AWS variables point at its server."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in aws_variables(s3_server).items():
        monkeypatch.setenv(name, value)
    import boto3

    bucket = f"test-{uuid.uuid4().hex[:12]}"
    boto3.session.Session().client("s3").create_bucket(Bucket=bucket)
    return bucket


@pytest.fixture
def s3_proxy(s3_server: str, s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """A faulty proxy before the bucket's server; the AWS variables point at it."""
    with proxied(FaultyProxy(s3_server)) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy


@contextmanager
def proxied(proxy: FaultyProxy) -> Iterator[FaultyProxy]:
    """The proxy, listening."""
    server = _Server(("127.0.0.1", 0), _Handler)
    server.proxy = proxy
    proxy.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield proxy
    server.shutdown()
    server.server_close()
    thread.join(_TIMEOUT_S)


def _serve() -> None:
    """Run the moto server until standard input ends; the first line of output is its endpoint."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    print(f"http://{host}:{port}", flush=True)
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    _serve()
