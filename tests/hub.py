"""A small server that answers as the model hub does, for the few requests that a download makes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextlib.contextmanager
def serve_hub(repositories: dict[str, Path], gated: set[str]) -> Iterator[str]:
    """Serve each repository's folder; yields the endpoint for `HF_ENDPOINT`. `gated` ones are denied."""

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            parts = self.path.split("?")[0].strip("/").split("/")
            if parts[:2] == ["api", "models"]:
                self._answer_info("/".join(parts[2:4]), tree="tree" in parts[4:5])
            elif len(parts) > 4 and parts[2] == "resolve":
                self._answer_file("/".join(parts[:2]), "/".join(parts[4:]))
            else:
                self._answer(404, b"")

        do_HEAD = do_GET

        def _answer_info(self, repository: str, tree: bool) -> None:
            if not self._allowed(repository):
                return
            files = sorted(repositories[repository].iterdir())
            info: object = {
                "id": repository,
                "sha": COMMIT,
                "siblings": [{"rfilename": f.name} for f in files],
            }
            if tree:
                info = [
                    {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": COMMIT} for f in files
                ]
            self._answer(200, json.dumps(info).encode(), {"Content-Type": "application/json"})

        def _answer_file(self, repository: str, name: str) -> None:
            if not self._allowed(repository):
                return
            body = (repositories[repository] / name).read_bytes()
            self._answer(
                200, body, {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": COMMIT}
            )

        def _allowed(self, repository: str) -> bool:
            if repository in gated:
                self._answer(403, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"})
            elif repository not in repositories:
                self._answer(404, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "not found"})
            return repository in repositories and repository not in gated

        def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for key, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
