"""Workers of Ray are forked for the tests of this folder, too."""

from __future__ import annotations

import pytest

from tests.warm.start import start


@pytest.fixture(scope="session", autouse=True)
def _forked_workers() -> None:
    start()
