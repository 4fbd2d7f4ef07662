"""What `tests/README.md` says is shown by a test is: the file is there, and the test in it."""

from __future__ import annotations

import re

import pytest

from tests.shared import ROOT

NAMED = sorted(
    set(
        re.findall(
            r"`((?:unit|cluster|fault)/[\w{},]+\.py)(?:::(\w+))?`", (ROOT / "tests" / "README.md").read_text()
        )
    )
)


def files(pattern: str) -> list[str]:
    """`a_{b,c}.py` as `a_b.py` and `a_c.py`."""
    if not (choice := re.search(r"\{([\w,]+)\}", pattern)):
        return [pattern]
    return [pattern.replace(choice[0], one) for one in choice[1].split(",")]


@pytest.mark.parametrize(("pattern", "name"), NAMED)
def test_a_named_test_is_there(pattern: str, name: str) -> None:
    for file in files(pattern):
        source = (ROOT / "tests" / file).read_text()
        assert not name or f"\ndef {name}(" in source
