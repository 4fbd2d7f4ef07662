"""The lease: one writer, whoever dies, sleeps or races; and a lineage that a stale writer cannot bend."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayft.checkpoint import CheckpointWriter, Lease, Lineage, latest, layout, lineage, process, records
from rayft.errors import LeaseLost, ResourceError, StorageError
from rayft.storage import LocalStore, RetryPolicy, Store
from rayft.storage.s3 import S3Store
from tests import checkpoints
from tests.s3 import FaultyProxy

TTL_S = 0.3


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return LocalStore(tmp_path / "run")
    return S3Store(request.getfixturevalue("s3_bucket"), "runs/run")


def acquire(store: Store, **options: Any) -> Lease:
    return Lease.acquire(store, {"user": "ada"}, ttl_s=TTL_S, **options)


def acquire_at_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> Lease:
    def waited(*_: object) -> None:
        raise AssertionError("waited although the lease was free")

    with monkeypatch.context() as patch:
        patch.setattr("rayft.checkpoint.lease._wait_and_see", waited)
        return acquire(store)


def test_a_living_holder_is_not_disturbed(store: Store) -> None:
    holder = acquire(store)
    holder.start_heartbeat()
    told: list[str] = []
    with pytest.raises(ResourceError, match=r"run is being written by .*:\d+ \(since 20.*\)") as caught:
        acquire(store, on_wait=told.append)
    assert caught.value.code == 4
    assert "another run name" in caught.value.remedy
    assert len(told) == 1
    assert holder.held()
    holder.release()


def test_a_starting_worker_group_is_a_sign_of_life(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    holder = acquire(store)
    starter = threading.Timer(TTL_S / 3, holder.begin_attempt, [None])
    starter.start()
    with pytest.raises(ResourceError):
        acquire(store)
    starter.join()


def test_a_holder_that_releases_while_it_is_watched(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    holder = acquire(store)
    release = threading.Timer(TTL_S / 3, holder.release)
    release.start()
    assert acquire(store).epoch == holder.epoch + 2
    release.join()


def test_a_silent_holder_is_replaced_and_learns_it(store: Store) -> None:
    first = acquire(store)
    epoch = first.begin_attempt(None)
    second = acquire(store)
    assert second.epoch == epoch + 1
    assert (first.held(), second.held()) == (False, True)
    for use in (lambda: first.begin_attempt(None), first.resume):
        with pytest.raises(LeaseLost, match="no longer written by this driver") as caught:
            use()
        assert caught.value.code == 9
    with pytest.raises(LeaseLost, match=f"has moved on to epoch {second.epoch}, so epoch {epoch}"):
        checkpoints.save(store, 1, epoch=epoch, world_size=1)
    first.release()  # changes nothing
    assert second.held()


def test_a_released_lease_is_taken_at_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    first = acquire(store)
    first.start_heartbeat()
    first.release()
    assert not first.held()
    second = acquire_at_once(store, monkeypatch)
    second.release()
    assert acquire_at_once(store, monkeypatch).held()


def test_takeover_does_not_wait(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    first = acquire(store)
    first.start_heartbeat()
    second = acquire(store, takeover=True)
    assert (first.held(), second.held()) == (False, True)
    first.stop()


def holder_script(path: Path, then: str) -> str:
    return f"""
import os, signal
from rayft.checkpoint import Lease
from rayft.storage import LocalStore
Lease.acquire(LocalStore({str(path)!r}), {{}}).start_heartbeat()
{then}
"""


def test_a_dead_holder_on_this_machine_is_replaced_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [sys.executable, "-c", holder_script(tmp_path, "os._exit(3)")]
    assert subprocess.run(command, check=False, timeout=60).returncode == 3
    assert acquire_at_once(LocalStore(tmp_path), monkeypatch).held()


def test_a_zombie_holds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = holder_script(tmp_path, "print('up', flush=True); os.kill(os.getpid(), signal.SIGKILL)")
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as zombie:
        assert zombie.stdout
        assert zombie.stdout.read() == b"up\n"
        os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)  # dead, and its exit code not asked for
        assert acquire_at_once(LocalStore(tmp_path), monkeypatch).held()


def test_pids_are_compared_only_where_they_mean_something() -> None:
    me = process.identity()
    assert not process.is_gone(me)
    assert process.is_gone({**me, "started": "1"})  # the pid was given to another process since
    for elsewhere in ({"host": "another"}, {"machine": "another boot or container"}):
        assert not process.is_gone({**me, "started": "1", **elsewhere})


def test_of_many_starts_at_once_one_wins(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    barrier = threading.Barrier(6)
    won: list[Lease] = []
    refused: list[ResourceError] = []

    def start() -> None:
        barrier.wait(30)
        try:
            lease = acquire(store)
            lease.start_heartbeat()
            won.append(lease)
        except ResourceError as error:
            refused.append(error)

    threads = [threading.Thread(target=start) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert (len(won), len(refused)) == (1, 5)
    won[0].release()


def test_another_process_acts_for_the_driver(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    driver = acquire(store)
    owner = json.loads(json.dumps(driver.owner))
    controller = Lease(store, owner)
    epoch, step = controller.resume()
    assert (epoch, step) == (records.newest_epoch(store), None)
    assert driver.held()
    checkpoints.save(store, 4, epoch=epoch)
    assert controller.resume() == (epoch + 2, 4)


def test_heartbeats_of_an_earlier_holder_do_not_count(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    first = acquire(store)
    first.heartbeat()
    second = acquire(store, takeover=True)
    stale = threading.Thread(target=lambda: [first.heartbeat() for _ in range(50)])
    stale.start()
    assert acquire(store).epoch == second.epoch + 1
    stale.join()


def test_the_heartbeat_ends_with_the_lease(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    first = acquire(store)
    first.start_heartbeat()
    thread = first._thread
    acquire(store, takeover=True)
    assert thread is not None
    thread.join(60)
    assert not thread.is_alive()


def test_storage_without_conditional_writes_is_refused(s3_bucket: str, s3_proxy: FaultyProxy) -> None:
    store = S3Store(s3_bucket, "run", retry=RetryPolicy(attempts=2, base_s=0.01))
    s3_proxy.add("unconditional", "PUT")
    with pytest.raises(StorageError, match="overwrites an object that was to be created only if absent"):
        acquire(store)
    assert store.list(layout.LEASE) == []


def test_a_lost_response_does_not_lose_the_lease(s3_bucket: str, s3_proxy: FaultyProxy) -> None:
    store = S3Store(s3_bucket, "run", retry=RetryPolicy(attempts=3, base_s=0.01))
    s3_proxy.add("lost_response", "PUT", "lease/", times=1)
    lease = acquire(store)
    s3_proxy.add("lost_response", "PUT", "lease/", times=1)
    assert lease.begin_attempt(None) == 2
    assert s3_proxy.hits == {"lost_response": 2}


def test_a_corrupt_record_is_named(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    acquire(store)
    store.put(layout.record_key(1), b"{")
    with pytest.raises(StorageError, match=r"lease record .*/lease/0000001.json is corrupt"):
        acquire(store)


def test_what_counts() -> None:
    history = Lineage(((2, None), (3, 40), (5, 44)))
    assert [history.counts(2, step) for step in (39, 40, 41, 44)] == [True, True, False, False]
    assert [history.counts(3, step) for step in (40, 44, 45)] == [True, True, False]
    assert history.counts(5, 1000)
    assert not history.counts(1, 0)  # epoch 2 started from nothing
    assert Lineage().counts(0, 7)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_one_history_whatever_stale_writers_commit(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Random attempts, and commits by any of them that got past the check of the lease just in time.

    A commit of a stale epoch never moves what the newest attempt would resume from past its own steps.
    """
    store = LocalStore(tmp_path_factory.mktemp("history"))
    lease = acquire(store)
    epochs: list[int] = []
    best: int | None = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rayft.checkpoint.commit.check_epoch", lambda *_: None)
        for _ in range(data.draw(st.integers(1, 8), label="events")):
            if not epochs or data.draw(st.booleans(), label="restart"):
                epoch, step = lease.resume(verify=False)
                epochs.append(epoch)
                assert step == best
            else:
                epoch = data.draw(st.sampled_from(epochs), label="epoch")
                step = data.draw(st.integers(0, 9), label="step")
                CheckpointWriter(store, epoch, 0, 1, background=False).save(step, [], {"epoch": epoch})
                if epoch == epochs[-1]:
                    best = step if best is None else max(best, step)
                assert latest(store) == best
    assert len(lineage(store).attempts) == len(epochs)
