"""`rayft rate` as people use it: the server in a process of its own, and a rater's way into the page."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from tests.ranks import free_port


class Page:
    """`rayft rate` in a process of its own."""

    def __init__(self, folder: Path, *arguments: str, port: int | None = None) -> None:
        self.folder, self.port = folder, port or free_port()
        self.url = f"http://127.0.0.1:{self.port}/"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "rayft.cli", "rate", str(folder), "--port", str(self.port), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                urllib.request.urlopen(self.url, timeout=2).read()
                return
            except OSError:
                assert self.process.poll() is None, self.process.stdout.read()  # type: ignore[union-attr]
                time.sleep(0.1)
        raise AssertionError(f"{self.url} did not answer in 60 s")

    def stop(self, how: signal.Signals = signal.SIGINT) -> str:
        """What it printed."""
        if self.process.poll() is None:
            self.process.send_signal(how)
        return self.process.communicate(timeout=30)[0]

    def post(self, path: str, body: Any, **headers: str) -> tuple[int, Any]:
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json", **headers}
        )
        try:
            with urllib.request.urlopen(request, timeout=10) as response:
                return response.status, json.loads(response.read())
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()


def enter(browser: Any, page: Page, name: str = "ann") -> Any:
    tab = browser.new_context().new_page()
    tab.set_default_timeout(15_000)
    tab.goto(page.url)
    tab.fill("#name", name)
    tab.click("text=Begin")
    tab.wait_for_selector("#rating")
    return tab
