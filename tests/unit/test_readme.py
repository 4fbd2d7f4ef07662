"""What READMEs say holds: a test that `tests/README.md` names is there, `jobs/README.md` has every method's own choices."""

from __future__ import annotations

import re

import pytest

from rayft.spec import METHODS, Rl
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


def test_what_a_method_sets_is_told() -> None:
    text = (ROOT / "jobs" / "README.md").read_text().split("## Learning from rewards")[1].split("\n\n")[2]
    header, _, *rows = [[cell.strip(" `") for cell in row.strip("|").split("|")] for row in text.splitlines()]
    assert header[1:] == list(METHODS)
    told = {row[0]: row[1:] for row in rows}
    for number, method in enumerate(METHODS):
        rl = Rl().filled(method)
        wanted = {name: _told(getattr(rl, name), name, rl) for name in told}
        assert {name: cells[number] for name, cells in told.items()} == wanted, method
    assert set().union(*METHODS.values()) <= told.keys()


def _told(value: object, name: str, rl: Rl) -> str:
    if value is None or (name in ("kl_in", "kl_estimator") and not rl.kl_coef):
        return "-"
    return (
        {True: "yes", False: "no"}[value]
        if isinstance(value, bool)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )
