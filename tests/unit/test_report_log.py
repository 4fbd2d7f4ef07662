"""The run log: appended by one writer, read as one history whatever happened in between."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayft.errors import LeaseLost, StorageError
from rayft.report.log import RunLog, current_rows, read_log
from rayft.storage import LocalStore


class RemoteStore(LocalStore):
    """Local files behind the interface of an object store: nothing can be appended. It can be switched off."""

    away = False
    refused = 0

    def local_path(self, key: str) -> Path | None:  # type: ignore[override]
        return None

    def put(self, key: str, data: Any) -> None:
        if self.away:
            self.refused += 1
            raise StorageError("The store is away.")
        LocalStore(self.root).put(key, data)

    def get(self, key: str) -> bytes:
        return LocalStore(self.root).get(key)

    def upload(self, path: Path, key: str) -> None:
        LocalStore(self.root).upload(path, key)

    def list(self, prefix: str = "") -> list[Any]:
        return LocalStore(self.root).list(prefix)

    def stat(self, key: str) -> Any:
        return LocalStore(self.root).stat(key)


def held() -> bool:
    return True


def step(number: int, loss: float = 1.0, **more: Any) -> dict[str, Any]:
    return {"kind": "step", "step": number, "loss": loss, **more}


def steps(rows: list[dict[str, Any]]) -> list[tuple[int, int]]:
    return [(row["epoch"], row["step"]) for row in rows if row["kind"] == "step"]


@pytest.fixture(params=[LocalStore, RemoteStore])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> LocalStore:
    return request.param(tmp_path / "run")


def test_rows_come_back_in_order_with_their_stamps(store: LocalStore) -> None:
    log = RunLog(store, epoch=3, held=held, attempt=2)
    log.append(step(1, 2.5))
    log.event("checkpoint", "saved", step=1)
    log.close()
    first, second = read_log(store)
    assert (first["epoch"], first["attempt"], first["loss"]) == (3, 2, 2.5)
    assert first["time"] > 1.7e9
    assert (second["event"], second["step"]) == ("checkpoint", 1)


def test_values_json_cannot_hold(store: LocalStore) -> None:
    log = RunLog(store, 1, held)
    log.append(step(1, float("nan"), grad_norm=np.float32(0.5), peak_memory_gb=(np.float64("inf"), 1.0)))
    log.close()
    (row,) = read_log(store)
    assert (row["loss"], row["grad_norm"], row["peak_memory_gb"]) == (None, 0.5, [None, 1.0])


def test_resume_voids_later_rows_of_earlier_epochs(store: LocalStore) -> None:
    log = RunLog(store, 1, held)
    log.begin_attempt(1, 1, None)
    for number in range(1, 6):
        log.append(step(number))
    log.event("checkpoint", step=3)
    log.event("checkpoint", step=5)
    log.event("failure", "a worker died", step=5)
    log.begin_attempt(2, 2, resumed_step=3)
    log.append(step(4, 0.4))
    log.close()
    rows = read_log(store)
    assert steps(rows) == [(1, 1), (1, 2), (1, 3), (2, 4)]
    events = [(row["event"], row.get("step")) for row in rows if row["kind"] == "event"]
    assert events == [("start", None), ("checkpoint", 3), ("failure", 5), ("resume", None)]
    assert rows[-1]["attempt"] == 2


def test_rows_of_a_stale_writer_do_not_count(store: LocalStore) -> None:
    old = RunLog(store, 3, held)
    old.append(step(40))
    old.append(step(41))
    new = RunLog(store, 4, held)
    new.begin_attempt(4, 1, resumed_step=40)
    new.append(step(41, 0.41))
    new.append(step(42))
    old.append(step(42, 9.9))  # was stopped between asking for the lease and writing
    old.append(step(43, 9.9))
    old.append(step(39))  # counts, and stands where it belongs
    new.close()
    old.close()
    assert steps(read_log(store)) == [(3, 40), (3, 39), (4, 41), (4, 42)]


def test_an_earlier_resume_limits_all_epochs_before_it() -> None:
    def resume(epoch: int, at: int | None) -> dict[str, Any]:
        return {"kind": "event", "event": "resume", "epoch": epoch, "resumed_step": at}

    rows = [{**step(n), "epoch": 1} for n in range(1, 9)] + [resume(2, 4)]
    rows += [{**step(n), "epoch": 2} for n in range(5, 9)] + [resume(3, 8), {**step(9), "epoch": 3}]
    assert steps(current_rows(rows)) == [(1, n) for n in range(1, 5)] + [(2, n) for n in range(5, 9)] + [
        (3, 9)
    ]
    assert steps(current_rows([*rows, resume(4, None)])) == []


def test_last_row_of_a_step_and_kind_counts() -> None:
    rows = [{**step(1, loss), "epoch": 1} for loss in (1.0, 2.0)]
    rows += [{"kind": "eval", "step": 1, "loss": 3.0, "epoch": 1}]
    rows += [
        {"kind": "suites", "when": when, "results": {}, "epoch": 1, "n": n}
        for n, when in enumerate(["before", "after", "before"])
    ]
    kept = current_rows(rows)
    assert [row.get("loss") for row in kept[:2]] == [2.0, 3.0]
    assert [(row["when"], row["n"]) for row in kept[2:]] == [("after", 1), ("before", 2)]


def test_torn_last_line_is_healed(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    log = RunLog(store, 1, held)
    log.append(step(1))
    log.close()
    path = tmp_path / "log.jsonl"
    path.write_bytes(path.read_bytes() + b'{"kind":"step","step":2,"los')
    assert steps(read_log(store)) == [(1, 1)]  # while a writer is at it, too
    log = RunLog(store, 2, held)
    log.append(step(2))
    log.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


def test_a_log_that_is_one_torn_line_is_emptied(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_bytes(b'{"kind":' + b'"x"' * 50_000)
    RunLog(LocalStore(tmp_path), 1, held).close()
    assert (tmp_path / "log.jsonl").read_bytes() == b""


def test_nothing_is_written_without_the_lease(store: LocalStore) -> None:
    answers = iter([True, False])
    log = RunLog(store, 1, lambda: next(answers), flush_interval_s=1000)
    log.append(step(1))
    log.flush()
    with pytest.raises(LeaseLost):
        _append_and_flush(log, step(2))
    with pytest.raises(LeaseLost):  # for ever, without asking again
        log.append(step(3))
    log.close()
    assert steps(read_log(store)) == [(1, 1)]


def _append_and_flush(log: RunLog, row: dict[str, Any]) -> None:
    log.append(row)  # a local log writes at once, a remote one on the flush
    log.flush()


def test_full_disk_leaves_no_half_line(tmp_path: Path) -> None:
    """A file size limit makes the operating system refuse the write half-way, as a full disk does."""
    context = multiprocessing.get_context("fork")
    child = context.Process(target=_write_until_full, args=(tmp_path,))
    child.start()
    child.join(30)
    assert child.exitcode == 0
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, len(lines) + 1))
    assert len(lines) > 5


def _write_until_full(folder: Path) -> None:
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    log = RunLog(LocalStore(folder), 1, held)
    try:
        for number in range(1, 100):
            log.append(step(number))
    except StorageError as error:
        os._exit(0 if "log.jsonl" in str(error) else 3)
    os._exit(4)


def test_killed_writer_leaves_whole_lines(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    child = context.Process(target=_write_for_ever, args=(tmp_path,))
    child.start()
    path = tmp_path / "log.jsonl"
    while not path.exists() or path.stat().st_size < 100_000:
        assert child.is_alive()
    child.kill()
    child.join(30)
    log = RunLog(LocalStore(tmp_path), 2, held)
    log.event("resume")
    log.close()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows[:-1]] == list(range(1, len(rows)))


def _write_for_ever(folder: Path) -> None:
    log = RunLog(LocalStore(folder), 1, held)
    number = 0
    while True:
        number += 1
        log.append(step(number, text="x" * 300))


def test_segments_are_flushed_in_the_background_and_grow(tmp_path: Path) -> None:
    store = RemoteStore(tmp_path)
    log = RunLog(store, 7, held, flush_interval_s=0.01)
    log.append(step(1))
    _until(lambda: steps(read_log(store)) == [(7, 1)])
    log.append(step(2))
    _until(lambda: steps(read_log(store)) == [(7, 1), (7, 2)])
    log.close()
    assert [entry.key for entry in store.list()] == ["log/0000007-000000.jsonl"]


def test_a_full_segment_is_followed_by_another_and_a_new_writer_keeps_them(tmp_path: Path) -> None:
    store = RemoteStore(tmp_path)
    for writer in range(2):
        log = RunLog(store, 7, held, flush_interval_s=1000)
        for number in range(3):
            log.append(step(3 * writer + number, text="x" * 150_000))
            log.flush()
        log.close()
    assert [entry.key[-8:] for entry in store.list("log")] == [f"{n:02d}.jsonl"[-8:] for n in range(4)]
    assert [number for _, number in steps(read_log(store))] == list(range(6))


def test_rows_wait_while_the_store_is_away(tmp_path: Path) -> None:
    store = RemoteStore(tmp_path)
    log = RunLog(store, 1, held, flush_interval_s=0.01)
    store.away = True
    for number in range(1, 4):
        log.append(step(number))
    _until(lambda: store.refused > 1)
    with pytest.raises(StorageError):
        log.flush()
    assert read_log(store) == []
    store.away = False
    log.close()
    assert steps(read_log(store)) == [(1, 1), (1, 2), (1, 3)]


def test_threads_do_not_mix_lines(store: LocalStore) -> None:
    log = RunLog(store, 1, held, flush_interval_s=0.001)
    threads = [
        threading.Thread(target=lambda n=n: [log.event("x", "y" * 500, n=n) for _ in range(50)])
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.close()
    assert sorted(row["n"] for row in read_log(store)) == sorted([0, 1, 2, 3] * 50)


def _until(condition: Any, seconds: float = 20) -> None:
    for _ in range(int(seconds / 0.01)):
        if condition():
            return
        threading.Event().wait(0.01)
    raise AssertionError("the background writer wrote nothing")
