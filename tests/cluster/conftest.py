"""One Ray for all tests of this folder that run in the test process."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.warm.start import start


@pytest.fixture(scope="session", autouse=True)
def _forked_workers() -> None:
    start()


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """A local Ray with two CPUs; only this one is shut down at the end."""
    os.environ["RAY_AUTH_MODE"] = "disabled"
    import ray

    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=100 << 20,
    )
    yield
    ray.shutdown()
