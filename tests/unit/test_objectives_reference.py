"""What is kept of the reference: the run's own values first, whatever the cache holds, and nothing is written twice."""

from __future__ import annotations

from pathlib import Path

import pytest

from rayft.objectives import reference
from rayft.objectives.reference import ReferenceLogprobs
from rayft.storage import LocalStore


def made(folder: Path, run: str) -> ReferenceLogprobs:
    found = ReferenceLogprobs(LocalStore(folder / "cache"), LocalStore(folder / run), "key")
    found.agree(found.load())
    return found


def test_another_run_reads_the_cache_and_a_resumed_one_its_own(tmp_path: Path) -> None:
    first = made(tmp_path, "first")
    first.add([(1,), (2,), (1, 2)], [-1.0, -2.0, -3.5])
    first.save(last=True)
    second = made(tmp_path, "second")
    assert second.get([(1, 2), (2,)]).tolist() == [-3.5, -2.0]
    # Another run's rounding, which came into the cache by a race.
    other = ReferenceLogprobs(LocalStore(tmp_path / "cache"), LocalStore(tmp_path / "other"), "key")
    other.agree({})
    other.add([(1,), (3,)], [-1.25, -4.0])
    other.save(last=True)
    again = made(tmp_path, "first")
    assert again.get([(1,), (3,)]).tolist() == [-1.0, -4.0]
    assert len(again) == 4


def test_what_is_known_stays(tmp_path: Path) -> None:
    found = made(tmp_path, "run")
    found.add([(1,)], [-1.0])
    found.add([(1,), (2,)], [-9.0, -2.0])
    assert found.get([(1,), (2,)]).tolist() == [-1.0, -2.0]
    assert not found.has([(1,), (3,)])
    with pytest.raises(KeyError):
        found.get([(3,)])


def test_chunks_are_saved_as_they_fill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that dies while it computes has lost less than a chunk; saving again writes nothing new."""
    monkeypatch.setattr(reference, "CHUNK", 3)
    found = made(tmp_path, "run")
    found.add([(n,) for n in range(7)], [float(-n) for n in range(7)])
    found.save()
    assert len(list(LocalStore(tmp_path / "cache").list("reference"))) == 2
    assert made(tmp_path, "next").has([(n,) for n in range(6)])
    found.save(last=True)
    objects = [len(list(LocalStore(tmp_path / name).list("reference"))) for name in ("cache", "run")]
    found.save(last=True)
    assert objects == [3, 3]
    assert objects == [len(list(LocalStore(tmp_path / name).list("reference"))) for name in ("cache", "run")]
