"""Processes that start again: what they were told before is told once, and what was asked of them is answered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray

from rayft.rlhf.group import Group, RoleDied

pytestmark = pytest.mark.slow


class Frail:
    """Dies in the calls that a file names, once each; counts what it is asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._asked: list[str] = []

    def build(self) -> int:
        return self._do("build")

    def take(self, number: int) -> int:
        return self._do("take") + number

    def work(self) -> list[str]:
        self._do("work")
        return self._asked

    def _do(self, what: str) -> int:
        self._asked.append(what)
        deadly = self._folder / what
        if deadly.exists():
            deadly.unlink()
            import os

            os._exit(1)
        return len(self._asked)


def group(folder: Path, restarts: int = 3) -> tuple[Group, list[str]]:
    told: list[str] = []

    def make(_: int) -> Any:
        return ray.remote(Frail).options(num_cpus=0).remote(folder)

    return Group("frail", make, 1, restarts=restarts, restart_s=60.0, tell=told.append), told


@pytest.mark.parametrize("deadly", ["build", "take", "work"])
def test_each_call_is_made_once_on_the_process_that_starts_again(
    deadly: str, tmp_path: Path, local_ray: None
) -> None:
    (tmp_path / deadly).touch()
    made, told = group(tmp_path)
    made.keep("build")
    assert made.call("build", timeout_s=60) == [1]
    made.keep("take", 10)
    # A time-out for the work itself, shorter than starting again takes.
    assert made.call("take", 10, timeout_s=60) == [12]
    assert made.call("work", timeout_s=5) == [["build", "take", "work"]]
    [message] = told
    assert f"A process of the role frail died in `{deadly}`" in message
    made.kill()


def test_after_so_many_restarts_it_is_told(tmp_path: Path, local_ray: None) -> None:
    (tmp_path / "work").touch()
    made, _ = group(tmp_path, restarts=0)
    with pytest.raises(RoleDied, match="died in `work`") as caught:
        made.call("work", timeout_s=60)
    assert caught.value.role == "frail"
    made.kill()
