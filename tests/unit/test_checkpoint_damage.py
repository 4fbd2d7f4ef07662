"""What storage and crashes can do to checkpoints: nothing damaged is ever loaded, what was good before stays."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from rayft.checkpoint import CheckpointReader, CorruptCheckpoint, committed_steps, latest, retain
from rayft.checkpoint.survey import survey
from rayft.errors import StorageError
from rayft.storage import LocalStore
from rayft.storage.store import Data
from tests import checkpoints


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    store = LocalStore(tmp_path)
    for step in (4, 8):
        checkpoints.save(store, step)
    return store


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


def latest_and_skipped(store: LocalStore) -> tuple[int | None, list[tuple[int, str]]]:
    skipped: list[tuple[int, str]] = []
    return latest(store, on_skip=lambda step, reason: skipped.append((step, reason))), skipped


def test_a_corrupt_byte_is_found_wherever_it_is(store: LocalStore) -> None:
    data = store.root / "checkpoints/step-8/0000000-rank-00001-of-00002.bin"
    manifest = CheckpointReader(store, 8).manifest
    used = {
        piece.byte_offset + at
        for tensor in manifest.tensors
        for piece in tensor.fragments
        if piece.file == data.name
        for at in range(piece.length * tensor.itemsize)
    }
    for at in sorted(used)[::41]:
        flip(data, at)
        step, skipped = latest_and_skipped(store)
        assert step == 4
        assert [at for at, _ in skipped] == [8]
        assert "step-8 is corrupt" in skipped[0][1]
        assert data.name in skipped[0][1]
        with pytest.raises(CorruptCheckpoint, match="does not match its checksum"):
            CheckpointReader(store, 8).verify()
        flip(data, at)
    assert latest(store) == 8


def test_reading_verifies_only_what_it_reads(store: LocalStore) -> None:
    manifest = CheckpointReader(store, 8).manifest
    embed = next(tensor for tensor in manifest.tensors if (tensor.name, tensor.kind) == ("embed", "param"))
    flip(store.root / "checkpoints/step-8" / embed.fragments[0].file, embed.fragments[0].byte_offset)
    reader = CheckpointReader(store, 8)
    reader.read("bias")
    reader.read("embed", offset=embed.fragments[1].offset)
    with pytest.raises(CorruptCheckpoint, match=r"step-8 is corrupt: param 'embed' in .*rank-00000"):
        reader.read("embed", offset=0, length=1)


@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [
        ("0000000-rank-00000-of-00002.bin", Path.unlink, "rank-00000-of-00002.bin is missing"),
        ("0000000-rank-00001-of-00002.bin", lambda path: path.write_bytes(b""), "has 0 bytes instead of"),
        ("manifest-0000000.json", lambda path: flip(path, 50), "does not match its own checksum"),
        ("manifest-0000000.json", lambda path: path.write_bytes(b""), "does not match its own checksum"),
    ],
)
def test_damaged_files(store: LocalStore, name: str, damage: Callable[[Path], None], reason: str) -> None:
    damage(store.root / "checkpoints/step-8" / name)
    step, skipped = latest_and_skipped(store)
    assert (step, committed_steps(store)) == (4, [4])
    assert skipped[0][0] == 8
    assert reason in skipped[0][1]
    assert latest(store, verify=False) == 4
    with pytest.raises(CorruptCheckpoint, match=reason):
        CheckpointReader(store, 8)


def test_fragments_without_a_manifest_are_no_checkpoint(store: LocalStore) -> None:
    (store.root / "checkpoints/step-8/manifest-0000000.json").unlink()
    assert latest_and_skipped(store) == (4, [])


def test_a_file_cut_while_it_is_read_is_an_error_not_a_crash(store: LocalStore) -> None:
    """A mapping must not be touched behind the end of its file: the kernel would kill the process."""
    reader = CheckpointReader(store, 8)
    (store.root / "checkpoints/step-8/0000000-rank-00000-of-00002.bin").write_bytes(b"short")
    with pytest.raises(CorruptCheckpoint, match="has 5 bytes instead of"):
        reader.read("embed")


def test_nothing_good_left(store: LocalStore) -> None:
    for step in (4, 8):
        flip(store.root / f"checkpoints/step-{step}/0000000-rank-00000-of-00002.bin", 0)
    step, skipped = latest_and_skipped(store)
    assert step is None
    assert [at for at, _ in skipped] == [8, 4]


class DyingStore(LocalStore):
    """Dies at its change number `lives`: before making it, and ever after."""

    lives = 0

    def child(self, *parts: str) -> DyingStore:
        return DyingStore(self.root.joinpath(*parts))

    def _change(self) -> None:
        DyingStore.lives -= 1
        if DyingStore.lives < 0:
            raise StorageError("dead")

    def put_parts(self, key: str, parts: Iterable[Data]) -> None:
        self._change()
        super().put_parts(key, parts)

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            self._change()
            super().delete([key])


def test_a_crash_before_any_write_leaves_the_old_or_the_new_checkpoint(tmp_path: Path) -> None:
    outcomes = []
    for lives in range(7):
        store = DyingStore(tmp_path / str(lives))
        DyingStore.lives = 100
        checkpoints.save(store, 4)
        DyingStore.lives = lives
        with contextlib.suppress(StorageError):
            checkpoints.save(store, 8, timeout_s=0.5)
        step = latest(LocalStore(store.root))
        assert step is not None
        checkpoints.check(LocalStore(store.root), step)
        outcomes.append(step)
    assert outcomes == [4, 4, 4, 4, 4, 8, 8]  # two files of data, two indexes, then the manifest


def test_a_crash_at_any_moment_of_retention_leaves_only_whole_checkpoints(tmp_path: Path) -> None:
    for lives in range(12):
        store = DyingStore(tmp_path / str(lives))
        DyingStore.lives = 100
        for step in (1, 2, 3):
            checkpoints.save(store, step)
        DyingStore.lives = lives
        with contextlib.suppress(StorageError):
            retain(store, 1)
        plain = LocalStore(store.root)
        steps = committed_steps(plain)
        assert survey(plain).bad == {}  # nothing looks like a damaged checkpoint
        assert latest_and_skipped(plain) == (3, [])
        assert set(steps) <= {1, 2, 3}
        for step in steps:
            checkpoints.check(plain, step)
        assert retain(plain, 1) == steps[:-1]
        assert [entry.key.split("/")[1] for entry in plain.list("checkpoints")] == ["step-3"] * 5
