"""Fragments written by any number of ranks, read by any other; what is not exactly a checkpoint is refused."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayft.checkpoint import (
    CheckpointReader,
    CheckpointWriter,
    CorruptCheckpoint,
    Fragment,
    Lease,
    Range,
    committed_steps,
    latest,
)
from rayft.checkpoint.checksum import CHUNK_BYTES
from rayft.checkpoint.fragments import tiling_error
from rayft.checkpoint.host_buffer import ALIGN_BYTES, HostBuffer
from rayft.checkpoint.manifest import Manifest, from_json, to_json
from rayft.errors import StorageError
from rayft.storage import LocalStore
from tests import checkpoints
from tests.s3 import FaultyProxy


@pytest.mark.parametrize("world_size", [1, 2, 4, 7])
def test_round_trip(tmp_path: Path, world_size: int) -> None:
    store = LocalStore(tmp_path)
    checkpoints.save(store, 5, world_size=world_size)
    checkpoints.check(store, 5)
    assert committed_steps(store) == [5]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_range_from_any_split(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Four ranks own random, also empty, pieces; random ranges come back exactly."""
    total = data.draw(st.integers(1, 3 * CHUNK_BYTES // 8), label="elements")
    edges = sorted(data.draw(st.lists(st.integers(0, total), min_size=3, max_size=3), label="edges"))
    dtype = data.draw(st.sampled_from(["float64", "float32", "bfloat16", "uint8"]), label="dtype")
    numpy_dtype = {"bfloat16": "uint16"}.get(dtype, dtype)
    values = np.random.default_rng(total).integers(0, 255, total).astype(numpy_dtype)
    store = LocalStore(tmp_path_factory.mktemp("elastic"))
    bounds = [0, *edges, total]
    writers = [CheckpointWriter(store, 0, rank, 4, timeout_s=60) for rank in range(4)]
    for rank, writer in enumerate(writers):
        start, stop = bounds[rank], bounds[rank + 1]
        mine = [Fragment("w", "param", (total,), dtype, start, values[start:stop])] if start < stop else []
        writer.save(1, mine, {})
    for writer in writers:
        writer.close()
    reader = CheckpointReader(store, 1)
    requests = []
    for _ in range(5):
        offset = data.draw(st.integers(0, total), label="offset")
        length = data.draw(st.integers(0, total - offset), label="length")
        requests.append(Range("w", "param", offset, length))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "rayft.checkpoint.verified._WINDOW_CHUNKS", data.draw(st.integers(1, 3), label="window")
        )
        for request, got in zip(requests, reader.read_many(requests), strict=True):
            assert got.dtype == numpy_dtype
            np.testing.assert_array_equal(got, values[request.offset :][: request.length])
        np.testing.assert_array_equal(reader.read("w"), values)


def test_reading_a_remote_checkpoint_by_ranges_and_through_the_node_cache(
    s3_bucket: str, s3_proxy: FaultyProxy, tmp_path: Path
) -> None:
    from rayft.storage import cache_at
    from rayft.storage.s3 import S3Store

    store = S3Store(s3_bucket, "runs/one")
    values = np.arange(CHUNK_BYTES, dtype=np.float32)  # four chunks
    writer = CheckpointWriter(store, 0, 0, 1)
    writer.save(3, [Fragment("w", "param", (values.size,), "float32", 0, values)], {})
    writer.close()
    s3_proxy.add("slow", "GET", ".bin")  # only counts
    part = CheckpointReader(store, 3).read("w", "param", values.size // 2, 10)
    np.testing.assert_array_equal(part, values[values.size // 2 :][:10])
    assert s3_proxy.hits == {"slow": 1}
    starts = range(0, values.size, values.size // 13)
    pieces = CheckpointReader(store, 3).read_many(Range("w", "param", at, 7) for at in starts)
    for at, piece in zip(starts, pieces, strict=True):
        np.testing.assert_array_equal(piece, values[at:][:7])
    s3_proxy.hits.clear()
    s3_proxy.add("slow", "HEAD", ".bin")
    for _ in range(2):
        cached = CheckpointReader(store, 3, cache_dir=tmp_path)
        for _ in range(2):
            np.testing.assert_array_equal(cached.read("w"), values)
    # Each reader looks once at the object; it is downloaded, and held against its checksum, once.
    assert s3_proxy.hits == {"slow": 4}
    (entry,) = cache_at(tmp_path).folder.survey()
    assert entry.users == 1
    cached.discard_copies()
    assert cache_at(tmp_path).folder.survey() == [], "a checkpoint that was loaded is not wanted again"
    assert latest(store) == 3


def test_the_buffer_is_filled_by_one_copy_and_kept() -> None:
    buffer = HostBuffer(block_bytes=256)
    data = [np.arange(size, dtype=np.uint16) for size in (1, 100, 0, 300)]
    memory = []
    for _ in range(2):
        buffer.clear()
        starts = [buffer.append(one) for one in data]
        assert [start % ALIGN_BYTES for start in starts] == [0] * 4
        whole = b"".join(buffer.parts())
        assert len(whole) == buffer.size
        for start, one in zip(starts, data, strict=True):
            assert whole[start : start + one.nbytes] == one.tobytes()
            assert b"".join(buffer.parts(start, start + one.nbytes)) == one.tobytes()
        memory.append([part.obj for part in buffer.parts()])
    assert all(first is second for first, second in zip(*memory, strict=True))


def test_reserved_memory_is_what_the_first_save_fills() -> None:
    buffer = HostBuffer(block_bytes=256)
    buffer.reserve(600)
    buffer.reserve(10)
    reserved = [id(block) for block in buffer._blocks]
    assert len(reserved) == 3
    data = np.arange(300, dtype=np.uint16)
    buffer.append(data)
    assert b"".join(buffer.parts()) == data.tobytes()
    assert [id(block) for block in buffer._blocks] == reserved


def test_training_may_change_the_tensors_once_save_returns(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    values = np.full(100_000, 1.0, np.float32)
    writer = CheckpointWriter(store, 0, 0, 1, reserve_bytes=1 << 20)
    state = {"position": 1}
    for step in (1, 2, 3):
        writer.save(step, [Fragment("w", "param", (100_000,), "float32", 0, values)], state)
        values += 1
        state["position"] += 1
    writer.close()
    for step in (1, 2, 3):
        reader = CheckpointReader(store, step)
        assert reader.state == {"position": step}
        assert set(reader.read("w")) == {step}


def test_a_full_backlog_blocks_and_fragments_may_be_generated(tmp_path: Path) -> None:
    release = threading.Event()

    class SlowStore(LocalStore):
        def put_parts(self, key: str, parts: object) -> None:
            if key.endswith(".bin"):
                assert release.wait(60)
            super().put_parts(key, parts)  # type: ignore[arg-type]

        def child(self, *parts: str) -> SlowStore:
            return SlowStore(self.root.joinpath(*parts))

    writer = CheckpointWriter(SlowStore(tmp_path), 0, 0, 1, backlog=2)
    assert not writer.busy
    for step in (1, 2):
        assert writer.save(step, checkpoints.fragments(step, 0, 1), checkpoints.state(step)) < 60
    assert writer.busy
    with pytest.raises(StorageError, match=r"step 2 to .* has not ended within 0 s"):
        writer.wait(0.01)
    waiting = threading.Thread(
        target=lambda: writer.save(3, checkpoints.fragments(3, 0, 1), checkpoints.state(3))
    )
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive()
    release.set()
    waiting.join(60)
    writer.close()
    assert writer.last_took_s > 0
    assert (writer.last_committed, writer.busy, committed_steps(LocalStore(tmp_path))) == (
        3,
        False,
        [1, 2, 3],
    )


def test_a_failed_save_raises_once_and_the_next_one_is_not_lost(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    writer = CheckpointWriter(store, 0, 0, 1)
    (tmp_path / "checkpoints").mkdir()
    for step in (1, 3):
        (tmp_path / f"checkpoints/step-{step}").write_text("in the way")
    writer.save(1, checkpoints.fragments(1, 0, 1), {})
    with pytest.raises(StorageError, match="step-1"):
        writer.save(2, checkpoints.fragments(2, 0, 1), checkpoints.state(2))
    writer.wait()
    writer.save(3, checkpoints.fragments(3, 0, 1), {})
    with pytest.raises(StorageError, match="step-3"):
        writer.wait()
    writer.close()
    assert committed_steps(store) == [2]
    checkpoints.check(store, 2)


def test_a_rank_that_failed_and_went_on_is_not_waited_for(tmp_path: Path) -> None:
    """The failed step is given up as soon as the rank has saved a later one: long before the time-out."""
    store = LocalStore(tmp_path)
    first, second = (CheckpointWriter(store, 0, rank, 2, timeout_s=300) for rank in range(2))
    first.save(1, checkpoints.fragments(1, 0, 2), checkpoints.state(1))
    second.save(2, checkpoints.fragments(2, 1, 2), {})
    with pytest.raises(StorageError, match=r"step 1 .* rank 1 of 2 failed to save its part and went on"):
        first.save(2, checkpoints.fragments(2, 0, 2), checkpoints.state(2))
    for writer in (first, second):
        writer.close()
    assert committed_steps(store) == [2]
    checkpoints.check(store, 2)


def test_nodes_that_do_not_share_the_path_are_found_at_once(tmp_path: Path) -> None:
    epoch = Lease.acquire(LocalStore(tmp_path / "here"), {}).begin_attempt(None)
    CheckpointWriter(LocalStore(tmp_path / "here"), epoch, 0, 2, background=False)
    with pytest.raises(StorageError, match=r"elsewhere on .* does not hold what the driver wrote") as caught:
        CheckpointWriter(LocalStore(tmp_path / "elsewhere"), epoch, 1, 2, background=False)
    assert "do not share this path" in caught.value.remedy


def test_missing_ranks_are_named(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    for rank in (0, 2):
        writer = CheckpointWriter(store, 0, rank, 4, timeout_s=0.2, background=rank == 0)
        writer.save(1, checkpoints.fragments(1, rank, 4), {})
        if rank == 0:
            with pytest.raises(StorageError, match=r"step 1 .* the part of rank 1, 2, 3 of 4 is missing"):
                writer.wait(60)
    assert latest(store) is None


def test_fragments_must_tile(tmp_path: Path) -> None:
    def save(*pieces: tuple[int, int]) -> None:
        made = [Fragment("w", "param", (10,), "float32", at, np.zeros(n, np.float32)) for at, n in pieces]
        CheckpointWriter(LocalStore(tmp_path), 0, 0, 1, background=False).save(1, made, {})

    for pieces, problem in (
        ([(0, 5)], "elements 5 to 10 are missing"),
        ([(5, 5)], "elements 0 to 5 are missing"),
        ([(0, 4), (6, 4)], "elements 4 to 6 are missing"),
        ([(0, 6), (5, 5)], "elements 5 to 6 are there twice"),
    ):
        with pytest.raises(ValueError, match=f"param 'w' do not tile it: {problem}"):
            save(*pieces)
    assert committed_steps(LocalStore(tmp_path)) == []
    save((5, 5), (0, 5))
    assert committed_steps(LocalStore(tmp_path)) == [1]


@given(st.integers(0, 30), st.lists(st.tuples(st.integers(0, 30), st.integers(1, 30)), max_size=5))
def test_tiling_is_exact(total: int, ranges: list[tuple[int, int]]) -> None:
    counts = [0] * 61
    for offset, length in ranges:
        for element in range(offset, offset + length):
            counts[element] += 1
    tiles = counts == [1] * total + [0] * (61 - total)
    assert (tiling_error(total, ranges) is None) == tiles


@pytest.mark.parametrize(
    ("data", "offset", "problem"),
    [
        (np.zeros((2, 2), np.float32), 0, "must be 1-D"),
        (np.zeros(8, np.float32)[::2], 0, "must be 1-D and contiguous"),
        (np.zeros(4, np.float64), 0, "bfloat16 is held as uint16, not float64"),
        (np.zeros(4, np.uint16), 3, "do not fit into the shape"),
        (np.zeros(4, np.uint16), -1, "do not fit into the shape"),
    ],
)
def test_impossible_fragments_are_refused(data: np.ndarray, offset: int, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        Fragment("w", "param", (2, 3), "bfloat16", offset, data)


def test_steps_go_forward_and_state_is_json(tmp_path: Path) -> None:
    writer = CheckpointWriter(LocalStore(tmp_path), 0, 0, 1, background=False)
    with pytest.raises(ValueError, match="JSON"):
        writer.save(1, [], {"loss": float("nan")})
    writer.save(1, [], {})
    with pytest.raises(ValueError, match="step 1 is not later than step 1"):
        writer.save(1, [], {})


def test_what_a_reader_asks_for_must_exist(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    checkpoints.save(store, 5)
    reader = CheckpointReader(store, 5)
    with pytest.raises(StorageError, match=r"step-5 holds no frozen 'embed' \(it has exp_avg, param\)"):
        reader.read("embed", "frozen")
    with pytest.raises(StorageError, match="no committed checkpoint of step 4"):
        CheckpointReader(store, 4)
    with pytest.raises(ValueError, match="has 3 elements: no 2 at 2"):
        reader.read("bias", "param", 2, 2)


def test_a_manifest_survives_json_and_nothing_else(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    checkpoints.save(store, 5)
    manifest = CheckpointReader(store, 5).manifest
    encoded = to_json(manifest)
    assert from_json(encoded, "here") == manifest
    assert json.loads(encoded)["format"] == "rayft-checkpoint/1"
    for damaged in (encoded[:-1], b"", b"[]", b"{}", encoded.replace(b'"seed":17', b'"seed":18')):
        with pytest.raises(CorruptCheckpoint, match="here is corrupt"):
            from_json(damaged, "here")


def test_a_manifest_of_another_format_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = to_json(Manifest(1, 1, 1, {}, (), ()))
    monkeypatch.setattr("rayft.checkpoint.manifest.FORMAT", "rayft-checkpoint/2")
    with pytest.raises(StorageError, match="has the format rayft-checkpoint/1") as caught:
        from_json(encoded, "here")
    assert not isinstance(caught.value, CorruptCheckpoint)  # what is fine but newer must not be walked over
